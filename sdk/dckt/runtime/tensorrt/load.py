"""TensorRT and the CUDA runtime, asked for only where there is a GPU.

TensorRT ends the process with a segmentation fault when it deserialises without a device, so every use of it begins
with :func:`load`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from dckt.errors import MissingExtraError, ProviderError

# Majors whose Python API this package was checked against.
MAJORS = (10, 11)
# The oldest architecture (Turing) for which both majors have kernels.
COMPUTE_CAPABILITY = (7, 5)
EXTRA = "tensorrt"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What an engine depends on beside its graph.

    Attributes:
        gpu: name of the device, as CUDA gives it.
        compute_capability: its architecture, such as ``"9.0"``.
        tensorrt: version of TensorRT, such as ``"10.16.1.11"``.
        driver: newest CUDA that the driver serves, such as ``"13.0"``.
        runtime: CUDA runtime that talks to it.
    """

    gpu: str
    compute_capability: str
    tensorrt: str
    driver: str
    runtime: str


def load() -> ModuleType:
    """The module ``tensorrt``, once a CUDA device that it can use was seen.

    Raises:
        MissingExtraError: ``tensorrt`` or ``cuda-python`` is not installed.
        ProviderError: there is no driver or no fit device, or TensorRT's libraries do not load.
    """
    _check_device()
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingExtraError("a TensorRT engine", EXTRA, "tensorrt")
    try:
        trt = import_module("tensorrt")
    # Its wheels load native libraries while they are imported: OSError, ImportError and RuntimeError were seen.
    except Exception as error:
        raise ProviderError(
            f"TensorRT is installed and does not load ({error}); "
            f"do: pip install --force-reinstall 'dckt[{EXTRA}]', for the CUDA that the driver serves"
        ) from error
    version = str(trt.__version__)
    if int(version.partition(".")[0]) not in MAJORS:
        expected = " or ".join(f"{major}.x" for major in MAJORS)
        raise ProviderError(f"TensorRT is {version}, expected {expected}; do: pip install 'dckt[{EXTRA}]'")
    return trt


def machine() -> Machine:
    """This machine, as far as an engine depends on it.

    Raises:
        MissingExtraError, ProviderError: as :func:`load`.
    """
    trt, cuda = load(), cuda_runtime()
    device = call(cuda.cudaGetDevice)
    return Machine(
        gpu=call(cuda.cudaGetDeviceProperties, device).name.decode(),
        compute_capability="{}.{}".format(*_capability(device)),
        tensorrt=str(trt.__version__),
        driver=_cuda_version(call(cuda.cudaDriverGetVersion)),
        runtime=_cuda_version(call(cuda.cudaRuntimeGetVersion)),
    )


def cuda_runtime() -> ModuleType:
    """The bindings of the CUDA runtime; importing them touches no device.

    Raises:
        MissingExtraError: ``cuda-python`` is not installed.
    """
    try:
        return import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise MissingExtraError("a TensorRT engine", EXTRA, "cuda-python") from error


def call(function: Any, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime.

    Returns:
        Its value; None if it has none.

    Raises:
        ProviderError: it did not succeed.
    """
    status, *values = function(*arguments)
    if status.value:
        raise ProviderError(f"CUDA: {function.__name__} failed: {_reason(status)}")
    return values[0] if values else None


def _check_device() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ProviderError(_explain(f"no NVIDIA driver ({error})")) from error
    cuda = cuda_runtime()
    status, count = cuda.cudaGetDeviceCount()
    if status.value or not count:
        served = _cuda_version(call(cuda.cudaDriverGetVersion))
        reason = _reason(status) if status.value else "no CUDA device"
        raise ProviderError(_explain(f"{reason}; the driver serves CUDA {served}"))
    device = call(cuda.cudaGetDevice)
    capability = _capability(device)
    if capability < COMPUTE_CAPABILITY:
        name = call(cuda.cudaGetDeviceProperties, device).name.decode()
        raise ProviderError(_explain("{} of compute capability {}.{}".format(name, *capability)))


def _explain(found: str) -> str:
    packages = {"tensorrt": "tensorrt", "cuda": "cuda-python"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        found += f"; not installed: {', '.join(missing)}"
    return "\n  ".join(
        (
            "a TensorRT engine cannot be built or run on this machine",
            f"found: {found}",
            f"needed: an NVIDIA driver, a GPU of compute capability {'.'.join(map(str, COMPUTE_CAPABILITY))} or newer, "
            f"and TensorRT {' or '.join(f'{major}.x' for major in MAJORS)}",
            f"do: on the machine that is to serve, pip install 'dckt[{EXTRA}]' and run dckt engine there; "
            "or serve another variant of the bundle, with ONNX Runtime or OpenVINO",
        )
    )


def _capability(device: int) -> tuple[int, int]:
    cuda = cuda_runtime()
    major = call(cuda.cudaDeviceGetAttribute, cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, device)
    minor = call(cuda.cudaDeviceGetAttribute, cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor, device)
    return int(major), int(minor)


def _reason(status: Any) -> str:
    _, text = cuda_runtime().cudaGetErrorString(status)
    return f"{text.decode()} ({status.name})"


def _cuda_version(number: int) -> str:
    """13020 is how CUDA writes 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
