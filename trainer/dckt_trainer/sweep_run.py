"""Trains the runs of a sweep: what is complete is read, what was interrupted goes on, and pretraining is shared.

The folder of a sweep:

sweep.json               rows and resolved settings; a row keeps its meaning for as long as the folder lives
runs/SETTING-SEED/       a run folder for each setting and seed; rows with the same settings share it
logs/SETTING-SEED.log    what a process of its own printed, or why a run failed
table.*, report.html     see :mod:`dckt_trainer.sweep_table`
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dckt.errors import ConfigError, RunError
from dckt.files import atomic_write
from dckt_trainer.config import Config, config_from_tree, load_config
from dckt_trainer.data.feature_corpus import is_feature_corpus
from dckt_trainer.plan import before_joint, config_differences
from dckt_trainer.progress import Reporter, Silent
from dckt_trainer.runs import Run
from dckt_trainer.sweep import Row, Sweep
from dckt_trainer.sweep_jobs import Job, Options, run_jobs

SWEEP_VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """A row's run of one seed; ``run`` is None where it failed, and ``failure`` says why."""

    row: Row
    seed: int
    path: Path
    config: Config
    run: Run | None
    failure: str = ""


@dataclass(frozen=True)
class SweepResult:
    """All outcomes, row by row and seed by seed."""

    sweep: Sweep
    path: Path
    source: str | None
    target: str
    preset: str
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> dict[Path, str]:
        """Why runs failed, by run folder."""
        return {outcome.path: outcome.failure for outcome in self.outcomes if outcome.run is None}


def run_sweep(
    sweep: Sweep,
    source: str | Path | None,
    target: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    changes: Sequence[str] = (),
    seeds: int | None = None,
    processes: int = 1,
    keep_models: bool = False,
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> SweepResult:
    """Trains what is missing of a sweep.

    Args:
        sweep: see :func:`dckt_trainer.sweep.read_sweep`.
        source: corpus that knowledge is taken from; ``{seed}`` in it stands for the seed, for a corpus of each.
            None for the target alone.
        target: corpus of the collection that is to be searched; likewise.
        out: folder of the sweep, new or its own.
        preset: what the rows change; the sweep's own unless given.
        changes: of the preset, for all rows; where a row changes the same key, the row's value holds.
        seeds: 0 to this, exclusive; the sweep's own number unless given.
        processes: so many runs side by side, each in a process of its own; 1 trains in this process.
        keep_models: models and checkpoints stay; else a complete run keeps its figures, logs and report. A folder
            that kept them once goes on keeping them.
        options: device, cache, and what is done with bad pairs.
        reporter: told how far the work is.

    Raises:
        ConfigError: the sweep cannot be run as it is, or a row means something else than in this folder before.
        RunError: the folder is not of a sweep, or a corpus changed between its runs.
    """
    reporter, out, options = reporter or Silent(), Path(out), options or Options()
    preset = preset or sweep.preset
    count = sweep.seeds if seeds is None else seeds
    if count < 1 or processes < 1:
        raise ConfigError(f"seeds is {count} and jobs is {processes}; expected at least 1 of each")
    configs = {row.title: _config(row, preset, changes, source) for row in sweep.rows}
    corpora = {"source": None if source is None else str(source), "target": str(target)}
    _check_paths(corpora, count)
    memory = _remembered(out)
    folders = _folders(sweep.rows, preset, configs, memory, out)
    keep_models = keep_models or memory.get("keep_models", False)
    _remember(out, memory, sweep, corpora, configs, folders, keep_models=keep_models)

    def job(row: Row, seed: int) -> Job:
        name = f"{folders[row.title]}-{seed}"
        paths = (None if source is None else _of_seed(source, seed)), _of_seed(target, seed)
        return Job(
            path=out / "runs" / name,
            log=out / "logs" / f"{name}.log",
            source=paths[0],
            target=paths[1],
            preset=preset,
            changes=(*changes, *row.changes, f"seed={seed}"),
            group=(*paths, before_joint(replace(configs[row.title], seed=seed))),
        )

    # Rows with the same settings share a run; seed by seed, so that the first seeds are whole early.
    jobs = {each.path: each for seed in range(count) for row in sweep.rows for each in [job(row, seed)]}
    for note in sweep.notes:
        reporter.say(f"note: {note}")
    failures = run_jobs(list(jobs.values()), options, processes, keep_models=keep_models, reporter=reporter)

    def outcome(row: Row, seed: int) -> Outcome:
        path = job(row, seed).path
        return Outcome(row, seed, path, replace(configs[row.title], seed=seed), jobs[path].run, failures.get(path, ""))

    outcomes = tuple(outcome(row, seed) for row in sweep.rows for seed in range(count))
    _check_corpora(outcomes)
    return SweepResult(sweep, out, corpora["source"], str(target), preset, outcomes)


# -- what the folder remembers -------------------------------------------------------------------------------------


def _config(row: Row, preset: str, changes: Sequence[str], source: str | Path | None) -> Config:
    every = [*changes, *row.changes]
    if any(change.partition("=")[0].strip() == "seed" for change in every):
        raise ConfigError("the seeds are the sweep's own: --seeds 5 runs 0 to 4; leave out seed=...")
    try:
        config = load_config(preset, every)
    except ConfigError as error:
        raise ConfigError(f"row {row.title!r}: {error}") from error
    if source is None and config.transfer.rounds:
        raise ConfigError(
            f"row {row.title!r} has {config.transfer.rounds} rounds of transfer, which need --source; "
            "for the target alone give --set transfer.rounds=0"
        )
    return config


def _check_paths(corpora: Mapping[str, str | None], seeds: int) -> None:
    for name, path in corpora.items():
        for seed in range(seeds if path else 0):
            found = _of_seed(str(path), seed)
            if not is_feature_corpus(found) and not Path(found).exists():
                raise ConfigError(f"--{name}: there is no {found}; expected a corpus")


def _remembered(out: Path) -> dict[str, Any]:
    """What sweep.json says of settings whose runs were begun; others bind nobody."""
    path = out / "sweep.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out} exists and is not a sweep (no sweep.json); name another --out")
        return {}
    try:
        memory: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        number = memory["version"] if memory["format"] == "dckt-sweep" else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged or not of a sweep ({error}); name another --out") from error
    if number != SWEEP_VERSION:
        raise RunError(f"{path}: sweep format {number}; this version of dckt reads {SWEEP_VERSION}")
    begun = {each.name.rpartition("-")[0] for each in (out / "runs").glob("*")}
    memory["rows"] = {title: row for title, row in memory["rows"].items() if row["folder"] in begun}
    memory["settings"] = {name: tree for name, tree in memory["settings"].items() if name in begun}
    return memory if begun else {}


def _folders(
    rows: Sequence[Row], preset: str, configs: Mapping[str, Config], memory: Mapping[str, Any], out: Path
) -> dict[str, str]:
    """The folder name of each row's settings; a setting that is known keeps its own.

    Raises:
        ConfigError: a row is known with other settings.
    """
    known = {
        name: config_from_tree(tree, f"{out / 'sweep.json'}, {name}")
        for name, tree in memory.get("settings", {}).items()
    }
    before = memory.get("rows", {})
    by_config = {config: name for name, config in known.items()}
    chosen = {}
    for row in rows:
        config = configs[row.title]
        entry = before.get(row.title)
        if entry:
            changed = config_differences(known[entry["folder"]], config)
            if entry["network"] != row.network:
                changed.append(f"network is {entry['network']!r} there and {row.network!r} here")
            if changed:
                raise ConfigError(
                    f"row {row.title!r} is not what {out} has under this title: {'; '.join(changed)}. "
                    "Restore it, give the row another title, or name another --out"
                )
        if config not in by_config:
            by_config[config] = _new_name(row.changes, preset, set(by_config.values()))
        chosen[row.title] = by_config[config]
    return chosen


def _remember(
    out: Path,
    memory: Mapping[str, Any],
    sweep: Sweep,
    corpora: Mapping[str, str | None],
    configs: Mapping[str, Config],
    folders: Mapping[str, str],
    *,
    keep_models: bool,
) -> None:
    places = {name: None if path is None else str(Path(path).resolve()) for name, path in corpora.items()}
    moved = [name for name, path in places.items() if memory and memory["corpora"][name] != path]
    if moved:
        told = "; ".join(f"{name} is {memory['corpora'][name]} there and {places[name]} here" for name in moved)
        raise ConfigError(f"{out} is of other corpora: {told}. Name another --out")
    rows = {row.title: {"folder": folders[row.title], "network": row.network} for row in sweep.rows}
    settings = {folders[title]: dataclasses.asdict(config) for title, config in configs.items()}
    content = {
        "format": "dckt-sweep",
        "version": SWEEP_VERSION,
        "keep_models": keep_models,
        "corpora": places,
        "rows": {**memory.get("rows", {}), **rows},
        "settings": {**memory.get("settings", {}), **settings},
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "sweep.json", json.dumps(content, indent=1, ensure_ascii=False))


def _new_name(changes: Sequence[str], preset: str, taken: set[str]) -> str:
    """A folder name that is not taken and tells what is changed; the preset's own where nothing is."""
    name = re.sub(r"[^\w.=+-]+", "-", "+".join(changes) or Path(preset).stem).strip("-.")[:80]
    return next(each for each in (name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))) if each not in taken)


def _of_seed(path: str | Path, number: int) -> str:
    return str(path).replace("{seed}", str(number))


def _check_corpora(outcomes: Sequence[Outcome]) -> None:
    """Refuses a table of runs on different states of one corpus."""
    seen: dict[tuple[Any, ...], tuple[str, Path]] = {}
    for outcome in outcomes:
        if outcome.run is None:
            continue
        settings = outcome.config
        few = settings.target.pairs_per_class
        for name, share in (("source", settings.source.exclude), ("target", (few, outcome.seed if few else None))):
            facts = outcome.run.facts.get(name)
            if not facts:
                continue
            first, path = seen.setdefault((facts["path"], share), (facts["fingerprint"], outcome.path))
            if first != facts["fingerprint"]:
                raise RunError(
                    f"the {name} corpus {facts['path']} changed between the runs {path} and {outcome.path}; "
                    "delete those on the corpus that you do not mean, and run the sweep again"
                )
