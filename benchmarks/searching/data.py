"""Vectors to search, made from a seed: what class probabilities, embeddings and collections of copies look like.

Shape letters: N items, Q queries, D width, C classes. All rows are float32 of length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Generator = np.random.Generator


@dataclass(frozen=True)
class VectorSet:
    """Items and queries.

    Attributes:
        name: in the tables.
        items: (N, D), in the order in which they are to be inserted.
        queries: (Q, D).
    """

    name: str
    items: Rows
    queries: Rows

    @property
    def dimension(self) -> int:
        """The width D."""
        return int(self.items.shape[1])


def soft(items: int, queries: int, classes: int) -> VectorSet:
    """Class probabilities of a network that is seldom sure: all rows differ."""
    rows = probabilities(np.random.default_rng(classes), items + queries, classes, margin=(2.0, 2.0))
    return VectorSet(f"p{classes}soft", rows[:items], rows[items:])


def saturated(items: int, queries: int, classes: int) -> VectorSet:
    """Class probabilities of a network that is nearly always sure, rounded to 4 decimals: many rows are equal."""
    margin = (6.0, SATURATION[classes])
    rows = probabilities(np.random.default_rng(classes), items + queries, classes, margin=margin, decimals=4)
    return VectorSet(f"p{classes}sat", rows[:items], rows[items:])


SATURATION = {10: 3.9, 200: 3.9}  # of 100,000 rows about 7,000 and 11,500 differ


def embeddings(items: int, queries: int, dimension: int) -> VectorSet:
    """Embeddings as of a trained encoder: 200 clusters in 24 dimensions, turned into D, and a little noise."""
    generator = np.random.default_rng(dimension)
    centres = generator.standard_normal((200, 24))
    latent = centres[generator.integers(200, size=items + queries)]
    latent = latent + 0.5 * generator.standard_normal(latent.shape)
    rows = (latent @ generator.standard_normal((24, dimension))).astype(np.float32)
    rows += 0.1 * generator.standard_normal(rows.shape, dtype=np.float32)
    unit = unit_rows(rows)
    return VectorSet(f"e{dimension}", unit[:items], unit[items:])


def one_hot(items: int, queries: int) -> VectorSet:
    """Ten one-hot vectors, inserted class by class. Half of the queries are such vectors, half soft probabilities."""
    generator = np.random.default_rng(0)
    corners = np.eye(10, dtype=np.float32)
    asked = corners[generator.integers(10, size=queries)]
    asked[::2] = probabilities(generator, len(asked[::2]), 10, margin=(2.0, 2.0))
    return VectorSet("one-hot, class by class", corners[np.sort(np.arange(items) % 10)], asked)


def half_identical(items: int, queries: int, *, first: bool) -> VectorSet:
    """Half of the items are one vector, the others point anywhere in 64 dimensions, and so do the queries.

    Args:
        items: N.
        queries: Q.
        first: insert the copies before the others, instead of shuffled among them.
    """
    generator = np.random.default_rng(1)
    rows = unit_rows(generator.standard_normal((items + queries, 64), dtype=np.float32))
    copies = np.arange(items) < items // 2
    if not first:
        copies = generator.permutation(copies)
    kept = rows[:items].copy()
    kept[copies] = kept[0]
    return VectorSet(f"half identical, {'first' if first else 'shuffled'}", kept, rows[items:])


TIES: tuple[Callable[[int, int], VectorSet], ...] = (
    one_hot,
    lambda items, queries: half_identical(items, queries, first=False),
    lambda items, queries: half_identical(items, queries, first=True),
    lambda items, queries: saturated(items, queries, 10),
    lambda items, queries: saturated(items, queries, 200),
)


def probabilities(
    generator: Generator, count: int, classes: int, *, margin: tuple[float, float], decimals: int | None = None
) -> Rows:
    """Softmax outputs, each scaled to length 1.

    Args:
        generator: of labels and logits.
        count: N.
        classes: C.
        margin: shape and scale of the gamma distribution by which the logit of a row's class stands out.
        decimals: to which the probabilities are rounded before they are scaled; None leaves them.
    """
    labels = generator.integers(classes, size=count)
    logits = generator.standard_normal((count, classes), dtype=np.float32)
    logits[np.arange(count), labels] += generator.gamma(*margin, size=count).astype(np.float32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    rows = weights / weights.sum(axis=1, keepdims=True)
    return unit_rows(rows if decimals is None else np.round(rows, decimals))


def unit_rows(rows: Rows) -> Rows:
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)
