"""The settings of `modern` that no run chooses for itself, tried on validation; the log keeps what was tried.

    DCKT_DATA=... OMP_NUM_THREADS=1 python benchmarks/tuning.py --trials 40
    python benchmarks/tuning.py --report
    python benchmarks/tuning.py --first-seed 1 --seeds 3 --log other.jsonl --try "source directions=400"

Half of a target's validation pairs does what validation does in a run, the other half judges, and no test pair is read.
The first trial is of the settings as they are. Trials are an Optuna study in LOG, which a later call goes on with;
settings that were tried are not tried again. The best of many looks better than it is: --try repeats a few of them on
other seeds, in a log of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from dckt_trainer.config import load_config
from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.evaluate import evaluate
from dckt_trainer.linear import basis, choose, fit, fit_both, transfer_helps
from dckt_trainer.markdown import markdown_table
from dckt_trainer.pairs import PairSet
from dckt_trainer.progress import Silent
from dckt_trainer.sweep_table import estimate
from setting import data_folder, input_changes, interval, machine
from unlabelled import GENERATED, read_pairs

STUDY = "modern"
LOG = Path(__file__).parent / "rows" / "modern.optuna.jsonl"
CORPORA = (("caltech101", "pascal_sentences"), ("fashion", "pascal_sentences"), ("caltech101", "fashion"))
PAIRS_PER_CLASS = (2, 10)


@dataclass(frozen=True)
class Setting:
    """One that is fixed in the code: where it stands, its values by the name in the log, and which it has."""

    module: ModuleType
    name: str
    values: Mapping[str, Any]
    now: str


SETTINGS = {
    "variance floor": Setting(basis, "FLOOR", {"0.01": 0.01, "0.05": 0.05, "0.2": 0.2, "1": 1.0}, "0.05"),
    "target directions": Setting(basis, "TARGET_DIRECTIONS", {"100": 100, "200": 200, "300": 300}, "300"),
    "source directions": Setting(basis, "SOURCE_DIRECTIONS", {"50": 50, "200": 200, "400": 400}, "200"),
    "standard errors": Setting(choose, "STANDARD_ERRORS", {"0": 0.0, "1": 1.0, "2": 2.0, "3": 3.0}, "2"),
    "masses": Setting(
        fit, "MASSES", {"two": (0.6, 0.9), "four": fit.MASSES, "six": (0.15, 0.3, 0.6, 0.85, 0.95, 0.99)}, "four"
    ),
    "ridges": Setting(fit, "RIDGES", {"one": (0.5,), "three": fit.RIDGES, "five": (0.02, 0.1, 0.5, 2.0, 8.0)}, "three"),
    "powers": Setting(fit, "POWERS", {"1": (1,), "1 2": fit.POWERS, "0 1 2 4": (0, 1, 2, 4)}, "1 2"),
    "temperatures": Setting(
        fit, "TEMPERATURES", {"one": (0.1,), "two": fit.TEMPERATURES, "four": (0.02, 0.05, 0.15, 0.5)}, "two"
    ),
    "strengths": Setting(
        fit, "STRENGTHS", {"two": (3.0, 300.0), "four": fit.STRENGTHS, "six": (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)}, "four"
    ),
}
NOW = {name: setting.now for name, setting in SETTINGS.items()}


@contextmanager
def applied(chosen: Mapping[str, str]) -> Iterator[None]:
    """The package with other settings."""
    with ExitStack() as stack:
        for name, value in chosen.items():
            setting = SETTINGS[name]
            stack.enter_context(mock.patch.object(setting.module, setting.name, setting.values[value]))
        yield


def halved(pairs: Mapping[str, PairSet]) -> tuple[dict[str, PairSet], dict[str, PairSet]]:
    """The pairs with one half of validation, to choose by, and with the other, to judge by."""
    order = np.random.default_rng(0).permutation(len(pairs["target.val"]))
    halves = []
    for places in (np.sort(order[::2]), np.sort(order[1::2])):
        part = dict(pairs)
        for name in part:
            if name.startswith("target.val"):
                part[name] = _some(part[name], places)
        halves.append(part)
    return halves[0], halves[1]


def _some(pairs: PairSet, places: np.ndarray[Any, Any]) -> PairSet:
    features = {medium: rows[torch.from_numpy(places)] for medium, rows in pairs.features.items()}
    labels, ids = pairs.labels[torch.from_numpy(places)], tuple(pairs.ids[place] for place in places)
    return replace(pairs, features=features, labels=labels, ids=ids)


def judged(pairs: Mapping[str, PairSet]) -> float:
    """MAP on the second half of validation of what a run would keep, the mean of both directions."""
    mine, others = halved(pairs)
    classes = int(pairs["target.train"].labels.max()) + 1
    found = fit_both(mine, classes, Silent())
    helps = transfer_helps(found, Silent())
    asked = others["target.val.by_source" if helps else "target.val"]
    return evaluate(found[helps].model, asked, torch.device("cpu")).average


def cells(data: Path, seeds: Sequence[int]) -> dict[str, Mapping[str, PairSet]]:
    """What each trial is judged on."""
    shared = input_changes(data)
    found = {}
    for seed in seeds:
        for count in PAIRS_PER_CLASS:
            changes = [f"target.pairs_per_class={count}", f"seed={seed}"]
            for source, target in CORPORA:
                config = load_config("modern", [*shared, *changes])
                name = f"{source} → {target}, {count} pairs, seed {seed}"
                found[name] = read_pairs(data / source, data / target, config, test=False)
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                write_synthetic(root, seed=seed, target_pairs_per_class=10)
                config = load_config("modern", [*GENERATED, *changes])
                name = f"generated, {count} pairs, seed {seed}"
                found[name] = read_pairs(root / "source", root / "target", config, test=False)
    return found


def objective(trial: optuna.Trial, cells: Mapping[str, Mapping[str, PairSet]]) -> float:
    """The mean of all cells, each of which stands in the log."""
    chosen = {name: trial.suggest_categorical(name, list(setting.values)) for name, setting in SETTINGS.items()}
    if any(other.params == trial.params for other in trial.study.get_trials(states=(TrialState.COMPLETE,))):
        raise optuna.TrialPruned
    with applied(chosen):
        found = {name: judged(pairs) for name, pairs in cells.items()}
    trial.set_user_attr("cells", found)
    return float(np.mean(list(found.values())))


def report(study: optuna.Study) -> str:
    """A table of all trials, best first, each against the settings as they are."""
    done = study.get_trials(states=(TrialState.COMPLETE,))
    now = next((each for each in done if each.params == NOW), None)
    if now is None:
        return "The settings as they are were not tried yet, so there is nothing to compare with."
    lines = []
    for trial in sorted(done, key=lambda each: -float(each.value or 0)):
        changed = [f"{name} {value}" for name, value in trial.params.items() if value != NOW[name]]
        lines.append([", ".join(changed) or "as now", f"{trial.value:.4f}", _difference(trial, now)])
    table = markdown_table(["settings", "MAP", "against now, cell by cell"], lines)
    return (
        f"{machine()}, optuna {optuna.__version__}\n{len(done)} trials of {len(now.user_attrs['cells'])} cells; MAP on "
        f"the half of validation that did not choose; differences with the 95 % interval of a paired t test\n\n{table}"
    )


def _settings(text: str) -> dict[str, str]:
    """All settings, some of them changed by ``NAME=VALUE, ...``."""
    changed = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        changed[name] = value
        if name not in SETTINGS or value not in SETTINGS[name].values:
            known = "; ".join(f"{each}: {', '.join(setting.values)}" for each, setting in SETTINGS.items())
            raise argparse.ArgumentTypeError(f"no setting {name!r} with the value {value!r}; there are {known}")
    return {**NOW, **changed}


def _difference(trial: FrozenTrial, now: FrozenTrial) -> str:
    if trial.number == now.number:
        return "–"
    own, other = trial.user_attrs["cells"], now.user_attrs["cells"]
    return interval(estimate([own[name] - other[name] for name in other if name in own]), "+", 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="more than the log holds")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--try",
        dest="tried",
        action="append",
        type=_settings,
        metavar="NAME=VALUE, ...",
        help="nothing but these changes, and the settings as they are; may be given several times",
    )
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--report", action="store_true", help="only print what the log holds")
    args = parser.parse_args(arguments)
    if args.report and not args.log.exists():
        parser.error(f"{args.log} is not there; run the study first, or name another --log")
    storage = JournalStorage(JournalFileBackend(str(args.log)))
    if args.report:
        print(report(optuna.load_study(study_name=STUDY, storage=storage)))
        return
    data = data_folder(parser).resolve()
    study = optuna.create_study(
        study_name=STUDY,
        direction="maximize",
        storage=storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=12),
    )
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    if not study.trials:
        study.set_user_attr("seeds", seeds)
        study.enqueue_trial(NOW)
    if study.user_attrs["seeds"] != seeds:
        parser.error(
            f"{args.log} was made with the seeds {study.user_attrs['seeds']}; go on with those, or name another --log"
        )
    for settings in args.tried or ():
        study.enqueue_trial(settings, skip_if_exists=True)
    waiting = len(study.get_trials(states=(TrialState.WAITING,)))
    study.optimize(partial(objective, cells=cells(data, seeds)), waiting if args.tried else args.trials)
    print(report(study))


if __name__ == "__main__":
    main()
