"""What the store gives: the items of a medium, and what commits did to them.

Shape letters: N vectors, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.index.vectors import Float32Array

# An item's id and its metadata as JSON.
Entry: TypeAlias = tuple[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the store holds of one medium.

    Attributes:
        labels: (N,) int64, ascending.
        matrix: (N, D) float32.
        postings: for every vector the items that share it, ids ascending.
        total: of the checksums of the items.
    """

    labels: NDArray[np.int64]
    matrix: Float32Array
    postings: list[list[Entry]]
    total: int


@dataclass(kw_only=True)
class Change:
    """What one or several commits did to one medium, in the order to repeat it.

    Attributes:
        removed: (label, id) of items that are gone or replaced; one that is not there is gone already.
        added: (label, id, metadata as JSON) of items that are new or replaced.
        vectors: by label, ascending, each vector that was not there before.
        more: by how much it changes the total of the items' checksums.
        items: how many there are after it.
        total: of their checksums.
    """

    removed: list[tuple[int, str]] = field(default_factory=list)
    added: list[tuple[int, str, str]] = field(default_factory=list)
    vectors: dict[int, Float32Array] = field(default_factory=dict)
    more: int = 0
    items: int = 0
    total: int = 0


@dataclass(frozen=True)
class Tuned:
    """What was asked of the graph of a medium, and what was measured for which graph."""

    target: float
    graph: str | None
    effort: int | None
    recall: float | None
