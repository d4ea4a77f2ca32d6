"""A whole training, stage by stage, each of which leaves a checkpoint that an interrupted run goes on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dckt.errors import ConfigError, RunError
from dckt.files import atomic_write
from dckt.metrics import CrossMediaMAP, bootstrap_interval
from dckt.preprocessing import TextSpec, Vocabulary
from dckt_trainer.checkpoint import load_tensors, load_with_metadata, save_tensors
from dckt_trainer.config import Config, ImageConfig
from dckt_trainer.data.corpus import SPLITS, Corpus, OnBadPair, Pair, Split, read_corpus
from dckt_trainer.data.features import cached_features, default_cache
from dckt_trainer.evaluate import evaluate
from dckt_trainer.losses import joint_terms
from dckt_trainer.model import DomainModel, save_model
from dckt_trainer.network import MEDIA, DomainNetwork, copy_of
from dckt_trainer.optimize import StepLog, sgd
from dckt_trainer.pairs import PairSet
from dckt_trainer.pretrain import passes_for, pretrain
from dckt_trainer.progress import Reporter, Silent, counted
from dckt_trainer.report import write_run_report
from dckt_trainer.runs import Run, create_run, open_run, taken_error
from dckt_trainer.seeds import seed_of
from dckt_trainer.transfer import JointData, RoundLog, passes_of_round, transfer_round
from dckt_trainer.trunk import Trunk, build_trunk
from dckt_trainer.word_cnn import WordCNN, text_vectors, train_word_cnn
from dckt_trainer.words import Words, check_vectors, learn_words

SMALLEST_SPREAD = 1e-4
Tokens: TypeAlias = dict[Split, list[list[int]]]


def train(
    source: str | Path,
    target: str | Path,
    out: str | Path,
    config: Config,
    *,
    device: str = "auto",
    cache: Path | None = None,
    on_bad_pair: OnBadPair = "raise",
    force: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Trains a target model with knowledge from the source, the whole of DCKT, and writes a run folder.

    Args:
        source: corpus that knowledge is taken from.
        target: corpus of the collection that is to be searched; its labels may be others.
        out: the run folder; must not exist.
        config: see :func:`dckt_trainer.config.load_config`.
        device: ``auto``, ``cpu`` or ``cuda``.
        cache: folder of cached trunk features; see :func:`dckt_trainer.data.features.default_cache`.
        on_bad_pair: ``raise`` lists all bad pairs and stops; ``skip`` leaves them out.
        force: an existing run folder is deleted first; nothing else ever is.
        reporter: told how far the work is.

    Raises:
        DcktError: anything that the user can mend; see :mod:`dckt.errors`.
    """
    reporter = reporter or Silent()
    place, out = _device(device), Path(out)
    replaced = _taken(out, force=force)
    config = _with_paths(config)
    _check_terms(config)
    corpora = {"source": _read(source, on_bad_pair, reporter), "target": _read(target, on_bad_pair, reporter)}
    _check_target(corpora["target"])
    trunk = build_trunk(config.image, config.seed).to(place)
    if replaced:
        shutil.rmtree(out.resolve())
    facts = [_facts(path, corpora[name], on_bad_pair) for name, path in (("source", source), ("target", target))]
    run = create_run(out, config, *facts, trunk=trunk.sha256)
    return _Training(run, corpora, trunk, place, cache or default_cache(), reporter).go()


def resume(
    path: str | Path, *, device: str = "auto", cache: Path | None = None, reporter: Reporter | None = None
) -> Run:
    """Goes on with an interrupted run, from its last whole stage or round, with its own configuration.

    Raises:
        RunError: there is no such run, it is complete, or a corpus changed since.
    """
    reporter = reporter or Silent()
    place, run = _device(device), open_run(path)
    if run.complete:
        raise RunError(f"{path}: the run is complete; its report is {run.path / 'report.html'}")
    corpora = {}
    for name in ("source", "target"):
        facts = run.facts[name]
        corpora[name] = _read(facts["path"], facts["on_bad_pair"], reporter)
        if corpora[name].fingerprint != facts["fingerprint"]:
            raise RunError(f"{path}: the {name} corpus {facts['path']} changed since the run began; train anew")
    trunk = build_trunk(run.config.image, run.config.seed).to(place)
    if trunk.sha256 != run.facts["trunk"]:
        raise RunError(
            f"{path}: the weights of the trunk ({run.config.image.weights}) changed since the run began; train anew"
        )
    return _Training(run, corpora, trunk, place, cache or default_cache(), reporter).go()


@dataclass
class _Joint:
    """The state of the joint stage between rounds."""

    source: DomainNetwork
    target: DomainNetwork
    optimizer: torch.optim.SGD
    round: int = 0
    step: int = 0
    best_round: int = 0
    best_map: float = -1.0


@dataclass
class _Training:
    run: Run
    corpora: dict[str, Corpus]
    trunk: Trunk
    device: torch.device
    cache: Path
    reporter: Reporter

    def __post_init__(self) -> None:
        self.config = self.run.config
        self.spec = TextSpec(max_tokens=self.config.text.max_tokens)
        self.labels = {name: corpus.labels for name, corpus in self.corpora.items()}

    def go(self) -> Run:
        words = self._words()  # first: they are quick, and a file of vectors that cannot be used shows at once
        images = self._image_features()
        tokens = {
            name: {part: self._tokens(corpus.part(part), words.vocabulary) for part in SPLITS}
            for name, corpus in self.corpora.items()
        }
        cnns = self._word_cnns(words, tokens)
        pairs = self._pair_sets(images, tokens, cnns)
        networks = self._pretrained(pairs)
        joint = self._transfer(networks, pairs)
        self._finish(joint, pairs, cnns, words.vocabulary)
        return self.run.finish()

    # -- inputs ------------------------------------------------------------------------------------------------

    def _image_features(self) -> dict[str, Tensor]:
        wanted = {
            "source.train": self.corpora["source"].part("train"),
            **{f"target.{part}": self.corpora["target"].part(part) for part in SPLITS},
        }
        features = {}
        for name, part in wanted.items():
            with self.reporter.task(f"image features, {name}", len(part)) as advance:
                paths = [pair.image for pair in part]
                rows = cached_features(self.trunk, paths, cache=self.cache, device=self.device, advance=advance)
            features[name] = torch.from_numpy(rows)
        _check_spread(features["source.train"], self.config.image)
        return features

    def _words(self) -> Words:
        path = self.run.checkpoints / "words.safetensors"
        if path.exists():
            tensors, notes = load_with_metadata(path)
            return Words(Vocabulary(tuple(json.loads(notes["words"]))), tensors["vectors"].numpy())
        texts = [pair.text for corpus in self.corpora.values() for pair in corpus.part("train")]
        with self.reporter.task("word vectors", 1) as advance:
            words = learn_words(texts, self.config.text, self.config.seed)
            advance(1)
        notes = {"words": json.dumps(words.vocabulary.words, ensure_ascii=False)}
        save_tensors(path, {"vectors": torch.from_numpy(words.vectors)}, notes)
        return words

    def _tokens(self, pairs: Sequence[Pair], vocabulary: Vocabulary) -> list[list[int]]:
        return [vocabulary.encode(pair.text, self.spec, allow_unknown=True) for pair in pairs]

    def _word_cnns(self, words: Words, tokens: dict[str, Tokens]) -> dict[str, WordCNN]:
        settings = self.config.text
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.config.seed, "word-cnn"))
            start = WordCNN(torch.from_numpy(words.vectors), settings.windows, settings.maps)
        source = self._word_cnn("source", start, tokens["source"])
        if settings.target_cnn == "source":
            return {"source": source, "target": source}
        return {"source": source, "target": self._word_cnn("target", source, tokens["target"])}

    def _word_cnn(self, domain: str, start: WordCNN, tokens: Tokens) -> WordCNN:
        path = self.run.checkpoints / f"text-{domain}.safetensors"
        if path.exists():
            cnn = WordCNN(start.embedding.weight, start.windows, self.config.text.maps)
            cnn.load_state_dict(load_tensors(path))
            return cnn.to(self.device).eval()
        stage = f"word-cnn/{domain}"
        self._begin(stage)
        corpus, numbers = self.corpora[domain], self._numbers(domain)
        train_part = tokens["train"], [numbers[pair.label] for pair in corpus.part("train")]
        val_part = tokens["val"], [numbers[pair.label] for pair in corpus.part("val")]
        with self.reporter.task(f"Word CNN, {domain}", self.config.text.cnn_epochs) as advance:

            def after(figures: dict[str, float]) -> None:
                advance(1)
                self.run.log("metrics", {"stage": stage, **figures})

            cnn = train_word_cnn(
                start,
                train_part,
                val_part,
                self.config.text,
                seed=self.config.seed,
                stream=stage,
                device=self.device,
                advance=after,
            )
        save_tensors(path, cnn.state_dict())
        return cnn

    def _pair_sets(
        self, images: dict[str, Tensor], tokens: dict[str, Tokens], cnns: dict[str, WordCNN]
    ) -> dict[str, PairSet]:
        def pair_set(domain: str, part: Split, cnn: WordCNN) -> PairSet:
            numbers, pairs = self._numbers(domain), self.corpora[domain].part(part)
            texts = text_vectors(cnn, tokens[domain][part], self.device)
            return PairSet(
                {"image": images[f"{domain}.{part}"], "text": texts},
                torch.tensor([numbers[pair.label] for pair in pairs], dtype=torch.int64),
                tuple(pair.id for pair in pairs),
            )

        sets = {f"target.{part}": pair_set("target", part, cnns["target"]) for part in SPLITS}
        sets["source.train"] = pair_set("source", "train", cnns["source"])
        # The source network scores target pairs, and it reads texts through the source's own Word CNN only.
        sets["target.train.by_source"] = pair_set("target", "train", cnns["source"])
        return sets

    def _numbers(self, domain: str) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels[domain])}

    # -- training ----------------------------------------------------------------------------------------------

    def _pretrained(self, pairs: dict[str, PairSet]) -> dict[str, DomainNetwork]:
        settings = self.config.pretrain
        source = self._pretrain("source", None, pairs["source.train"], settings.source_epochs)
        start = source if settings.target_start == "source" else None
        return {
            "source": source,
            "target": self._pretrain("target", start, pairs["target.train"], settings.target_epochs),
        }

    def _pretrain(self, domain: str, start: DomainNetwork | None, pairs: PairSet, epochs: int) -> DomainNetwork:
        inputs = {medium: rows.shape[1] for medium, rows in pairs.features.items()}
        classes = len(self.labels[domain])
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.config.seed, "weights", domain))
            network = copy_of(start, classes) if start else DomainNetwork(inputs, self.config.network.width, classes)
        network.to(self.device)
        path = self.run.checkpoints / f"{domain}-0.safetensors"
        if path.exists():
            network.load_state_dict(load_tensors(path))
            return network
        stage = f"pretrain/{domain}"
        self._begin(stage)
        passes = passes_for(len(pairs), epochs, self.config.pretrain.batch)
        with self.reporter.task(f"pretraining, {domain}", passes) as advance:
            pretrain(
                network,
                pairs,
                self.config,
                domain=domain,
                epochs=epochs,
                device=self.device,
                advance=advance,
                on_epochs=lambda epoch, log: self.run.log(
                    "metrics", {"stage": stage, "epoch": epoch, **_loss_figures(log)}
                ),
            )
        save_tensors(path, network.state_dict())
        return network

    def _transfer(self, networks: dict[str, DomainNetwork], pairs: dict[str, PairSet]) -> _Joint:
        optimizer = sgd(list(networks.values()), self.config.optimizer)
        joint = _Joint(networks["source"], networks["target"], optimizer)
        data = JointData(pairs["source.train"], pairs["target.train"], pairs["target.train.by_source"])
        self._restore(joint)
        if joint.best_map < 0:
            self._begin("round/0")
            self._validate(joint, pairs["target.val"], {})
        rounds = self.config.transfer.rounds
        for number in range(joint.round + 1, rounds + 1):
            self._begin(f"round/{number}")
            with self.reporter.task(
                f"round {number} of {rounds}", passes_of_round(len(data.source), self.config)
            ) as advance:
                log = transfer_round(
                    number,
                    joint.source,
                    joint.target,
                    data,
                    optimizer,
                    self.config,
                    first_step=joint.step,
                    device=self.device,
                    advance=advance,
                )
            joint.round, joint.step = number, joint.step + log.steps.steps
            self.run.log("selection", _selection_figures(log, data.target))
            self._validate(joint, pairs["target.val"], {"selected": len(log.selected), **_loss_figures(log.steps)})
            self._keep(joint)
        return joint

    def _validate(self, joint: _Joint, pairs: PairSet, figures: dict[str, Any]) -> None:
        result = evaluate(joint.target, pairs, self.device)
        self.run.log("metrics", {"stage": f"round/{joint.round}", "validation": map_figures(result), **figures})
        self.reporter.say(
            f"round {joint.round}: validation MAP image to text {result.image_to_text.map:.3f}, "
            f"text to image {result.text_to_image.map:.3f}"
            + (f", {figures['selected']} pairs selected" if figures else " (no transfer yet)")
        )
        if result.average > joint.best_map:
            joint.best_map, joint.best_round = result.average, joint.round
            notes = {"round": str(joint.round), "map": repr(result.average)}
            save_tensors(self.run.checkpoints / "target-best.safetensors", joint.target.state_dict(), notes)

    def _keep(self, joint: _Joint) -> None:
        """One file for the whole joint state, so that a kill leaves the state of one round, never a mixture."""
        tensors = {f"source.{name}": value for name, value in joint.source.state_dict().items()}
        tensors |= {f"target.{name}": value for name, value in joint.target.state_dict().items()}
        for name, parameter in self._named_parameters(joint).items():
            momentum = joint.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:  # SGD keeps none where optimizer.momentum is 0
                tensors[f"momentum.{name}"] = momentum
        notes = {
            "round": str(joint.round),
            "step": str(joint.step),
            "best_round": str(joint.best_round),
            "best_map": repr(joint.best_map),
        }
        save_tensors(self.run.checkpoints / "joint.safetensors", tensors, notes)

    def _restore(self, joint: _Joint) -> None:
        path = self.run.checkpoints / "joint.safetensors"
        if not path.exists():
            return
        tensors, notes = load_with_metadata(path)
        for name, network in (("source.", joint.source), ("target.", joint.target)):
            network.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
        for name, parameter in self._named_parameters(joint).items():
            if f"momentum.{name}" in tensors:
                joint.optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(self.device)
        joint.round, joint.step = int(notes["round"]), int(notes["step"])
        joint.best_round, joint.best_map = int(notes["best_round"]), float(notes["best_map"])

    def _named_parameters(self, joint: _Joint) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": parameter
            for name, network in (("source", joint.source), ("target", joint.target))
            for key, parameter in network.named_parameters()
        }

    # -- the end -----------------------------------------------------------------------------------------------

    def _finish(
        self, joint: _Joint, pairs: dict[str, PairSet], cnns: dict[str, WordCNN], vocabulary: Vocabulary
    ) -> None:
        """Reads the test split, once, for Model_t(0), the last and the best round; then writes models and report."""
        last = {name: value.clone() for name, value in joint.target.state_dict().items()}
        states = {
            "model_t0": (0, load_tensors(self.run.checkpoints / "target-0.safetensors")),
            "last": (joint.round, last),
            "best": (joint.best_round, load_tensors(self.run.checkpoints / "target-best.safetensors")),
        }
        test: dict[str, Any] = {"pairs": len(pairs["target.test"])}
        for name, (number, state) in states.items():
            joint.target.load_state_dict(state)
            at_50 = evaluate(joint.target, pairs["target.test"], self.device, cut=50)
            figures = map_figures(evaluate(joint.target, pairs["target.test"], self.device))
            test[name] = {"round": number, **figures, "average_at_50": at_50.average}
        keep = self.config.transfer.keep
        joint.target.load_state_dict(states[keep][1])
        validation = [
            {"round": int(event["stage"].removeprefix("round/")), **event["validation"]}
            for event in self.run.events("metrics")
            if "validation" in event
        ]
        outcome = {"kept": keep, "validation": validation, "test": test}
        atomic_write(self.run.path / "evaluation.json", json.dumps(outcome, indent=1))
        for domain, network in (("source", joint.source), ("target", joint.target)):
            labels = self.labels[domain]
            model = DomainModel(self.trunk, cnns[domain], network, vocabulary, labels, self.spec)
            save_model(model, self.run.path / domain, self.config.image)
        write_run_report(self.run, self.corpora["target"], joint.target, pairs["target.test"], self.device)

    def _begin(self, stage: str) -> None:
        """Forgets what an interrupted try at this stage logged."""
        for name in ("metrics", "selection"):
            kept = [event for event in self.run.events(name) if event["stage"] != stage]
            self.run.rewrite(name, kept)  # always: it also drops a line that a kill cut short


def map_figures(result: CrossMediaMAP) -> dict[str, Any]:
    """MAP of both directions, their average, its 95 % bootstrap interval over pairs, and the bounds of the ties."""
    pairs = (result.image_to_text.per_query + result.text_to_image.per_query) / 2
    return {
        "image_to_text": result.image_to_text.map,
        "text_to_image": result.text_to_image.map,
        "average": result.average,
        "interval": bootstrap_interval(pairs),
        "lowest": (result.image_to_text.lowest + result.text_to_image.lowest) / 2,
        "highest": (result.image_to_text.highest + result.text_to_image.highest) / 2,
    }


def _loss_figures(log: StepLog) -> dict[str, Any]:
    return {"total": log.total, "terms": dict(log.terms), "weighted": dict(log.weighted), "steps": log.steps}


def _selection_figures(log: RoundLog, pairs: PairSet) -> dict[str, Any]:
    quantiles = np.quantile(log.consistency, [0, 0.25, 0.5, 0.75, 1])
    return {
        "stage": f"round/{log.number}",
        "round": log.number,
        "pairs": len(pairs),
        "selected": [pairs.ids[place] for place in log.selected],
        "consistency_quantiles": [float(value) for value in quantiles],
        "mean_consistency": float(log.consistency.mean()),
        "mean_consistency_selected": float(log.consistency[log.selected].mean()),
    }


def _read(path: str | Path, on_bad_pair: OnBadPair, reporter: Reporter) -> Corpus:
    with counted(reporter, f"checking {Path(path).name}") as progress:
        corpus = read_corpus(path, on_bad_pair=on_bad_pair, progress=progress)
    counts = ", ".join(f"{len(corpus.part(part))} {part}" for part in SPLITS)
    reporter.say(f"{path}: {len(corpus.pairs)} pairs ({counts}), {len(corpus.labels)} classes")
    for line in (*corpus.skipped, *corpus.warnings):
        reporter.say(f"  note: {line}")
    return corpus


def _check_target(corpus: Corpus) -> None:
    empty = [part for part in SPLITS if not corpus.part(part)]
    if empty:
        raise ConfigError(
            f"the target corpus {corpus.root} has no pairs in: {', '.join(empty)}; a target needs train, val and "
            "test pairs "
            "(leave the column split out everywhere and dckt makes a split)"
        )


def _taken(out: Path, *, force: bool) -> bool:
    """Whether a run has to make way, which only ``force`` allows; anything but a run or an empty folder never does."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not force:
        raise taken_error(out)
    open_run(out)
    return True


def _with_paths(config: Config) -> Config:
    """The configuration with absolute paths, so that a run can be gone on with from any folder."""
    image, text = config.image, config.text
    if image.weights not in ("torchvision", "random"):
        image = replace(image, weights=str(Path(image.weights).resolve()))
    if text.vectors != "word2vec":
        text = replace(text, vectors=str(Path(text.vectors).resolve()))
        check_vectors(text)
    return replace(config, image=image, text=text)


def _check_terms(config: Config) -> None:
    if config.transfer.rounds and not joint_terms(MEDIA, config.losses, config.mmd):
        raise ConfigError("every weight in [losses] is 0, so a round would minimise nothing; give one, or --rounds 0")


def _check_spread(features: Tensor, config: ImageConfig) -> None:
    """Refuses features that hardly differ: divided by the epsilon of batch normalisation, they would train nothing.

    A deep trunk with random weights yields such features; its signal fades from layer to layer.
    """
    spread = features.std(0).max()
    if not spread > SMALLEST_SPREAD:
        raise ConfigError(
            f"the trunk {config.trunk} with weights {config.weights!r} gives every picture nearly the same features "
            f"(largest standard deviation {spread:.1e}); use trained weights, or a shallow trunk such as alexnet"
        )


def _facts(path: str | Path, corpus: Corpus, on_bad_pair: OnBadPair) -> dict[str, Any]:
    counts = {part: len(corpus.part(part)) for part in SPLITS}
    return {
        "path": str(Path(path).resolve()),
        "fingerprint": corpus.fingerprint,
        "on_bad_pair": on_bad_pair,
        "pairs": counts,
        "classes": len(corpus.labels),
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is cuda, but PyTorch {torch.__version__} sees no CUDA device; use cpu or auto")
    return torch.device(name)
