"""Runs settings over seeds and tabulates test MAP.

A run that is complete is not run again. Runs of one seed that differ in the joint stage alone share what comes before.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dckt_trainer.config import Config, MmdConfig, TransferConfig, load_config
from dckt_trainer.progress import Bars
from dckt_trainer.runs import create_run, open_run
from dckt_trainer.train import resume, train

PRETRAINED = ("words", "text-source", "text-target", "source-0", "target-0")
WAYS = ("image_to_text", "text_to_image", "average")


@dataclass(frozen=True)
class Row:
    """A row of the table: a network of a setting's runs (model_t0, last or best), over seeds."""

    title: str
    setting: str
    network: str


def outcome(source: Path, target: Path, out: Path, config: Config, earlier: Sequence[Path] = ()) -> dict[str, Any]:
    """The evaluation of one run, which is trained, gone on with, or read, as it needs.

    Args:
        source: a corpus.
        target: a corpus.
        out: the run folder.
        config: the run's configuration.
        earlier: complete runs on the same corpora, whose pretraining may serve.
    """
    reporter = Bars()
    for base in map(open_run, earlier):
        if not out.exists() and _before_joint(base.config) == _before_joint(config):
            run = create_run(out, config, base.facts["source"], base.facts["target"], trunk=base.facts["trunk"])
            for name in PRETRAINED:
                shutil.copy(base.checkpoints / f"{name}.safetensors", run.checkpoints)
    if (out / "run.json").exists():
        run = open_run(out)
        if run.config != config:
            raise SystemExit(f"{out} was run with another configuration; delete it or name another --out")
        run = run if run.complete else resume(out, reporter=reporter)
    else:
        run = train(source, target, out, config, reporter=reporter)
    return run.evaluation


def _before_joint(config: Config) -> Config:
    """The configuration less all that only the joint stage reads."""
    losses = replace(config.losses, mmd_fc6=0, mmd_fc7=0, mmd_fc8=0, mmd_fc9=0)
    return replace(config, transfer=TransferConfig(), mmd=MmdConfig(), losses=losses)


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
        earlier: list[Path] = []
        for name, changes in settings.items():
            config = load_config(preset, [*changes, f"seed={seed}"])
            path = out / f"{name}-{seed}"
            found[name].append(outcome(source, target, path, config, earlier))
            earlier.append(path)
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
