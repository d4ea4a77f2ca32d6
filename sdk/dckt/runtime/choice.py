"""Which variant of a bundle serves here, and its encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from dckt.bundle import Bundle, Manifest, Variant
from dckt.errors import BundleCorruptError, BundleError, MissingExtraError, ProviderError
from dckt.runtime import Encoder
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.openvino import OpenVinoEncoder, check_openvino
from dckt.runtime.providers import CPU, CUDA, check_device, cuda_devices, resolve_providers
from dckt.runtime.tensorrt.cache import Engine, engines_folder, find_engines
from dckt.runtime.tensorrt.encoder import TensorRTEncoder
from dckt.runtime.tensorrt.load import machine

AUTO = "auto"
# On a GPU fp16 halves what is read, and the tensor cores compute in it.
_ON_CUDA = ("onnxruntime-fp16", "onnxruntime-fp32")
# Near fp32 before fast; then fast.
_ENGINES = ("fp16", "int8", "fp32")
_TENSORRT = "tensorrt-"


def choose(manifest: Manifest, *, variant: str = AUTO, device: str = "auto", engines: Iterable[str] = ()) -> Variant:
    """The variant that serves here.

    By itself it takes, on a GPU, an engine, else fp16, else fp32 on ONNX Runtime; on a CPU the first of the manifest's
    that can run, which are in order of speed.

    Args:
        manifest: of the bundle.
        variant: a name, or ``auto``.
        device: ``cpu``; ``cuda``; or ``auto``: a GPU if there is one that a variant can use.
        engines: precisions in which every graph has a TensorRT engine that fits this machine, best first.

    Raises:
        ConfigError: another device.
        BundleError: the bundle has no such variant, or none for the device; names those that it has.
        MissingExtraError: the variant's runtime is not installed.
        ProviderError: the machine cannot run the variant, and why.
    """
    check_device(device)
    built = {engine.name: engine for engine in map(_engine, engines)}
    if variant != AUTO:
        return _named(manifest, variant, device, built)
    if device == "cpu" or (device == "auto" and not _gpu_serves(manifest, built)):
        return _on_cpu(manifest)
    return _on_cuda(manifest, built)


def open_encoders(
    bundle: Bundle,
    *,
    variant: str = AUTO,
    device: str = "auto",
    threads: int | None = None,
    output: str | None = None,
    also: Sequence[str] = (),
) -> dict[str, Encoder]:
    """An encoder for each medium of a bundle, all of one variant; what they run on, they say.

    Args:
        bundle: the model.
        variant: see :func:`choose`.
        device: see :func:`choose`.
        threads: threads that one call may use on the CPU; None leaves it to the runtime (one a core).
        output: the representation to compute; None takes the bundle's own.
        also: others to compute in the same pass.

    Raises:
        BundleCorruptError: a graph cannot be loaded, or is not what the manifest says.
        DcktError: see :func:`choose`.
    """
    engines = _engines(bundle, variant, device)
    chosen = choose(bundle.manifest, variant=variant, device=device, engines=engines)
    outputs = (output or bundle.manifest.representation, *also)
    encoders = _open(bundle, chosen, device, threads, outputs, engines)
    # A GPU that is there may still not attach, which only a session tells. What is best on a GPU need not be on a CPU.
    if variant == AUTO and device == "auto" and any(encoder.provider == CPU for encoder in encoders.values()):
        best = choose(bundle.manifest, device="cpu")
        if best != chosen:
            for encoder in encoders.values():
                encoder.close()
            encoders = _open(bundle, best, "cpu", threads, outputs, engines)
    return encoders


def _open(
    bundle: Bundle,
    variant: Variant,
    device: str,
    threads: int | None,
    outputs: Sequence[str],
    engines: Mapping[str, Engine],
) -> dict[str, Encoder]:
    manifest = bundle.manifest
    encoders: dict[str, Encoder] = {}
    with ExitStack() as opened:
        for medium in manifest.graphs["fp32"]:
            graph = bundle.graph(medium, variant.graph)
            encoder = _encoder(graph, medium, variant, device, threads, outputs, engines)
            encoders[medium] = opened.enter_context(encoder)
            for output, width in encoder.dimensions.items():
                expected = manifest.dimensions.get(output)
                if width != expected:
                    raise BundleCorruptError(
                        f"{graph}: {output} is {width} wide; the manifest says {expected}; export the model again"
                    )
        opened.pop_all()
    return encoders


def _encoder(
    graph: Path,
    medium: str,
    variant: Variant,
    device: str,
    threads: int | None,
    outputs: Sequence[str],
    engines: Mapping[str, Engine],
) -> Encoder:
    output, *also = outputs
    if variant.runtime == "openvino":
        return OpenVinoEncoder.open(graph, output=output, also=also, precision=variant.precision, threads=threads)
    if variant.runtime == "tensorrt":
        engine = engines[variant.graph]
        plan, sha256 = engine.path(medium), engine.plans[medium].sha256
        return TensorRTEncoder.open(plan, output=output, also=also, sha256=sha256, precision=variant.precision)
    return OnnxEncoder.open(
        graph, output=output, also=also, device=device, threads=threads, precision=variant.precision
    )


def _engine(precision: str) -> Variant:
    return Variant(name=f"{_TENSORRT}{precision}", runtime="tensorrt", graph=precision, precision=precision)


def _named(manifest: Manifest, name: str, device: str, built: dict[str, Variant]) -> Variant:
    there = {variant.name: variant for variant in manifest.variants} | built
    engine = name.startswith(_TENSORRT) and name.removeprefix(_TENSORRT) in manifest.graphs
    if name not in there and not engine:
        raise BundleError(f"variant {name!r} is not in this bundle; it has {', '.join(there)}; or take auto")
    if engine:
        if device == "cpu" or not cuda_devices():
            found = "device 'cpu' was asked for" if device == "cpu" else "there is none here"
            raise ProviderError(f"{name} needs an NVIDIA GPU, and {found}; choose one of {', '.join(there)}, or auto")
        if name not in built:
            raise BundleError(
                f"{name}: no engine fits this machine; build it here, by dckt engine, and set DCKT_ENGINES if it "
                "is kept outside the bundle"
            )
        return built[name]
    variant = there[name]
    if variant.runtime == "openvino":
        if device == "cuda":
            raise ProviderError(
                f"{name} runs on the CPU and device 'cuda' was asked for; choose device 'cpu' or 'auto'"
            )
        check_openvino(variant.precision)
    else:
        resolve_providers(device)
    return variant


def _on_cpu(manifest: Manifest) -> Variant:
    reasons = []
    for variant in manifest.variants:
        if variant.runtime == "tensorrt":
            reasons.append(f"{variant.name} needs an NVIDIA GPU")
            continue
        try:
            if variant.runtime == "openvino":
                check_openvino(variant.precision)
        except (MissingExtraError, ProviderError) as error:
            reasons.append(str(error))
        else:
            return variant
    raise ProviderError("\n  ".join(["no variant of this bundle runs on this CPU:", *reasons]))


def _on_cuda(manifest: Manifest, built: dict[str, Variant]) -> Variant:
    if built:
        return next(iter(built.values()))
    resolve_providers("cuda")
    there = {variant.name: variant for variant in manifest.variants}
    for name in _ON_CUDA:
        if name in there:
            return there[name]
    raise BundleError(f"no variant of this bundle runs on a GPU; it has {', '.join(there)}; choose device 'cpu'")


def _gpu_serves(manifest: Manifest, built: dict[str, Variant]) -> bool:
    if not cuda_devices():
        return False
    listed = {variant.name for variant in manifest.variants} & set(_ON_CUDA)
    return bool(built) or (bool(listed) and resolve_providers("auto")[0][0] == CUDA)


def _engines(bundle: Bundle, variant: str, device: str) -> dict[str, Engine]:
    """The bundle's TensorRT engines that fit this machine, by precision, in the order in which ``auto`` takes them."""
    # TensorRT may end the process where there is no GPU, so nothing of it is touched before one was seen.
    if device == "cpu" or not engines_folder(bundle.path).is_dir() or not cuda_devices():
        return {}
    try:
        fitting = find_engines(bundle, machine()).fitting
    except (MissingExtraError, ProviderError):
        if variant.startswith(_TENSORRT):
            raise
        return {}
    found = {engine.precision: engine for engine in reversed(fitting)}
    return {precision: found[precision] for precision in _ENGINES if precision in found}
