"""An encoder that runs on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from dckt.errors import BundleCorruptError, ConfigError, ItemError, ProviderError
from dckt.runtime.providers import CPU, CUDA, Provider, explain_no_cuda, preload_cuda, quiet, resolve_providers

_DTYPES = {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(float)": np.float32}
# Every failure below comes as an exception, so ONNX Runtime need not print it too.
_SILENT = 4


class OnnxEncoder:
    """One output of one ONNX graph; see :class:`dckt.runtime.Encoder`. Make it with :meth:`open`.

    Attributes:
        input_name: name of the graph's one input.
        input_dtype: the only dtype that it takes.
        input_shape: size of each of its axes; None where it is free. The first is the batch.
        dimension: width of the vectors.
        provider: what the session really runs on.
    """

    def __init__(self, session: onnxruntime.InferenceSession, graph: Path, output: str) -> None:
        inputs, outputs = session.get_inputs(), {node.name: node for node in session.get_outputs()}
        if len(inputs) != 1 or inputs[0].type not in _DTYPES:
            found = ", ".join(f"{node.name} {node.type}" for node in inputs)
            raise BundleCorruptError(f"{graph}: takes {found}; expected one input of {', '.join(_DTYPES)}")
        if output not in outputs:
            raise BundleCorruptError(f"{graph}: has no output {output!r}, only {sorted(outputs)}")
        shape = outputs[output].shape
        if outputs[output].type != "tensor(float)" or len(shape) != 2 or not isinstance(shape[1], int):
            raise BundleCorruptError(
                f"{graph}: output {output!r} is {outputs[output].type} {shape}; "
                "expected tensor(float) [batch, width] of a fixed width"
            )
        self.input_name: str = inputs[0].name
        self.input_dtype: np.dtype[Any] = np.dtype(_DTYPES[inputs[0].type])
        self.input_shape: tuple[int | None, ...] = tuple(
            size if isinstance(size, int) else None for size in inputs[0].shape
        )
        self.dimension: int = shape[1]
        self.provider: str = session.get_providers()[0]
        self._output = output
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def open(cls, graph: Path, *, output: str, device: str = "auto", threads: int | None = None) -> Self:
        """Loads a graph.

        Args:
            graph: an ONNX file; its external data, if it has any, lies beside it.
            output: name of the output to compute, float32 (B, D).
            device: ``"cpu"``; ``"cuda"``, or an error; or ``"auto"``: CUDA if it truly attaches, else the
                CPU.
            threads: threads that one call may use on the CPU; None leaves it to ONNX Runtime (one a core).

        Raises:
            ConfigError: another device, or fewer than one thread.
            ProviderError: ``"cuda"`` was asked for and does not attach.
            BundleCorruptError: ONNX Runtime cannot load the file, or its inputs and outputs are others.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; expected at least 1, or None")
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
        return cls(session, graph, output)

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Vectors (B, dimension), float32, finite, of a batch whose first axis is B; B may be 0.

        Raises:
            ItemError: the batch has another dtype or shape than the graph takes, or a vector is not finite.
            ProviderError: ONNX Runtime failed, or the encoder is closed.
        """
        session = self._session  # a call that has begun keeps the session, even if another thread closes it
        if session is None:
            raise ProviderError("the encoder is closed; open it again")
        self._check(batch)
        if len(batch) == 0:
            return np.zeros((0, self.dimension), np.float32)
        try:
            (vectors,) = session.run([self._output], {self.input_name: batch})
        except Exception as error:
            kind = ItemError if isinstance(error, InvalidArgument) else ProviderError
            raise kind(f"ONNX Runtime on {self.provider} refused a batch {batch.shape}: {error}") from error
        if vectors.shape != (len(batch), self.dimension):
            raise BundleCorruptError(
                f"output {self._output!r} came as {vectors.shape}, expected {(len(batch), self.dimension)}; "
                "export the model again"
            )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise ItemError(f"the model gives numbers that are not finite for rows {bad[:10].tolist()}")
        return vectors  # type: ignore[no-any-return]

    def close(self) -> None:
        """Frees the session. Closing twice is harmless."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, batch: object) -> None:
        if isinstance(batch, np.ndarray) and self._fits(batch):
            return
        given = f"{batch.dtype} {batch.shape}" if isinstance(batch, np.ndarray) else type(batch).__name__
        shape = ", ".join("any" if size is None else str(size) for size in self.input_shape)
        raise ItemError(f"{self.input_name} is {given}; expected an array {self.input_dtype} ({shape})")

    def _fits(self, batch: NDArray[Any]) -> bool:
        if batch.dtype != self.input_dtype or batch.ndim != len(self.input_shape) or 0 in batch.shape[1:]:
            return False
        return all(want in {None, size} for want, size in zip(self.input_shape, batch.shape, strict=True))


def _cpu_session(graph: Path, threads: int | None) -> onnxruntime.InferenceSession:
    try:
        return _session(graph, ((CPU, {}),), threads)
    except Exception as error:
        raise BundleCorruptError(
            f"{graph}: ONNX Runtime {onnxruntime.__version__} cannot load it ({error}); "
            "export the model again, or update onnxruntime"
        ) from error


def _session(graph: Path, providers: tuple[Provider, ...], threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    # The fallback of ONNX Runtime prints to stdout and goes on with the CPU.
    return onnxruntime.InferenceSession(str(graph), options, providers=list(providers), enable_fallback=0)
