"""What is settled before a training begins: settings, corpora, trunk, all read and checked, and nothing written.

A training and its dry run share this, so the one refuses what the other refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dckt.errors import ConfigError, RunError
from dckt.preprocessing import tokenizer
from dckt_trainer import parallel
from dckt_trainer.config import ComputeConfig, Config, LossConfig, MmdConfig, TargetConfig, TransferConfig, flat_config
from dckt_trainer.data.corpus import SPLITS, Labels, OnBadPair, read_corpus
from dckt_trainer.data.feature_corpus import AnyCorpus, FeatureCorpus, is_feature_corpus, read_feature_corpus
from dckt_trainer.data.subset import only, subset_per_class
from dckt_trainer.losses import joint_terms
from dckt_trainer.media import MEDIA, faulty_names
from dckt_trainer.progress import Reporter, counted
from dckt_trainer.runs import Run, is_free, open_run, taken_error
from dckt_trainer.trunk import Trunk, build_trunk
from dckt_trainer.words import check_vectors, learn_words, load_words

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
        base: the run whose pretraining is taken over, whole or the source's half.
        taken: names of the checkpoints that are taken over.
        replaces: whether a run in the run's folder has to make way.
        trial: whether the run is judged on validation alone; then the corpora have no test pairs.
    """

    config: Config
    corpora: Mapping[str, AnyCorpus]
    facts: Mapping[str, dict[str, Any]]
    trunk: Trunk | None
    device: torch.device
    base: Run | None
    taken: tuple[str, ...]
    replaces: bool
    trial: bool = False


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
    trial: bool = False,
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
    if pretrained_from is not None and config.model.kind == "linear":
        raise ConfigError("a linear model has no pretraining to take over; leave --pretrained-from out")
    base = None if pretrained_from is None else open_run(pretrained_from)
    if base and replaces and out is not None and base.path.resolve() == Path(out).resolve():
        raise ConfigError(
            f"{out}: its own pretraining cannot be taken over by the run that replaces it; use another out"
        )
    vectors = config.media.vectors
    corpora = {
        name: read_any(path, on_bad_pair, reporter, vectors, _labels(config, name)) for name, path in paths.items()
    }
    corpora = {name: _share_of(corpus, name, config, reporter) for name, corpus in corpora.items()}
    check_corpora(corpora)
    if config.target.labels == "unknown":
        _check_unlabelled(corpora["target"], config.target.clusters)
    trunk = None if features else build_trunk(config.image, config.seed).to(place)
    facts = {name: _facts(path, corpora[name], on_bad_pair) for name, path in paths.items()}
    taken = _taken_over(base, config, corpora, facts, trunk.sha256 if trunk else None, reporter) if base else ()
    corpora = _less_test(corpora) if trial else corpora
    return Plan(config, corpora, facts, trunk, place, base, taken, replaces, trial)


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
        corpus = read_any(facts["path"], facts["on_bad_pair"], reporter, config.media.vectors, _labels(config, name))
        corpora[name] = _share_of(corpus, name, config, reporter)
        if corpora[name].fingerprint != facts["fingerprint"]:
            raise RunError(f"{run.path}: the {name} corpus {facts['path']} changed since the run began; train anew")
    trunk = None if run.facts["trunk"] is None else build_trunk(config.image, config.seed).to(place)
    if trunk and trunk.sha256 != run.facts["trunk"]:
        raise RunError(
            f"{run.path}: the weights of the trunk ({config.image.weights}) changed since the run began; train anew"
        )
    facts, taken = {name: run.facts[name] for name in corpora}, tuple(run.facts.get("taken_over") or ())
    corpora = _less_test(corpora) if run.trial else corpora
    return Plan(config, corpora, facts, trunk, place, None, taken, replaces=False, trial=run.trial)


def pretraining_files(config: Config, domains: Iterable[str], *, features: bool) -> list[str]:
    """Names of the checkpoints that are whole when the joint stage begins."""
    domains = list(domains)
    networks = [f"{domain}-0.safetensors" for domain in domains]
    if features:
        return networks
    if config.text.encoder == "bag":  # made anew, in seconds
        return ["words.safetensors", *networks]
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


def source_half(config: Config) -> Config:
    """The configuration less all that only the joint stage or the target's pretraining reads.

    Runs with one source and the same words that agree in this have the same Word CNN and pretrained network of the
    source.
    """
    early = before_joint(config)
    return replace(
        early,
        target=TargetConfig(),
        text=replace(early.text, target_cnn="finetuned"),
        losses=replace(early.losses, pair_target=0.0),
        pretrain=replace(early.pretrain, target_epochs=0, target_start="random"),
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


def read_any(
    path: str | Path,
    on_bad_pair: OnBadPair,
    reporter: Reporter,
    vectors: Sequence[str] = (),
    labels: Labels = "known",
) -> AnyCorpus:
    """Reads a corpus of either kind, with some media beside pictures and texts, and says what it holds.

    Raises:
        CorpusError: see :func:`read_corpus` and :func:`read_feature_corpus`.
    """
    corpus: AnyCorpus
    if is_feature_corpus(path):
        corpus = read_feature_corpus(path, vectors=vectors, labels=labels, on_bad_pair=on_bad_pair)
    else:
        with counted(reporter, f"checking {Path(path).name}") as progress:
            corpus = read_corpus(path, vectors=vectors, labels=labels, on_bad_pair=on_bad_pair, progress=progress)
    counts = ", ".join(f"{len(corpus.part(part))} {part}" for part in SPLITS)
    classes = f"{len(corpus.labels)} classes" if labels == "known" else "labels are not used"
    reporter.say(f"{path}: {len(corpus.pairs)} pairs ({counts}), {classes}")
    for line in (*corpus.skipped, *(corpus.warnings if labels == "known" else ())):
        reporter.say(f"  note: {line}")
    return corpus


def check_corpora(corpora: Mapping[str, AnyCorpus]) -> None:
    """Checks that the corpora can be trained on together.

    Raises:
        ConfigError: the target lacks a split, or vectors have different widths or hardly differ.
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
        _check_spread(corpus)
    source = corpora.get("source")
    if source is not None and source.widths != target.widths:
        differ = ", ".join(
            f"{medium} features {source.widths[medium]} in {source.root} and {target.widths[medium]} in {target.root}"
            for medium in target.widths
            if source.widths[medium] != target.widths[medium]
        )
        raise ConfigError(
            f"source and target must have features of equal width, made by one method; numbers a row: {differ}"
        )


def _labels(config: Config, domain: str) -> Labels:
    return config.target.labels if domain == "target" else "known"


def _check_unlabelled(target: AnyCorpus, clusters: int) -> None:
    train, validation = len(target.part("train")), len(target.part("val"))
    if clusters == 1 or clusters > train:
        raise ConfigError(
            f"target.clusters is {clusters}; expected 0, or 2 to {train}, for so many training pairs has {target.root}"
        )
    if train < 2 or validation < 2:
        raise ConfigError(
            f"{target.root} has {train} train and {validation} val pairs; without labels both need 2 or more"
        )


def _check_spread(corpus: AnyCorpus) -> None:
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
    transfer, linear = config.transfer, config.model.kind == "linear"
    mistakes = []
    if linear and config.text.encoder != "bag" and not features:
        mistakes.append("model.kind is 'linear', which reads texts as bags of words; set text.encoder to 'bag'")
    if linear and config.media.vectors:
        mistakes.append("model.kind is 'linear', which brings pictures and texts together; leave media.vectors empty")
    if config.text.encoder == "bag" and config.text.training == "end_to_end":
        mistakes.append("text.training is 'end_to_end', but a bag of words has nothing to learn; set it to 'cached'")
    mistakes += _mistakes_of_labels(config.target, linear=linear)
    if alone and not linear:
        if transfer.rounds:
            mistakes.append(
                f"transfer.rounds is {transfer.rounds}, but there is no source to transfer from; name one with "
                "--source, or train the target alone with --set transfer.rounds=0"
            )
        if config.pretrain.target_start == "source":
            mistakes.append("pretrain.target_start is 'source', but there is no source; set it to 'random'")
        if config.text.target_cnn == "source" and not features:
            mistakes.append("text.target_cnn is 'source', but there is no source; set it to 'finetuned'")
    if alone and config.source.exclude:
        mistakes.append("source.exclude names labels, but there is no source; leave it empty")
    if features and config.text.training == "end_to_end":
        mistakes.append("text.training is 'end_to_end', but ready features have no Word CNN; set it to 'cached'")
    # A network keeps its pathways under the names of the media, beside names of its own.
    taken = [name for name in config.media.vectors if hasattr(nn.ModuleDict, name)]
    mistakes += [f"media.vectors: {fault}" for fault in faulty_names(config.media.vectors)]
    mistakes += [f"media.vectors: {name!r} has a meaning of its own; choose another name" for name in taken]
    _check_batches(config)
    if transfer.rounds and not linear and not joint_terms(MEDIA, config.losses, config.mmd):
        mistakes.append(
            "every weight in [losses] is 0, so a round would minimise nothing; give one, or --set transfer.rounds=0"
        )
    if mistakes:
        raise ConfigError("\n  ".join(["the settings do not go together:", *mistakes]) if mistakes[1:] else mistakes[0])


def _mistakes_of_labels(target: TargetConfig, *, linear: bool) -> list[str]:
    if target.labels == "known":
        counted = f"target.clusters is {target.clusters}, but labels are known, so there are classes; set it to 0"
        return [counted] if target.clusters else []
    mistakes = []
    if not linear:
        mistakes.append(
            "target.labels is 'unknown', and a network learns from labels; use the preset modern, or set model.kind to "
            "'linear'"
        )
    if target.pairs_per_class:
        mistakes.append("target.pairs_per_class chooses by label, but target.labels is 'unknown'; set it to 0")
    return mistakes


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


def _share_of(corpus: AnyCorpus, domain: str, config: Config, reporter: Reporter) -> AnyCorpus:
    """What the configuration takes of a domain's corpus."""
    if domain == "source":
        return _without(corpus, config.source.exclude)
    count = config.target.pairs_per_class
    return _few(corpus, count, config.seed, reporter) if count else corpus


def _less_test(corpora: Mapping[str, AnyCorpus]) -> dict[str, AnyCorpus]:
    """The corpora without their test pairs, so that nothing behind the plan can read one."""
    return {name: only(corpus, lambda pair: pair.split != "test") for name, corpus in corpora.items()}


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
    return only(corpus, lambda pair: pair.label not in labels) if labels else corpus


def _few(corpus: AnyCorpus, count: int, seed: int, reporter: Reporter) -> AnyCorpus:
    """The corpus with ``count`` training pairs of each class; what a class lacks is said."""
    few = subset_per_class(corpus, count, seed)
    found = Counter(pair.label for pair in few.part("train"))
    lacking = [f"{label!r} has {found[label]}" for label in few.labels if found[label] < count]
    kept, held = len(few.part("train")), len(corpus.part("train"))
    reporter.say(f"target.pairs_per_class: {kept} of {held} training pairs are kept, {count} of each class")
    if lacking:
        reporter.say(f"  note: classes with fewer training pairs keep what they have: {', '.join(lacking)}")
    return few


def _taken(out: Path, *, force: bool) -> bool:
    """Whether a run has to make way, which only ``force`` allows; anything but a run or an empty folder never does."""
    if is_free(out):
        return False
    if not force:
        raise taken_error(out)
    open_run(out)
    return True


def _taken_over(
    base: Run,
    config: Config,
    corpora: Mapping[str, AnyCorpus],
    facts: Mapping[str, dict[str, Any]],
    trunk: str | None,
    reporter: Reporter,
) -> tuple[str, ...]:
    """The checkpoints of a run that this one's own would equal: all of its pretraining, or the source's half.

    Raises:
        RunError: there are none, or they are missing.
    """
    theirs = base.config
    differ = [
        f"the {name} corpus"
        for name in DOMAINS
        if (base.facts[name] or {}).get("fingerprint") != facts.get(name, {}).get("fingerprint")
    ]
    other_texts = "the target corpus" in differ
    if base.facts["trunk"] != trunk:
        differ.append("the weights of the trunk")
    # Where the weights come from does not matter; what they are, the trunk's hash has told.
    theirs = replace(theirs, image=replace(theirs.image, weights=config.image.weights))
    differ += config_differences(before_joint(theirs), before_joint(config))
    same_source = not {"the source corpus", "the weights of the trunk"} & set(differ) and "source" in facts
    half = same_source and source_half(theirs) == source_half(config)
    half = half and (config.text.encoder == "cnn" or trunk is None)  # a bag is of the target's texts first
    if differ and not half:
        raise RunError(f"{base.path}: its pretraining is not that of this run; different are {'; '.join(differ)}")
    files = pretraining_files(config, ["source"] if differ else facts, features=trunk is None)
    missing = [name for name in files if not (base.checkpoints / name).is_file()]
    if missing:
        raise RunError(
            f"{base.path}: its pretraining cannot be taken over, for checkpoints are missing: {', '.join(missing)}; "
            f"if it is not finished, go on with: dckt-train --resume {base.path}"
        )
    if other_texts and trunk is not None:
        _check_words(base, config, corpora)
    if differ:
        reporter.say(f"{base.path}: the source's half is taken over, the target's not, for {'; '.join(differ)}")
    return tuple(files)


def _check_words(base: Run, config: Config, corpora: Mapping[str, AnyCorpus]) -> None:
    """Refuses to take over a source's half that was trained on other words than this run would have.

    Words are those of both corpora's training texts. From a file of vectors they are nevertheless the same where
    ``text.extra_words`` takes all of the file.
    """
    if config.text.vectors == "word2vec":
        raise RunError(
            f"{base.path}: no half of its pretraining can be taken over by a run on another target, for word2vec "
            "learns from the texts of both; with a file of word vectors (text.vectors) one could be"
        )
    texts = [pair.text for corpus in corpora.values() for pair in corpus.part("train")]
    ours, theirs = learn_words(texts, config.text, config.seed), load_words(base.checkpoints / "words.safetensors")
    if ours.vocabulary != theirs.vocabulary or not np.array_equal(ours.vectors, theirs.vectors):
        raise RunError(
            f"{base.path}: the source's half of its pretraining cannot be taken over, for the training texts of this "
            "run's target give other words; they do not where text.extra_words takes all of the file of vectors"
        )


def _facts(path: str | Path, corpus: AnyCorpus, on_bad_pair: OnBadPair) -> dict[str, Any]:
    return {
        "path": str(Path(path).resolve()),
        "fingerprint": corpus.fingerprint,
        "on_bad_pair": on_bad_pair,
        "pairs": {part: len(corpus.part(part)) for part in SPLITS},
        "classes": len(corpus.labels),
    }
