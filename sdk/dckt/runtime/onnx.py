"""An encoder that runs on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from dckt.errors import BundleCorruptError, ItemError, ProviderError
from dckt.runtime.checked import CheckedEncoder, Port, Signature, check_threads
from dckt.runtime.providers import CPU, CUDA, Provider, explain_no_cuda, preload_cuda, quiet, resolve_providers

_DTYPES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(float)": "float32"}
# Every failure below comes as an exception, so ONNX Runtime need not print it too.
_SILENT = 4


class OnnxEncoder(CheckedEncoder[onnxruntime.InferenceSession]):
    """Outputs of one ONNX graph; see :class:`dckt.runtime.Encoder`. Make it with :meth:`open`."""

    def __init__(self, session: onnxruntime.InferenceSession, signature: Signature, *, precision: str) -> None:
        super().__init__(session, signature, variant=f"onnxruntime-{precision}", provider=session.get_providers()[0])

    @classmethod
    def open(
        cls,
        graph: Path,
        *,
        output: str,
        also: Sequence[str] = (),
        device: str = "auto",
        threads: int | None = None,
        precision: str = "fp32",
    ) -> Self:
        """Loads a graph.

        Args:
            graph: an ONNX file; its external data, if it has any, lies beside it.
            output: name of the main output to compute, float32 (B, D).
            also: names of others to compute in the same pass.
            device: ``"cpu"``; ``"cuda"``, or an error; or ``"auto"``: CUDA if it truly attaches, else the
                CPU.
            threads: threads that one call may use on the CPU; None leaves it to ONNX Runtime (one a core).
            precision: what the graph is written in, for the name of the variant. ONNX Runtime computes in just that.

        Raises:
            ConfigError: another device, or fewer than one thread.
            ProviderError: ``"cuda"`` was asked for and does not attach.
            BundleCorruptError: ONNX Runtime cannot load the file, or its inputs and outputs are others.
        """
        check_threads(threads)
        providers = resolve_providers(device)
        reason = ""
        if providers[0][0] == CUDA:
            reason = preload_cuda()
            try:
                with quiet(device):
                    session = _session(graph, providers, threads)
            # ONNX Runtime raises many types here, and none of them is for a device that is not there.
            except Exception as error:  # noqa: BLE001
                reason = f"{error}; {reason}"
                session = _cpu_session(graph, threads)
        else:
            session = _cpu_session(graph, threads)
        if device == "cuda" and session.get_providers()[0] != CUDA:
            raise ProviderError(explain_no_cuda(reason))
        signature = Signature.of(graph, _ports(session.get_inputs()), _ports(session.get_outputs()), [output, *also])
        return cls(session, signature, precision=precision)

    def _compute(self, session: onnxruntime.InferenceSession, batch: NDArray[Any]) -> Sequence[NDArray[np.float32]]:
        try:
            vectors = session.run(list(self.dimensions), {self.input_name: batch})
        except Exception as error:
            kind = ItemError if isinstance(error, InvalidArgument) else ProviderError
            raise kind(f"ONNX Runtime on {self.provider} refused a batch {batch.shape}: {error}") from error
        return vectors  # type: ignore[no-any-return]


def graph_ports(graph: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of an ONNX file.

    Raises:
        BundleCorruptError: ONNX Runtime cannot load the file.
    """
    session = _cpu_session(graph, 1, optimize=False)
    return _ports(session.get_inputs()), _ports(session.get_outputs())


def _ports(nodes: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(
        Port(
            node.name,
            _DTYPES.get(node.type, node.type),
            tuple(size if isinstance(size, int) else None for size in node.shape),
        )
        for node in nodes
    )


def _cpu_session(graph: Path, threads: int | None, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    try:
        return _session(graph, ((CPU, {}),), threads, optimize=optimize)
    except Exception as error:
        raise BundleCorruptError(
            f"{graph}: ONNX Runtime {onnxruntime.__version__} cannot load it ({error}); "
            "export the model again, or update onnxruntime"
        ) from error


def _session(
    graph: Path, providers: tuple[Provider, ...], threads: int | None, *, optimize: bool = True
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The fallback of ONNX Runtime prints to stdout and goes on with the CPU.
    return onnxruntime.InferenceSession(str(graph), options, providers=list(providers), enable_fallback=0)
