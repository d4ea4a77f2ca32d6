"""What is settled before a training begins: settings, corpora, trunk, all read and checked, and nothing written.

A training and its dry run share this, so the one refuses what the other refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dckt.errors import ConfigError, RunError
from dckt.preprocessing import tokenizer
from dckt_trainer import parallel
from dckt_trainer.config import ComputeConfig, Config, LossConfig, MmdConfig, TransferConfig, flat_config
from dckt_trainer.data.corpus import SPLITS, OnBadPair, read_corpus
from dckt_trainer.data.feature_corpus import AnyCorpus, FeatureCorpus, is_feature_corpus, read_feature_corpus
from dckt_trainer.losses import joint_terms
from dckt_trainer.network import MEDIA
from dckt_trainer.progress import Reporter, counted
from dckt_trainer.runs import Run, is_free, open_run, taken_error
from dckt_trainer.trunk import Trunk, build_trunk
from dckt_trainer.words import check_vectors

DOMAINS = ("source", "target")
SMALLEST_SPREAD = 1e-4  # of features; divided by the epsilon of batch normalisation, less would train nothing


@dataclass(frozen=True)
class Plan:
    """A training that can begin.

    Attributes:
        config: with absolute paths, so that a run can be gone on with from any folder.
        corpora: by domain; without a source where the target is trained alone.
        facts: by domain, what the run folder says of the corpus.
        trunk: on ``device``; None where the corpora are ready features.
        device: where the training runs.
        base: the run whose pretraining is taken over.
        replaces: whether a run in the run's folder has to make way.
    """

    config: Config
    corpora: Mapping[str, AnyCorpus]
    facts: Mapping[str, dict[str, Any]]
    trunk: Trunk | None
    device: torch.device
    base: Run | None
    replaces: bool


def make_plan(
    source: str | Path | None,
    target: str | Path,
    out: str | Path | None,
    config: Config,
    *,
    device: str,
    on_bad_pair: OnBadPair,
    force: bool,
    pretrained_from: str | Path | None,
    reporter: Reporter,
) -> Plan:
    """Reads and checks all that a training needs; what is quick to check comes first.

    The arguments are those of :func:`dckt_trainer.train.train`; with no ``out``, no run folder is looked at.

    Raises:
        DcktError: anything that the user can mend.
    """
    place = pick_device(device)
    replaces = out is not None and _taken(Path(out), force=force)
    paths = {"target": target} if source is None else {"source": source, "target": target}
    features = _all_features(paths)
    _check_settings(config, alone=source is None, features=features)
    config = _with_paths(config, features=features)
    base = None if pretrained_from is None else open_run(pretrained_from)
    if base and replaces and out is not None and base.path.resolve() == Path(out).resolve():
        raise ConfigError(
            f"{out}: its own pretraining cannot be taken over by the run that replaces it; use another out"
        )
    corpora = {name: read_any(path, on_bad_pair, reporter) for name, path in paths.items()}
    if "source" in corpora:
        corpora["source"] = _without(corpora["source"], config.source.exclude)
    check_corpora(corpora)
    trunk = None if features else build_trunk(config.image, config.seed).to(place)
    facts = {name: _facts(path, corpora[name], on_bad_pair) for name, path in paths.items()}
    if base:
        _check_base(base, config, facts, trunk.sha256 if trunk else None)
    return Plan(config, corpora, facts, trunk, place, base, replaces)


def remake_plan(run: Run, *, device: str, reporter: Reporter) -> Plan:
    """The plan of a run that was begun, from what its folder says.

    Raises:
        RunError: a corpus or the trunk changed since.
    """
    place, config = pick_device(device), run.config
    _check_batches(config)
    corpora = {}
    for name in DOMAINS:
        facts = run.facts[name]
        if facts is None:
            continue
        corpus = read_any(facts["path"], facts["on_bad_pair"], reporter)
        corpora[name] = _without(corpus, config.source.exclude) if name == "source" else corpus
        if corpora[name].fingerprint != facts["fingerprint"]:
            raise RunError(f"{run.path}: the {name} corpus {facts['path']} changed since the run began; train anew")
    trunk = None if run.facts["trunk"] is None else build_trunk(config.image, config.seed).to(place)
    if trunk and trunk.sha256 != run.facts["trunk"]:
        raise RunError(
            f"{run.path}: the weights of the trunk ({config.image.weights}) changed since the run began; train anew"
        )
    return Plan(config, corpora, {name: run.facts[name] for name in corpora}, trunk, place, None, replaces=False)


def pretraining_files(config: Config, domains: Mapping[str, object], *, features: bool) -> list[str]:
    """Names of the checkpoints that are whole when the joint stage begins."""
    networks = [f"{domain}-0.safetensors" for domain in domains]
    if features:
        return networks
    cnns = [
        f"text-{domain}.safetensors"
        for domain in domains
        if domain == "source" or config.text.target_cnn == "finetuned"
    ]
    return ["words.safetensors", *cnns, *networks]


def before_joint(config: Config) -> Config:
    """The configuration less all that only the joint stage reads.

    Runs on the same corpora that agree in this have the same words, Word CNNs and pretrained networks.
    """
    return replace(
        config,
        losses=LossConfig(pair_source=config.losses.pair_source, pair_target=config.losses.pair_target),
        mmd=MmdConfig(),
        optimizer=replace(config.optimizer, inv_gamma=0.0, inv_power=0.0),
        text=replace(config.text, cnn_frozen_rounds=0),
        transfer=TransferConfig(order=config.transfer.order),
        compute=ComputeConfig(precision=config.compute.precision),  # the rest changes rounding alone
    )


def config_differences(there: Config, here: Config) -> list[str]:
    """A phrase for each key in which two configurations differ."""
    one, other = flat_config(there), flat_config(here)
    return [f"{key} is {one[key]!r} there and {value!r} here" for key, value in other.items() if one[key] != value]


def pick_device(name: str) -> torch.device:
    """The device of a name: ``auto`` is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return parallel.local_device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is cuda, but PyTorch {torch.__version__} sees no CUDA device; use cpu or auto")
    return parallel.local_device(name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch has so many threads in this block; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_any(path: str | Path, on_bad_pair: OnBadPair, reporter: Reporter) -> AnyCorpus:
    """Reads a corpus of either kind and says what it holds.

    Raises:
        CorpusError: see :func:`read_corpus` and :func:`read_feature_corpus`.
    """
    corpus: AnyCorpus
    if is_feature_corpus(path):
        corpus = read_feature_corpus(path, on_bad_pair=on_bad_pair)
    else:
        with counted(reporter, f"checking {Path(path).name}") as progress:
            corpus = read_corpus(path, on_bad_pair=on_bad_pair, progress=progress)
    counts = ", ".join(f"{len(corpus.part(part))} {part}" for part in SPLITS)
    reporter.say(f"{path}: {len(corpus.pairs)} pairs ({counts}), {len(corpus.labels)} classes")
    for line in (*corpus.skipped, *corpus.warnings):
        reporter.say(f"  note: {line}")
    return corpus


def check_corpora(corpora: Mapping[str, AnyCorpus]) -> None:
    """Checks that the corpora can be trained on together.

    Raises:
        ConfigError: the target lacks a split, or ready features have different widths or hardly differ.
    """
    target = corpora["target"]
    empty = [part for part in SPLITS if not target.part(part)]
    if empty:
        raise ConfigError(
            f"the target corpus {target.root} has no pairs in: {', '.join(empty)}; a target needs train, val and "
            "test pairs "
            + (
                "(val and test may be lists of rows: features.npz:val=ARRAY,test=ARRAY)"
                if isinstance(target, FeatureCorpus)
                else "(leave the column split out everywhere and dckt makes a split)"
            )
        )
    for corpus in corpora.values():
        if isinstance(corpus, FeatureCorpus):
            _check_spread(corpus)
    source = corpora.get("source")
    if isinstance(source, FeatureCorpus) and isinstance(target, FeatureCorpus) and source.widths != target.widths:
        differ = ", ".join(
            f"{medium} features {source.widths[medium]} in {source.root} and {target.widths[medium]} in {target.root}"
            for medium in MEDIA
            if source.widths[medium] != target.widths[medium]
        )
        raise ConfigError(
            f"source and target must have features of equal width, made by one method; numbers a row: {differ}"
        )


def _check_spread(corpus: FeatureCorpus) -> None:
    for medium, rows in corpus.vectors("train").items():
        spread = float(rows.std(0).max())
        if not spread > SMALLEST_SPREAD:
            raise ConfigError(
                f"the {medium} features of {corpus.root} hardly differ from pair to pair (largest standard deviation "
                f"{spread:.1e}), so nothing could be learnt from them; multiply them by a constant"
            )


def _all_features(paths: Mapping[str, str | Path]) -> bool:
    kinds = {name: is_feature_corpus(path) for name, path in paths.items()}
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            f"{paths['source']} and {paths['target']}: one is a file of ready features and the other a corpus of "
            "pictures and texts; give two of one kind, for both networks must see the same kind of features"
        )
    return kinds["target"]


def _check_settings(config: Config, *, alone: bool, features: bool) -> None:
    transfer = config.transfer
    mistakes = []
    if alone:
        if transfer.rounds:
            mistakes.append(
                f"transfer.rounds is {transfer.rounds}, but there is no source to transfer from; name one with "
                "--source, or train the target alone with --rounds 0"
            )
        if config.pretrain.target_start == "source":
            mistakes.append("pretrain.target_start is 'source', but there is no source; set it to 'random'")
        if config.text.target_cnn == "source" and not features:
            mistakes.append("text.target_cnn is 'source', but there is no source; set it to 'finetuned'")
        if config.source.exclude:
            mistakes.append("source.exclude names labels, but there is no source; leave it empty")
    if features and config.text.training == "end_to_end":
        mistakes.append("text.training is 'end_to_end', but ready features have no Word CNN; set it to 'cached'")
    _check_batches(config)
    if transfer.weighting == "soft" and (transfer.stratified or transfer.draws == "frozen"):
        mistakes.append("transfer.weighting is 'soft', which draws nothing; leave out transfer.stratified and .draws")
    if transfer.rounds and not joint_terms(MEDIA, config.losses, config.mmd):
        mistakes.append("every weight in [losses] is 0, so a round would minimise nothing; give one, or --rounds 0")
    if mistakes:
        raise ConfigError("\n  ".join(["the settings do not go together:", *mistakes]) if mistakes[1:] else mistakes[0])


def _check_batches(config: Config) -> None:
    for section in (config.pretrain, config.transfer):
        parallel.own_rows(section.batch)  # refuses one that the processes cannot share


def _with_paths(config: Config, *, features: bool) -> Config:
    image, text = config.image, config.text
    if features:  # neither is read
        return config
    tokenizer(text.tokenizer)  # refuses one that is not there
    if image.weights not in ("torchvision", "random"):
        image = replace(image, weights=str(Path(image.weights).resolve()))
    if text.vectors != "word2vec":
        text = replace(text, vectors=str(Path(text.vectors).resolve()))
        check_vectors(text)
    return replace(config, image=image, text=text)


def _without(corpus: AnyCorpus, labels: tuple[str, ...]) -> AnyCorpus:
    """The corpus less the pairs of some labels."""
    known = {pair.label for pair in corpus.pairs}
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ConfigError(
            f"source.exclude names {', '.join(map(repr, unknown))}, which {corpus.root} does not have; "
            f"its labels are: {', '.join(sorted(known))}"
        )
    if len(known - set(labels)) < 2:
        raise ConfigError(
            f"source.exclude leaves {len(known - set(labels))} labels of {corpus.root}; expected 2 or more"
        )
    if not labels:
        return corpus
    if isinstance(corpus, FeatureCorpus):
        return replace(corpus, pairs=tuple(pair for pair in corpus.pairs if pair.label not in labels))
    return replace(corpus, pairs=tuple(pair for pair in corpus.pairs if pair.label not in labels))


def _taken(out: Path, *, force: bool) -> bool:
    """Whether a run has to make way, which only ``force`` allows; anything but a run or an empty folder never does."""
    if is_free(out):
        return False
    if not force:
        raise taken_error(out)
    open_run(out)
    return True


def _check_base(base: Run, config: Config, facts: Mapping[str, dict[str, Any]], trunk: str | None) -> None:
    """Refuses to take over a pretraining that this run's own would not equal."""
    theirs = base.config
    differ = [
        f"the {name} corpus"
        for name in DOMAINS
        if (base.facts[name] or {}).get("fingerprint") != facts.get(name, {}).get("fingerprint")
    ]
    if base.facts["trunk"] != trunk:
        differ.append("the weights of the trunk")
    # Where the weights come from does not matter; what they are, the trunk's hash has told.
    theirs = replace(theirs, image=replace(theirs.image, weights=config.image.weights))
    differ += config_differences(before_joint(theirs), before_joint(config))
    if differ:
        raise RunError(f"{base.path}: its pretraining is not that of this run; different are {'; '.join(differ)}")
    files = pretraining_files(config, facts, features=trunk is None)
    missing = [name for name in files if not (base.checkpoints / name).is_file()]
    if missing:
        raise RunError(
            f"{base.path}: its pretraining cannot be taken over, for checkpoints are missing: {', '.join(missing)}; "
            f"if it is not finished, go on with: dckt-train --resume {base.path}"
        )


def _facts(path: str | Path, corpus: AnyCorpus, on_bad_pair: OnBadPair) -> dict[str, Any]:
    return {
        "path": str(Path(path).resolve()),
        "fingerprint": corpus.fingerprint,
        "on_bad_pair": on_bad_pair,
        "pairs": {part: len(corpus.part(part)) for part in SPLITS},
        "classes": len(corpus.labels),
    }
