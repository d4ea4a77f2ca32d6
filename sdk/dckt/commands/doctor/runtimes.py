"""What can compute here: hnswlib, ONNX Runtime and its providers, OpenVINO, CUDA and TensorRT."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from dckt.commands.doctor.finding import Finding
from dckt.commands.doctor.probes import ProbeError, ask

_AREA = "runtimes"
_REBUILD = (
    "compile it for this processor: HNSWLIB_NO_NATIVE=1 pip install --force-reinstall --no-deps --no-cache-dir "
    "--no-binary hnswlib hnswlib"
)
_ONNXRUNTIME = "pip install --force-reinstall onnxruntime"
_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"
_USED = ("CPUExecutionProvider", "CUDAExecutionProvider")


def onnxruntime_answer() -> dict[str, Any] | Finding:
    """What ONNX Runtime says of this machine; or that it does not work, which everything else needs."""
    try:
        return ask("onnxruntime")
    except ProbeError as error:
        return Finding(_AREA, "ONNX Runtime", "problem", str(error), _ONNXRUNTIME)


def runtime_findings(answer: dict[str, Any] | Finding) -> Iterator[Finding]:
    """Everything that computes.

    Args:
        answer: of :func:`onnxruntime_answer`.
    """
    yield _hnswlib()
    if isinstance(answer, Finding):
        yield answer
        devices = 0
    else:
        yield from onnxruntime_findings(answer)
        devices = answer["devices"]
    yield _openvino()
    yield _tensorrt(devices)


def onnxruntime_findings(answer: dict[str, Any]) -> Iterator[Finding]:
    """The providers that attach, and what is to be known about CUDA."""
    attached, compiled, devices = answer["attached"], answer["compiled"], answer["devices"]
    unused = [_short(name) for name in compiled if name not in _USED]
    found = f"{', '.join(map(_short, attached)) or 'no provider'} attached"
    if unused:
        found += f"; compiled in and not used by dckt: {', '.join(unused)}"
    if "CPUExecutionProvider" in attached:
        yield Finding(_AREA, "ONNX Runtime", "ok", found)
    else:
        yield Finding(_AREA, "ONNX Runtime", "problem", f"{found} ({answer['reason']})", _ONNXRUNTIME)
    cuda = "CUDAExecutionProvider"
    gpus = "1 device" if devices == 1 else f"{devices} devices"
    if not devices:
        yield Finding(_AREA, "CUDA", "ok", "no device, so models run on the CPU")
    elif cuda in attached:
        yield Finding(_AREA, "CUDA", "ok", f"{gpus}, and ONNX Runtime runs on it")
    elif cuda in compiled:
        found = f"{gpus}; ONNX Runtime was built for CUDA and it does not attach ({answer['reason']})"
        yield Finding(_AREA, "CUDA", "problem", found, _GPU)
    else:
        yield Finding(_AREA, "CUDA", "note", f"{gpus}; this ONNX Runtime cannot use them", _GPU)


def _hnswlib() -> Finding:
    try:
        right = ask("hnswlib")["right"]
    except ProbeError as error:
        return Finding(_AREA, "hnswlib", "problem", str(error), _REBUILD)
    if not right:
        return Finding(_AREA, "hnswlib", "problem", "a small graph gave wrong neighbours", _REBUILD)
    return Finding(_AREA, "hnswlib", "ok", "builds and searches a graph")


def _openvino() -> Finding:
    if importlib.util.find_spec("openvino") is None:
        return Finding(_AREA, "OpenVINO", "ok", "not installed; ONNX Runtime serves")
    try:
        answer = ask("openvino")
    except ProbeError as error:
        return Finding(_AREA, "OpenVINO", "problem", str(error), "pip install --force-reinstall 'dckt[openvino]'")
    found = f"computes in {', '.join(answer['precisions'])}"
    if answer["refused"]:
        found += f"; not in {', '.join(answer['refused'])}: {' '.join(answer['refused'].values())}"
    return Finding(_AREA, "OpenVINO", "ok" if answer["precisions"] else "problem", found)


def _tensorrt(devices: int) -> Finding:
    installed = importlib.util.find_spec("tensorrt") is not None
    # It may end the process where there is no GPU, so nothing of it is touched before one was seen.
    if not devices:
        there = "installed, and not asked" if installed else "not installed"
        return Finding(_AREA, "TensorRT", "ok", f"{there}: there is no CUDA device")
    if not installed:
        return Finding(_AREA, "TensorRT", "note", "not installed", "pip install 'dckt[tensorrt]', then dckt engine")
    try:
        about = ask("tensorrt")
    except ProbeError as error:
        return Finding(_AREA, "TensorRT", "problem", str(error), "pip install --force-reinstall 'dckt[tensorrt]'")
    found = f"{about['tensorrt']} on {about['gpu']} ({about['compute_capability']}), CUDA {about['runtime']}"
    return Finding(_AREA, "TensorRT", "ok", f"{found}, driver for {about['driver']}")


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")
