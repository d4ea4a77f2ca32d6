"""The real Python bindings of TensorRT, without NVIDIA's libraries and without a GPU; and graphs as we export them.

The bindings' wheel is a megabyte. Its extension needs three libraries, of which it calls nothing while it is imported;
empty ones with the right names, and the few factory functions that it looks up, let every class, enumeration and
signature be read. Nothing can be executed. What is fetched stays in pytest's cache folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from dckt.preprocessing import TextSpec, Vocabulary
from dckt_export.graphs import onnx_from_encoder
from dckt_export.precision import fp16_from_fp32
from dckt_export.quantize import calibrate, int8_from_fp32
from dckt_trainer.config import ImageConfig
from dckt_trainer.model import DomainModel
from dckt_trainer.network import DomainNetwork
from dckt_trainer.trunk import build_trunk
from dckt_trainer.word_cnn import WordCNN

VERSIONS = ("10.16", "11.4")
FACTORIES = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
IMPORT = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY); import tensorrt"
READ = f"""{IMPORT}
import ctypes, json

def about(value):
    if isinstance(value, property):
        return {{"kind": "property", "doc": value.fget.__doc__, "writable": value.fset is not None}}
    if isinstance(value, type):
        parts = {{}}
        for base in reversed(value.__mro__[:-1]):
            parts.update(vars(base))
        public = {{name: part for name, part in parts.items() if not name.startswith("__") or name == "__init__"}}
        inner = {{name: about(part) for name, part in public.items()}}
        members = list(getattr(value, "__members__", ()))
        # tp_as_buffer is the 21st word of a type object.
        buffer = bool(ctypes.c_void_p.from_address(id(value) + 20 * ctypes.sizeof(ctypes.c_void_p)).value)
        return {{"kind": "class", "attributes": inner, "members": members, "buffer": buffer}}
    return {{"kind": "callable" if callable(value) else "value", "doc": getattr(value, "__doc__", None)}}

module = {{name: about(value) for name, value in vars(tensorrt).items() if not name.startswith("_")}}
print(json.dumps({{"version": tensorrt.__version__, "module": module}}))
"""


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings.

    Attributes:
        site: folder to import ``tensorrt`` from.
        libraries: folder of the empty libraries.
        stubs: folder of its type stubs, once :meth:`write_stubs` ran.
    """

    site: Path
    libraries: Path
    stubs: Path

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """All that the module offers, by name."""
        return json.loads(self.run(["-c", READ]))  # type: ignore[no-any-return]

    def run(self, arguments: list[str]) -> str:
        paths = {"LD_LIBRARY_PATH": str(self.libraries), "PYTHONPATH": str(self.site)}
        finished = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **paths},
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def write_stubs(self) -> Path:
        if not self.stubs.exists():
            partial = self.stubs.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            stubgen = f"{IMPORT}; from pybind11_stubgen import main; main(sys.argv[1:])"
            self.run(["-c", stubgen, "tensorrt", "-o", str(partial), "--ignore-all-errors"])
            file = partial / "tensorrt" / "tensorrt.pyi"
            # Signatures that C++ allows and Python does not: a parameter called "in", and one without a default
            # behind one with a default. We use none of them.
            text = re.sub(r"([(, ])in: ", r"\1in_: ", file.read_text())
            file.write_text(
                text.replace("channel_axis: typing.SupportsInt)", "channel_axis: typing.SupportsInt = ...)")
            )
            partial.rename(self.stubs)
        return self.stubs


@pytest.fixture(scope="session", params=VERSIONS)
def bindings(request: pytest.FixtureRequest) -> Bindings:
    version = request.param
    root = request.config.cache.mkdir(f"tensorrt-{version}-py{sys.version_info.major}{sys.version_info.minor}")
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share the folder
        site, libraries = root / "site", root / "libraries"
        if not site.exists():
            _fetch(version, root, site)
        if not libraries.exists():
            _compile(version.partition(".")[0], root, libraries)
        made = Bindings(site, libraries, root / "stubs")
        made.write_stubs()
    return made


def _fetch(version: str, root: Path, site: Path) -> None:
    downloads = root / "downloads"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "1",
    ]
    finished = subprocess.run(
        [*command, "--dest", str(downloads), f"tensorrt-cu13-bindings=={version}.*"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if finished.returncode:
        pytest.skip(f"the bindings of TensorRT {version} cannot be fetched: {finished.stderr.strip()[-300:]}")
    (wheel,) = downloads.glob("*.whl")
    partial = root / "site.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    # The package that people import is called so; its own wheel would fetch NVIDIA's libraries.
    (partial / "tensorrt_bindings").rename(partial / "tensorrt")
    partial.rename(site)


def _compile(major: str, root: Path, libraries: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make empty libraries with")
    partial = root / "libraries.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    sources = {"nvinfer": "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FACTORIES)}
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        source, library = partial / f"{name}.c", f"lib{name}.so.{major}"
        source.write_text(sources.get(name, "typedef int nothing;\n"))
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(partial / library), str(source)]
        subprocess.run(command, check=True, timeout=60)
    partial.rename(libraries)


@dataclass(frozen=True)
class Exported:
    """A model with random weights, and its graphs as the exporter writes them.

    Attributes:
        model: of 5 classes and a width of 16.
        graphs: ``image`` and ``text``, each also with ``.fp16`` and ``.int8`` behind it.
    """

    model: DomainModel
    graphs: Mapping[str, onnx.ModelProto]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """By trunk; they share a text encoder."""
    side, folder, chance = 64, tmp_path_factory.mktemp("graphs"), np.random.default_rng(0)
    pictures, words = chance.integers(0, 256, (4, side, side, 3), np.uint8), chance.integers(1, 50, (4, 20), np.int64)
    pixels, tokens = torch.zeros(2, side, side, 3, dtype=torch.uint8), torch.ones(3, 7, dtype=torch.int64)
    made: dict[str, Exported] = {}
    texts: dict[str, onnx.ModelProto] = {}
    for name in ("squeezenet1_1", "mobilenet_v2"):
        trunk = build_trunk(ImageConfig(trunk=name, weights="random", side=side), 0)
        cnn = WordCNN(torch.randn(50, 16), (3, 4, 5), 10).eval()
        network = DomainNetwork({"image": trunk.features, "text": 30}, 16, 5).eval()
        vocabulary = Vocabulary.of([f"w{number}" for number in range(48)])
        model = DomainModel(trunk, cnn, network, vocabulary, tuple("abcde"), TextSpec(max_tokens=40))
        image = onnx_from_encoder(model.image_encoder(), pixels, input_name="pixels", dynamic={0: "batch"})
        if not texts:
            free = {0: "batch", 1: "length"}
            text = onnx_from_encoder(model.text_encoder(), tokens, input_name="tokens", dynamic=free)
            texts = {"text": text, "text.fp16": _half(text), "text.int8": _int8(text, words, folder)}
        images = {"image": image, "image.fp16": _half(image), "image.int8": _int8(image, pictures, folder)}
        made[name] = Exported(model, images | texts)
    return made


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    """As if real inputs had shown every tensor to stay within 1."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {name for node in copy.graph.node for name in (*node.input, *node.output)}
    return fp16_from_fp32(copy, dict.fromkeys(tensors, 1.0))


def _int8(model: onnx.ModelProto, batch: NDArray[Any], folder: Path) -> onnx.ModelProto:
    source, out = folder / "fp32.onnx", folder / "int8.onnx"
    source.write_bytes(model.SerializeToString())
    int8_from_fp32(source, out, calibrate(source, lambda: [batch]))
    return onnx.load(out)
