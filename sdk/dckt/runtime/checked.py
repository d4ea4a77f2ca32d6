"""What every backend checks: its graph once, each batch, and each result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from dckt.errors import BundleCorruptError, ConfigError, ItemError, ProviderError

INPUT_DTYPES = ("uint8", "int64", "float32")

Session = TypeVar("Session")


class Port(NamedTuple):
    """An input or output of a graph: its name, NumPy's name of its dtype, and each axis's size, None where it is free.

    A dtype that NumPy does not know has the backend's own name.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a graph takes, and the outputs that are asked of it.

    Attributes:
        input_name: name of the graph's one input.
        input_dtype: the only dtype that it takes.
        input_shape: size of each of its axes; None where it is free. The first is the batch.
        dimensions: width of each output by its name; each is float32 (B, width). The first is the main one.
    """

    input_name: str
    input_dtype: np.dtype[Any]
    input_shape: tuple[int | None, ...]
    dimensions: Mapping[str, int]

    @classmethod
    def of(cls, graph: Path, inputs: Sequence[Port], outputs: Sequence[Port], wanted: Sequence[str]) -> Self:
        """The signature of a graph that has one input and, among others, the outputs that are wanted.

        Args:
            graph: the file, to name it in errors.
            inputs: what the graph takes.
            outputs: what it gives.
            wanted: names of those that are to be computed, the main one first.

        Raises:
            BundleCorruptError: the inputs or an output are of another kind, or there is no such output.
        """
        if len(inputs) != 1 or inputs[0].dtype not in INPUT_DTYPES:
            found = ", ".join(f"{port.name} {port.dtype}" for port in inputs)
            raise BundleCorruptError(f"{graph}: takes {found}; expected one input of {', '.join(INPUT_DTYPES)}")
        ports = {port.name: port for port in outputs}
        return cls(
            input_name=inputs[0].name,
            input_dtype=np.dtype(inputs[0].dtype),
            input_shape=inputs[0].shape,
            dimensions={output: _width(graph, ports, output) for output in wanted},
        )

    def check_batch(self, batch: object) -> None:
        """Refuses what the graph does not take.

        Raises:
            ItemError: no array, or another dtype or shape.
        """
        if isinstance(batch, np.ndarray) and self._fits(batch):
            return
        given = f"{batch.dtype} {batch.shape}" if isinstance(batch, np.ndarray) else type(batch).__name__
        shape = ", ".join("any" if size is None else str(size) for size in self.input_shape)
        raise ItemError(f"{self.input_name} is {given}; expected an array {self.input_dtype} ({shape})")

    def check_vectors(self, vectors: Mapping[str, NDArray[np.float32]], rows: int) -> None:
        """Refuses what no index can use.

        Raises:
            BundleCorruptError: another shape than (rows, width).
            ItemError: a number that is not finite.
        """
        for output, of in vectors.items():
            expected = rows, self.dimensions[output]
            if of.shape != expected:
                raise BundleCorruptError(
                    f"output {output!r} came as {of.shape}, expected {expected}; export the model again"
                )
            bad = np.flatnonzero(~np.isfinite(of).all(axis=1))
            if bad.size:
                raise ItemError(f"the model gives numbers that are not finite for rows {bad[:10].tolist()}")

    def _fits(self, batch: NDArray[Any]) -> bool:
        if batch.dtype != self.input_dtype or batch.ndim != len(self.input_shape) or 0 in batch.shape[1:]:
            return False
        return all(want in {None, size} for want, size in zip(self.input_shape, batch.shape, strict=True))


def _width(graph: Path, ports: Mapping[str, Port], output: str) -> int:
    if output not in ports:
        raise BundleCorruptError(f"{graph}: has no output {output!r}, only {sorted(ports)}")
    _, dtype, shape = ports[output]
    if dtype != "float32" or len(shape) != 2 or shape[1] is None:
        raise BundleCorruptError(
            f"{graph}: output {output!r} is {dtype} {list(shape)}; expected float32 [batch, width] of a fixed width"
        )
    return shape[1]


class CheckedEncoder(ABC, Generic[Session]):
    """An :class:`dckt.runtime.Encoder` but for its backend: checks, the empty batch, closing.

    Attributes:
        input_name: name of the graph's one input.
        input_dtype: the only dtype that it takes.
        input_shape: size of each of its axes; None where it is free. The first is the batch.
        dimensions: width of each output that is computed, the main one first.
        variant: runtime and precision, such as ``openvino-bf16``.
        provider: what it really runs on.
    """

    def __init__(self, session: Session, signature: Signature, *, variant: str, provider: str) -> None:
        self.input_name = signature.input_name
        self.input_dtype = signature.input_dtype
        self.input_shape = signature.input_shape
        self.dimensions = signature.dimensions
        self.variant = variant
        self.provider = provider
        self._signature = signature
        self._session: Session | None = session

    @abstractmethod
    def _compute(self, session: Session, batch: NDArray[Any]) -> Sequence[NDArray[np.float32]]:
        """Each output for a checked batch with at least one row, in memory that nothing else writes to."""

    @property
    def dimension(self) -> int:
        """Width of the vectors of the main output."""
        return next(iter(self.dimensions.values()))

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """The main output: vectors (B, dimension); see :meth:`run_all`."""
        return next(iter(self.run_all(batch).values()))

    def run_all(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Vectors (B, width) of each output, float32, finite, of a batch whose first axis is B; B may be 0.

        The arrays are the caller's own: no later call writes to them.

        Raises:
            ItemError: the batch has another dtype or shape than the graph takes, or a vector is not finite.
            ProviderError: the backend failed, or the encoder is closed.
        """
        session = self._session  # a call that has begun keeps the session, even if another thread closes it
        if session is None:
            raise ProviderError("the encoder is closed; open it again")
        self._signature.check_batch(batch)
        if len(batch) == 0:
            return {output: np.zeros((0, width), np.float32) for output, width in self.dimensions.items()}
        vectors = dict(zip(self.dimensions, self._compute(session, batch), strict=True))
        self._signature.check_vectors(vectors, len(batch))
        return vectors

    def close(self) -> None:
        """Frees the session. Closing twice is harmless."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_threads(threads: int | None) -> None:
    """Refuses a number of threads below 1.

    Raises:
        ConfigError: see above.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1, or None")
