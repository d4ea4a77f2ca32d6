"""Which ONNX Runtime execution provider a graph is to run on, and why it does not when it does not."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import onnxruntime

from dckt.errors import ConfigError, ProviderError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
DEVICES = ("auto", "cpu", "cuda")

Provider = tuple[str, dict[str, Any]]

# Without TF32 a float32 graph gives the CPU's vectors, so one index serves both. The heuristic search spares
# a second-long benchmark for each new batch size.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def check_device(device: str) -> None:
    """Refuses a device that is none of :data:`DEVICES`.

    Raises:
        ConfigError: see above.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; expected one of {', '.join(DEVICES)}")


def cuda_devices() -> int:
    """How many GPUs NVIDIA's driver offers to this process; 0 without a driver. No memory is taken on them."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else count.value


def resolve_providers(device: str) -> tuple[Provider, ...]:
    """Providers to ask a session for, best first, each with its options.

    Args:
        device: ``"cpu"``; ``"cuda"``; or ``"auto"``, which asks for CUDA where ONNX Runtime was built with
            it.

    Raises:
        ConfigError: another device.
        ProviderError: ``"cuda"`` and an ONNX Runtime without it.
    """
    check_device(device)
    built_with_cuda = CUDA in onnxruntime.get_available_providers()
    if device == "cuda" and not built_with_cuda:
        raise ProviderError(explain_no_cuda())
    if device == "cpu" or not built_with_cuda:
        return ((CPU, {}),)
    return ((CUDA, _CUDA_OPTIONS), (CPU, {}))


def preload_cuda() -> str:
    """Loads CUDA and cuDNN as pip installed them, off the search path; returns what could not be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"there is no NVIDIA driver ({error})"
    printed = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(printed):  # it prints what it cannot load
            onnxruntime.preload_dlls()
    return " ".join(printed.getvalue().split())


@contextlib.contextmanager
def quiet(device: str) -> Iterator[None]:
    """Keeps ONNX Runtime from printing that CUDA did not attach, where that is no failure: under ``"auto"``."""
    if device == "auto":
        onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        if device == "auto":
            onnxruntime.set_default_logger_severity(2)  # what it starts with; there is no way to ask


def explain_no_cuda(reason: str = "") -> str:
    """Why CUDA did not attach: what was found, what is needed, and what to do.

    Args:
        reason: what ONNX Runtime itself said, if it said anything.
    """
    installed = _installed()
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    lines = [
        "device 'cuda' was asked for and CUDA did not attach" + (f": {reason}" if reason else ""),
        f"found: {versions or 'no distribution of ONNX Runtime'}; "
        f"providers: {', '.join(onnxruntime.get_available_providers())}",
    ]
    if len(installed) > 1:
        lines.append("cause: onnxruntime and onnxruntime-gpu install the same files, so one has overwritten the other")
    needed = getattr(onnxruntime, "cuda_version", "")
    lines.append(
        f"needed: an NVIDIA driver, CUDA {needed} and cuDNN 9"
        if needed
        else "needed: an NVIDIA driver, and onnxruntime-gpu with the CUDA and cuDNN that it was built for"
    )
    lines.append(
        "do: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'; "
        "or choose device 'cpu' or 'auto'"
    )
    return "\n  ".join(lines)


def _installed() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
