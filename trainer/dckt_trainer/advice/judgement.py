"""How candidates are judged on validation.

They are compared pair by pair on the same validation pairs. One is clearly ahead of another where the 95 % interval of
their difference is above 0. Of those that no other is clearly ahead of, the cheapest is advised.

Shape letters: S seeds, N validation pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from dckt_trainer.advice.candidates import Candidate, Trial, changes_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """Whether all of it is above 0."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """Whether all of it is below 0."""
        return self.high < 0

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low)


@dataclass(frozen=True, eq=False)
class Figures:
    """How a candidate does on validation.

    Attributes:
        candidate: which.
        per_pair: (S, N) average precision of each pair, the mean of its items as queries.
        seconds: that its training took, all seeds together.
        offered: whether its command would hand it out; `modern` leaves a source out that does not help clearly.
    """

    candidate: Candidate
    per_pair: NDArray[np.float64]
    seconds: float
    offered: bool = True

    @cached_property
    def map(self) -> Interval:
        """MAP, the mean over seeds."""
        return interval(self.per_pair)

    def less(self, other: Figures) -> Interval:
        """How far its MAP is ahead of another's, seed by seed and pair by pair."""
        return interval(self.per_pair - other.per_pair)


def interval(values: NDArray[np.float64]) -> Interval:
    """Mean of values (S, N) and its interval: Student's t over pairs, and on top the chance in training, over seeds.

    >>> interval(np.array([[0.0, 1.0, 2.0]]))
    Interval(mean=1.0, low=-1.48413771..., high=3.48413771...)
    """
    seeds, pairs = values.shape
    variance = values.mean(0).var(ddof=1) / pairs
    if seeds > 1:
        variance += values.mean(1).var(ddof=1) / seeds
    half = float(stdtrit(pairs - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class LeftOut:
    """A trial that shows nothing.

    Attributes:
        trial: which; it is told of as its last candidate, for the first of two has a trial of its own.
        why: ``time``, it would not have fitted into the rest of the budget; ``stopped``, it did not; ``memory``;
            ``failed``.
        seconds: what it was estimated at; None where that could not be.
        remaining: seconds of the budget that were left.
        detail: what went wrong, of one that failed or that the memory is too small for.
    """

    trial: Trial
    why: Literal["time", "stopped", "memory", "failed"]
    seconds: float | None
    remaining: float
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """Which candidate is advised.

    Attributes:
        chosen: the cheapest of those that no other is clearly ahead of.
        level: others that it is not clearly ahead of, the highest MAP first.
        behind: the rest, likewise.
    """

    chosen: Figures
    level: tuple[Figures, ...]
    behind: tuple[Figures, ...]


def judge(found: Sequence[Figures]) -> Verdict:
    """Chooses among candidates, cheapest first, at least one of which is offered."""
    offered = [each for each in found if each.offered]
    # The one with the highest MAP has nobody ahead of it, so there always is one.
    chosen = next(each for each in offered if not any(other.less(each).above for other in offered))
    others = sorted((each for each in offered if each is not chosen), key=lambda each: -each.map.mean)
    return Verdict(
        chosen,
        tuple(each for each in others if not chosen.less(each).above),
        tuple(each for each in others if chosen.less(each).above),
    )


@dataclass(frozen=True, eq=False)
class Advice:
    """What was tried, and what comes of it.

    Attributes:
        source: path of the corpus; None without one.
        target: likewise.
        pairs: of the target, ``train`` and ``val``.
        classes: of the target.
        changes: the user's own settings, ``section.key=value`` each.
        skip_bad: whether bad pairs were skipped.
        seeds: how often each candidate was trained.
        budget: in seconds.
        spent: likewise.
        figures: of the candidates that were trained, cheapest first; one at least.
        left_out: the others.
    """

    source: str | None
    target: str
    pairs: Mapping[str, int]
    classes: int
    changes: tuple[str, ...]
    skip_bad: bool
    seeds: int
    budget: float
    spent: float
    figures: tuple[Figures, ...]
    left_out: tuple[LeftOut, ...]

    @cached_property
    def verdict(self) -> Verdict:
        """See :func:`judge`."""
        return judge(self.figures)

    @property
    def command(self) -> list[str]:
        """Trains what is advised, and tests it."""
        chosen = self.verdict.chosen.candidate
        source = self.source if chosen.source else None
        return [
            "dckt-train",
            *(["--source", source] if source else []),
            *["--target", self.target, "--preset", chosen.preset],
            *[word for each in changes_of(chosen, self.changes, source=bool(source)) for word in ("--set", each)],
            *(["--on-bad-pair", "skip"] if self.skip_bad else []),
            *["--out", f"runs/{Path(self.target.partition(':')[0]).stem}"],
        ]

    @property
    def with_and_without(self) -> tuple[Figures, Figures] | None:
        """What is compared to tell what the source brings: with it, and without it; the advised is one of them."""
        chosen = self.verdict.chosen
        others = [each for each in self.figures if each.candidate.source != chosen.candidate.source]
        if not others:
            return None
        best = max(others, key=lambda each: each.map.mean)
        return (chosen, best) if chosen.candidate.source else (best, chosen)
