"""A whole training, stage by stage, each of which leaves a checkpoint that an interrupted run goes on from."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dckt.errors import RunError
from dckt.files import atomic_file, atomic_write
from dckt.metrics import bootstrap_interval
from dckt_trainer import parallel
from dckt_trainer.analysis import score_spread
from dckt_trainer.checkpoint import load_into, load_tensors, load_with_metadata, save_tensors, unfit_error
from dckt_trainer.config import Config
from dckt_trainer.cores import crowding, threads
from dckt_trainer.data.corpus import OnBadPair
from dckt_trainer.data.features import default_cache
from dckt_trainer.encoders import CommonSpace
from dckt_trainer.evaluate import Answers, Evaluation, answers, evaluate, score
from dckt_trainer.inputs import Inputs, prepare
from dckt_trainer.linear import Fitted, default_clusters, fit_both, transfer_helps
from dckt_trainer.media import in_words
from dckt_trainer.model import DomainModel, save_model, save_network
from dckt_trainer.network import DomainNetwork, copy_of
from dckt_trainer.optimize import Solver, StepLog, sgd
from dckt_trainer.pairs import PairSet
from dckt_trainer.plan import DOMAINS, Plan, make_plan, pick_device, remake_plan
from dckt_trainer.pretrain import passes_for, pretrain
from dckt_trainer.progress import Reporter, Silent
from dckt_trainer.report import write_run_report
from dckt_trainer.runs import ReadOnlyRun, Run, create_run, open_run
from dckt_trainer.seeds import seed_of
from dckt_trainer.tensorboard import check_installed, mirrored
from dckt_trainer.transfer import JointData, RoundLog, passes_of_round, transfer_round
from dckt_trainer.word_bag import WordBag
from dckt_trainer.word_cnn import WordCNN


def train(
    source: str | Path | None,
    target: str | Path,
    out: str | Path,
    config: Config,
    *,
    device: str = "auto",
    cache: Path | None = None,
    on_bad_pair: OnBadPair = "raise",
    force: bool = False,
    pretrained_from: str | Path | None = None,
    trial: bool = False,
    tensorboard: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Trains a target model with knowledge from the source, the whole of DCKT, and writes a run folder.

    Args:
        source: corpus that knowledge is taken from: a folder of pictures and texts, or an ``.npz`` file of ready
            features (:mod:`dckt_trainer.data.feature_corpus`); None trains the target alone, with no rounds.
        target: corpus of the collection that is to be searched, of the same kind; its labels may be others.
        out: the run folder; must not exist.
        config: see :func:`dckt_trainer.config.load_config`.
        device: ``auto``, ``cpu`` or ``cuda``.
        cache: folder of cached trunk features; see :func:`dckt_trainer.data.features.default_cache`.
        on_bad_pair: ``raise`` lists all bad pairs and stops; ``skip`` leaves them out.
        force: an existing run folder is deleted first; nothing else ever is.
        pretrained_from: a run folder whose words, Word CNNs and pretrained networks are taken over; it must have been
            trained on the same corpora with the same settings, but for those of the joint stage. Where the target or
            what concerns the target alone differs as well, the source's half is taken over, if the words are the same.
        trial: the run is to be compared with others, on validation alone. The test pairs are dropped when the corpora
            have been checked, no models and no report are written, and evaluation.json has the average precision of
            every validation pair in place of ``test``.
        tensorboard: the events also go to the run's folder ``tensorboard`` as they happen, for TensorBoard.
        reporter: told how far the work is.

    Raises:
        DcktError: anything that the user can mend; see :mod:`dckt.errors`.
    """
    reporter, out = reporter or Silent(), Path(out)
    if tensorboard:
        check_installed()
    with threads(config.compute.threads), parallel.processes(pick_device(device)):
        reporter = Silent() if parallel.rank() else reporter
        plan = make_plan(
            source,
            target,
            out,
            config,
            device=device,
            on_bad_pair=on_bad_pair,
            force=force,
            pretrained_from=pretrained_from,
            reporter=reporter,
            trial=trial,
        )
        parallel.wait()  # until every process has looked at the folder
        with parallel.first_alone():
            run = _read_only(open_run(out)) if parallel.rank() else _new_run(out, plan)
        return _go(run, plan, cache, reporter, tensorboard=tensorboard)


def resume(
    path: str | Path,
    *,
    device: str = "auto",
    cache: Path | None = None,
    tensorboard: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Goes on with an interrupted run, from its last whole stage or round, with its own configuration.

    Events go to TensorBoard if ``tensorboard`` is set or if they did before.

    Raises:
        RunError: there is no such run, it is complete, or a corpus changed since.
    """
    reporter = reporter or Silent()
    run = open_run(path)
    if run.complete:
        raise RunError(f"{path}: the run is complete; its report is {run.path / 'report.html'}")
    with threads(run.config.compute.threads), parallel.processes(pick_device(device)):
        if parallel.rank():
            reporter, run = Silent(), _read_only(run)
        plan = remake_plan(run, device=device, reporter=reporter)
        with parallel.first_alone():
            if not parallel.rank():
                run.sweep_up()
                if run.facts.get("pretrained_from") and not _taken_over(run, plan):  # killed while it was
                    _take_over(open_run(run.facts["pretrained_from"]), run, plan)
        return _go(run, plan, cache, reporter, tensorboard=tensorboard)


def _go(run: Run, plan: Plan, cache: Path | None, reporter: Reporter, *, tensorboard: bool) -> Run:
    if warning := crowding(plan.device):
        reporter.say(warning)
    with ExitStack() as stack:
        if not parallel.rank():
            run = stack.enter_context(mirrored(run, wanted=tensorboard))
        return _Training(run, plan, cache or default_cache(), reporter).go()


def _read_only(run: Run) -> Run:
    return ReadOnlyRun(run.path, run.facts)


def _new_run(out: Path, plan: Plan) -> Run:
    if plan.replaces:
        _clear(out)
    run = create_run(
        out,
        plan.config,
        plan.facts.get("source"),
        plan.facts["target"],
        trunk=plan.trunk.sha256 if plan.trunk else None,
        pretrained_from=str(plan.base.path.resolve()) if plan.base else None,
        taken_over=plan.taken,
        trial=plan.trial,
    )
    if plan.base:
        _take_over(plan.base, run, plan)
    return run


@dataclass
class _Joint:
    """The state of the joint stage between rounds.

    Attributes:
        networks: by domain; the target's alone where there is no source.
        optimizer: over all of them.
        round: rounds that are done.
        step: solver steps that are done.
        best_round: the best on validation so far.
        best_map: its MAP; below 0 before the first validation.
    """

    networks: Mapping[str, DomainNetwork]
    optimizer: Solver
    round: int = 0
    step: int = 0
    best_round: int = 0
    best_map: float = -1.0

    @property
    def target(self) -> DomainNetwork:
        return self.networks["target"]


@dataclass
class _Training:
    run: Run
    plan: Plan
    cache: Path
    reporter: Reporter

    def __post_init__(self) -> None:
        self.config, self.corpora, self.device = self.plan.config, self.plan.corpora, self.plan.device

    def go(self) -> Run:
        with parallel.first_alone():  # the others find its checkpoints and its cache
            inputs = prepare(self.run, self.plan, cache=self.cache, reporter=self.reporter)
        if self.config.model.kind == "linear":
            return self._linear(inputs)
        joint = self._transfer(self._pretrained(inputs), inputs.pairs)
        with parallel.first_alone():
            if parallel.rank():
                return open_run(self.run.path)
            self._finish(joint, inputs)
            return self.run.finish()

    def _linear(self, inputs: Inputs) -> Run:
        """Fits without and with the source; takes seconds, so there is nothing to go on with."""
        with parallel.first_alone():
            if not parallel.rank():
                classes = len(self._class_names("target"))
                self._finish_linear(fit_both(inputs.pairs, classes, self.reporter, labelled=self._labelled), inputs)
                self.run.finish()
        return open_run(self.run.path)

    def _save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        if not parallel.rank():
            save_tensors(self.run.checkpoints / f"{name}.safetensors", tensors, notes)

    # -- pretraining -------------------------------------------------------------------------------------------

    def _pretrained(self, inputs: Inputs) -> dict[str, DomainNetwork]:
        networks: dict[str, DomainNetwork] = {}
        if "source" in self.corpora:
            networks["source"] = self._pretrain("source", None, inputs)
        start = networks["source"] if self.config.pretrain.target_start == "source" else None
        networks["target"] = self._pretrain("target", start, inputs)
        return networks

    def _pretrain(self, domain: str, start: DomainNetwork | None, inputs: Inputs) -> DomainNetwork:
        network, pairs = self._new_network(domain, start, inputs), inputs.pairs[f"{domain}.train"]
        path = self.run.checkpoints / f"{domain}-0.safetensors"
        if path.exists():
            load_into(network, load_tensors(path), path)
            self._forget_part(domain)
            return network
        stage, settings = f"pretrain/{domain}", self.config.pretrain
        epochs = settings.source_epochs if domain == "source" else settings.target_epochs
        optimizer = self._optimizer([network])
        done = self._restore_part(domain, network, optimizer)
        self.run.begin(stage, done)
        total = passes_for(len(pairs), epochs, settings.batch)

        def after(passes: int, log: StepLog) -> None:
            epoch = passes * settings.batch // len(pairs)
            self.run.log("metrics", {"stage": stage, "passes": passes, "epoch": epoch, **_loss_figures(log)})
            if passes < total:
                tensors = {**_states({domain: network}), **_momenta({domain: network}, optimizer)}
                self._save(f"{domain}-part", tensors, {"passes": str(passes), **_scale_notes(optimizer)})

        with self.reporter.task(f"pretraining, {domain}", total) as advance:
            advance(done)
            pretrain(
                network,
                optimizer,
                pairs,
                self.config,
                domain=domain,
                epochs=epochs,
                device=self.device,
                first_pass=done,
                advance=advance,
                after=after,
            )
        self._save(f"{domain}-0", network.state_dict())
        self._forget_part(domain)
        return network

    def _forget_part(self, domain: str) -> None:
        if not parallel.rank():
            (self.run.checkpoints / f"{domain}-part.safetensors").unlink(missing_ok=True)

    def _restore_part(self, domain: str, network: DomainNetwork, optimizer: Solver) -> int:
        """Goes on with a pretraining that was interrupted: the forward passes that it had done."""
        path = self.run.checkpoints / f"{domain}-part.safetensors"
        if not path.exists():
            return 0
        tensors, notes = load_with_metadata(path)
        self._load(path, tensors, notes, {domain: network}, optimizer)
        try:
            return int(notes["passes"])
        except (KeyError, ValueError) as error:
            raise unfit_error(path, str(error)) from error

    def _load(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, str],
        networks: Mapping[str, DomainNetwork],
        optimizer: Solver,
    ) -> None:
        """Puts back what :func:`_states` and :func:`_momenta` took."""
        for domain, network in networks.items():
            prefix = f"{domain}."
            load_into(network, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path)
        try:
            for name, parameter in _learning(networks).items():
                if self.config.optimizer.momentum and parameter.requires_grad:
                    momentum = tensors[f"momentum.{name}"].to(self.device).view_as(parameter)
                    optimizer.state[parameter]["momentum_buffer"] = momentum
            if "scale" in notes:
                optimizer.scale_for(torch.float16).load_state_dict(json.loads(notes["scale"]))
        except (KeyError, RuntimeError) as error:
            raise unfit_error(path, str(error)) from error

    def _optimizer(self, networks: Sequence[DomainNetwork]) -> Solver:
        return sgd(networks, self.config.optimizer, self.config.text.cnn_lr_factor)

    def _new_network(self, domain: str, start: DomainNetwork | None, inputs: Inputs) -> DomainNetwork:
        classes, settings = len(self.corpora[domain].labels), self.config.network
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.config.seed, "weights", domain))
            network = (
                copy_of(start, classes)
                if start
                else DomainNetwork(inputs.widths, settings.width, classes, settings.moving_average)
            )
        if self.config.text.training == "end_to_end":
            front: nn.Module = inputs.readers[domain]
            if start and self.config.text.target_cnn == "source":  # as it was trained with what else is taken over
                front = start.fronts["text"]
            network.fronts["text"] = copy.deepcopy(front)
        return network.to(self.device)

    # -- transfer ----------------------------------------------------------------------------------------------

    def _transfer(self, networks: Mapping[str, DomainNetwork], pairs: Mapping[str, PairSet]) -> _Joint:
        joint = _Joint(networks, self._optimizer(list(networks.values())))
        self._restore(joint)
        if joint.best_map < 0:
            self.run.begin("round/0")
            self._validate(joint, pairs["target.val"], {})
        for number in range(joint.round + 1, self.config.transfer.rounds + 1):
            self.run.begin(f"round/{number}")
            log = self._round(number, joint, pairs)
            joint.round, joint.step = number, joint.step + log.steps.steps
            self.run.log("selection", _selection_figures(log, pairs["target.train"]))
            figures = {"selected": len(log.selection.places), **_loss_figures(log.steps)}
            self._validate(joint, pairs["target.val"], figures)
            self._keep(joint)
        return joint

    def _round(self, number: int, joint: _Joint, pairs: Mapping[str, PairSet]) -> RoundLog:
        data = JointData(pairs["source.train"], pairs["target.train"], pairs["target.train.by_source"])
        name = f"round {number} of {self.config.transfer.rounds}"
        with self.reporter.task(name, passes_of_round(len(data.source), self.config)) as advance:
            return transfer_round(
                number,
                joint.networks["source"],
                joint.target,
                data,
                joint.optimizer,
                self.config,
                first_step=joint.step,
                device=self.device,
                advance=advance,
            )

    def _validate(self, joint: _Joint, pairs: PairSet, figures: dict[str, Any]) -> None:
        result = evaluate(joint.target, pairs, self.device)
        self.run.log("metrics", {"stage": f"round/{joint.round}", "validation": map_figures(result), **figures})
        self.reporter.say(
            f"round {joint.round}: validation MAP "
            + ", ".join(f"{in_words(name)} {one.map:.3f}" for name, one in result.directions.items())
            + (f", {figures['selected']} pairs selected" if figures else " (no transfer yet)")
        )
        if result.average > joint.best_map:
            joint.best_map, joint.best_round = result.average, joint.round
            self._save(f"target-best-{joint.round}", joint.target.state_dict())

    def _keep(self, joint: _Joint) -> None:
        """One file for the whole joint state, so that a kill leaves the state of one round, never a mixture."""
        tensors = {**_states(joint.networks), **_momenta(joint.networks, joint.optimizer)}
        notes = {
            "round": str(joint.round),
            "step": str(joint.step),
            "best_round": str(joint.best_round),
            "best_map": repr(joint.best_map),
            **_scale_notes(joint.optimizer),
        }
        self._save("joint", tensors, notes)
        for path in self.run.checkpoints.glob("target-best-*.safetensors"):  # those before, or of a try that was killed
            if not parallel.rank() and path.stem != f"target-best-{joint.best_round}":
                path.unlink()

    def _restore(self, joint: _Joint) -> None:
        path = self.run.checkpoints / "joint.safetensors"
        if not path.exists():
            return
        tensors, notes = load_with_metadata(path)
        self._load(path, tensors, notes, joint.networks, joint.optimizer)
        try:
            joint.round, joint.step = int(notes["round"]), int(notes["step"])
            joint.best_round, joint.best_map = int(notes["best_round"]), float(notes["best_map"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise unfit_error(path, str(error)) from error

    # -- the end -----------------------------------------------------------------------------------------------

    @property
    def _labelled(self) -> bool:
        return self.config.target.labels == "known"

    def _class_names(self, domain: str) -> tuple[str, ...]:
        """Of a model's outputs; where the target's labels are unknown, clusters."""
        if domain == "source" or self._labelled:
            return self.corpora[domain].labels
        count = self.config.target.clusters or default_clusters(len(self.corpora[domain].part("train")))
        return tuple(f"cluster {number}" for number in range(1, count + 1))

    @property
    def _judge(self) -> str:
        """The split that the end of the run is judged on."""
        return "val" if self.plan.trial else "test"

    def _finish(self, joint: _Joint, inputs: Inputs) -> None:
        """Reads the test split, once, for Model_t(0), the last and the best round; then writes models and report.

        A trial reads validation in its place, and writes the figures alone.
        """
        for network in joint.networks.values():
            network.forget_copies()
        joint.optimizer.zero_grad(set_to_none=True)
        joint.optimizer.state.clear()  # the three states below take the memory of gradients and momentum
        pairs, paths = inputs.pairs[f"target.{self._judge}"], self.run.checkpoints
        last = {name: value.clone() for name, value in joint.target.state_dict().items()}
        states = {
            "model_t0": (0, load_tensors(paths / "target-0.safetensors"), paths / "target-0.safetensors"),
            "last": (joint.round, last, paths / "joint.safetensors"),
            "best": (
                joint.best_round,
                load_tensors(paths / f"target-best-{joint.best_round}.safetensors"),
                paths / f"target-best-{joint.best_round}.safetensors",
            ),
        }
        tested = {}
        for name, (number, state, path) in states.items():
            load_into(joint.target, state, path)
            tested[name] = number, answers(joint.target, pairs, self.device)
        keep = self.config.transfer.keep
        joint.target.load_state_dict(states[keep][1])
        if not self.plan.trial:
            for domain, network in joint.networks.items():
                self._save_model(domain, network, inputs)
        self._report(tested, keep, pairs)

    def _finish_linear(self, found: Sequence[Fitted], inputs: Inputs) -> None:
        """Likewise for the linear models: round 0 is that of the target alone, round 1 takes the source in."""
        cpu = torch.device("cpu")
        readers = ("target", "source")  # each model reads the texts in a way of its own

        def part(name: str, number: int) -> PairSet:
            return inputs.pairs[f"target.{name}.by_source" if number else f"target.{name}"]

        for number, one in enumerate(found):
            self.run.begin(f"round/{number}")
            validation = map_figures(evaluate(one.model, part("val", number), cpu))
            event = {"stage": f"round/{number}", "validation": validation, "choice": asdict(one.choice)}
            self.run.log("metrics", event)
        last = len(found) - 1
        best = last if transfer_helps(found, self.reporter, labelled=self._labelled) else 0
        rounds = {"model_t0": 0, "last": last, "best": best}
        tested = {
            name: (number, answers(found[number].model, part(self._judge, number), cpu))
            for name, number in rounds.items()
        }
        if not self.plan.trial:
            self._write_model("target", found[best].model, inputs, inputs.readers.get(readers[best]))
        self._report(tested, "best", part(self._judge, best))

    def _report(self, tested: Mapping[str, tuple[int, Answers]], keep: str, pairs: PairSet) -> None:
        """Writes the evaluation of models, given their rounds and what they say of the test pairs, and the report."""
        validation = [
            {"round": int(event["stage"].removeprefix("round/")), **event["validation"]}
            for event in self.run.events("metrics")
            if "validation" in event
        ]
        outcome: dict[str, Any] = {"kept": keep, "labels": self.config.target.labels, "validation": validation}
        if self.plan.trial:
            outcome["trial"] = {
                name: {"round": number, "per_pair": score(said.vectors, pairs).per_pair.tolist()}
                for name, (number, said) in tested.items()
            }
            atomic_write(self.run.path / "evaluation.json", json.dumps(outcome, indent=1))
            return
        test: dict[str, Any] = {"pairs": len(pairs)}
        for name, (number, said) in tested.items():
            test[name] = {
                "round": number,
                **map_figures(score(said.vectors, pairs)),
                "average_at_50": score(said.vectors, pairs, cut=50).average,
            }
        outcome["test"] = test
        atomic_write(self.run.path / "evaluation.json", json.dumps(outcome, indent=1))
        write_run_report(self.run, self.corpora["target"], tested["model_t0"][1], tested[keep][1])

    def _save_model(self, domain: str, network: DomainNetwork, inputs: Inputs) -> None:
        front = network.fronts.pop("text") if network.fronts else inputs.readers.get(domain)
        self._write_model(domain, network, inputs, cast("WordCNN | WordBag | None", front))

    def _write_model(self, domain: str, network: CommonSpace, inputs: Inputs, reader: WordCNN | WordBag | None) -> None:
        folder, labels = self.run.path / domain, self._class_names(domain)
        if self.plan.trunk is None or inputs.vocabulary is None or reader is None:
            save_network(network, labels, folder)
            return
        model = DomainModel(self.plan.trunk, reader, network, inputs.vocabulary, labels, inputs.text)
        save_model(model, folder, self.config.image)


def map_figures(result: Evaluation) -> dict[str, Any]:
    """MAP of each direction, their average, its 95 % bootstrap interval over pairs, and the bounds of the ties."""
    return {
        **{name: one.map for name, one in result.directions.items()},
        "average": result.average,
        "interval": bootstrap_interval(result.per_pair),
        "lowest": result.lowest,
        "highest": result.highest,
    }


def _clear(out: Path) -> None:
    """Empties the folder of a run that has to make way; where ``out`` is a link, the link stays."""
    folder = out.resolve()
    shutil.rmtree(folder)
    folder.mkdir()


def _take_over(base: Run, run: Run, plan: Plan) -> None:
    """Takes checkpoints and events of a pretraining; files are linked, because none is ever changed in place."""
    for name in plan.taken:
        with atomic_file(run.checkpoints / name) as partial:
            try:
                os.link(base.checkpoints / name, partial)
            except OSError:  # another file system, or one without links
                shutil.copyfile(base.checkpoints / name, partial)
    domains = [domain for domain in DOMAINS if f"{domain}-0.safetensors" in plan.taken]
    stages = {f"{stage}/{domain}" for stage in ("word-cnn", "pretrain") for domain in domains}
    run.rewrite("metrics", [event for event in base.events("metrics") if event["stage"] in stages])


def _states(networks: Mapping[str, DomainNetwork]) -> dict[str, Tensor]:
    states = {domain: network.state_dict() for domain, network in networks.items()}
    return {f"{domain}.{name}": value for domain, state in states.items() for name, value in state.items()}


def _learning(networks: Mapping[str, DomainNetwork]) -> dict[str, Tensor]:
    return {f"{domain}.{name}": p for domain, network in networks.items() for name, p in network.named_parameters()}


def _scale_notes(optimizer: Solver) -> dict[str, str]:
    scaler = optimizer.scaler
    return {"scale": json.dumps(scaler.state_dict())} if scaler and scaler.is_enabled() else {}


def _momenta(networks: Mapping[str, DomainNetwork], optimizer: Solver) -> dict[str, Tensor]:
    """What the optimiser carries on; nothing where optimizer.momentum is 0, and for word vectors, which never learn."""
    found = {name: optimizer.state[p].get("momentum_buffer") for name, p in _learning(networks).items()}
    return {f"momentum.{name}": value for name, value in found.items() if value is not None}


def _taken_over(run: Run, plan: Plan) -> bool:
    return bool(run.events("metrics")) and all((run.checkpoints / name).exists() for name in plan.taken)


def _loss_figures(log: StepLog) -> dict[str, Any]:
    figures = {"total": log.total, "terms": dict(log.terms), "weighted": dict(log.weighted), "steps": log.steps}
    return {**figures, "skipped": log.skipped} if log.skipped else figures


def _selection_figures(log: RoundLog, pairs: PairSet) -> dict[str, Any]:
    scores, places = log.selection.scores, log.selection.places
    return {
        "stage": f"round/{log.number}",
        "round": log.number,
        "pairs": len(pairs),
        "selected": [pairs.ids[place] for place in places],
        **score_spread(scores),
        "mean_consistency": float(scores.mean()),
        "mean_consistency_selected": float(scores[places].mean()),
    }
