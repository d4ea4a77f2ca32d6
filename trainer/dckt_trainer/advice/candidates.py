"""What can be advised, and the trainings that show it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dckt.errors import ConfigError
from dckt_trainer.config import Config, load_config

OURS = ("seed", "model.kind", "pretrain.target_start")  # keys that the candidates differ in


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
