"""The events of a run as TensorBoard reads them.

The run's .jsonl files are the truth. The event file is their mirror and is written anew whenever a training starts or
goes on, so a stage that was interrupted and repeated never has its points twice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dckt.errors import MissingExtraError
from dckt_trainer.runs import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
MIRRORED = ("metrics", "selection")
_PLACES = ("stage", "round", "epoch")  # keys that say where an event belongs, and are no figures themselves


def export(run: Run) -> Path:
    """Writes the folder ``tensorboard`` of a run, finished or not, and returns it. What is there is replaced.

    Raises:
        MissingExtraError: the package tensorboard is not installed.
    """
    with mirrored(run, wanted=True):
        return run.path / FOLDER


@contextmanager
def mirrored(run: Run, *, wanted: bool) -> Iterator[Run]:
    """The run, whose events from now on also reach TensorBoard while they happen.

    Args:
        run: its events so far are written first.
        wanted: whether to; a run that has the folder already is mirrored in any case.

    Raises:
        MissingExtraError: the package tensorboard is not installed.
    """
    if not wanted and not (run.path / FOLDER).exists():
        yield run
        return
    check_installed()
    mirror = _Mirror(run)
    try:
        yield _MirroredRun(run.path, run.facts, mirror)
    finally:
        mirror.close()


def check_installed() -> None:
    """Refuses early what :func:`mirrored` would refuse.

    Raises:
        MissingExtraError: the package tensorboard is not installed.
    """
    try:
        import_module("tensorboard")
        import_module("torch.utils.tensorboard")
    except ModuleNotFoundError as error:
        raise MissingExtraError("TensorBoard output", "tensorboard", error.name or "tensorboard") from error


@dataclass(frozen=True)
class _MirroredRun(Run):
    mirror: _Mirror

    def log(self, name: str, event: dict[str, Any]) -> None:
        super().log(name, event)
        self.mirror.add(name, event)

    def rewrite(self, name: str, events: list[dict[str, Any]]) -> None:
        forgotten = events != self.events(name)
        super().rewrite(name, events)
        if forgotten:
            self.mirror.rewrite()


class _Mirror:
    """One event file, and where in it each stage has come to."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._begin()

    def _begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run.path / FOLDER
        # A TensorBoard that is open on the folder stops for good at a file that vanishes; so old files are emptied now,
        # and deleted the next time. By purge_step it forgets what it has read of them.
        for path in folder.glob("events.out.tfevents.*"):
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=0)
        self.steps: Counter[str] = Counter()
        for name in MIRRORED:
            for event in self.run.events(name):
                self.add(name, event)

    def rewrite(self) -> None:
        """Begins anew with the events that the .jsonl files hold now."""
        self.close()
        self._begin()

    def add(self, name: str, event: Mapping[str, Any]) -> None:
        """Writes an event, so that a reader finds it at once."""
        stage, step = self._place(name, event)
        for tag, value in _scalars(event):
            self.writer.add_scalar(f"{stage}/{tag}", value, step)
        if "histogram" in event:
            _add_histogram(self.writer, f"{stage}/scores", event, step)
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self.writer.close()

    def _place(self, name: str, event: Mapping[str, Any]) -> tuple[str, int]:
        """Group and step: a round's number, a Word CNN's epoch, in pretraining the solver steps so far."""
        stage = event["stage"]
        if stage.startswith("round/"):
            return ("selection" if name == "selection" else "round"), int(stage.removeprefix("round/"))
        self.steps[stage] += event.get("steps", 1)
        return stage, self.steps[stage]


def _scalars(event: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in event.items():
        if isinstance(value, Mapping) and key != "histogram":
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in _PLACES:
            yield f"{prefix}{key}", value


def _add_histogram(writer: SummaryWriter, tag: str, event: Mapping[str, Any], step: int) -> None:
    """A histogram of which only the counts are kept: sum and squares are those of the middles of its bins."""
    histogram, quantiles = event["histogram"], event["quantiles"]
    counts = np.asarray(histogram["counts"])
    edges = np.linspace(histogram["low"], histogram["high"], len(counts) + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        tag,
        min=quantiles[0],
        max=quantiles[-1],
        num=int(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
