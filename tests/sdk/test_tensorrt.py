"""TensorRT engines, as far as there is anything to run without a GPU. The API itself: tests/tensorrt_api."""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dckt.bundle import Bundle
from dckt.cli import app
from dckt.commands.engine import parse_profile
from dckt.errors import BundleCorruptError, BundleError, ConfigError, ProviderError
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.tensorrt.build import check_profile, engine_from_onnx, locked, read_timings, write_timings
from dckt.runtime.tensorrt.cache import (
    ENGINE,
    Engine,
    Plan,
    dump_engine,
    engine_key,
    engines_folder,
    find_engines,
    graph_hashes,
    read_engine,
)
from dckt.runtime.tensorrt.encoder import TensorRTEncoder
from dckt.runtime.tensorrt.engines import (
    MIN_COSINE,
    ROWS,
    build_engines,
    choose_graph,
    generated_batch,
    length_profile,
    min_cosine,
    timings_file,
)
from dckt.runtime.tensorrt.inspect import check_layers, layer_precisions
from dckt.runtime.tensorrt.load import Machine, load
from dckt.runtime.tensorrt.operators import unsupported

HERE = Machine(gpu="GPU A", compute_capability="8.6", tensorrt="10.16.1", driver="13.0", runtime="13.0")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


without_gpu = pytest.mark.skipif(has_driver(), reason="what happens without an NVIDIA driver; here is one")


# --- without a device ---------------------------------------------------------------------------------------


@without_gpu
def test_says_what_was_found_what_is_needed_and_what_to_do() -> None:
    with pytest.raises(ProviderError) as caught:
        load()
    message = str(caught.value)
    assert "found: no NVIDIA driver (libcuda.so.1" in message
    assert "needed: an NVIDIA driver, a GPU of compute capability 7.5 or newer, and TensorRT 10.x or 11.x" in message
    assert "do: " in message
    assert "pip install 'dckt[tensorrt]'" in message


@without_gpu
def test_tensorrt_is_not_imported_without_a_device(tmp_path: Path) -> None:
    """Not even where it is installed: deserialising without a device ends the process."""
    (tmp_path / "tensorrt.py").write_text("import os; os._exit(139)")
    code = (
        "import pathlib, sys\n"
        "import dckt.runtime.tensorrt.engines\n"
        "from dckt.errors import ProviderError\n"
        "from dckt.runtime.tensorrt.build import engine_from_onnx\n"
        "from dckt.runtime.tensorrt.encoder import TensorRTEncoder\n"
        "from dckt.runtime.tensorrt.load import load, machine\n"
        "plan = pathlib.Path(sys.argv[1], 'image.plan')\n"
        "plan.write_bytes(b'plan')\n"
        "digest = __import__('hashlib').sha256(b'plan').hexdigest()\n"
        "for action in (load, machine, lambda: engine_from_onnx(plan, plan),\n"
        "               lambda: TensorRTEncoder.open(plan, output='fc9', sha256=digest, precision='fp16')):\n"
        "    try:\n"
        "        action()\n"
        "    except ProviderError as error:\n"
        "        print('not installed' in str(error))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert (finished.returncode, finished.stdout.split()) == (0, ["False"] * 4), finished.stderr


@pytest.mark.parametrize("damage", [b"", b"plan!", b"PLAN"])
def test_damaged_plan_is_refused_before_tensorrt_sees_it(tmp_path: Path, damage: bytes) -> None:
    plan = tmp_path / "image.plan"
    plan.write_bytes(damage)
    digest = hashlib.sha256(b"plan").hexdigest()
    with pytest.raises(BundleCorruptError, match=r"image\.plan: is not the engine that was built.*dckt engine"):
        TensorRTEncoder.open(plan, output="fc9", sha256=digest, precision="fp16")
    with pytest.raises(BundleCorruptError, match="cannot be read"):
        TensorRTEncoder.open(tmp_path / "none.plan", output="fc9", sha256=digest, precision="fp16")


@without_gpu
def test_nothing_is_written_without_a_device(tiny_bundle_copy: Path) -> None:
    before = sorted(tiny_bundle_copy.rglob("*"))
    with pytest.raises(ProviderError):
        build_engines(Bundle.open(tiny_bundle_copy))
    assert sorted(tiny_bundle_copy.rglob("*")) == before


def test_wrong_arguments_are_refused_first(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(ConfigError, match=r"graph is 'fp16'; .* has fp32"):
        build_engines(bundle, graph="fp16")
    with pytest.raises(ConfigError, match="profile is 8,4,32; expected MIN,OPT,MAX"):
        build_engines(bundle, profile=(8, 4, 32))
    with pytest.raises(ConfigError, match="length_profile is 0,4,32"):
        engine_from_onnx(bundle.graph("image"), tmp_path / "plan", length_profile=(0, 4, 32))
    with pytest.raises(ConfigError, match="workspace is 0 bytes"):
        engine_from_onnx(bundle.graph("image"), tmp_path / "plan", workspace=0)


# --- the command --------------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("extra", [(), ("--json",), ("--graph", "fp32", "--profile", "1,2,4", "--force")])
def test_command_names_what_is_missing(tiny_bundle: Path, extra: tuple[str, ...]) -> None:
    command = "import sys; from dckt.cli import main; sys.argv = ['dckt', *sys.argv[1:]]; main()"
    finished = subprocess.run(
        [sys.executable, "-c", command, "engine", str(tiny_bundle), *extra],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: a TensorRT engine cannot be built or run on this machine\n  found: no")
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("text", ["", "8", "1,8", "1,8,x", "1,8,32,64", "0,1,2", "4,2,8"])
def test_command_refuses_a_profile(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected MIN,OPT,MAX"):
        parse_profile(text)
    result = CliRunner().invoke(app, ["engine", "any.dckt", "--profile", text])
    assert isinstance(result.exception, ConfigError)


def test_command_has_examples() -> None:
    result = CliRunner().invoke(app, ["engine", "--help"])
    assert result.exit_code == 0
    assert "dckt engine shop.dckt" in result.output


# --- the inspector ------------------------------------------------------------------------------------------


def layer(kind: str, dtype: str | None, **more: Any) -> dict[str, Any]:
    """A layer as the inspector writes it with detailed verbosity; ``dtype`` None: it gives no types."""
    text = dtype or "N/A due to dynamic shapes"
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [8, 64, 56, 56], "Format/Datatype": text}
    about = {"Name": f"{kind} 1", "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], **more}
    return {**about, "TacticValue": "0x0000000000000001"}


def information(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["pixels", "fc9", "probability"]})


def test_layers_count_by_the_precision_that_they_compute_in() -> None:
    text = information(
        layer("Reformat", "Row major linear FP32", ParameterType="Reformat", Origin="REFORMAT"),
        layer("CaskConvolution", "Channel major FP16 format where channel % 8 == 0", ParameterType="Convolution"),
        layer("CaskConvolution", "Half", Weights={"Type": "Half", "Count": 36864}, Bias={"Type": "Float", "Count": 1}),
        layer("CaskConvolution", None, ParameterType="Convolution", Weights={"Type": "Int8", "Count": 36864}),
        layer("CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format."),
        layer("CaskPooling", "Half", ParameterType="Pooling"),
        layer("gemm", "Half(4096,1)", Metadata="[ONNX Layer: node_linear]"),
        layer("MatrixMultiply", "Float", ParameterType="MatrixMultiply"),
        layer("gemm", "BFloat16"),
        layer("gemm", None),
        layer("kgen", "Half", Metadata="[ONNX Layer: node_softmax]"),
        layer("NoOp", "Float"),
    )
    assert layer_precisions(text) == {"fp16": 3, "int8": 2, "fp32": 1, "bf16": 1, "unknown": 1}


def test_half_weights_do_not_make_a_float_layer_half() -> None:
    text = information(layer("CaskConvolution", "Row major linear FP32", Weights={"Type": "Half", "Count": 9}))
    assert layer_precisions(text) == {"fp32": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (information("node_conv2d + node_relu"), "names its layers without details"),
        (information(layer("Myelin", "Half")), "hides what"),
        (information(layer("ForeignNode", "Half")), "hides what"),
        ("", "gave no JSON of layers"),
        ("{}", "gave no JSON of layers"),
        ("[]", "gave no JSON of layers"),
        ('{"Layers": 3}', "gave no list of layers"),
    ],
)
def test_inspector_without_details_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        layer_precisions(text)


@pytest.mark.parametrize(
    ("layers", "precision"),
    [
        ({"fp16": 9, "fp32": 1}, "fp16"),
        ({"int8": 5, "fp16": 4, "fp32": 1}, "int8"),
        ({"fp32": 3}, "fp32"),
        ({"fp32": 1, "fp16": 2}, "fp32"),
    ],
)
def test_engine_is_what_it_is_called(layers: dict[str, int], precision: str) -> None:
    check_layers(layers, precision, "the image engine")


@pytest.mark.parametrize(
    ("layers", "precision", "message"),
    [
        ({"fp16": 8, "fp32": 1}, "fp16", "asked for as fp16, but of 9 .* 8 in fp16, 1 in fp32; expected 90% in fp16"),
        ({"fp32": 18}, "fp16", "18 in fp32"),
        ({"int8": 18}, "fp16", "18 in int8"),
        ({"unknown": 2, "fp16": 8}, "fp16", "2 in unknown"),
        ({"int8": 4, "fp16": 4, "fp32": 1}, "int8", "expected 90% in int8 or fp16"),
        ({}, "fp32", "shows no convolution or matrix layer"),
    ],
)
def test_engine_that_is_not_what_it_is_called(layers: dict[str, int], precision: str, message: str) -> None:
    with pytest.raises(BundleError, match=rf"the image engine: .*{message}"):
        check_layers(layers, precision, "the image engine")


# --- keys and files -----------------------------------------------------------------------------------------


def key(bundle: Bundle, machine: Machine = HERE, **changed: Any) -> str:
    settings: dict[str, Any] = {"profile": (1, 8, 32), "length_profile": (1, 16, 16), "hardware_compatible": False}
    return engine_key(graph_hashes(bundle, "fp32"), machine, **settings | changed)


def test_key_changes_with_all_that_decides_an_engine(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    keys = {
        key(bundle),
        key(bundle, replace(HERE, gpu="GPU B")),
        key(bundle, replace(HERE, compute_capability="9.0")),
        key(bundle, replace(HERE, tensorrt="11.4.0")),
        key(bundle, replace(HERE, driver="13.1")),
        key(bundle, replace(HERE, runtime="13.1")),
        key(bundle, profile=(1, 8, 64)),
        key(bundle, length_profile=(1, 8, 16)),
        key(bundle, hardware_compatible=True),
        engine_key(
            {"image": "0" * 64}, HERE, profile=(1, 8, 32), length_profile=(1, 16, 16), hardware_compatible=False
        ),
    }
    assert len(keys) == 10
    assert key(bundle) == key(Bundle.open(tiny_bundle))
    assert all(len(one) == 32 for one in keys)


def test_graph_hash_is_the_files(tiny_bundle: Path) -> None:
    hashes = graph_hashes(Bundle.open(tiny_bundle), "fp32")
    content = {medium: (tiny_bundle / f"{medium}.onnx").read_bytes() for medium in ("image", "text")}
    assert hashes == {medium: hashlib.sha256(data).hexdigest() for medium, data in content.items()}


def engine(bundle: Bundle, folder: Path, **changed: Any) -> Engine:
    """An engine's folder; its plans are text, which is enough for all that comes before TensorRT."""
    folder.mkdir(parents=True)
    plans = {}
    for medium in ("image", "text"):
        data = f"plan of {medium}".encode()
        (folder / f"{medium}.plan").write_bytes(data)
        plans[medium] = Plan(
            file=f"{medium}.plan",
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            layers={"fp32": 2},
            build_seconds=1.5,
            min_cosine={"probability": 1.0, "fc9": 0.99995},
            warnings=("a warning",),
        )
    settings: dict[str, Any] = {
        "folder": folder,
        "precision": "fp32",
        "graphs": graph_hashes(bundle, "fp32"),
        "machine": HERE,
        "profile": (1, 8, 32),
        "length_profile": (1, 16, 16),
        "hardware_compatible": False,
        "plans": plans,
    }
    made = Engine(**settings | changed)
    (folder / ENGINE).write_text(dump_engine(made))
    return made


def test_engine_is_read_as_it_was_written(tiny_bundle: Path, tmp_path: Path) -> None:
    made = engine(Bundle.open(tiny_bundle), tmp_path / "key")
    assert read_engine(tmp_path / "key") == made
    assert made.path("text").read_bytes() == b"plan of text"


@pytest.mark.parametrize("place", ["bundle", "elsewhere", "variable"])
def test_finds_engines_that_fit_and_names_the_others(
    tiny_bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    bundle = Bundle.open(tiny_bundle_copy)
    cache = tmp_path / "engines" if place == "elsewhere" else None
    if place == "variable":
        monkeypatch.setenv("DCKT_ENGINES", str(tmp_path / "engines"))
    folder = engines_folder(bundle.path, cache)
    assert folder == (bundle.path / "engines" if place == "bundle" else tmp_path / "engines")
    fitting = engine(bundle, folder / "a")
    engine(bundle, folder / "b", machine=replace(HERE, gpu="GPU B", compute_capability="9.0", tensorrt="11.4.0"))
    engine(bundle, folder / "c", graphs={"image": "0" * 64, "text": "1" * 64})
    engine(bundle, folder / "d", machine=replace(HERE, driver="12.9"))
    engine(bundle, folder / "e", precision="int8")
    (folder / "f").mkdir()
    (folder / "f" / ENGINE).write_text("{")
    engine(bundle, folder / ".g.partial")
    found = find_engines(bundle, HERE, cache=cache)
    assert found.fitting == (fitting,)
    reasons = dict(found.others)
    assert sorted(reasons) == ["b", "c", "d", "e", "f"]
    assert reasons["b"] == ("built for TensorRT 11.4.0, here is 10.16.1; and for GPU B (9.0), here is GPU A (8.6)")
    assert reasons["c"] == "built from other fp32 graphs than the bundle's"
    assert reasons["d"] == "built for CUDA 13.0 with a driver for 12.9, here is 13.0 with 13.0"
    assert reasons["e"] == "built from int8 graphs, which the bundle does not have"
    assert "is no description of an engine" in reasons["f"]
    Bundle.open(bundle.path)  # engines are none of its own files


@pytest.mark.parametrize(("capability", "fits"), [("8.0", True), ("9.0", True), ("7.5", False)])
def test_hardware_compatible_engine_fits_newer_gpus(tiny_bundle_copy: Path, capability: str, fits: bool) -> None:
    bundle = Bundle.open(tiny_bundle_copy)
    engine(bundle, bundle.path / "engines" / "a", hardware_compatible=True)
    other = replace(HERE, gpu="GPU C", compute_capability=capability)
    assert bool(find_engines(bundle, other).fitting) == fits
    assert not find_engines(bundle, replace(other, tensorrt="10.16.2")).fitting


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no description"),
        ({"version": 2}, "newer dckt"),
        ({"profile": [8, 4, 2]}, "no description"),
        ({"profile": [1, 2]}, "no description"),
        ({"machine": {}}, "no description"),
        ({"plans": {}}, "no description"),
        ({"plans": 3}, "no description"),
        ({"graphs": None}, "no description"),
    ],
)
def test_wrong_description_is_an_error(tiny_bundle: Path, tmp_path: Path, change: Any, message: str) -> None:
    engine(Bundle.open(tiny_bundle), tmp_path / "key")
    file = tmp_path / "key" / ENGINE
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BundleError, match=message):
        read_engine(tmp_path / "key")


def test_plan_outside_its_folder_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    engine(Bundle.open(tiny_bundle), tmp_path / "key")
    file = tmp_path / "key" / ENGINE
    file.write_text(file.read_text().replace('"image.plan"', '"../image.plan"'))
    with pytest.raises(BundleCorruptError, match="is no name of a file"):
        read_engine(tmp_path / "key")


# --- the timing cache ---------------------------------------------------------------------------------------


def test_timings_are_read_as_written_and_damage_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    assert read_timings(file) == b""
    for data in (b"", b"measured" * 100):
        write_timings(file, data)
        assert read_timings(file) == data
    content = file.read_bytes()
    for damaged in (content[:-1], content[:10], content + b"x", b"0" + content[1:], content.replace(b"m", b"n", 1)):
        file.write_bytes(damaged)
        assert read_timings(file) == b""


def test_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    code = (
        "import pathlib, sys\n"
        "from dckt.runtime.tensorrt.build import locked, read_timings, write_timings\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "for _ in range(50):\n"
        "    with locked(file):\n"
        "        write_timings(file, read_timings(file) + b'x')\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    with locked(file):
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
        time.sleep(0.2)  # long enough to write, if the lock did not hold
        assert read_timings(file) == b""
    assert [worker.wait(60) for worker in workers] == [0, 0]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.close()
    assert read_timings(file) == b"x" * 100


def test_timings_of_each_machine_have_a_file() -> None:
    name = timings_file(replace(HERE, gpu="Quadro RTX 6000/8000"))
    assert name == "timing-10.16.1-Quadro-RTX-6000-8000.cache"


# --- the self-check -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", ["image", "text"])
@pytest.mark.parametrize("rows", [3, ROWS, 33])
def test_generated_inputs_are_what_the_encoder_takes(tiny_bundle: Path, medium: str, rows: int) -> None:
    bundle = Bundle.open(tiny_bundle)
    with OnnxEncoder.open(bundle.graph(medium), output="fc9", device="cpu") as encoder:
        batch = generated_batch(encoder, bundle, rows)
        vectors = encoder.run(batch)
        assert vectors.shape == (rows, 6)
        np.testing.assert_array_equal(batch, generated_batch(encoder, bundle, rows))
    assert len(np.unique(batch.reshape(rows, -1), axis=0)) == min(rows, ROWS)
    np.testing.assert_array_equal(batch, np.resize(batch[:ROWS], batch.shape))
    if medium == "text":
        lengths = (batch != 0).sum(axis=1)
        assert (lengths.max(), lengths.min()) == (16, 1)
        assert batch.max() < len(bundle.vocabulary)


def test_smallest_cosine_finds_the_one_bad_row() -> None:
    rows = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    assert min_cosine(rows, rows) == pytest.approx(1)
    other = rows.copy()
    other[17] += 0.3
    expected = rows[17] @ other[17] / np.linalg.norm(rows[17]) / np.linalg.norm(other[17])
    assert min_cosine(rows, other) == pytest.approx(expected, abs=1e-6)
    assert min_cosine(rows, other) < MIN_COSINE["int8"]
    other[17] = 0
    assert min_cosine(rows, other) == -1


def test_graph_and_lengths_come_from_the_bundle(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert choose_graph(bundle, "auto") == choose_graph(bundle, "fp32") == "fp32"
    assert length_profile(bundle) == (1, 16, 16)
    check_profile(length_profile(bundle))


# --- operators ----------------------------------------------------------------------------------------------


def test_operators_that_a_parser_would_refuse() -> None:
    assert unsupported([("Conv", "float16"), ("Cast", "uint8"), ("DequantizeLinear", "int8")], 20) == []
    mistakes = unsupported([("Conv", "uint8"), ("FFT", "float32"), ("DequantizeLinear", "uint8")], 99)
    assert mistakes == [
        "opset 99; TensorRT takes 9 to 24",
        "Conv on uint8; TensorRT takes float32, float16",
        "DequantizeLinear on uint8; TensorRT takes int8",
        "FFT is not among the operators that were checked",
    ]
