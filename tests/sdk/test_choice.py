"""Which variant serves: by speed, by what the machine can run, by name; and never another without a word."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from dckt.bundle import Bundle
from dckt.errors import BundleCorruptError, BundleError, ConfigError, MissingExtraError, ProviderError
from dckt.runtime import choice
from dckt.runtime.choice import choose, open_encoders
from dckt.runtime.providers import CPU, CUDA, cuda_devices
from dckt.runtime.tensorrt.cache import Found
from dckt.runtime.tensorrt.load import Machine

EVERYTHING = ("openvino-int8", "openvino-bf16", "onnxruntime-int8", "openvino-fp32", "onnxruntime-fp32")
ON_GPU = ("openvino-bf16", "onnxruntime-fp32", "onnxruntime-fp16")
Make = Callable[..., Bundle]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "cuda_devices", lambda: 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, and an ONNX Runtime that was built for it."""
    monkeypatch.setattr(choice, "cuda_devices", lambda: 1)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])


def openvino_offers(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """Makes OpenVINO able to compute in these precisions and no others."""

    def check(precision: str) -> None:
        if not precisions:
            raise MissingExtraError("a variant of OpenVINO", "openvino", "openvino")
        if precision not in precisions:
            raise ProviderError(f"openvino-{precision} needs a CPU with {precision.upper()}")

    monkeypatch.setattr(choice, "check_openvino", check)


# --- on a CPU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "order", "expected"),
    [
        (["fp32", "bf16", "int8"], EVERYTHING, "openvino-int8"),
        (["fp32", "bf16"], EVERYTHING, "openvino-bf16"),
        (["fp32", "int8"], ["openvino-bf16", "openvino-int8", "onnxruntime-fp32"], "openvino-int8"),
        (["fp32"], ["openvino-bf16", "onnxruntime-fp32", "openvino-fp32"], "onnxruntime-fp32"),
        ([], EVERYTHING, "onnxruntime-int8"),
        (["fp32", "bf16", "int8"], ["onnxruntime-fp32", "openvino-int8"], "onnxruntime-fp32"),
        ([], ["tensorrt-fp16", "onnxruntime-fp32"], "onnxruntime-fp32"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.usefixtures("no_gpu")
def test_the_first_that_can_run_here(
    bundle_with: Make,
    monkeypatch: pytest.MonkeyPatch,
    offered: Sequence[str],
    order: Sequence[str],
    expected: str,
    device: str,
) -> None:
    openvino_offers(monkeypatch, *offered)
    assert choose(bundle_with(order).manifest, device=device).name == expected


def test_none_that_can_run_here(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino_offers(monkeypatch)
    manifest = bundle_with(["openvino-fp32", "tensorrt-fp16"]).manifest
    with pytest.raises(ProviderError) as caught:
        choose(manifest, device="cpu")
    assert "pip install 'dckt[openvino]'" in str(caught.value)
    assert "tensorrt-fp16 needs an NVIDIA GPU" in str(caught.value)


def test_a_bundle_of_one_variant(tiny_bundle: Path) -> None:
    assert choose(Bundle.open(tiny_bundle).manifest, device="cpu").name == "onnxruntime-fp32"


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.usefixtures("no_gpu")
def test_what_is_asked_for_by_name(bundle_with: Make, monkeypatch: pytest.MonkeyPatch, name: str, device: str) -> None:
    openvino_offers(monkeypatch, "fp32", "bf16", "int8")
    assert choose(bundle_with(EVERYTHING).manifest, variant=name, device=device).name == name


@pytest.mark.parametrize("name", ["openvino-int8", "onnxruntime-fp16", "tensorrt-fp16", "tensorrt-", "fast", ""])
def test_a_variant_that_is_not_in_the_bundle(bundle_with: Make, name: str) -> None:
    manifest = bundle_with(["openvino-bf16", "onnxruntime-fp32"]).manifest
    with pytest.raises(BundleError, match=rf"variant '{name}' is not in this bundle; it has openvino-bf16, onnx.*auto"):
        choose(manifest, variant=name)


def test_a_variant_that_cannot_run_here(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle_with(EVERYTHING).manifest
    openvino_offers(monkeypatch)
    with pytest.raises(MissingExtraError, match=r"dckt\[openvino\]"):
        choose(manifest, variant="openvino-bf16")
    openvino_offers(monkeypatch, "fp32")
    with pytest.raises(ProviderError, match="needs a CPU with BF16"):
        choose(manifest, variant="openvino-bf16")
    with pytest.raises(ProviderError, match="openvino-fp32 runs on the CPU and device 'cuda' was asked for"):
        choose(manifest, variant="openvino-fp32", device="cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match="CUDA did not attach"):
        choose(manifest, variant="onnxruntime-fp32", device="cuda")


def test_unknown_device(tiny_bundle: Path) -> None:
    for name in ("auto", "onnxruntime-fp32"):
        with pytest.raises(ConfigError, match="device is 'tpu'"):
            choose(Bundle.open(tiny_bundle).manifest, variant=name, device="tpu")


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu(bundle_with: Make, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    openvino_offers(monkeypatch, "fp32", "bf16")
    manifest = bundle_with(ON_GPU).manifest
    assert choose(manifest, device=device, engines=["int8", "fp16"]).name == "tensorrt-int8"
    assert choose(manifest, device=device).name == "onnxruntime-fp16"
    assert choose(bundle_with(ON_GPU[:2], force=True).manifest, device=device).name == "onnxruntime-fp32"
    assert choose(manifest, device="cpu").name == "openvino-bf16"


@pytest.mark.usefixtures("gpu")
def test_a_bundle_without_a_variant_for_gpus(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino_offers(monkeypatch, "fp32")
    manifest = bundle_with(["openvino-fp32"]).manifest
    assert choose(manifest).name == "openvino-fp32"
    with pytest.raises(BundleError, match="no variant of this bundle runs on a GPU; it has openvino-fp32"):
        choose(manifest, device="cuda")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_onnx_runtime_was_not_built_for(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino_offers(monkeypatch, "fp32", "bf16")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    manifest = bundle_with(ON_GPU).manifest
    assert choose(manifest).name == "openvino-bf16"
    assert choose(manifest, engines=["fp16"]).name == "tensorrt-fp16"
    with pytest.raises(ProviderError, match="CUDA did not attach"):
        choose(manifest, device="cuda")


def test_an_engine_by_name(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundle_with(ON_GPU).manifest
    monkeypatch.setattr(choice, "cuda_devices", lambda: 0)
    with pytest.raises(ProviderError, match="tensorrt-fp16 needs an NVIDIA GPU, and there is none here"):
        choose(manifest, variant="tensorrt-fp16")
    monkeypatch.setattr(choice, "cuda_devices", lambda: 1)
    with pytest.raises(BundleError, match=r"tensorrt-fp16: no engine fits this machine.*dckt engine.*DCKT_ENGINES"):
        choose(manifest, variant="tensorrt-fp16")
    with pytest.raises(ProviderError, match="device 'cpu' was asked for"):
        choose(manifest, variant="tensorrt-fp16", device="cpu", engines=["fp16"])
    assert choose(manifest, variant="tensorrt-fp16", engines=["fp16"]).graph == "fp16"


def test_counting_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def driver(failure: int, count: int) -> Any:
        def counted(pointer: Any) -> int:
            pointer._obj.value = count
            return 0

        return lambda _: SimpleNamespace(cuInit=lambda flags: failure, cuDeviceGetCount=counted)

    for failure, count, expected in ((0, 2, 2), (0, 0, 0), (100, 2, 0)):
        monkeypatch.setattr(ctypes, "CDLL", driver(failure, count))
        assert cuda_devices() == expected

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda_devices() == 0


# --- encoders -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("name", ["onnxruntime-fp32", "onnxruntime-int8", "openvino-fp32", "openvino-int8"])
def test_encoders_say_what_they_are(bundle_with: Make, name: str) -> None:
    encoders = open_encoders(bundle_with(EVERYTHING), variant=name, device="cpu", threads=1)
    assert list(encoders) == ["image", "text"]
    for encoder in encoders.values():
        assert encoder.variant == name
        assert encoder.provider == ("CPU" if name.startswith("openvino") else CPU)
        assert encoder.dimension == 4
    pixels = np.full((2, 8, 8, 3), 255, np.uint8)
    np.testing.assert_allclose(encoders["image"].run(pixels).sum(axis=1), 1, atol=1e-2)


@pytest.mark.usefixtures("bf16", "no_gpu")
def test_auto_takes_the_fastest(bundle_with: Make) -> None:
    encoders = open_encoders(bundle_with(EVERYTHING[1:]))
    assert {encoder.variant for encoder in encoders.values()} == {"openvino-bf16"}


def test_each_variant_reads_its_own_graphs(bundle_with: Make) -> None:
    bundle = bundle_with(EVERYTHING)
    bundle.graph("text", "int8").write_bytes(b"not a graph")
    assert open_encoders(bundle, variant="onnxruntime-fp32", device="cpu")
    with pytest.raises(BundleCorruptError, match=r"text\.int8\.onnx"):
        open_encoders(bundle, variant="onnxruntime-int8", device="cpu")


def test_output(bundle_with: Make) -> None:
    bundle = bundle_with(["onnxruntime-fp32"])
    assert open_encoders(bundle, device="cpu", output="fc9")["image"].dimension == 6
    with pytest.raises(BundleCorruptError, match="no output 'fc8'"):
        open_encoders(bundle, device="cpu", output="fc8")


def test_a_manifest_that_lies_about_the_width(bundle_with: Make) -> None:
    bundle = bundle_with(["onnxruntime-fp32"], dimensions={"probability": 4, "fc9": 7})
    with pytest.raises(BundleCorruptError, match="fc9 is 6 wide; the manifest says 7"):
        open_encoders(bundle, device="cpu", output="fc9")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_does_not_attach(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is best on a GPU is not what is best on the CPU that is taken in its place."""
    openvino_offers(monkeypatch)
    asked: list[list[str]] = []
    real = onnxruntime.InferenceSession

    def session(path: str, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        asked.append([Path(path).name, *(name for name, _ in providers)])
        return real(path, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    bundle = bundle_with(["onnxruntime-fp32", "onnxruntime-fp16"])
    encoders = open_encoders(bundle)
    assert {encoder.variant for encoder in encoders.values()} == {"onnxruntime-fp32"}
    assert asked[0] == ["image.fp16.onnx", CUDA, CPU]
    assert asked[-1] == ["text.onnx", CPU]
    with pytest.raises(ProviderError, match="did not attach"):
        open_encoders(bundle, device="cuda")


HERE = Machine(gpu="NVIDIA X", compute_capability="9.0", tensorrt="10.16", driver="13.0", runtime="13.0")


@pytest.fixture
def engines(bundle_with: Make, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with the folder of engines, and a machine that TensorRT names."""
    bundle = bundle_with(ON_GPU)
    (bundle.path / "engines").mkdir()
    monkeypatch.setattr(choice, "machine", lambda: HERE)
    return bundle


@pytest.mark.usefixtures("gpu")
def test_engines_are_looked_for_where_they_were_built(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a bundle that may not be written, by the variable that dckt engine reads too."""
    monkeypatch.setattr(choice, "machine", lambda: None)
    monkeypatch.setattr(choice, "find_engines", lambda bundle, machine: pytest.fail("looked"))
    open_encoders(Bundle.open(tiny_bundle), device="auto")
    monkeypatch.setenv("DCKT_ENGINES", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="looked"):
        open_encoders(Bundle.open(tiny_bundle), device="auto")


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_fits_is_taken(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Path, dict[str, str]]] = []

    class FakeEncoder:
        dimensions, variant, provider = {"probability": 4}, "tensorrt-fp16", "TensorRT 10.16 on NVIDIA X"

        @classmethod
        def open(cls, plan: Path, **options: str) -> FakeEncoder:
            opened.append((plan, options))
            return cls()

        def __enter__(self) -> FakeEncoder:
            return self

        def __exit__(self, *_: object) -> None: ...

    def built(name: str, precision: str) -> Any:
        plans = {medium: SimpleNamespace(sha256=f"hash of {medium}") for medium in ("image", "text")}
        return SimpleNamespace(precision=precision, plans=plans, path=lambda medium: Path(name) / f"{medium}.plan")

    def find(bundle: Bundle, machine: Machine) -> Found:
        assert machine is HERE
        return Found((built("a", "fp32"), built("b", "fp16"), built("c", "fp16")), ())

    monkeypatch.setattr(choice, "find_engines", find)
    monkeypatch.setattr(choice, "TensorRTEncoder", FakeEncoder)
    encoders = open_encoders(engines)
    assert {encoder.variant for encoder in encoders.values()} == {"tensorrt-fp16"}
    assert opened == [
        (
            Path("b") / f"{medium}.plan",
            {"output": "probability", "also": [], "sha256": f"hash of {medium}", "precision": "fp16"},
        )
        for medium in ("image", "text")
    ]


def test_tensorrt_is_not_touched_without_a_gpu(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "machine", lambda: pytest.fail("TensorRT was touched"))
    openvino_offers(monkeypatch)
    monkeypatch.setattr(choice, "cuda_devices", lambda: 0)
    assert open_encoders(engines)["image"].variant == "onnxruntime-fp32"
    monkeypatch.setattr(choice, "cuda_devices", lambda: 1)
    assert open_encoders(engines, device="cpu")["image"].variant == "onnxruntime-fp32"


def test_engines_without_tensorrt(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` goes on without them; asked for by name, they are missed."""

    def missing() -> Machine:
        raise MissingExtraError("a TensorRT engine", "tensorrt", "tensorrt")

    monkeypatch.setattr(choice, "machine", missing)
    monkeypatch.setattr(choice, "cuda_devices", lambda: 1)
    openvino_offers(monkeypatch)
    assert open_encoders(engines)["image"].variant == "onnxruntime-fp32"
    with pytest.raises(MissingExtraError, match=r"dckt\[tensorrt\]"):
        open_encoders(engines, variant="tensorrt-fp16")
