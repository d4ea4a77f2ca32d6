"""The run folder: everything that a training leaves behind.

config.toml         as resolved, every key
run.json            format, state, corpora, versions, times
metrics.jsonl       losses and validation MAP, a line an event
selection.jsonl     which target pairs each round took, and the spread of their scores
evaluation.json     MAP on validation and test
analysis.json       on test: AP by query and class, precision by recall, confusions; how often each pair was selected
checkpoints/        where an interrupted run goes on from
target/, source/    the trained models
report.html         to look at; its plots are in plots/
tensorboard/        the same events for TensorBoard, where that was asked for
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dckt import __version__ as dckt_version
from dckt.errors import RunError
from dckt.files import atomic_write, sha256_file
from dckt_trainer.config import Config, dump_config, load_config
from dckt_trainer.encoders import CommonSpace
from dckt_trainer.model import DomainModel, load_model, load_network

RUN_VERSION = 1


@dataclass(frozen=True)
class Run:
    """A run folder and what its run.json says."""

    path: Path
    facts: dict[str, Any]

    @property
    def config(self) -> Config:
        """The configuration as it was resolved.

        Raises:
            RunError: the file was changed or deleted since.
        """
        path = self.path / "config.toml"
        if not path.is_file() or sha256_file(path) != self.facts["config_sha256"]:
            raise RunError(f"{path}: was changed after the run began; restore it, or train anew with --preset {path}")
        return load_config(path)

    @property
    def complete(self) -> bool:
        """Whether the training came to its end."""
        return bool(self.facts.get("state") == "complete")

    @property
    def trial(self) -> bool:
        """Whether it was trained to be judged on validation alone; then it has no models and read no test pair."""
        return bool(self.facts.get("trial"))

    @property
    def source(self) -> Path | None:
        """The source corpus; None where the target was trained alone."""
        facts = self.facts["source"]
        return Path(facts["path"]) if facts else None

    @property
    def target(self) -> Path:
        """The target corpus."""
        return Path(self.facts["target"]["path"])

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> dict[str, Any]:
        """MAP on validation and on test, as the training wrote it; a trial has none on test."""
        try:
            value: dict[str, Any] = json.loads((self.path / "evaluation.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path}: evaluation.json cannot be read ({error})") from error
        return value

    def model(self, domain: str = "target") -> DomainModel:
        """The trained model of a domain, from pixels and words on.

        Raises:
            RunError: the training did not finish, a file is missing or damaged, or the corpora were ready features.
        """
        return load_model(self._finished(domain))

    def network(self, domain: str = "target") -> CommonSpace:
        """The trained network of a domain, from features on.

        Raises:
            RunError: the training did not finish, or a file is missing or damaged.
        """
        return load_network(self._finished(domain))

    def _finished(self, domain: str) -> Path:
        if not self.complete:
            raise RunError(
                f"{self.path}: the training has not finished (state: {self.facts.get('state')}); "
                f"go on with: dckt-train --resume {self.path}"
            )
        folder = self.path / domain
        if self.trial:
            raise RunError(f"{self.path}: a trial, judged on validation alone; it has no models, so train anew")
        if not folder.exists():
            raise RunError(
                f"{folder}: there is none; a target that was trained alone has no source, and a sweep deletes models "
                "unless it is run with --keep-models"
            )
        return folder

    def finish(self) -> Run:
        """The same run, marked complete on disk."""
        return _write(self.path, {**self.facts, "state": "complete", "finished": _now()})

    def log(self, name: str, event: dict[str, Any]) -> None:
        """Appends an event to ``name``.jsonl."""
        with (self.path / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")

    def events(self, name: str) -> list[dict[str, Any]]:
        """All events of ``name``.jsonl; a last line that a kill cut short is left out."""
        path = self.path / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def begin(self, stage: str, passes: int = 0) -> None:
        """Forgets what an interrupted try at this stage logged, after the forward passes that it can go on from."""
        for name in ("metrics", "selection"):
            kept = [
                event
                for event in self.events(name)
                if event["stage"] != stage or 0 < event.get("passes", passes + 1) <= passes
            ]
            self.rewrite(name, kept)  # always: it also drops a line that a kill cut short

    def sweep_up(self) -> None:
        """Deletes files that a kill left half written."""
        for partial in self.path.rglob(".*.partial"):
            partial.unlink()

    def rewrite(self, name: str, events: list[dict[str, Any]]) -> None:
        """Replaces ``name``.jsonl, so that a resumed run does not log a stage twice."""
        text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        atomic_write(self.path / f"{name}.jsonl", text)


class ReadOnlyRun(Run):
    """The run as all processes but the first have it: they read what the first writes."""

    def log(self, name: str, event: dict[str, Any]) -> None:
        """Does nothing."""

    def rewrite(self, name: str, events: list[dict[str, Any]]) -> None:
        """Does nothing."""


def create_run(
    path: Path,
    config: Config,
    source: dict[str, Any] | None,
    target: dict[str, Any],
    *,
    trunk: str | None,
    pretrained_from: str | None = None,
    taken_over: Sequence[str] = (),
    trial: bool = False,
) -> Run:
    """Makes the folder of a new run.

    Args:
        path: must not exist, or be an empty folder.
        config: as resolved.
        source: ``path``, ``fingerprint`` and counts of the source corpus; None where the target is trained alone.
        target: likewise.
        trunk: hash of the trunk; None where the corpora are ready features.
        pretrained_from: the run whose pretraining is taken over.
        taken_over: names of the checkpoints that are.
        trial: see :func:`dckt_trainer.train.train`.

    Raises:
        RunError: the path is taken, or cannot be written.
    """
    if not is_free(path):
        raise taken_error(path)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        atomic_write(path / "config.toml", dump_config(config))
        facts = {
            "format": "dckt-run",
            "version": RUN_VERSION,
            "state": "training",
            "started": _now(),
            "config_sha256": sha256_file(path / "config.toml"),
            "trunk": trunk,
            "pretrained_from": pretrained_from,
            "taken_over": list(taken_over),
            "trial": trial,
            "source": source,
            "target": target,
            "versions": {
                "python": platform.python_version(),
                "dckt": dckt_version,
                **{name: version(name) for name in ("torch", "torchvision", "gensim", "numpy", "Pillow")},
            },
        }
        return _write(path, facts)
    except OSError as error:
        raise RunError(f"{path}: the run folder cannot be written ({error})") from error


def is_free(path: Path) -> bool:
    """Whether a run can begin there: nothing is there, or no more than what a kill at the very start leaves."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    rest = {entry.name for entry in path.iterdir()} - {"config.toml", "checkpoints"}
    return not [name for name in rest if not name.startswith((".config.toml", ".run.json"))] and not (
        (path / "checkpoints").is_dir() and any((path / "checkpoints").iterdir())
    )


def taken_error(path: Path) -> RunError:
    """The error for a run folder that would have to be overwritten."""
    return RunError(
        f"{path} exists; go on with it: dckt-train --resume {path}, begin anew: --force, or name another --out"
    )


def open_run(path: str | Path) -> Run:
    """Opens a run folder.

    Raises:
        RunError: there is none, it is no run, or it was written by a newer version.
    """
    path = Path(path)
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if facts["format"] != "dckt-run":
            raise KeyError("format")
        number = facts["version"]
        missing = {"state", "source", "target", "trunk", "config_sha256", "started"} - set(facts)
        if number == RUN_VERSION and missing:
            raise KeyError(*sorted(missing))
    except OSError as error:
        raise RunError(f"{path}: not a run folder (no run.json); expected one that dckt-train made") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / 'run.json'}: damaged or not a run ({error})") from error
    if number != RUN_VERSION:
        raise RunError(f"{path}: run format {number}; this version of dckt reads {RUN_VERSION}; use a matching version")
    return Run(path, facts)


def _write(path: Path, facts: dict[str, Any]) -> Run:
    atomic_write(path / "run.json", json.dumps(facts, indent=1))
    return Run(path, facts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
