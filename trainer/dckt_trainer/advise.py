"""Which method to use: the candidates, how they are judged on validation, and the words for it.

Nothing here trains; :mod:`dckt_trainer.advise_run` does. Candidates are compared pair by pair on the same validation
pairs. One is clearly ahead of another where the 95 % interval of their difference is above 0. Of those that no other is
clearly ahead of, the cheapest is advised.

Shape letters: S seeds, N validation pairs.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from dckt.errors import ConfigError
from dckt_trainer.config import Config, load_config

CONFIDENCE = 0.95
FEW_PAIRS = 50  # of validation; with fewer the words say so
OURS = ("seed", "model.kind", "pretrain.target_start")  # keys that the candidates differ in
COLUMNS = ("MAP", "95 %", "less the advised", "took")
NOTE = (
    "MAP on validation, the mean of all directions; * is advised. Differences are pair by pair, with their 95 % "
    "interval. The first candidate's time includes the image features that were not cached yet."
)

_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


# --- candidates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Something that a user could train.

    Attributes:
        key: for programs.
        title: for tables.
        words: behind "Use", where there is a source.
        network: which of a run's networks it is: ``model_t0``, ``last``, or ``kept``, the one that the run keeps.
        preset: of the command that trains it.
        changes: likewise, ``section.key=value`` each.
        source: whether it takes anything from the source.
    """

    key: str
    title: str
    words: str
    network: Literal["model_t0", "last", "kept"]
    preset: str
    changes: tuple[str, ...]
    source: bool


@dataclass(frozen=True)
class Trial:
    """A training that shows one candidate or more.

    Attributes:
        name: of its run folders.
        candidates: with the preset and changes of the first it is trained, and with the source if the last has one.
        unless: a trial that shows this one's candidates as well; this one is for when that was left out.
        base: a trial whose pretrained source it takes over.
    """

    name: str
    candidates: tuple[Candidate, ...]
    unless: str = ""
    base: str = ""

    @property
    def source(self) -> bool:
        """Whether it reads the source."""
        return self.candidates[-1].source

    def changes(self, more: Iterable[str]) -> tuple[str, ...]:
        """What it changes of its preset: what the user does, as far as it is there to be changed, and its own."""
        return changes_of(self.candidates[0], more, source=self.source)


_ALONE = Candidate("modern-alone", "modern alone", "`modern` without the source", "model_t0", "modern", (), False)
_LINEAR = Candidate("modern", "modern with source", "`modern` with the source", "last", "modern", (), True)
_NETWORK = Candidate(
    "network-alone",
    "network alone",
    "the network of `small` without the source",
    "kept",
    "small",
    ("transfer.rounds=0", "pretrain.target_start=random"),
    False,
)
_STARTED = Candidate(
    "network-from-source",
    "network from source",
    "the network of `small`, started from the source's weights",
    "kept",
    "small",
    ("transfer.rounds=0", "pretrain.target_start=source"),
    True,
)
_DCKT = Candidate(
    "dckt", "DCKT with transfer", "DCKT with its rounds of transfer, the preset `small`", "kept", "small", (), True
)


def trials(*, source: bool, vectors: bool) -> tuple[Trial, ...]:
    """What is tried, cheapest first.

    Args:
        source: whether there is one.
        vectors: whether there are media beside pictures and texts, which the linear model cannot take.
    """
    alone = Trial("modern-alone", (_ALONE,), unless="modern" if source else "")
    found = [alone, Trial("network-alone", (_NETWORK,))]
    if source:
        found = [
            Trial("modern", (_ALONE, _LINEAR)),
            *found,
            Trial("network-from-source", (_STARTED,)),
            Trial("dckt", (_DCKT,), base="network-from-source"),
        ]
    return tuple(trial for trial in found if not (vectors and trial.candidates[0].preset == "modern"))


def changes_of(candidate: Candidate, more: Iterable[str], *, source: bool) -> tuple[str, ...]:
    """A candidate's changes behind the user's own, of which those of the source need one."""
    return (*(change for change in more if source or not _key(change).startswith("source.")), *candidate.changes)


def configs(chosen: Sequence[Trial], changes: Sequence[str]) -> dict[str, Config]:
    """The resolved settings of each trial, by its name.

    Raises:
        ConfigError: a change is none, or is of what the candidates differ in.
    """
    for change in changes:
        if _key(change) in OURS:
            raise ConfigError(f"--set {change}: that is what the candidates differ in; leave it out")
    found = {trial.name: load_config(trial.candidates[0].preset, trial.changes(changes)) for trial in chosen}
    if any(config.target.labels == "unknown" for config in found.values()):
        raise ConfigError(
            "--set target.labels=unknown: candidates are judged by labels, and without any there is only one to train: "
            "dckt-train --preset modern --set target.labels=unknown"
        )
    if "dckt" in found and not found["dckt"].transfer.rounds:
        raise ConfigError("--set transfer.rounds=0: without rounds there is no transfer to try; leave it out")
    return found


def _key(change: str) -> str:
    return change.partition("=")[0].strip()


# --- figures ------------------------------------------------------------------------------------------------------


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

    @property
    def sentence(self) -> str:
        """What to tell of it."""
        title = self.trial.candidates[-1].title
        if self.why == "memory":
            return f"{title}: left out, for {self.detail}."
        if self.why == "failed":
            return f"{title}: failed ({self.detail})."
        about = "" if self.seconds is None else f"about {duration(self.seconds)}"
        if self.why == "time":
            return f"{title}: left out, for it would take {about}, and {duration(self.remaining)} were left."
        return f"{title}: stopped when the budget was over; it was expected to take {about}."


# --- judgement ----------------------------------------------------------------------------------------------------


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

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        verdict = self.verdict
        against = _versus_source(self)
        return {
            "format": "dckt-advice",
            "version": 1,
            "advised": verdict.chosen.candidate.key,
            "level_with": [each.candidate.key for each in verdict.level],
            "command": self.command,
            "text": paragraphs(self),
            "source": self.source,
            "target": self.target,
            "pairs": dict(self.pairs),
            "classes": self.classes,
            "settings": list(self.changes),
            "seeds": self.seeds,
            "budget_seconds": self.budget,
            "spent_seconds": round(self.spent, 1),
            "test_pairs_read": False,
            "candidates": [self._record(each) for each in self.figures],
            "source_brings": against
            and {
                "with": against[0].candidate.key,
                "without": against[1].candidate.key,
                **vars(against[0].less(against[1])),
            },
            "left_out": [
                {
                    "candidate": each.trial.candidates[-1].key,
                    "why": each.why,
                    "estimated_seconds": each.seconds,
                    "remaining_seconds": each.remaining,
                    "detail": each.detail,
                }
                for each in self.left_out
            ],
        }

    def _record(self, each: Figures) -> dict[str, Any]:
        candidate, chosen = each.candidate, self.verdict.chosen
        return {
            "key": candidate.key,
            "title": candidate.title,
            "preset": candidate.preset,
            "settings": list(candidate.changes),
            "source": candidate.source,
            "offered": each.offered,
            "validation_map": vars(each.map) | {"by_seed": each.per_pair.mean(1).tolist()},
            "less_the_advised": None if each is chosen else vars(each.less(chosen)),
            "seconds": round(each.seconds, 1),
        }


# --- words --------------------------------------------------------------------------------------------------------


def paragraphs(advice: Advice) -> list[str]:
    """The advice in words, most important first; the command is not among them."""
    told = [_choice(advice), _comparison(advice), _source(advice), _caution(advice), _rest(advice)]
    return [each for each in told if each]


def rows(advice: Advice) -> list[tuple[str, ...]]:
    """The table, in the order of :data:`COLUMNS` behind the title."""
    chosen = advice.verdict.chosen
    return [
        (
            each.candidate.title + (" *" if each is chosen else ""),
            f"{each.map.mean:.3f}",
            f"{max(each.map.low, 0):.3f}-{min(each.map.high, 1):.3f}",
            "–" if each is chosen else _signed(each.less(chosen)),
            duration(each.seconds),
        )
        for each in advice.figures
    ]


def markdown(advice: Advice) -> str:
    """The advice as a page."""
    head = ("", *COLUMNS)
    table = [head, ["---"] * len(head), *rows(advice)]
    trained = f"{advice.pairs['train']} training and {advice.pairs['val']} validation pairs of {advice.classes} classes"
    return "\n\n".join(
        [
            "# Advice",
            f"{advice.target}: {trained}. Source: {advice.source or 'none'}.",
            *paragraphs(advice),
            f"Train and test it with:\n\n    {shlex.join(advice.command)}",
            "\n".join("| " + " | ".join(row) + " |" for row in table),
            NOTE + "\n",
        ]
    )


def duration(seconds: float) -> str:
    """A time in words.

    >>> [duration(each) for each in (0.4, 59.6, 750, 3900)]
    ['under 1 s', '1 min', '12.5 min', '1 h 5 min']
    """
    if seconds < 1:
        return "under 1 s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.1f}".removesuffix(".0") + " min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


def seconds_of(text: str) -> float:
    """A time as users write it, in seconds.

    >>> seconds_of("1h30m")
    5400.0

    Raises:
        ConfigError: it is no time, or none at all.
    """
    found = _PARTS.fullmatch(text.strip().lower())
    total = (
        sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )
    if not total:
        raise ConfigError(f"--budget is {text!r}; expected a time with its unit, such as 90s, 20m or 1h30m")
    return total


def _choice(advice: Advice) -> str:
    chosen = advice.verdict.chosen
    words, found = chosen.candidate.words, chosen.map
    if advice.source is None:
        words = words.removesuffix(" without the source")
    count = advice.pairs["val"]
    return (
        f"Use {words}. On {count} validation pairs its MAP is {found.mean:.3f} "
        f"(95 % interval {max(found.low, 0):.3f} to {min(found.high, 1):.3f})."
    )


def _comparison(advice: Advice) -> str:
    verdict = advice.verdict
    chosen = verdict.chosen
    if not (verdict.level or verdict.behind):
        return (
            "Nothing else was trained that could be advised, so this says how good it is and not that it is the best."
        )
    told = []
    if verdict.level:
        listed = _listed([f"{each.candidate.title}, at {_told(each.less(chosen))}" for each in verdict.level])
        told.append(
            f"Level with it: {listed}. Validation cannot tell them apart, so take the "
            f"{'cheapest' if len(verdict.level) > 1 else 'cheaper'}, which it is."
        )
    if verdict.behind:
        first, *rest = verdict.behind
        ahead = chosen.less(first)
        told.append(f"It is clearly ahead of {first.candidate.title}, by {_told(ahead)}.")
        if rest:
            told.append(f"Further behind: {_listed([each.candidate.title for each in rest])}.")
    return " ".join(told)


def _versus_source(advice: Advice) -> tuple[Figures, Figures] | None:
    """What is compared to tell what the source brings: with it, and without it; the advised is one of them."""
    chosen = advice.verdict.chosen
    others = [each for each in advice.figures if each.candidate.source != chosen.candidate.source]
    if not others:
        return None
    best = max(others, key=lambda each: each.map.mean)
    return (chosen, best) if chosen.candidate.source else (best, chosen)


def _source(advice: Advice) -> str:
    if advice.source is None:
        return (
            "No source was given, so what one would bring is not known: try a large labelled collection with --source."
        )
    compared = _versus_source(advice)
    chosen = advice.verdict.chosen
    if compared is None:
        which = "without" if chosen.candidate.source else "with"
        return f"What the source brings is not known, for nothing {which} it was trained."
    taken, alone = compared
    gain = taken.less(alone)
    if taken is chosen:
        if gain.above:
            return f"The source brings {_told(gain)}, over the best without it, {alone.candidate.title}."
        return (
            f"Whether the source helps is not clear: over the best without it, {alone.candidate.title}, "
            f"the difference is {_told(gain)}."
        )
    best = f"the best with it, {taken.candidate.title}, is at {_told(gain)} from what is advised"
    if gain.below:
        return f"The source does not help: {best}."
    if gain.above:  # within a hair of the rule by which the run itself decides, or with seeds that disagree
        return f"The source may help: {best}, but `modern` itself asks for two standard errors and leaves it out."
    return f"The source does not help clearly: {best}."


def _caution(advice: Advice) -> str:
    found, chosen, count = advice.figures, advice.verdict.chosen, advice.pairs["val"]
    gaps = [each.less(chosen) for each in found if each is not chosen]
    what = "Settings and candidate" if gaps else "Its settings"
    told = [
        f"{what} were chosen on these same pairs, so expect somewhat less on new ones. The test pairs were not read."
    ]
    if gaps:
        half = max(gap.high - gap.low for gap in gaps) / 2
        told.append(f"With {count} validation pairs, a difference of less than about {half:.3f} may be chance.")
    if count < FEW_PAIRS:
        told.append("So few pairs decide little: more of them would tell more than more candidates.")
    if advice.seeds == 1 and any(each.candidate.preset != "modern" for each in found):
        told.append(
            "Each network was trained once, so the intervals lack what another seed changes; "
            "--seeds 3 with another --out tells it."
        )
    return " ".join(told)


def _rest(advice: Advice) -> str:
    if not advice.left_out:
        return ""
    told = [each.sentence for each in advice.left_out]
    if any(each.why in ("time", "stopped") for each in advice.left_out):
        told.append("The same command with a larger --budget goes on with what was left out.")
    return " ".join(told)


def _signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _told(found: Interval) -> str:
    return f"{found.mean:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f})"


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
