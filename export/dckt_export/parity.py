"""The retrieval gate: does the exported model rank as the PyTorch model does?

Shape letters: N pairs, D width of a representation. A bound on the largest difference says little: 1e-4 may be
nothing, or may turn rankings over. So vectors are compared by direction, row by row, and rankings by MAP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ConfigError, ParityError
from dckt.metrics import mean_average_precision
from dckt_trainer.config import read_toml
from dckt_trainer.media import directions

Vectors = Mapping[str, NDArray[np.float32]]

HERE = Path(__file__).parent
TOP = 10
WORST = 5
# Shorter than this share of its medium's median, a vector is rounding error around zero and has no direction.
NEAR_ZERO = 1e-6
# Scores this close tie: float32 cannot tell them apart.
NEAR_TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class MediumParity:
    """How close the vectors of one medium are.

    Attributes:
        rows: N.
        cosine_min: of each PyTorch vector with its exported one: the smallest,
        cosine_p1: the first percentile,
        cosine_median: and the median.
        max_difference: the largest absolute difference of two numbers.
        worst: ids of the rows with the smallest cosine, and that cosine.
    """

    rows: int
    cosine_min: float
    cosine_p1: float
    cosine_median: float
    max_difference: float
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class RankingParity:
    """How close the rankings of one direction are.

    Attributes:
        map_torch: MAP of the PyTorch model.
        map_exported: MAP of the exported model.
        interval: half the width of the 95 % interval of their difference, from the queries' differences of AP. On a
            hundred pairs one query whose first two results change places moves MAP by half a point, either way.
        top10_overlap: mean share of the exported model's first ten that belong to PyTorch's first ten, near ties
            with the tenth included.
    """

    map_torch: float
    map_exported: float
    interval: float
    top10_overlap: float


@dataclass(frozen=True)
class Parity:
    """One representation of both models, compared.

    Attributes:
        media: by medium.
        directions: by direction, such as ``image_to_text``: every ordered pair of media.
    """

    media: Mapping[str, MediumParity]
    directions: Mapping[str, RankingParity]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What an exported model must keep.

    Attributes:
        cosine_min: every row's cosine is at least this.
        cosine_median: the median of the rows' cosines is at least this.
        map_change: MAP of each direction changes by less than this, or no more than chance may do in one of them.
    """

    cosine_min: float
    cosine_median: float
    map_change: float


def read_thresholds(path: Path | None = None) -> dict[str, Thresholds]:
    """What each precision must keep, from a TOML file with a table for each, as ``thresholds.toml`` beside this module.

    Args:
        path: the file; what it leaves out is as in ours. None reads ours alone.

    Raises:
        ConfigError: the file cannot be read, or names what is none of ours, or a number is out of range.
    """
    _, tables = read_toml("thresholds", HERE, "thresholds")
    given = read_toml(path, HERE, "thresholds")[1] if path else {}
    for precision, values in given.items():
        if precision not in tables or not isinstance(values, dict) or not values.keys() <= tables[precision].keys():
            names = ", ".join(field.name for field in fields(Thresholds))
            raise ConfigError(f"{path}: {precision} = {values}; expected tables {', '.join(tables)} with {names}")
        tables[precision] |= values
    for precision, values in tables.items():
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{path}: {name} of [{precision}] is {value!r}; expected a number from 0 to 1")
    return {precision: Thresholds(**values) for precision, values in tables.items()}


def measure(torch: Vectors, onnx: Vectors, labels: Sequence[str], ids: Sequence[str]) -> Parity:
    """Compares the vectors of the same pairs from two models.

    Args:
        torch: (N, D) of ``image``, ``text`` and any other medium, from PyTorch.
        onnx: likewise, from the exported model.
        labels: N labels.
        ids: N ids, to name rows by.

    Raises:
        ParityError: the shapes differ, or a number is not finite.
    """
    for medium in torch:
        for name, vectors in (("the PyTorch model", torch[medium]), ("the exported model", onnx[medium])):
            _check_finite(f"{name}, {medium}", vectors, ids)
        if torch[medium].shape != onnx[medium].shape:
            raise ParityError(
                f"{medium}: the exported model gives {onnx[medium].shape}, the PyTorch model {torch[medium].shape}"
            )
    return Parity(
        media={medium: _medium(torch[medium], onnx[medium], ids) for medium in torch},
        directions={name: _direction(torch, onnx, labels, *two) for name, two in directions(torch).items()},
    )


def failures(parity: Mapping[str, Parity], thresholds: Thresholds) -> list[str]:
    """What an exported model does not keep, a line each, with figures and the worst rows; empty if it passes.

    Args:
        parity: by the name of the representation.
        thresholds: what is to be kept.
    """
    rankings = sum(len(one.directions) for one in parity.values())
    if not rankings:  # no representation could be compared; why not is said where that was found
        return []
    # One ranking in twenty is beyond its own interval by chance; of four, one in five exports would have such a one.
    wider = _deviations(rankings) / _deviations(1)
    return [line for name, one in parity.items() for line in _failures(name, one, thresholds, wider)]


def _deviations(rankings: int) -> float:
    """Standard deviations within which so many rankings stay, all of them, with 95 % (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 0.05 / 2 / rankings)


def _failures(name: str, parity: Parity, thresholds: Thresholds, wider: float) -> list[str]:
    lines = []
    for medium, one in parity.media.items():
        if one.cosine_min < thresholds.cosine_min:
            worst = ", ".join(f"{row} ({cosine:.6f})" for row, cosine in one.worst)
            lines.append(
                f"{name}, {medium}: cosine of {one.rows} rows down to {one.cosine_min:.6f} (median "
                f"{one.cosine_median:.6f}), expected at least {thresholds.cosine_min}; worst rows: {worst}"
            )
        if one.cosine_median < thresholds.cosine_median:
            lines.append(
                f"{name}, {medium}: median cosine of {one.rows} rows {one.cosine_median:.6f}, expected at least "
                f"{thresholds.cosine_median}"
            )
    for direction, ranking in parity.directions.items():
        change, interval = ranking.map_exported - ranking.map_torch, wider * ranking.interval
        if abs(change) >= thresholds.map_change and abs(change) > interval:
            lines.append(
                f"{name}, {direction.replace('_', ' ')}: MAP {ranking.map_torch:.4f} became {ranking.map_exported:.4f} "
                f"({change:+.4f} ± {interval:.4f}), expected a change below {thresholds.map_change}; "
                f"overlap of the top {TOP}: {ranking.top10_overlap:.3f}"
            )
    return lines


def _check_finite(name: str, vectors: NDArray[np.float32], ids: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        shown = ", ".join(ids[row] for row in bad[:WORST])
        raise ParityError(f"{name}: numbers that are not finite in {bad.size} of {len(ids)} rows, first {shown}")


def _medium(torch: NDArray[np.float32], onnx: NDArray[np.float32], ids: Sequence[str]) -> MediumParity:
    cosines = _cosines(torch.astype(np.float64), onnx.astype(np.float64))
    worst = np.argsort(cosines, kind="stable")[:WORST]
    return MediumParity(
        rows=len(ids),
        cosine_min=float(cosines.min()),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_median=float(np.median(cosines)),
        max_difference=float(np.abs(torch.astype(np.float64) - onnx).max()),
        worst=tuple((ids[row], float(cosines[row])) for row in worst),
    )


def _cosines(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each row of both, at most 1; of two zero vectors 1, of one with another vector 0."""
    norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    zero = NEAR_ZERO * np.median(norms[0])
    both, either = np.maximum(*norms) <= zero, np.minimum(*norms) <= zero
    product = np.where(either, 1.0, norms[0] * norms[1])
    cosines: NDArray[np.float64] = np.minimum((left * right).sum(axis=1) / product, 1.0)
    return np.where(both, 1.0, np.where(either, 0.0, cosines))


def _direction(torch: Vectors, onnx: Vectors, labels: Sequence[str], queries: str, items: str) -> RankingParity:
    before, after = (mean_average_precision(model[queries], labels, model[items], labels) for model in (torch, onnx))
    scores = _unit(torch[queries]) @ _unit(torch[items]).T
    ranked = np.argsort(-(_unit(onnx[queries]) @ _unit(onnx[items]).T), axis=1, kind="stable")[:, :TOP]
    tenth = -np.sort(-scores, axis=1)[:, ranked.shape[1] - 1]
    kept = np.take_along_axis(scores, ranked, axis=1) >= tenth[:, None] - NEAR_TIE
    changes = after.per_query - before.per_query
    return RankingParity(
        map_torch=before.map,
        map_exported=after.map,
        interval=float(_deviations(1) * changes.std() / np.sqrt(len(changes))),
        top10_overlap=float(kept.mean()),
    )


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(norms > 0, norms, 1)
    return unit
