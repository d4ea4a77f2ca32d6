from __future__ import annotations

import ctypes
import gc
import random
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

from dckt.bundle import Bundle
from dckt.errors import BundleCorruptError, ConfigError, ItemError, ProviderError
from dckt.preprocessing import image_batch, token_batch
from dckt.runtime import Encoder
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.providers import CPU, CUDA, explain_no_cuda, resolve_providers

NO_GPU = CUDA not in onnxruntime.get_available_providers()
without_gpu = pytest.mark.skipif(not NO_GPU, reason="this ONNX Runtime has CUDA; the test is about one without")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def image_encoder(bundle: Bundle, **options: Any) -> OnnxEncoder:
    return OnnxEncoder.open(bundle.graph("image"), **{"output": "probability", "device": "cpu", **options})


def text_encoder(bundle: Bundle, **options: Any) -> OnnxEncoder:
    return OnnxEncoder.open(bundle.graph("text"), **{"output": "probability", "device": "cpu", **options})


def graph(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: np.ndarray) -> Path:
    """Writes a small ONNX file; inputs and outputs are (name, type, shape)."""
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "test", values[0], values[1], initializers)
    save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


FLOAT = TensorProto.FLOAT
IDENTITY = [helper.make_node("Identity", ["x"], ["y"])]


# --- what it computes ---------------------------------------------------------------------------------------------


def test_it_is_an_encoder(bundle: Bundle) -> None:
    encoder: Encoder = image_encoder(bundle)
    assert encoder.input_name == "pixels"
    assert encoder.input_dtype == np.uint8
    assert encoder.input_shape == (None, 8, 8, 3)
    assert encoder.dimension == 4
    assert encoder.provider == CPU
    assert text_encoder(bundle).input_shape == (None, None)
    assert text_encoder(bundle).input_dtype == np.int64


def test_picture_and_word_of_one_colour_get_one_vector(bundle: Bundle, colour_images: dict[str, Path]) -> None:
    pixels = image_batch(colour_images.values(), bundle.manifest.image)
    tokens = token_batch([bundle.vocabulary.encode(name, bundle.manifest.text) for name in colour_images])
    for output, dimension in bundle.manifest.dimensions.items():
        image, text = image_encoder(bundle, output=output).run(pixels), text_encoder(bundle, output=output).run(tokens)
        assert image.dtype == text.dtype == np.float32
        assert image.shape == text.shape == (len(colour_images), dimension)
        np.testing.assert_allclose(image, text, atol=1e-5)


def test_output_chooses_the_representation(bundle: Bundle) -> None:
    red = np.zeros((1, 8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    np.testing.assert_allclose(image_encoder(bundle, output="fc9").run(red), [[1, 0, 0, 0, 1, 1]])
    probability = image_encoder(bundle, output="probability").run(red)
    assert bundle.manifest.labels[probability[0].argmax()] == "red"
    assert probability.sum() == pytest.approx(1)


def test_padding_does_not_matter(bundle: Bundle) -> None:
    encoder = text_encoder(bundle, output="fc9")
    short, long = encoder.run(np.array([[2, 3]])), encoder.run(np.array([[2, 3, 0, 0, 0]]))
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_empty_batch(bundle: Bundle) -> None:
    vectors = image_encoder(bundle).run(np.zeros((0, 8, 8, 3), np.uint8))
    assert vectors.shape == (0, 4)
    assert vectors.dtype == np.float32
    assert text_encoder(bundle).run(token_batch([])).shape == (0, 4)


def test_batch_equals_its_rows(bundle: Bundle) -> None:
    encoder = image_encoder(bundle)
    pixels = np.random.default_rng(0).integers(256, size=(33, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(encoder.run(pixels), np.vstack([encoder.run(row[None]) for row in pixels]), atol=1e-6)


def test_strided_batch(bundle: Bundle) -> None:
    pixels = np.random.default_rng(1).integers(256, size=(4, 8, 8, 6), dtype=np.uint8)[..., ::2]
    assert not pixels.flags.c_contiguous
    encoder = image_encoder(bundle)
    np.testing.assert_array_equal(encoder.run(pixels), encoder.run(pixels.copy()))


def test_external_data_lies_beside_the_graph(tmp_path: Path) -> None:
    weight = np.arange(2000, dtype=np.float32).reshape(1, 2000)
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    path = graph(tmp_path / "g.onnx", [node], [("x", FLOAT, ["b", 1])], [("y", FLOAT, ["b", 2000])], weight=weight)
    import onnx

    save_model(onnx.load(path), path, save_as_external_data=True, location="g.onnx.data")
    assert (tmp_path / "g.onnx.data").stat().st_size >= weight.nbytes
    encoder = OnnxEncoder.open(path, output="y", device="cpu")
    np.testing.assert_array_equal(encoder.run(np.ones((1, 1), np.float32)), weight)
    (tmp_path / "g.onnx.data").unlink()
    with pytest.raises(BundleCorruptError, match="cannot load"):
        OnnxEncoder.open(path, output="y", device="cpu")


def test_many_threads_share_one_encoder(bundle: Bundle) -> None:
    encoder = image_encoder(bundle, threads=1)
    pixels = np.random.default_rng(2).integers(256, size=(8, 8, 8, 3), dtype=np.uint8)
    expected, wrong = encoder.run(pixels), []

    def work() -> None:
        wrong.extend(1 for _ in range(50) if not np.array_equal(encoder.run(pixels), expected))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_reach_onnx_runtime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = onnxruntime.InferenceSession

    def session(path: str, options: onnxruntime.SessionOptions, **rest: Any) -> onnxruntime.InferenceSession:
        seen.append(options.intra_op_num_threads)
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    image_encoder(bundle, threads=3)
    image_encoder(bundle)
    assert seen == [3, 0]


def test_close(bundle: Bundle) -> None:
    with image_encoder(bundle) as encoder:
        pass
    encoder.close()
    with pytest.raises(ProviderError, match="closed"):
        encoder.run(np.zeros((1, 8, 8, 3), np.uint8))


def test_close_frees_the_session(bundle: Bundle) -> None:
    encoder = image_encoder(bundle)
    sessions = lambda: sum(type(thing).__name__ == "InferenceSession" for thing in gc.get_objects())  # noqa: E731
    before = sessions()
    encoder.close()
    gc.collect()
    assert sessions() == before - 1


# --- refused batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((1, 8, 8, 3), np.int64),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 4), np.uint8),
        np.zeros((1, 9, 8, 3), np.uint8),
        np.zeros((1, 3, 8, 8), np.uint8),
        np.zeros((1, 8, 0, 3), np.uint8),
        np.zeros((0,), np.uint8),
        [[1]],
        None,
    ],
    ids=lambda batch: f"{getattr(batch, 'dtype', '')}{getattr(batch, 'shape', batch)}",
)
def test_batch_of_another_kind(bundle: Bundle, batch: Any) -> None:
    with pytest.raises(ItemError, match=r"pixels is .*; expected an array uint8 \(any, 8, 8, 3\)"):
        image_encoder(bundle).run(batch)


def test_text_without_tokens(bundle: Bundle) -> None:
    with pytest.raises(ItemError, match="tokens is int64"):
        text_encoder(bundle).run(np.zeros((3, 0), np.int64))


def test_token_that_the_graph_does_not_know(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = text_encoder(bundle)
    with pytest.raises(ItemError, match="refused a batch"):
        encoder.run(np.array([[10_000]]))
    assert capfd.readouterr() == ("", "")
    assert encoder.run(np.array([[2]])).shape == (1, 4), "it goes on"


def test_vectors_that_are_not_finite(tmp_path: Path) -> None:
    node = helper.make_node("Log", ["x"], ["y"])
    path = graph(tmp_path / "g.onnx", [node], [("x", FLOAT, ["b", 2])], [("y", FLOAT, ["b", 2])])
    encoder = OnnxEncoder.open(path, output="y", device="cpu")
    with pytest.raises(ItemError, match=r"not finite for rows \[1, 3\]"):
        encoder.run(np.array([[1, 1], [1, 0], [1, 1], [-1, 1]], np.float32))


def test_graph_that_breaks_its_own_shape(tmp_path: Path) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    path = graph(tmp_path / "g.onnx", [node], [("x", FLOAT, ["b", 2])], [("y", FLOAT, ["b2", 2])])
    with pytest.raises(BundleCorruptError, match="expected"):
        OnnxEncoder.open(path, output="y", device="cpu").run(np.ones((3, 2), np.float32))


def test_failure_inside_onnx_runtime_is_ours(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = image_encoder(bundle)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(encoder, "_session", SimpleNamespace(run=out_of_memory))
    with pytest.raises(ProviderError, match="out of memory"):
        encoder.run(np.zeros((1, 8, 8, 3), np.uint8))


# --- refused graphs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(range(256)) * 50])
def test_file_that_is_no_graph(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(BundleCorruptError, match=rf"g\.onnx: ONNX Runtime {onnxruntime.__version__} cannot load it"):
        OnnxEncoder.open(tmp_path / "g.onnx", output="y", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match="cannot load"):
        OnnxEncoder.open(tmp_path / "nowhere.onnx", output="y", device="cpu")


def test_damaged_graph_opens_or_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """What a checksum would have caught never escapes as anything but an error of ours."""
    whole = bundle.graph("text").read_bytes()
    generator, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (tmp_path / "g.onnx").write_bytes(damaged[: generator.randrange(len(whole))] if refused % 5 == 4 else damaged)
        try:
            encoder = OnnxEncoder.open(tmp_path / "g.onnx", output="probability", device="cpu", threads=1)
            encoder.run(np.array([[2, 3]]))
        except (BundleCorruptError, ItemError, ProviderError):
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([("x", FLOAT, ["b", 2]), ("z", FLOAT, [1])], [("y", FLOAT, ["b", 2])], "expected one input"),
        ([("x", TensorProto.DOUBLE, ["b", 2])], [("y", TensorProto.DOUBLE, ["b", 2])], "expected one input"),
        ([("x", FLOAT, ["b", "d"])], [("y", FLOAT, ["b", "d"])], "fixed width"),
        ([("x", FLOAT, ["b", 2, 2])], [("y", FLOAT, ["b", 2, 2])], "fixed width"),
        ([("x", TensorProto.INT64, ["b", 2])], [("y", TensorProto.INT64, ["b", 2])], "fixed width"),
    ],
)
def test_graph_of_another_shape(tmp_path: Path, inputs: list[Any], outputs: list[Any], message: str) -> None:
    path = graph(tmp_path / "g.onnx", IDENTITY, inputs, outputs)
    with pytest.raises(BundleCorruptError, match=message):
        OnnxEncoder.open(path, output="y", device="cpu")


def test_output_that_is_not_there(bundle: Bundle) -> None:
    with pytest.raises(BundleCorruptError, match=r"no output 'fc8', only \['fc9', 'probability'\]"):
        image_encoder(bundle, output="fc8")


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -2}, {"device": "gpu"}, {"device": "CPU"}])
def test_unknown_options(bundle: Bundle, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        image_encoder(bundle, **options)


@without_gpu
def test_auto_says_that_it_got_the_cpu(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    assert image_encoder(bundle, device="auto").provider == "CPUExecutionProvider"
    assert capfd.readouterr() == ("", "")


@without_gpu
def test_cuda_that_is_not_there_is_an_error(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProviderError) as caught:
        image_encoder(bundle, device="cuda")
    message = str(caught.value)
    assert f"onnxruntime {onnxruntime.__version__}" in message
    for provider in onnxruntime.get_available_providers():
        assert provider in message
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in message
    assert "'cpu' or 'auto'" in message
    assert capfd.readouterr() == ("", "")


def pretend_built_with_cuda(monkeypatch: pytest.MonkeyPatch, create: Callable[..., Any]) -> list[list[str]]:
    """Makes ONNX Runtime list CUDA, and ``create`` stand for its session; returns the providers asked for."""
    asked: list[list[str]] = []

    def session(path: str, options: object, *, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        asked.append([name for name, _ in providers])
        return create(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


REAL_SESSION = onnxruntime.InferenceSession


def cpu_whatever_was_asked(path: str, options: Any, *, providers: list[Any]) -> Any:
    """As ONNX Runtime when a CUDA library is missing: a session, without a word, on the CPU."""
    return REAL_SESSION(path, options, providers=[CPU])


def lost_driver(path: str, options: Any, *, providers: list[Any]) -> Any:
    if providers[0][0] == CUDA:
        raise RuntimeError("CUDA driver version is insufficient")
    return REAL_SESSION(path, options, providers=[CPU])


@pytest.mark.parametrize("create", [cpu_whatever_was_asked, lost_driver])
def test_listed_is_not_attached(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, create: Callable[..., Any]) -> None:
    asked = pretend_built_with_cuda(monkeypatch, create)
    assert image_encoder(bundle, device="auto").provider == CPU
    assert asked[0] == [CUDA, CPU]
    with pytest.raises(ProviderError, match="CUDA did not attach") as caught:
        image_encoder(bundle, device="cuda")
    if create is lost_driver:
        assert "driver version is insufficient" in str(caught.value)
    asked.clear()
    assert image_encoder(bundle, device="cpu").provider == CPU
    assert asked == [[CPU]]


def test_damaged_graph_is_not_blamed_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built_with_cuda(monkeypatch, lost_driver)
    (tmp_path / "g.onnx").write_bytes(b"garbage")
    for device in ("auto", "cuda"):
        with pytest.raises(BundleCorruptError, match="cannot load"):
            OnnxEncoder.open(tmp_path / "g.onnx", output="y", device=device)


def test_attached_cuda_is_reported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def attached(path: str, options: Any, *, providers: list[Any]) -> Any:
        real = REAL_SESSION(path, options, providers=[CPU])
        return SimpleNamespace(
            get_inputs=real.get_inputs, get_outputs=real.get_outputs, get_providers=lambda: [CUDA, CPU]
        )

    pretend_built_with_cuda(monkeypatch, attached)
    assert image_encoder(bundle, device="auto").provider == CUDA
    assert image_encoder(bundle, device="cuda").provider == CUDA


def test_libraries_that_do_not_load_are_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built_with_cuda(monkeypatch, cpu_whatever_was_asked)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13"), raising=False)
    with pytest.raises(ProviderError, match=r"libcublas\.so\.13"):
        image_encoder(bundle, device="cuda")


def test_missing_driver_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    pretend_built_with_cuda(monkeypatch, cpu_whatever_was_asked)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ProviderError, match=r"no NVIDIA driver \(libcuda\.so\.1"):
        image_encoder(bundle, device="cuda")


def test_onnx_runtime_before_preloading(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built_with_cuda(monkeypatch, cpu_whatever_was_asked)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
    monkeypatch.delattr(onnxruntime, "preload_dlls", raising=False)
    assert image_encoder(bundle, device="auto").provider == CPU


def test_only_auto_is_quiet(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    severities: list[int] = []
    pretend_built_with_cuda(monkeypatch, lost_driver)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", severities.append)
    with pytest.raises(ProviderError):
        image_encoder(bundle, device="cuda")
    assert severities == []
    image_encoder(bundle, device="auto")
    assert severities == [4, 2], "silent, and as it was"


def test_two_distributions_that_overwrite_one_another_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    monkeypatch.setattr(metadata, "version", installed.__getitem__)
    message = explain_no_cuda()
    assert "onnxruntime 1.31.1, onnxruntime-gpu 1.30.0" in message
    assert "overwritten" in message


@pytest.mark.parametrize("only", ["onnxruntime", "onnxruntime-gpu"])
def test_one_distribution_has_overwritten_nothing(monkeypatch: pytest.MonkeyPatch, only: str) -> None:
    def version(name: str) -> str:
        if name != only:
            raise metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(metadata, "version", version)
    assert "overwritten" not in explain_no_cuda()
    assert f"found: {only} 1.31.1;" in explain_no_cuda()


def test_needed_versions_come_from_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    assert "CUDA 13.0" in explain_no_cuda()


def test_providers_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert [name for name, _ in resolve_providers("auto")] == [CUDA, CPU]
    assert [name for name, _ in resolve_providers("cuda")] == [CUDA, CPU]
    assert [name for name, _ in resolve_providers("cpu")] == [CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert [name for name, _ in resolve_providers("auto")] == [CPU]
    with pytest.raises(ProviderError):
        resolve_providers("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="skipped: no GPU, this ONNX Runtime has no CUDA provider")
def test_cuda_agrees_with_the_cpu(bundle: Bundle) -> None:
    pixels = np.random.default_rng(3).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    on_gpu = image_encoder(bundle, device="cuda")
    assert on_gpu.provider == CUDA
    np.testing.assert_allclose(on_gpu.run(pixels), image_encoder(bundle).run(pixels), atol=1e-5)


# --- several outputs ---


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)


def test_both_outputs_in_one_pass(bundle, pixels, monkeypatch):
    expected = {name: image_encoder(bundle, output=name).run(pixels) for name in ("probability", "fc9")}
    encoder = OnnxEncoder.open(bundle.graph("image"), output="fc9", also=["probability"], device="cpu")
    assert encoder.dimension == 6
    assert list(encoder.dimensions.items()) == [("fc9", 6), ("probability", 4)]
    passes = []
    real = encoder._compute
    monkeypatch.setattr(encoder, "_compute", lambda *arguments: passes.append(1) or real(*arguments))
    found = encoder.run_all(pixels)
    assert passes == [1]
    assert list(found) == ["fc9", "probability"]
    for name, vectors in found.items():
        np.testing.assert_array_equal(vectors, expected[name])
    np.testing.assert_array_equal(encoder.run(pixels), expected["fc9"])
    assert {name: vectors.shape for name, vectors in encoder.run_all(pixels[:0]).items()} == {
        "fc9": (0, 6),
        "probability": (0, 4),
    }


def test_every_output_must_be_there(bundle):
    with pytest.raises(BundleCorruptError, match="has no output 'fc8'"):
        OnnxEncoder.open(bundle.graph("image"), output="fc9", also=["fc8"], device="cpu")


def test_every_output_is_checked(bundle, pixels, monkeypatch):
    encoder = OnnxEncoder.open(bundle.graph("image"), output="fc9", also=["probability"], device="cpu")
    real = encoder._compute

    def spoilt(*arguments):
        fc9, probability = real(*arguments)
        probability[1, 2] = np.nan
        return fc9, probability

    monkeypatch.setattr(encoder, "_compute", spoilt)
    with pytest.raises(ItemError, match=r"not finite for rows \[1\]"):
        encoder.run_all(pixels)
    monkeypatch.setattr(encoder, "_compute", lambda *arguments: [real(*arguments)[0]] * 2)
    with pytest.raises(BundleCorruptError, match="'probability' came as"):
        encoder.run_all(pixels)
