"""The SDK works where only its own dependencies are installed."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dckt

FORBIDDEN = ("torch", "torchvision", "gensim", "onnx", "onnxscript", "safetensors", "matplotlib", "pyarrow")
FORBIDDEN += ("openvino", "tensorrt", "cuda")  # runtimes that are extras of the SDK
MODULES = sorted(module.name for module in pkgutil.walk_packages(dckt.__path__, "dckt."))
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_needs_nothing_of_training_or_export() -> None:
    assert {"dckt.bundle", "dckt.runtime.onnx", "dckt.metrics", "dckt.report", "dckt.cli", "dckt.searcher"} <= set(
        MODULES
    )
    python(f"{BLOCK}\nimport importlib\nfor name in {MODULES!r}: importlib.import_module(name)")


def test_block_blocks() -> None:
    assert "is blocked" in python(
        f"{BLOCK}\ntry:\n    import onnx.helper\nexcept ImportError as error:\n    print(error)"
    )


def test_encodes_without_training_packages(tiny_bundle: Path, colour_images: dict[str, Path]) -> None:
    printed = python(f"""{BLOCK}
from dckt import Bundle
from dckt.preprocessing import image_batch
from dckt.runtime.onnx import OnnxEncoder
bundle = Bundle.open({str(tiny_bundle)!r})
with OnnxEncoder.open(bundle.graph("image"), output="probability") as encoder:
    vectors = encoder.run(image_batch([{str(colour_images["red"])!r}], bundle.manifest.image))
print(bundle.manifest.labels[vectors[0].argmax()])
""")
    assert printed == "red\n"


def test_import_loads_nothing_heavy() -> None:
    heavy = "numpy", "PIL", "onnxruntime", "openvino", "hnswlib", "typer", "rich", "importlib.metadata"
    assert python(f"import sys, dckt\nprint([name for name in {heavy!r} if name in sys.modules])") == "[]\n"


def test_every_public_name_is_there() -> None:
    assert set(dckt.__all__) <= set(dir(dckt))
    for name in dckt.__all__:
        assert getattr(dckt, name) is not None
    assert isinstance(dckt.__version__, str)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'dckt' has no attribute 'nothing'"):
        _ = dckt.nothing
