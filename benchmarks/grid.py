"""Runs settings over seeds and tabulates test MAP. A run that is complete is not run again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dckt_trainer.config import Config, load_config
from dckt_trainer.progress import Bars
from dckt_trainer.runs import open_run
from dckt_trainer.train import resume, train

WAYS = ("image_to_text", "text_to_image", "average")


@dataclass(frozen=True)
class Row:
    """A row of the table: a network of a setting's runs (model_t0, last or best), over seeds."""

    title: str
    setting: str
    network: str


def outcome(source: Path, target: Path, out: Path, config: Config) -> dict[str, Any]:
    """The evaluation of one run, which is trained, gone on with, or read, as it needs."""
    reporter = Bars()
    if (out / "run.json").exists():
        run = open_run(out)
        if run.config != config:
            raise SystemExit(f"{out} was run with another configuration; delete it or name another --out")
        run = run if run.complete else resume(out, reporter=reporter)
    else:
        run = train(source, target, out, config, reporter=reporter)
    return run.evaluation


def grid(
    corpora: Mapping[int, tuple[Path, Path]],
    settings: Mapping[str, Sequence[str]],
    out: Path,
    *,
    preset: str = "small",
) -> dict[str, list[dict[str, Any]]]:
    """Evaluations by setting, one for each seed.

    Args:
        corpora: source and target for each seed.
        settings: changes of the preset for each setting.
        out: folder of the runs.
        preset: what is changed.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for seed, (source, target) in corpora.items():
        for name, changes in settings.items():
            config = load_config(preset, [*changes, f"seed={seed}"])
            found[name].append(outcome(source, target, out / f"{name}-{seed}", config))
    return found


def markdown(rows: Sequence[Row], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table: mean and standard deviation over seeds, on the test split."""
    lines = ["| network | image → text | text → image | average | by seed |", "|---|---|---|---|---|"]
    for row in rows:
        values = {way: [e["test"][row.network][way] for e in found[row.setting]] for way in WAYS}
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values.values()]
        seeds = " ".join(f"{value:.3f}" for value in values["average"])
        lines.append(f"| {row.title} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def save(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The evaluations as JSON."""
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
