"""OpenVINO as a runtime: the numbers, the settings that reach it, threads, and what it must leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dckt.bundle import Bundle
from dckt.errors import BundleCorruptError, ConfigError, ItemError, MissingExtraError, ProviderError
from dckt.runtime import Encoder
from dckt.runtime import openvino as module
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.openvino import OpenVinoEncoder, check_openvino, has_bf16

pytestmark = pytest.mark.usefixtures("openvino")

WIDTH = 6


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of two convolutions and a product: pixels (B, 16, 16, 3) to ``wide`` (B, 8) and ``y`` (B, 6)."""
    chance = np.random.default_rng(5)
    constants = {
        "scale": np.array(255, np.float32),
        "first": chance.standard_normal((8, 3, 3, 3), np.float32) / 3,
        "second": chance.standard_normal((8, 8, 3, 3), np.float32) / 6,
        "weight": chance.standard_normal((8, WIDTH), np.float32),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["numbers", "scale"], ["small"]),
        helper.make_node("Transpose", ["small"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ReduceMean", ["d", "axes"], ["wide"], keepdims=0),
        helper.make_node("MatMul", ["wide", "weight"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 16, 16, 3])],
        [
            helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["batch", 8]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path = tmp_path_factory.mktemp("openvino") / "image.onnx"
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(9, 16, 16, 3), dtype=np.uint8)


def opened(graph: Path, **options: Any) -> OpenVinoEncoder:
    return OpenVinoEncoder.open(graph, **{"output": "y", "precision": "fp32", "threads": 1, **options})


# --- what it computes ---------------------------------------------------------------------------------------------


def test_it_is_an_encoder(graph: Path) -> None:
    encoder: Encoder = opened(graph)
    assert encoder.input_name == "pixels"
    assert encoder.input_dtype == np.uint8
    assert encoder.input_shape == (None, 16, 16, 3)
    assert encoder.dimension == WIDTH
    assert (encoder.variant, encoder.provider) == ("openvino-fp32", "CPU")


@pytest.mark.parametrize("output", ["y", "wide"])
def test_fp32_is_what_onnx_runtime_gives(graph: Path, pixels: np.ndarray, output: str) -> None:
    with OnnxEncoder.open(graph, output=output, device="cpu", threads=1) as reference:
        expected = reference.run(pixels)
    with opened(graph, output=output) as encoder:
        vectors = encoder.run(pixels)
    assert vectors.dtype == np.float32
    assert np.abs(vectors).max() > 0.1
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.usefixtures("bf16")
def test_bf16_is_near_and_not_the_same(graph: Path, pixels: np.ndarray) -> None:
    exact, rounded = opened(graph).run(pixels), opened(graph, precision="bf16").run(pixels)
    np.testing.assert_allclose(rounded, exact, atol=2e-2)
    assert np.abs(rounded - exact).max() > 1e-4


@pytest.mark.parametrize("medium", ["image", "text"])
def test_both_media_of_a_bundle(tiny_bundle: Path, medium: str) -> None:
    file = Bundle.open(tiny_bundle).graph(medium)
    batch = np.array([[2, 3, 0], [4, 0, 0]]) if medium == "text" else np.full((2, 8, 8, 3), 200, np.uint8)
    for output in ("probability", "fc9"):
        expected = OnnxEncoder.open(file, output=output, device="cpu").run(batch)
        np.testing.assert_allclose(opened(file, output=output).run(batch), expected, atol=1e-5)


@pytest.mark.parametrize("order", [["probability", "fc9"], ["fc9", "probability"]])
def test_both_outputs_in_one_pass(tiny_bundle: Path, order: list[str]) -> None:
    file = Bundle.open(tiny_bundle).graph("image")
    batch = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    encoder = opened(file, output=order[0], also=order[1:])
    found = encoder.run_all(batch)
    assert list(found) == list(encoder.dimensions) == order
    for output, vectors in found.items():
        np.testing.assert_allclose(vectors, opened(file, output=output).run(batch), atol=1e-6)
    kept = {output: vectors.copy() for output, vectors in found.items()}
    encoder.run_all(255 - batch)
    for output, vectors in found.items():
        np.testing.assert_array_equal(vectors, kept[output])


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_any_batch(graph: Path, pixels: np.ndarray, rows: int) -> None:
    encoder = opened(graph)
    vectors = encoder.run(pixels[:rows])
    assert vectors.shape == (rows, WIDTH)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.run(pixels)[:rows], atol=1e-6)


def test_strided_and_read_only_batches(graph: Path, pixels: np.ndarray) -> None:
    encoder = opened(graph)
    strided, frozen = pixels[::2], pixels[:4].copy()
    frozen.flags.writeable = False
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(encoder.run(strided), encoder.run(strided.copy()))
    np.testing.assert_array_equal(encoder.run(frozen), encoder.run(pixels[:4]))
    backwards = pixels[..., ::-1]
    np.testing.assert_array_equal(encoder.run(backwards), encoder.run(backwards.copy()))


def test_vectors_belong_to_the_caller(graph: Path, pixels: np.ndarray) -> None:
    encoder = opened(graph)
    first = encoder.run(pixels[:2])
    kept = first.copy()
    encoder.run(pixels[2:4])
    np.testing.assert_array_equal(first, kept)
    first[:] = 7
    np.testing.assert_array_equal(encoder.run(pixels[:2]), kept)
    encoder.close()
    assert (first == 7).all()


def test_the_batch_is_left_as_it_is(graph: Path, pixels: np.ndarray) -> None:
    before = pixels.copy()
    opened(graph).run(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_eight_threads_share_one_encoder(graph: Path, pixels: np.ndarray) -> None:
    encoder = opened(graph)
    single = [encoder.run(row[None]) for row in pixels[:8]]
    wrong: list[int] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(40):
            rows = 1 + turn % 3
            vectors = encoder.run(np.repeat(pixels[number][None], rows, axis=0))
            if not np.allclose(vectors, single[number], atol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= len(encoder._session._idle) <= 8  # type: ignore[union-attr]


def test_external_data_lies_beside_the_graph(tmp_path: Path) -> None:
    weight = np.arange(2000, dtype=np.float32).reshape(1, 2000)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "outside",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2000])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "g.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="g.onnx.data")
    np.testing.assert_array_equal(opened(path).run(np.ones((1, 1), np.float32)), weight)
    (tmp_path / "g.onnx.data").unlink()
    with pytest.raises(BundleCorruptError, match=r"g\.onnx: OpenVINO .* cannot load it"):
        opened(path)


# --- settings -----------------------------------------------------------------------------------------------------


def compiled(encoder: OpenVinoEncoder) -> Any:
    assert encoder._session is not None
    return encoder._session.compiled


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_openvino(graph: Path, threads: int) -> None:
    assert compiled(opened(graph, threads=threads)).get_property("INFERENCE_NUM_THREADS") == threads


def test_precision_is_set_and_not_left_to_openvino(graph: Path) -> None:
    def hint(precision: str) -> str:
        kind = compiled(opened(graph, precision=precision)).get_property("INFERENCE_PRECISION_HINT")
        return str(kind.get_type_name())

    assert hint("fp32") == "f32"
    assert hint("int8") == ("bf16" if has_bf16() else "f32")
    if has_bf16():
        assert hint("bf16") == "bf16"


def test_only_the_asked_output_is_computed(graph: Path) -> None:
    assert len(compiled(opened(graph)).outputs) == 1


def test_latency_is_asked_for(graph: Path) -> None:
    assert "LATENCY" in str(compiled(opened(graph)).get_property("PERFORMANCE_HINT"))


def pretend(monkeypatch: pytest.MonkeyPatch, capabilities: list[str]) -> None:
    monkeypatch.setattr(module, "_capabilities", lambda core: capabilities)


def test_a_cpu_without_bf16(graph: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ["FP32", "INT8"])
    assert not has_bf16()
    with pytest.raises(ProviderError, match=r"openvino-bf16 needs a CPU with BF16; .* has FP32, INT8; choose"):
        opened(graph, precision="bf16")
    encoder = opened(graph, precision="int8")
    assert compiled(encoder).get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    np.testing.assert_allclose(encoder.run(pixels), opened(graph).run(pixels), atol=1e-5)


@pytest.mark.parametrize("options", [{"threads": 0}, {"precision": "fp16"}, {"precision": "f32"}])
def test_settings_that_are_not_offered(graph: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        opened(graph, **options)


# --- refused batches and graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 15, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8), None],
    ids=lambda batch: str(getattr(batch, "shape", batch)),
)
def test_batch_of_another_kind(graph: Path, batch: Any) -> None:
    with pytest.raises(ItemError, match=r"pixels is .*; expected an array uint8 \(any, 16, 16, 3\)"):
        opened(graph).run(batch)


def test_vectors_that_are_not_finite(tmp_path: Path) -> None:
    path = one_node(tmp_path, "Log", [("x", TensorProto.FLOAT, ["b", 2])], ("y", TensorProto.FLOAT, ["b", 2]))
    with pytest.raises(ItemError, match=r"not finite for rows \[1, 3\]"):
        opened(path).run(np.array([[1, 1], [1, 0], [1, 1], [-1, 1]], np.float32))


def one_node(folder: Path, kind: str, inputs: list[Any], output: Any) -> Path:
    values = [helper.make_tensor_value_info(*value) for value in inputs]
    names = [name for name, *_ in inputs]
    made = helper.make_graph(
        [helper.make_node(kind, names, [output[0]])], "test", values, [helper.make_tensor_value_info(*output)]
    )
    onnx.save_model(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "g.onnx"
    )
    return folder / "g.onnx"


FLOAT = TensorProto.FLOAT


@pytest.mark.parametrize(
    ("kind", "inputs", "output", "message"),
    [
        ("Add", [("x", FLOAT, ["b", 2]), ("z", FLOAT, ["b", 2])], ("y", FLOAT, ["b", 2]), "expected one input"),
        ("Abs", [("x", TensorProto.DOUBLE, ["b", 2])], ("y", TensorProto.DOUBLE, ["b", 2]), "expected one input"),
        ("Abs", [("x", FLOAT, ["b", "d"])], ("y", FLOAT, ["b", "d"]), "fixed width"),
        ("Abs", [("x", TensorProto.INT64, ["b", 2])], ("y", TensorProto.INT64, ["b", 2]), "fixed width"),
    ],
)
def test_graph_of_another_shape(tmp_path: Path, kind: str, inputs: list[Any], output: Any, message: str) -> None:
    with pytest.raises(BundleCorruptError, match=message):
        opened(one_node(tmp_path, kind, inputs, output))


def test_output_that_is_not_there(graph: Path) -> None:
    with pytest.raises(BundleCorruptError, match=r"no output 'fc8', only \['wide', 'y'\]"):
        opened(graph, output="fc8")


@pytest.mark.parametrize("content", [b"", b"garbage", b'<?xml version="1.0"?><net name="x" version="11"></net>'])
def test_file_that_is_no_graph(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Another format that OpenVINO knows is none, either."""
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(BundleCorruptError):
        opened(tmp_path / "g.onnx")
    with pytest.raises(BundleCorruptError, match="cannot load"):
        opened(tmp_path / "nowhere.onnx")
    assert capfd.readouterr() == ("", "")


def test_close(graph: Path, pixels: np.ndarray) -> None:
    with opened(graph) as encoder:
        encoder.run(pixels)
    encoder.close()
    with pytest.raises(ProviderError, match="closed"):
        encoder.run(pixels)


def test_failure_inside_openvino_is_ours(graph: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened(graph)

    def fail(batch: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(encoder, "_session", SimpleNamespace(infer=fail))
    with pytest.raises(ProviderError, match="out of memory"):
        encoder.run(pixels)


# --- the package --------------------------------------------------------------------------------------------------


def test_openvino_that_is_not_installed(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.import_module

    def missing(name: str) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return real(name)

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'dckt\[openvino\]'"):
        opened(graph)
    with pytest.raises(MissingExtraError):
        check_openvino("fp32")


@pytest.mark.parametrize("error", [ImportError("libtbb.so.12"), ModuleNotFoundError("no numpy", name="numpy")])
def test_openvino_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(module, "import_module", broken)
    with pytest.raises(ProviderError, match="installed and cannot be imported"):
        check_openvino("fp32")


QUIET = """
import os, socket, sys, threading
def refuse(*_): raise SystemExit("a connection was tried")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from pathlib import Path
from dckt.runtime.openvino import OpenVinoEncoder
assert "openvino" not in sys.modules
import numpy as np
encoder = OpenVinoEncoder.open(Path(sys.argv[1]), output="y", precision="fp32", threads=1)
encoder.run(np.zeros((1, 16, 16, 3), np.uint8))
assert "openvino_telemetry" not in sys.modules
print([thread.name for thread in threading.enumerate()])
"""


def test_openvino_reports_nothing_and_writes_nothing_at_home(graph: Path, tmp_path: Path) -> None:
    """Left to itself it does both when it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    finished = subprocess.run(
        [sys.executable, "-c", QUIET, str(graph)],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "['MainThread']"
    assert list(home.rglob("*")) == []


INTERRUPTED = """
import gc, signal, sys
from pathlib import Path
from dckt.runtime.openvino import OpenVinoEncoder

first, second = [OpenVinoEncoder.open(Path(sys.argv[1]), output="y", precision="fp32") for _ in range(2)]
first.close()
del first
gc.collect()
second.close()
del second
gc.collect()
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is begun in the background may ignore it
try:
    signal.raise_signal(signal.SIGINT)  # in this thread, which has the stack
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_after_encoders_were_closed(graph: Path) -> None:
    """OpenVINO leaves a thread with a signal stack that is gone, when each encoder has a core of its own."""
    command = [sys.executable, "-c", INTERRUPTED, str(graph)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "interrupted\n"


def test_telemetry_that_was_imported_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "openvino_telemetry", there)
    monkeypatch.delitem(sys.modules, "openvino")
    seen: list[object] = []
    monkeypatch.setattr(module, "import_module", lambda name: seen.append(sys.modules["openvino_telemetry"]))
    module.import_openvino()
    assert seen == [None]
    assert sys.modules["openvino_telemetry"] is there
