"""What only a native library can tell. Each is asked in a process of its own.

A library that was compiled for another processor, or is half installed, ends its process and not the examination. Run
as ``python -m dckt.commands.doctor.probes NAME ARGUMENT...``, this prints a line of JSON; :func:`ask` does that.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from dckt.errors import DcktError

# y = x, both (1,) float32, of ONNX opset 13: what the smallest session needs.
_GRAPH = b64decode("CAc6OwoQCgF4EgF5IghJZGVudGl0eRIFcHJvYmVaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN")
_SECONDS = 300


class ProbeError(Exception):
    """Why there is no answer; it never leaves the examination."""


def ask(name: str, *arguments: object) -> dict[str, Any]:
    """What a probe answers.

    Args:
        name: one of :data:`PROBES`.
        arguments: what it takes.

    Raises:
        ProbeError: the library refuses, or its process ended or did not.
    """
    # -P: a file in the working folder must not take the place of a package.
    command = [sys.executable, "-P", "-m", __name__, name, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"did not answer within {_SECONDS} s") from error
    lines = done.stdout.splitlines()
    if done.returncode < 0:
        raise ProbeError(f"ended its process by {_signal(-done.returncode)}")
    if done.returncode or not lines:
        raise ProbeError(f"ended its process with exit code {done.returncode}: {_last(done.stderr)}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise ProbeError(answer["error"])
    return answer


def hnswlib() -> dict[str, Any]:
    """Whether a graph can be built and searched."""
    import numpy as np
    from hnswlib import Index

    vectors = np.eye(8, dtype=np.float32)
    index = Index("ip", 8)
    index.init_index(len(vectors))
    index.add_items(vectors)
    found, _ = index.knn_query(vectors, k=1)
    return {"right": bool((found[:, 0] == np.arange(8)).all())}


def onnxruntime() -> dict[str, Any]:
    """Which providers were compiled in, which attach to a session, and how many CUDA devices the driver offers."""
    import onnxruntime

    from dckt.runtime.providers import CPU, CUDA, cuda_devices, preload_cuda, quiet

    compiled = onnxruntime.get_available_providers()
    attached, reason = [], ""
    for provider in (CPU, CUDA):
        if provider not in compiled:
            continue
        try:
            if provider == CUDA:
                reason = preload_cuda()
            with quiet("auto"):
                session = onnxruntime.InferenceSession(_GRAPH, providers=[provider], enable_fallback=0)
        except Exception as error:  # noqa: BLE001 - it raises many types for a provider that does not attach
            reason = f"{error}; {reason}"
            continue
        if session.get_providers()[0] == provider:
            attached.append(provider)
    return {"compiled": compiled, "attached": attached, "reason": reason, "devices": cuda_devices()}


def openvino() -> dict[str, Any]:
    """In which precisions OpenVINO computes here, and why not in the others."""
    from dckt.errors import ProviderError
    from dckt.runtime.openvino import PRECISIONS, check_openvino

    refused = {}
    for precision in PRECISIONS:
        try:
            check_openvino(precision)
        except ProviderError as error:
            refused[precision] = str(error)
    return {"precisions": [one for one in PRECISIONS if one not in refused], "refused": refused}


def tensorrt() -> dict[str, Any]:
    """What TensorRT says of this machine. Ask only where a CUDA device was seen."""
    from dckt.runtime.tensorrt.load import machine

    return asdict(machine())


def variant(bundle: str, name: str) -> dict[str, Any]:
    """Whether a variant of a bundle encodes an item of each medium, and what it runs on. Files were checked before."""
    import numpy as np

    from dckt.bundle import Bundle
    from dckt.runtime.choice import open_encoders

    opened = Bundle.open(bundle, verify=False)
    side = opened.manifest.image.side
    items: dict[str, Any] = {"image": np.zeros((1, side, side, 3), np.uint8), "text": np.ones((1, 1), np.int64)}
    encoders = open_encoders(opened, variant=name)
    runs_on = set()
    for medium, encoder in encoders.items():
        with encoder:
            usual = np.ones([size or 1 for size in encoder.input_shape], encoder.input_dtype)
            if not np.isfinite(encoder.run(items.get(medium, usual))).all():
                raise ProbeError(f"{medium}: the vector holds a number that is not finite")
            runs_on.add(f"{encoder.variant} on {encoder.provider.removesuffix('ExecutionProvider')}")
    return {"runs_on": sorted(runs_on)}


def engines(bundle: str) -> dict[str, Any]:
    """Which engines of a bundle fit this machine, and why the others do not. Ask only where a CUDA device was seen."""
    from dckt.bundle import Bundle
    from dckt.runtime.tensorrt.cache import find_engines
    from dckt.runtime.tensorrt.load import machine

    found = find_engines(Bundle.open(bundle, verify=False), machine())
    return {"fitting": [engine.precision for engine in found.fitting], "others": dict(found.others)}


PROBES: Mapping[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (hnswlib, onnxruntime, openvino, tensorrt, variant, engines)
}


def main(name: str, *arguments: str) -> None:
    """Prints what a probe answers, or what it raises, as the last line of standard output."""
    try:
        answer = PROBES[name](*arguments)
    except (DcktError, ProbeError) as error:
        answer = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is what was asked for
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(f"\n{json.dumps(answer)}")  # noqa: T201 - read by ask


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


if __name__ == "__main__":
    main(*sys.argv[1:])
