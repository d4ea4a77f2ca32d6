"""Running a graph: one narrow contract for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray


class Encoder(Protocol):
    """A graph that turns a batch of pixels or tokens into a batch of vectors.

    It computes one output, or several in one pass; the first is the main one. ``run`` and ``run_all`` may be called
    from several threads at once.
    """

    @property
    def input_name(self) -> str:
        """Name of the graph's one input."""
        ...

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """The only dtype that the input takes."""
        ...

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Size of each input axis; None where it is free. The first is the batch."""
        ...

    @property
    def dimension(self) -> int:
        """Width of the vectors of the main output."""
        ...

    @property
    def dimensions(self) -> Mapping[str, int]:
        """Width of each output that is computed, by its name, the main one first."""
        ...

    @property
    def variant(self) -> str:
        """Runtime and the precision that it computes in, for example ``"openvino-bf16"``."""
        ...

    @property
    def provider(self) -> str:
        """What the graph really runs on, for example ``"CPUExecutionProvider"``."""
        ...

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Vectors (B, dimension) of the main output, float32, finite, of a batch whose first axis is B; B may be 0.

        The array is the caller's own: no later call writes to it.

        Raises:
            ItemError: the batch has another dtype or shape than the graph takes, or a vector is not finite.
            ProviderError: the backend failed, or the encoder is closed.
        """
        ...

    def run_all(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """As :meth:`run`, for every output of :attr:`dimensions`, from one pass through the graph."""
        ...

    def close(self) -> None:
        """Frees the graph. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
