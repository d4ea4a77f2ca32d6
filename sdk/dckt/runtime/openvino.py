"""An encoder that runs on OpenVINO, on the CPU. Nothing here imports OpenVINO before an encoder is opened."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dckt.errors import BundleCorruptError, ConfigError, MissingExtraError, ProviderError
from dckt.runtime.checked import CheckedEncoder, Port, Signature, check_threads

PRECISIONS = ("fp32", "bf16", "int8")
_DEVICE = "CPU"
_DTYPES = {"u8": "uint8", "i64": "int64", "f32": "float32"}
_TELEMETRY = "openvino_telemetry"
_importing = threading.Lock()
_making = threading.Lock()


class OpenVinoEncoder(CheckedEncoder["_Requests"]):
    """Outputs of one ONNX graph; see :class:`dckt.runtime.Encoder`. Make it with :meth:`open`.

    A token id that the vocabulary does not hold is an error in ONNX Runtime; OpenVINO reads zeros there.
    """

    @classmethod
    def open(
        cls, graph: Path, *, output: str, precision: str, also: Sequence[str] = (), threads: int | None = None
    ) -> Self:
        """Loads a graph.

        Args:
            graph: an ONNX file; its external data, if it has any, lies beside it.
            output: name of the main output to compute, float32 (B, D).
            precision: what to compute in. ``"fp32"``; ``"bf16"``, from a graph in fp32; or ``"int8"``, for a graph
                with quantised layers, whose other layers then run in bf16 where the CPU has it.
            also: names of others to compute in the same pass. What only the rest of the outputs need is left out.
            threads: threads that one call may use; None leaves it to OpenVINO (one a core).

        Raises:
            ConfigError: another precision, or fewer than one thread.
            MissingExtraError: OpenVINO is not installed.
            ProviderError: OpenVINO does not work here, or the CPU does not compute in bf16.
            BundleCorruptError: OpenVINO cannot load the file, or its inputs and outputs are others.
        """
        check_threads(threads)
        core = _core(precision)
        settings = {"INFERENCE_PRECISION_HINT": _hint(core, precision), "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        openvino = import_openvino()
        try:
            model = _read(openvino, graph)
            signature = Signature.of(graph, _inputs(model), _outputs(model), [output, *also])
            ports = {name: port for port in model.outputs for name in port.get_names()}
            wanted = [ports[name].get_node() for name in signature.dimensions]
            # A batch axis that is free costs a few percent at batch 1; a second copy of the weights costs more.
            compiled = core.compile_model(openvino.Model(wanted, model.get_parameters()), _DEVICE, settings)
        except BundleCorruptError:
            raise
        # What OpenVINO raises here is of several types, and RuntimeError for most reasons.
        except Exception as error:
            raise BundleCorruptError(
                f"{graph}: OpenVINO {_version(openvino)} cannot load it ({_one_line(error)}); "
                "export the model again, update openvino, or choose another variant"
            ) from error
        return cls(_Requests(compiled), signature, variant=f"openvino-{precision}", provider=_DEVICE)

    def _compute(self, session: _Requests, batch: NDArray[Any]) -> Sequence[NDArray[np.float32]]:
        try:
            return session.infer(batch)
        except Exception as error:
            raise ProviderError(f"OpenVINO refused a batch {batch.shape}: {_one_line(error)}") from error


class _Requests:
    """A compiled model that many threads may call: a request serves one call at a time, and is used again."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: deque[Any] = deque()  # appending to it and popping from it are atomic

    def infer(self, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        # The batch is read where it lies. The outputs are copied, for the next call writes to that memory.
        outputs = request.infer({0: np.ascontiguousarray(batch)}, share_inputs=True, share_outputs=False)
        self._idle.append(request)
        return [outputs[place] for place in range(len(outputs))]


def check_openvino(precision: str) -> None:
    """Whether OpenVINO can compute in a precision on this machine.

    Args:
        precision: one of :data:`PRECISIONS`.

    Raises:
        ConfigError: another precision.
        MissingExtraError: OpenVINO is not installed.
        ProviderError: OpenVINO does not work here, or the CPU does not compute in bf16.
    """
    _core(precision)


def has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this machine's CPU.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ProviderError: OpenVINO does not work here.
    """
    return "BF16" in _capabilities(_core("fp32"))


def import_openvino() -> ModuleType:
    """The package, without its telemetry: unasked, it reports its import to its makers and keeps an id in HOME.

    Raises:
        MissingExtraError: it is not installed.
        ProviderError: it is, and cannot be imported.
    """
    with _importing:
        hide = "openvino" not in sys.modules
        hidden = sys.modules.get(_TELEMETRY)
        try:
            if hide:
                sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it fails, which it is ready for
            return import_module("openvino")
        except ModuleNotFoundError as error:
            if error.name != "openvino":
                raise ProviderError(f"openvino is installed and cannot be imported ({error})") from error
            raise MissingExtraError("a variant of OpenVINO", "openvino", "openvino") from error
        except ImportError as error:
            raise ProviderError(f"openvino is installed and cannot be imported ({error})") from error
        finally:
            if hide:
                del sys.modules[_TELEMETRY]
                if hidden is not None:
                    sys.modules[_TELEMETRY] = hidden


def _core(precision: str) -> Any:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; OpenVINO computes in {', '.join(PRECISIONS)}")
    openvino = import_openvino()
    try:
        with _making:
            core = _shared_core()
        capabilities = _capabilities(core)
    except Exception as error:
        raise ProviderError(f"OpenVINO {_version(openvino)} finds no CPU ({_one_line(error)})") from error
    if precision == "bf16" and "BF16" not in capabilities:
        name = core.get_property(_DEVICE, "FULL_DEVICE_NAME")
        raise ProviderError(
            f"openvino-bf16 needs a CPU with BF16; {name} has {', '.join(capabilities)}; choose openvino-fp32 or auto"
        )
    return core


@cache
def _shared_core() -> Any:
    """The one core of this process, which is never freed.

    On a CPU with AMX a core gives its thread an alternate signal stack, and takes it back when it is freed. Two cores
    that are not freed in the reverse order leave the thread with a stack that is no longer mapped, and the next signal,
    such as Ctrl-C, is a segmentation fault (seen with OpenVINO 2026.4.1).
    """
    return import_openvino().Core()


def _capabilities(core: Any) -> list[str]:
    return list(core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))


def _hint(core: Any, precision: str) -> str:
    """What floating point layers compute in. Left to itself, OpenVINO takes bf16 for fp32 graphs as well."""
    low = precision == "bf16" or (precision == "int8" and "BF16" in _capabilities(core))
    return "bf16" if low else "f32"


def _read(openvino: ModuleType, graph: Path) -> Any:
    # Core.read_model would try every format that it knows, whatever the file's name.
    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(str(graph)))


def _inputs(model: Any) -> list[Port]:
    return [_port(port.get_node().get_friendly_name(), port) for port in model.inputs]


def _outputs(model: Any) -> list[Port]:
    return [_port(name, port) for port in model.outputs for name in port.get_names()]


def _port(name: str, port: Any) -> Port:
    kind = port.get_element_type().get_type_name()
    shape = port.get_partial_shape()
    sizes = () if shape.rank.is_dynamic else tuple(axis.get_length() if axis.is_static else None for axis in shape)
    return Port(name, _DTYPES.get(kind, kind), sizes)


def _version(openvino: ModuleType) -> str:
    return str(openvino.__version__).partition("-")[0]  # without the build's number and branch


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
