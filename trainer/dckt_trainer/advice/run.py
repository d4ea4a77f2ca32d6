"""Trains the candidates of an advice within a time budget, and remembers what was done.

The folder of an advice:

state.json              what was asked, times, and what was left out
runs/TRIAL-SEED/        a trial run each: figures on validation, and no models
advice.json, advice.md  for programs and for people
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dckt.errors import ConfigError, DcktError, RunError
from dckt.files import atomic_write
from dckt_trainer.advice.candidates import Trial, configs, trials
from dckt_trainer.advice.judgement import Advice, Figures, LeftOut
from dckt_trainer.advice.words import duration, markdown, record, sentence
from dckt_trainer.config import Config, config_from_tree
from dckt_trainer.data.feature_corpus import is_feature_corpus
from dckt_trainer.estimate import Estimate, estimate
from dckt_trainer.plan import config_differences
from dckt_trainer.progress import Advance, Reporter, Silent
from dckt_trainer.runs import Run, open_run
from dckt_trainer.sweep_jobs import Options
from dckt_trainer.train import resume, train

STATE_VERSION = 1
FEWEST_PAIRS = 2  # of validation, to tell how much a mean varies


def advise(
    source: str | Path | None,
    target: str | Path,
    out: str | Path,
    *,
    budget: float,
    seeds: int = 1,
    changes: Sequence[str] = (),
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> Advice:
    """Trains the candidates that fit into the budget, judges them on validation, and writes the advice.

    No test pair is read. In a folder that has an advice already, what is missing is trained; where nothing is, or
    nothing more would fit, the advice is that of before.

    Args:
        source: corpus that knowledge may be taken from; None tries what needs none.
        target: corpus of the collection that is to be searched.
        out: folder of the advice, new or its own.
        budget: seconds, over all calls with this folder.
        seeds: how often each candidate is trained.
        changes: settings of all candidates, ``section.key=value`` each.
        options: device, cache, and what is done with bad pairs.
        reporter: told how far the work is.

    Raises:
        ConfigError: what was asked cannot be, differs from what was asked with this folder before, or nothing fits.
        RunError: the folder is not of an advice, a corpus changed since, or every candidate failed.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; expected at least 1")
    for name, path in (("source", source), ("target", target)):
        if path is not None and not is_feature_corpus(path) and not Path(path).exists():
            raise ConfigError(f"--{name}: there is no {path}; expected a corpus")
    options = options or Options()
    plain = trials(source=source is not None, vectors=False)
    vectors = bool(configs(plain[-1:], changes)[plain[-1].name].media.vectors)
    chosen = trials(source=source is not None, vectors=vectors)
    asked = _Asked(
        None if source is None else str(source),
        str(target),
        seeds,
        tuple(changes),
        options.on_bad_pair,
        configs(chosen, changes),
    )
    return _Advising(chosen, asked, Path(out), budget, options, reporter or Silent()).go()


@dataclass(frozen=True)
class _Asked:
    source: str | None
    target: str
    seeds: int
    changes: tuple[str, ...]
    on_bad_pair: str
    configs: Mapping[str, Config]

    def as_dict(self) -> dict[str, Any]:
        return {
            **{name: None if path is None else str(Path(path).resolve()) for name, path in self.corpora.items()},
            "seeds": self.seeds,
            "on_bad_pair": self.on_bad_pair,
            "configs": {name: dataclasses.asdict(config) for name, config in self.configs.items()},
        }

    @property
    def corpora(self) -> dict[str, str | None]:
        return {"source": self.source, "target": self.target}

    def differences(self, before: Mapping[str, Any], origin: str) -> list[str]:
        """A phrase for each thing that was asked otherwise before."""
        ours = self.as_dict()
        found = [
            f"{name} is {before[name]} there and {ours[name]} here"
            for name in ("source", "target", "seeds", "on_bad_pair")
            if before[name] != ours[name]
        ]
        for name, tree in before["configs"].items():
            if name in self.configs:
                found += config_differences(config_from_tree(tree, f"{origin}, {name}"), self.configs[name])
        return list(dict.fromkeys(found))


@dataclass
class _State:
    """What state.json remembers.

    Attributes:
        budget: seconds; the largest that was given.
        spent: seconds of it, over all calls.
        done: whether everything was trained or left out.
        seconds: by run, how long it took.
        rates: by kind of model, seconds a training pair beyond what was estimated.
        left_out: by trial, the rest of :class:`LeftOut`.
    """

    budget: float = 0.0
    spent: float = 0.0
    done: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    left_out: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class _OverBudgetError(Exception):
    """The budget is over in the middle of a training."""


@dataclass
class _Advising:
    trials: Sequence[Trial]
    asked: _Asked
    out: Path
    budget: float
    options: Options
    reporter: Reporter

    def __post_init__(self) -> None:
        self.state = self._remembered()
        self.start, self.before = time.monotonic(), self.state.spent

    def go(self) -> Advice:
        more = self.budget > self.state.budget
        waits = any(each["why"] in ("time", "stopped") for each in self.state.left_out.values())
        self.budget = self.state.budget = max(self.budget, self.state.budget)
        if self.state.done and not (more and waits):
            self.reporter.say(f"{self.out}: the advice of before; for a corpus that changed since, name another --out")
        else:
            self._try_all()
        advice = self._advice()
        atomic_write(self.out / "advice.json", json.dumps(record(advice), indent=1, ensure_ascii=False))
        atomic_write(self.out / "advice.md", markdown(advice))
        return advice

    # -- training ----------------------------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        return self.budget - self.before - (time.monotonic() - self.start)

    def _try_all(self) -> None:
        self.state.done, self.state.left_out = False, {}
        try:
            for trial in self.trials:
                if self._shown_elsewhere(trial) or self._runs(trial):
                    continue
                left = self._try(trial)
                if left:
                    self.reporter.say(sentence(left))
                    self.state.left_out[trial.name] = {
                        name: value for name, value in vars(left).items() if name != "trial"
                    }
            whys = [each["why"] for each in self.state.left_out.values()]
            self.state.done = "failed" not in whys  # what failed is tried again
        finally:
            self.state.spent = self.budget - self.remaining
            if self.state.done or self.state.seconds:  # bad input leaves nothing behind
                self._save()
        self._sweep_up()

    def _try(self, trial: Trial) -> LeftOut | None:
        missing = [seed for seed in range(self.asked.seeds) if not _finished(self._path(trial, seed))]
        cost = self._estimate(trial, missing[0])
        seconds = self._expected(trial, cost, len(missing))
        if seconds is None:
            return LeftOut(trial, "memory", None, self.remaining, cost.warnings[0])
        if seconds > self.remaining:
            return LeftOut(trial, "time", seconds, max(self.remaining, 0.0))
        titles = " and ".join(candidate.title for candidate in trial.candidates)
        self.reporter.say(f"{titles}: about {duration(seconds)}, {duration(self.remaining)} are left")
        for seed in missing:
            try:
                self._train(trial, seed)
            except _OverBudgetError:
                return LeftOut(trial, "stopped", seconds, 0.0)
            except DcktError as error:
                return LeftOut(trial, "failed", seconds, self.remaining, str(error).partition("\n")[0])
        self._learn(trial, cost, missing)
        return None

    def _estimate(self, trial: Trial, seed: int) -> Estimate:
        try:
            cost = estimate(
                self.asked.source if trial.source else None,
                self.asked.target,
                None,
                replace(self.asked.configs[trial.name], seed=seed),
                **dataclasses.asdict(self.options),
                pretrained_from=self._base(trial, seed),
                trial=True,
            )
        except ConfigError as error:
            raise ConfigError(f"{trial.candidates[-1].title}: {error}") from error
        if cost.pairs["target"]["val"] < FEWEST_PAIRS:
            raise ConfigError(f"{self.asked.target} has 1 validation pair; an advice needs {FEWEST_PAIRS} at least")
        return cost

    def _expected(self, trial: Trial, cost: Estimate, count: int) -> float | None:
        """Seconds of ``count`` seeds: the estimate, and what trainings before took beyond theirs, pair by pair."""
        each = cost.seconds["in all"]
        if each is None:
            return None
        once = cost.seconds.get("image features") or 0.0  # the next seed finds them in the cache
        rates = self.state.rates
        rate = rates.get(self._kind(trial), max(rates.values(), default=0.0))
        return once + count * (each - once + rate * self._read(trial, cost))

    def _learn(self, trial: Trial, cost: Estimate, seeds: Sequence[int]) -> None:
        taken = sum(self.state.seconds[self._path(trial, seed).name] for seed in seeds)
        once, each = cost.seconds.get("image features") or 0.0, cost.seconds["in all"] or 0.0
        beyond = taken - once - len(seeds) * (each - once)
        self.state.rates[self._kind(trial)] = max(beyond, 0.0) / len(seeds) / self._read(trial, cost)

    def _read(self, trial: Trial, cost: Estimate) -> int:
        """Pairs that a run reads and learns words from, less those that were learnt from already."""
        learnt = ["source"] if self._base(trial, 0) else []
        return sum(sum(pairs.values()) for name, pairs in cost.pairs.items() if name not in learnt)

    def _kind(self, trial: Trial) -> str:
        return self.asked.configs[trial.name].model.kind

    def _train(self, trial: Trial, seed: int) -> None:
        path, reporter = self._path(trial, seed), _Until(self.reporter, time.monotonic() + self.remaining)
        self._save()
        begun = time.monotonic()
        try:
            if (path / "run.json").exists():
                resume(path, device=self.options.device, cache=self.options.cache, reporter=reporter)
            else:
                shutil.rmtree(path, ignore_errors=True)  # a kill may leave a folder that is no run yet
                train(
                    self.asked.source if trial.source else None,
                    self.asked.target,
                    path,
                    replace(self.asked.configs[trial.name], seed=seed),
                    **dataclasses.asdict(self.options),
                    pretrained_from=self._base(trial, seed),
                    trial=True,
                    reporter=reporter,
                )
        finally:
            taken = time.monotonic() - begun
            self.state.seconds[path.name] = self.state.seconds.get(path.name, 0.0) + taken
            self.state.spent = self.budget - self.remaining
            self._save()

    def _base(self, trial: Trial, seed: int) -> Path | None:
        """The run whose pretrained source can be taken over; a bag's words depend on more than the source."""
        if not trial.base or (
            self.asked.configs[trial.name].text.encoder != "cnn" and not is_feature_corpus(self.asked.target)
        ):
            return None
        path = self.out / "runs" / f"{trial.base}-{seed}"
        return path if _finished(path) and (path / "checkpoints").exists() else None

    def _sweep_up(self) -> None:
        """Deletes checkpoints, but for those that a trial which was left out would take over."""
        kept = {trial.base for trial in self.trials if trial.name in self.state.left_out}
        for trial in self.trials:
            for run in self._runs(trial) if trial.name not in kept else ():
                shutil.rmtree(run.checkpoints, ignore_errors=True)

    # -- what there is -----------------------------------------------------------------------------------------

    def _path(self, trial: Trial, seed: int) -> Path:
        return self.out / "runs" / f"{trial.name}-{seed}"

    def _runs(self, trial: Trial) -> list[Run]:
        """The runs of a trial; none unless all are complete."""
        runs = [_finished(self._path(trial, seed)) for seed in range(self.asked.seeds)]
        return [run for run in runs if run] if all(runs) else []

    def _shown_elsewhere(self, trial: Trial) -> bool:
        return any(other.name == trial.unless and self._runs(other) for other in self.trials)

    def _advice(self) -> Advice:
        runs = {trial: self._runs(trial) for trial in self.trials if not self._shown_elsewhere(trial)}
        left = [
            LeftOut(trial, **self.state.left_out[trial.name]) for trial in runs if trial.name in self.state.left_out
        ]
        trained = [run for those in runs.values() for run in those]
        if not trained:
            told = "\n".join(f"  {sentence(each)}" for each in left)
            if any(each.why == "failed" for each in left):
                raise RunError(f"no candidate could be trained:\n{told}")
            raise ConfigError(
                f"no candidate fits into the budget of {duration(self.budget)}; give a larger --budget:\n{told}"
            )
        self._check_corpora(trained)
        facts = trained[0].facts["target"]
        return Advice(
            self.asked.source,
            self.asked.target,
            {part: facts["pairs"][part] for part in ("train", "val")},
            facts["classes"],
            self.asked.changes,
            self.asked.on_bad_pair == "skip",
            self.asked.seeds,
            self.budget,
            self.state.spent,
            tuple(each for trial, those in runs.items() if those for each in self._figures(trial, those)),
            tuple(left),
        )

    def _figures(self, trial: Trial, runs: Sequence[Run]) -> Iterator[Figures]:
        seconds = sum(self.state.seconds.get(run.path.name, 0.0) for run in runs)
        outcomes = [run.evaluation for run in runs]
        for candidate in trial.candidates:
            names = [each["kept"] if candidate.network == "kept" else candidate.network for each in outcomes]
            found = [each["trial"][name] for each, name in zip(outcomes, names, strict=True)]
            # The command trains with the first seed, and hands out what that run keeps.
            kept = outcomes[0]["trial"][outcomes[0]["kept"]]["round"]
            offered = candidate.network != "last" or kept == found[0]["round"]
            yield Figures(candidate, np.array([each["per_pair"] for each in found]), seconds, offered)

    def _check_corpora(self, runs: Sequence[Run]) -> None:
        seen: dict[tuple[str, int], tuple[str, Path]] = {}
        for run in runs:
            drawn = run.config.seed if run.config.target.pairs_per_class else 0
            for name in ("source", "target"):
                facts = run.facts[name]
                if facts:
                    first, path = seen.setdefault((name, drawn), (facts["fingerprint"], run.path))
                    if first != facts["fingerprint"]:
                        raise RunError(
                            f"the {name} corpus {facts['path']} changed between the runs {path} and {run.path}; "
                            "name another --out"
                        )

    # -- memory ------------------------------------------------------------------------------------------------

    def _remembered(self) -> _State:
        path = self.out / "state.json"
        if not path.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise RunError(f"{self.out} exists and is not of an advice (no state.json); name another --out")
            return _State()
        try:
            memory = json.loads(path.read_text(encoding="utf-8"))
            number = memory["version"] if memory["format"] == "dckt-advice-state" else 0
            state = _State(**memory["state"]) if number == STATE_VERSION else None
            changed = self.asked.differences(memory["asked"], str(path)) if state else []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged or not of an advice ({error}); name another --out") from error
        if state is None:
            raise RunError(f"{path}: format {number}; this version of dckt reads {STATE_VERSION}; name another --out")
        if changed:
            raise ConfigError(f"{self.out} is the advice on something else: {'; '.join(changed)}. Name another --out")
        return state

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "format": "dckt-advice-state",
            "version": STATE_VERSION,
            "asked": self.asked.as_dict(),
            "state": dataclasses.asdict(self.state),
        }
        atomic_write(self.out / "state.json", json.dumps(content, indent=1, ensure_ascii=False))


class _Until:
    """A reporter that ends the work it is told of once the budget is over; the run can be gone on with."""

    def __init__(self, reporter: Reporter, deadline: float) -> None:
        self.reporter, self.deadline = reporter, deadline

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        with self.reporter.task(name, total) as advance:

            def checked(count: int, figures: Mapping[str, float] | None = None) -> None:
                advance(count, figures)
                if time.monotonic() > self.deadline:
                    raise _OverBudgetError

            yield checked

    def say(self, text: str) -> None:
        self.reporter.say(text)


def _finished(path: Path) -> Run | None:
    """The run of a folder, where it is complete."""
    run = open_run(path) if (path / "run.json").exists() else None
    return run if run and run.complete else None
