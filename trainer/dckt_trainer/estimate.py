"""What a training would cost, without training: memory and disk by formula, time by timing steps on random numbers.

Everything is read and checked as a training would, and nothing is written. Not counted is what takes little beside the
rest: word vectors, Word CNNs, and the validation after each round.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from dckt_trainer.config import Config
from dckt_trainer.cores import threads
from dckt_trainer.data.corpus import Corpus, OnBadPair
from dckt_trainer.data.feature_corpus import FeatureCorpus
from dckt_trainer.data.features import BATCH, cache_file, computed_features, default_cache
from dckt_trainer.inputs import needed_pictures
from dckt_trainer.linear.fit import DIRECTIONS, analysis_seconds, steps
from dckt_trainer.losses import Term, joint_terms, pretraining_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream
from dckt_trainer.plan import DOMAINS, Plan, make_plan
from dckt_trainer.pretrain import passes_for
from dckt_trainer.progress import Reporter, Silent
from dckt_trainer.transfer import passes_of_round
from dckt_trainer.trunk import Trunk
from dckt_trainer.word_bag import SOURCE_TOPICS
from dckt_trainer.words import learn_words

FLOAT, DOUBLE = 4, 8  # bytes
HALF = 2
ENOUGH = 1.0  # seconds; steps are timed until so much has passed
MOST_STEPS = 5
TIMED_PICTURES = 4 * BATCH


@dataclass(frozen=True)
class Estimate:
    """What a training would cost.

    Attributes:
        pairs: by domain and split.
        inputs: by medium, numbers a pair.
        memory: bytes on the training's device, by what takes them, at the peak beyond what is taken now.
        free_memory: bytes of it that are free.
        disk: bytes that are written, by what.
        free_disk: by what, bytes that are free where that is written.
        pictures: how many have no features in the cache yet.
        seconds: by stage; None where it was not timed, because the memory is too small.
        warnings: what will hardly work.
    """

    pairs: Mapping[str, Mapping[str, int]]
    inputs: Mapping[str, int]
    memory: Mapping[str, int]
    free_memory: int
    disk: Mapping[str, int]
    free_disk: Mapping[str, int]
    pictures: int
    seconds: Mapping[str, float | None]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def estimate(
    source: str | Path | None,
    target: str | Path,
    out: str | Path | None,
    config: Config,
    *,
    device: str = "auto",
    cache: Path | None = None,
    on_bad_pair: OnBadPair = "raise",
    force: bool = False,
    pretrained_from: str | Path | None = None,
    trial: bool = False,
    reporter: Reporter | None = None,
) -> Estimate:
    """Checks what :func:`dckt_trainer.train.train` would check with these arguments, and says what it would cost.

    Weights that torchvision has to download are downloaded. With ``out`` None no run folder is looked at, and the
    disk is that of the working directory.

    Raises:
        DcktError: what the training would raise before its first step.
    """
    reporter = reporter or Silent()
    with threads(config.compute.threads):
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
        return _Estimation(plan, Path(out or "."), cache or default_cache(), reporter).go()


@dataclass
class _Estimation:
    plan: Plan
    out: Path
    cache: Path
    reporter: Reporter

    def __post_init__(self) -> None:
        self.config, self.device = self.plan.config, self.plan.device
        self.pairs = {name: facts["pairs"] for name, facts in self.plan.facts.items()}
        self.inputs = self._inputs()
        self.linear = self.config.model.kind == "linear"
        with torch.device("meta"):  # shapes, without the memory
            self.shapes = {} if self.linear else {name: self._network(name) for name in self.plan.corpora}

    def go(self) -> Estimate:
        missing = self._missing_features()
        memory, free_memory, warnings = self._memory(), _free_memory(self.device), []
        needed = sum(memory.values())
        fits = needed <= free_memory
        if not fits:
            warnings.append(
                f"the training takes {needed / 1e9:.1f} GB of memory on {self.device}, and {free_memory / 1e9:.1f} GB "
                "are free, so its steps were not timed; lower network.width, the batch, or compute.fold"
            )
        disk = self._disk(missing)
        free_disk = {name: _free_disk(self.cache if name == "feature cache" else self.out) for name in disk}
        warnings += [
            f"the {name} takes {size / 1e9:.1f} GB of disk, and {free_disk[name] / 1e9:.1f} GB are free there"
            for name, size in disk.items()
            if size > free_disk[name]
        ]
        return Estimate(
            self.pairs,
            self.inputs,
            memory,
            free_memory,
            disk,
            free_disk,
            sum(map(len, missing.values())),
            self._seconds(missing, timed=fits),
            tuple(warnings),
        )

    # -- what there is -----------------------------------------------------------------------------------------

    def _inputs(self) -> dict[str, int]:
        """By medium, the numbers a pair; with pictures and texts, a file of word vectors is read whole, to check it."""
        target, text = self.plan.corpora["target"], self.config.text
        if isinstance(target, FeatureCorpus):
            return target.widths
        width = text.dimension
        if text.vectors != "word2vec":
            with self.reporter.task("word vectors", 1) as advance:
                texts = [pair.text for corpus in self.plan.corpora.values() for pair in corpus.part("train")]
                width = learn_words(texts, text, self.config.seed).vectors.shape[1]
                advance(1)
        reader = len(text.windows) * text.maps
        if text.encoder == "bag":  # the most; few texts have fewer topics
            reader = width + text.topics + (SOURCE_TOPICS if "source" in self.plan.corpora else 0)
        return {"image": self._trunk_features(), "text": reader, **target.widths}

    def _trunk_features(self) -> int:
        return self.plan.trunk.features if self.plan.trunk else 0

    def _missing_features(self) -> dict[str, list[Path]]:
        """By the name of the pair set, pictures whose features are not in the cache."""
        trunk = self.plan.trunk
        if trunk is None:
            return {}
        wanted = needed_pictures(cast("Mapping[str, Corpus]", self.plan.corpora))
        return {name: paths for name, paths in wanted.items() if not cache_file(trunk, paths, self.cache).is_file()}

    def _network(self, domain: str) -> DomainNetwork:
        settings = self.config.network
        return DomainNetwork(
            self.inputs, settings.width, len(self.plan.corpora[domain].labels), settings.moving_average
        )

    # -- memory and disk ---------------------------------------------------------------------------------------

    def _memory(self) -> dict[str, int]:
        """The joint stage's, or the pretraining's where the target is alone; the tests hold this to a real step."""
        if self.linear:
            largest = max(pairs["train"] for pairs in self.pairs.values())
            return {"features in double precision": 3 * DOUBLE * largest * sum(self.inputs.values())}
        weights = sum(_numbers(network) for network in self.shapes.values())
        memory = {
            "weights": FLOAT * weights,
            "gradients": FLOAT * weights,
            "momentum": FLOAT * weights if self.config.optimizer.momentum else 0,
            "activations": self._activations(),
        }
        memory["gradients of activations"] = memory["activations"]  # on the way back about as much again is held
        if self.config.compute.precision != "float32":
            largest = max(p.numel() for network in self.shapes.values() for p in network.parameters())
            memory["weights in low precision"] = HALF * (weights + largest)  # the last for a gradient on its way
        if self.device.type == "cpu" and self.plan.trunk:
            # Image features stay on disk, mapped into memory; ready features have been read already.
            rows = sum(self.pairs["target"].values())
            if "source" in self.pairs:
                rows += self.pairs["source"]["train"] + self.pairs["target"]["train"]
            memory |= {
                f"{medium} vectors": FLOAT * rows * width for medium, width in self.inputs.items() if medium != "image"
            }
        return memory

    def _activations(self) -> int:
        """Bytes that the largest pass leaves for its way back."""
        config = self.config
        stages = [
            self._pass(1, pretraining_terms(name, self.inputs, config.losses), stage.batch, stage.accumulate)
            for name, stage in ((name, config.pretrain) for name in self.shapes)
        ]
        if config.transfer.rounds:
            terms = joint_terms(self.inputs, config.losses, config.mmd)
            stages.append(self._pass(2, terms, config.transfer.batch, config.transfer.accumulate))
        return max(stages)

    def _pass(self, domains: int, terms: Sequence[Term], batch: int, accumulate: int) -> int:
        """Numbers are counted for each pair and then for each batch; the media have common.fc8 and .fc9 together."""
        width, media = self.config.network.width, len(self.inputs)
        folded = min(self.config.compute.fold or accumulate, accumulate)
        normalised = sum(width for medium, width in self.inputs.items() if medium != "image")
        inputs = sum(self.inputs.values()) + 2 * normalised  # their normalisation keeps two more
        layers = 4 * media * 2 * width  # what each normalises, and what comes out
        # Pair losses keep differences; MMD keeps the rows of both domains together, and matrices of kernel values.
        pair = [term for term in terms if term.name.startswith("pair/")]
        rows = {term: media if "common" in term.name else 1 for term in terms if term.name.startswith("mmd/")}
        kept = width * (len(pair) / domains + sum(rows.values()))
        kernels = (self.config.mmd.kernels + 1) * sum((2 * batch * count) ** 2 for count in rows.values())
        return int(FLOAT * folded * (domains * batch * (inputs + layers + kept) + kernels))

    def _disk(self, missing: Mapping[str, list[Path]]) -> dict[str, int]:
        if self.linear:
            disk = {"run folder": FLOAT * DIRECTIONS * sum(self.inputs.values())}
            if missing:
                disk["feature cache"] = FLOAT * self._trunk_features() * sum(map(len, missing.values()))
            return disk
        states = {name: FLOAT * _numbers(network) for name, network in self.shapes.items()}
        checkpoints = sum(states.values()) + states["target"]  # NAME-0 of each, and target-best
        if self.config.transfer.rounds:  # weights and momentum, and for a moment the new beside the old
            checkpoints += 2 * (2 if self.config.optimizer.momentum else 1) * sum(states.values())
        models = sum(states.values())
        if self.plan.trunk:
            models += len(states) * FLOAT * sum(value.numel() for value in self.plan.trunk.state_dict().values())
        disk = {"run folder": checkpoints + models}
        if missing:
            disk["feature cache"] = FLOAT * self._trunk_features() * sum(map(len, missing.values()))
        return disk

    # -- time --------------------------------------------------------------------------------------------------

    def _seconds(self, missing: Mapping[str, list[Path]], *, timed: bool) -> dict[str, float | None]:
        config = self.config
        epochs = {"source": config.pretrain.source_epochs, "target": config.pretrain.target_epochs}
        seconds: dict[str, float | None] = {}
        if self.plan.trunk:
            seconds["image features"] = self._features_seconds(self.plan.trunk, missing)
        if self.linear:
            seconds["correlations"] = analysis_seconds() * sum(
                steps(source=source, labelled=config.target.labels == "known")
                for source in (False, True)[: len(self.plan.corpora)]
            )
        networks: dict[str, DomainNetwork] = {}
        for domain in (name for name in DOMAINS if name in self.shapes):
            name = f"pretraining, {domain}"
            taken = f"{domain}-0.safetensors" in self.plan.taken
            if taken or not timed:
                seconds[name] = 0.0 if taken else None
                continue
            networks[domain] = self._network(domain).to(self.device)
            terms = pretraining_terms(domain, self.inputs, config.losses)
            each = self._step({domain: networks[domain]}, terms, config.pretrain.batch, config.pretrain.accumulate)
            passes = passes_for(self.pairs[domain]["train"], epochs[domain], config.pretrain.batch)
            seconds[name] = each * math.ceil(passes / config.pretrain.accumulate)
        if config.transfer.rounds and not self.linear:
            seconds["a round"] = self._round(networks) if timed else None
            seconds["all rounds"] = None if seconds["a round"] is None else config.transfer.rounds * seconds["a round"]
        parts = [value for name, value in seconds.items() if name != "a round"]
        seconds["in all"] = None if None in parts else sum(cast("list[float]", parts))
        return seconds

    def _round(self, networks: Mapping[str, DomainNetwork]) -> float:
        config = self.config
        both = {name: networks.get(name) or self._network(name).to(self.device) for name in DOMAINS}
        terms = joint_terms(self.inputs, config.losses, config.mmd)
        each = self._step(both, terms, config.transfer.batch, config.transfer.accumulate)
        return each * math.ceil(passes_of_round(self.pairs["source"]["train"], config) / config.transfer.accumulate)

    def _step(self, networks: Mapping[str, DomainNetwork], terms: list[Term], batch: int, accumulate: int) -> float:
        """Seconds of a solver step: the median of some, behind one that touches all memory."""
        domains = {name: Domain(network, self._stream(network, batch)) for name, network in networks.items()}
        optimizer = sgd(list(networks.values()), self.config.optimizer)
        taken: list[float] = []
        with self.reporter.task(f"timing a step, {' and '.join(networks)}", 1) as advance:
            while len(taken) <= 1 or (len(taken) <= MOST_STEPS and sum(taken) < ENOUGH):
                start = time.perf_counter()
                # A rate of nothing, so that random numbers cannot drive the weights to infinity.
                optimize(
                    domains,
                    terms,
                    optimizer,
                    passes=accumulate,
                    accumulate=accumulate,
                    rate=lambda step: 1e-30,
                    compute=self.config.compute,
                    stage="timing",
                )
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                taken.append(time.perf_counter() - start)
            advance(1)
        return statistics.median(taken[1:])

    def _stream(self, network: DomainNetwork, batch: int) -> PairStream:
        generator = torch.Generator().manual_seed(0)
        rows = {medium: torch.randn(batch, size, generator=generator) for medium, size in self.inputs.items()}
        labels = torch.arange(batch) % network.classes
        pairs = PairSet(rows, labels, tuple(map(str, range(batch))))
        return PairStream(pairs, np.arange(batch), batch, 0, "timing", self.device)

    def _features_seconds(self, trunk: Trunk, missing: Mapping[str, list[Path]]) -> float:
        paths = [path for part in missing.values() for path in part]
        if not paths:
            return 0.0
        few = paths[: min(TIMED_PICTURES, len(paths))]
        with self.reporter.task("timing the trunk", len(few)) as advance:
            batches = computed_features(trunk, few, self.device)
            done = len(next(batches))
            advance(done)
            start, rest = time.perf_counter(), 0
            for batch in batches:
                rest += len(batch)
                advance(len(batch))
            taken = time.perf_counter() - start
        # With one batch alone there is nothing to time: so few pictures take no time worth telling.
        return taken / rest * len(paths) if rest else 0.0


def _numbers(network: DomainNetwork) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo names no MemAvailable")


def _free_disk(path: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    path = path.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
