"""The typed configuration of a run, its presets, and how both are read.

A configuration is a frozen tree of dataclasses. A preset is a TOML file that names every key; a user's own TOML file or
``--set section.key=value`` changes some of them. All mistakes are reported at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dckt.errors import ConfigError

PRESET_FOLDER = Path(__file__).parent / "presets"
T = TypeVar("T")
_FUNCTION = re.compile(r"[\w.]+:\w+")


def _setting(default: T, *, low: float | None = None, high: float | None = None, above: float | None = None) -> T:
    """A field with a default and the range that is allowed: ``low <= value <= high``, ``value > above``."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def _plugin(default: str, *names: str) -> str:
    """A field that is one of some names, or the user's own function as ``module:function``."""
    value: str = field(default=default, metadata={"names": names})
    return value


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What is taken of the source corpus.

    Attributes:
        exclude: labels that are left out, as in the paper's ablation without overlap between the domains.
    """

    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What is taken of the target corpus.

    Attributes:
        pairs_per_class: so many training pairs of each class, which the seed chooses, and with one seed a smaller
            number's are part of a larger one's; 0 takes all. Validation and test pairs are all taken.
        labels: ``unknown``: only the pairs are known. Labels may be missing then; where they are there, they are read
            for the figures of the evaluation and for nothing else. Needs the linear model.
        clusters: of training pairs, in place of classes where labels are unknown; 0 is twice the square root of their
            number. Too many cost little, too few cost much.
    """

    pairs_per_class: int = _setting(0, low=0)
    labels: Literal["known", "unknown"] = "known"
    clusters: int = _setting(0, low=0)


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Media beside pictures and texts.

    Attributes:
        vectors: names of media whose items are vectors, such as ``audio``; both corpora hold one for each pair, in
            ``vectors/audio.npy`` (:mod:`dckt_trainer.data.corpus`) or as an array ``audio`` of ready features.
    """

    vectors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The frozen image trunk and the pictures that it sees.

    Attributes:
        trunk: name of a torchvision classification network with convolutional features.
        weights: ``torchvision`` (its ImageNet weights), ``random`` (from the seed), or a .safetensors file.
        grid: side of the grid that the last feature map is averaged to; 0 is the network's own (7 for VGG, else 1).
        side: side of the square picture, in pixels.
        crop_share: share of the short side that the centred square covers.
    """

    trunk: str = "vgg19_bn"
    weights: str = "torchvision"
    grid: int = _setting(0, low=0, high=32)
    side: int = _setting(224, low=32, high=1024)
    crop_share: float = _setting(0.875, above=0, high=1)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Word vectors and the Word CNN (Kim, 2014) that turns a text into one vector.

    Attributes:
        tokenizer: ``words`` (words of any script; Chinese and Japanese by the character), or one that was registered,
            see :mod:`dckt.preprocessing.text`.
        vectors: ``word2vec`` (skip-gram, trained on the training texts of both domains) or a file of vectors in
            word2vec text or binary format.
        dimension: width of the word vectors that are trained here; a file brings its own.
        min_count: a word that the training texts hold more rarely than this is unknown.
        epochs: passes of skip-gram over the texts.
        extra_words: so many words from the top of a file are kept beside those of the training texts.
        max_tokens: words of a text after this many are left out.
        encoder: the Word ``cnn``, or a ``bag`` of words (:mod:`dckt_trainer.word_bag`), which learns from no label and
            is the better one where texts are few; what follows, but for ``topics``, is of the CNN alone.
        topics: of a bag, from the target's texts, and at most as many more from what else the source's hold.
        windows: widths of the convolution's windows, in words.
        maps: feature maps for each window; the text vector has ``len(windows) * maps`` numbers.
        dropout: on the text vector while the CNN learns as a classifier.
        cnn_epochs: at most so many passes; the one with the best validation accuracy is kept.
        cnn_batch: texts a step.
        target_cnn: the target's CNN is ``finetuned`` from the source's on target labels, or is the ``source``'s own.
        training: ``cached`` computes every text's vector once, with the CNN frozen; ``end_to_end`` goes on training
            each domain's CNN together with its network, the word vectors frozen.
        cnn_lr_factor: with ``end_to_end``, the CNN learns so many times as fast as the network.
        cnn_frozen_rounds: with ``end_to_end``, the CNN stays as it is for so many rounds of transfer, because MMD
            is the largest force on it.
    """

    tokenizer: str = "words"
    vectors: str = "word2vec"
    dimension: int = _setting(300, low=1, high=4096)
    min_count: int = _setting(2, low=1)
    epochs: int = _setting(10, low=1)
    extra_words: int = _setting(20_000, low=0)
    max_tokens: int = _setting(300, low=1)
    encoder: Literal["cnn", "bag"] = "cnn"
    topics: int = _setting(300, low=0, high=4096)
    windows: tuple[int, ...] = (3, 4, 5)
    maps: int = _setting(100, low=1)
    dropout: float = _setting(0.5, low=0, high=0.95)
    cnn_epochs: int = _setting(25, low=1)
    cnn_batch: int = _setting(50, low=1)
    target_cnn: Literal["finetuned", "source"] = "finetuned"
    training: Literal["cached", "end_to_end"] = "cached"
    cnn_lr_factor: float = _setting(0.1, low=0)
    cnn_frozen_rounds: int = _setting(2, low=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What brings the media together.

    Attributes:
        kind: ``network`` trains the paper's; ``linear`` is fitted in closed form in seconds
            (:mod:`dckt_trainer.linear`), and reads none of the sections below but ``compute``.
    """

    kind: Literal["network", "linear"] = "network"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """One domain's network; both domains have the same shape.

    Attributes:
        width: D, the outputs of fc6 to fc9.
        moving_average: of batch normalisation's statistics, nine tenths of the old and a tenth of the new: ``torch``
            starts it at mean 0 and variance 1, ``caffe`` weighs what was seen so far alone.
    """

    width: int = _setting(4096, low=2)
    moving_average: Literal["torch", "caffe"] = "torch"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms, after section 3 of the paper; 0 leaves a term out.

    Attributes:
        semantic_source: cross entropy of the source, for each medium (eq. 9).
        semantic_target: cross entropy of the target, for each medium (eq. 10).
        pair_source: distance of the source's pairs, at fc6 and at fc7 (eq. 6).
        pair_target: distance of the target's pairs, at fc6 and at fc7 (eq. 7).
        mmd_fc6: media-level MMD at fc6, for each medium (eq. 2 and 3).
        mmd_fc7: media-level MMD at fc7, for each medium.
        mmd_fc8: correlation-level MMD at fc8 (eq. 8).
        mmd_fc9: correlation-level MMD at fc9.
    """

    semantic_source: float = _setting(0.2, low=0)
    semantic_target: float = _setting(1.0, low=0)
    pair_source: float = _setting(1e-4, low=0)
    pair_target: float = _setting(1e-4, low=0)
    mmd_fc6: float = _setting(1.0, low=0)
    mmd_fc7: float = _setting(1.0, low=0)
    mmd_fc8: float = _setting(1.0, low=0)
    mmd_fc9: float = _setting(2.0, low=0)


@dataclass(frozen=True, kw_only=True)
class MmdConfig:
    """How the squared MMD is estimated.

    Attributes:
        estimator: ``quadratic`` (unbiased, all pairs), ``linear`` (DAN's neighbours), ``quadruple`` (random draws).
        kernels: K Gaussian kernels whose values are added.
        factor: ratio of one kernel's gamma to the next one's.
        bandwidth: gamma is one over the ``mean`` or the ``median`` squared distance in the two batches together, or
            ``fixed``.
        gamma: the middle kernel's, where ``bandwidth`` is ``fixed``.
    """

    estimator: Literal["quadratic", "linear", "quadruple"] = "quadratic"
    kernels: int = _setting(5, low=1, high=64)
    factor: float = _setting(2.0, above=1)
    bandwidth: Literal["mean", "median", "fixed"] = "mean"
    gamma: float = _setting(1e-3, above=0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Stochastic gradient descent with momentum.

    Attributes:
        lr: learning rate of weights.
        momentum: share of the last step that is kept.
        form: ``torch`` multiplies the velocity by the rate; ``caffe`` keeps the rate inside it, so a change of
            the rate reaches old gradients never. Equal at a constant rate.
        weight_decay: of weights.
        bias_lr_factor: biases learn so many times as fast, and do not decay.
        inv_gamma: in the joint stage the rate is ``lr * (1 + inv_gamma * step) ** -inv_power``.
        inv_power: see ``inv_gamma``.
    """

    lr: float = _setting(0.01, above=0)
    momentum: float = _setting(0.9, low=0, high=0.9999)
    form: Literal["torch", "caffe"] = "torch"
    weight_decay: float = _setting(5e-4, low=0)
    bias_lr_factor: float = _setting(2.0, low=0)
    inv_gamma: float = _setting(1e-4, low=0)
    inv_power: float = _setting(0.75, low=0)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Separate pretraining of the two domains (section 4 of the paper).

    Attributes:
        source_epochs: passes over the source's training pairs.
        target_epochs: passes over the target's training pairs.
        batch: pairs a forward pass, and what batch normalisation sees.
        accumulate: forward passes whose gradients are averaged into one step.
        target_start: the target network starts from ``random`` weights or from the trained ``source``'s.
    """

    source_epochs: int = _setting(160, low=0)
    target_epochs: int = _setting(47, low=0)
    batch: int = _setting(64, low=2)
    accumulate: int = _setting(16, low=1)
    target_start: Literal["random", "source"] = "random"


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Progressive transfer (Algorithm 1 of the paper).

    Attributes:
        rounds: MI, rounds that are trained; 0 ends with the pretrained target network, Model_t(0).
        source_epochs: Ep, passes over the source in each round.
        batch: pairs of each domain a forward pass.
        accumulate: forward passes whose gradients are averaged into one step.
        alpha: the largest probability with which a pair is selected (eq. 13).
        score: how well a target pair fits the source model: ``consistency`` (AP^q, eq. 11 and 12, needs target labels),
            ``reciprocal_rank`` (of its partner, needs none), or your own function as ``module:function``.
        law: ``paper`` selects by score (eq. 13), ``released`` as the authors' code does, ``all`` takes every pair,
            ``random`` as many pairs as ``paper`` is expected to, whichever they are; or your own function as
            ``module:function``.
        stratified: keep the law's expected number of every class, not of all classes together.
        draws: random numbers of a round are ``fresh``, or the same in every round: ``frozen``, as in the released code,
            where about four fifths of the pairs can then never be selected.
        order: pairs come ``shuffled`` anew in each pass, or in a ``fixed`` order that each round starts again.
        keep: the target network of the ``last`` round, or of the ``best`` on validation (round 0 counts).
    """

    rounds: int = _setting(10, low=0)
    source_epochs: int = _setting(1, low=1)
    batch: int = _setting(64, low=2)
    accumulate: int = _setting(10, low=1)
    alpha: float = _setting(0.2, above=0, high=1)
    score: str = _plugin("consistency", "consistency", "reciprocal_rank")
    law: str = _plugin("paper", "paper", "released", "all", "random")
    stratified: bool = False
    draws: Literal["fresh", "frozen"] = "fresh"
    order: Literal["shuffled", "fixed"] = "shuffled"
    keep: Literal["last", "best"] = "last"


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the arithmetic of the training is done. It changes speed, memory and rounding, not what is computed.

    Attributes:
        precision: of the matrix products in fc6 to fc10; weights, momentum, statistics and losses stay in float32.
            ``float16`` needs a GPU, and scales the loss.
        fold: at most so many of a step's forward passes are done as one matrix product a layer, each with its own batch
            statistics and MMD; 0 does all of them at once.
        compile: ``torch.compile`` for the layers' normalisation; see docs/training.md for what it brings.
        threads: of PyTorch on the CPU; 0 leaves it to PyTorch. Beside other busy programs 1 is the fastest.
    """

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    fold: int = _setting(0, low=0)
    compile: bool = False
    threads: int = _setting(0, low=0, high=1024)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the outcome of a run, besides the two corpora."""

    seed: int = _setting(0, low=0)
    source: SourceConfig = field(default_factory=SourceConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    mmd: MmdConfig = field(default_factory=MmdConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def preset_names() -> list[str]:
    """The presets that come with dckt."""
    return names_in(PRESET_FOLDER)


def names_in(folder: Path) -> list[str]:
    """Names of the TOML files in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


# Settings that there were once, with the value at which they did nothing.
_GONE: Mapping[str, Any] = {"transfer.smoothing": 0.0, "transfer.weighting": "draw"}
_GONE_WORDS = (
    "a setting that was taken out, for it brought nothing (leave it out, or go on with the version that had it)"
)


def load_config(preset: str | Path = "paper", changes: Iterable[str] = ()) -> Config:
    """Reads a preset or a TOML file, applies changes, and checks the whole.

    Args:
        preset: a preset's name, or the path of a TOML file; keys that the file leaves out are the paper's.
        changes: ``section.key=value`` each, the value as TOML or as a bare word.

    Raises:
        ConfigError: lists every unknown key, wrong type and value out of range.

    >>> load_config("small", ["network.width=256"]).network.width
    256
    """
    path, tree = read_toml(preset, PRESET_FOLDER, "preset")
    for change in changes:
        _apply(tree, change)
    return config_from_tree(tree, str(path))


def read_toml(name: str | Path, folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The path and content of a TOML file that comes with dckt, by its name, or of the user's own, by its path.

    Args:
        name: of a file in ``folder``, without its suffix; or the path of any file.
        folder: where those that come with dckt are.
        kind: what they are called in errors.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    path = folder / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(names_in(folder))
        raise ConfigError(f"{name}: neither a {kind} ({names}) nor a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def config_from_tree(tree: Mapping[str, Any], origin: str) -> Config:
    """Builds a configuration from nested mappings.

    Raises:
        ConfigError: lists every mistake; ``origin`` says where the tree came from.
    """
    mistakes: list[str] = []
    config = _build(Config, _without_gone(tree), "", mistakes)
    if mistakes:
        raise ConfigError("\n  ".join([f"{origin}: the configuration has {len(mistakes)} mistakes:", *mistakes]))
    return config


def dump_config(config: Config) -> str:
    """The configuration as TOML, every key written out."""
    lines: list[str] = []
    sections: list[str] = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            sections += ["", f"[{name}]", *(f"{key} = {_toml(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join([*lines, *sections]) + "\n"


def flat_config(config: Config) -> dict[str, Any]:
    """Every key of a configuration as ``section.key``."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's basic strings are JSON's
    return repr(value)


def _apply(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{change!r}: a change is written section.key=value, for example network.width=512")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{change!r}: {section} is a value, not a section")
    tree[last] = value


def _build(cls: type[T], tree: Any, path: str, mistakes: list[str]) -> T:
    """Builds one dataclass, gathering mistakes; a field with a mistake keeps its default."""
    where = path or "the top level"
    if not isinstance(tree, Mapping):
        mistakes.append(f"{where} is {tree!r}; expected a section with keys")
        tree = {}
    kinds = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        full = f"{path}.{name}" if path else str(name)
        if name not in fields:
            known = f"{where} has {', '.join(fields)}"
            mistakes.append(f"{full}: {_GONE_WORDS if full in _GONE else 'unknown key'}; {known}")
        elif dataclasses.is_dataclass(kinds[name]):
            values[name] = _build(typing.cast("type[Any]", kinds[name]), value, full, mistakes)
        else:
            _check(values, full, value, kinds[name], fields[name].metadata, mistakes)
    return cls(**values)


def _without_gone(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Runs of an older version name settings that are gone; where these did nothing, the runs are as good as ever."""
    transfer, model = tree.get("transfer"), tree.get("model")
    if not isinstance(transfer, Mapping):
        return tree
    linear = isinstance(model, Mapping) and model.get("kind") == "linear"  # which has no rounds
    idle = {
        key
        for key, value in transfer.items()
        if (name := f"transfer.{key}") in _GONE and (linear or value == _GONE[name])
    }
    return {**tree, "transfer": {key: value for key, value in transfer.items() if key not in idle}} if idle else tree


def _check(
    values: dict[str, Any], full: str, value: Any, kind: Any, limits: Mapping[str, Any], mistakes: list[str]
) -> None:
    name = full.rpartition(".")[2]
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            values[name] = value
        else:
            mistakes.append(f"{full} is {value!r}; expected one of {', '.join(typing.get_args(kind))}")
        return
    if isinstance(kind, types.GenericAlias):
        words = typing.get_args(kind)[0] is str
        if (
            isinstance(value, list | tuple)
            and all(type(item) is str if words else type(item) is int and item > 0 for item in value)
            and (words or value)
        ):
            values[name] = tuple(value)
        else:
            mistakes.append(f"{full} is {value!r}; expected a list of {'words' if words else 'whole numbers above 0'}")
        return
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        mistakes.append(f"{full} is {value!r}; expected {kind.__name__}")
        return
    names = limits.get("names")
    if names and value not in names and not _FUNCTION.fullmatch(value):
        mistakes.append(f"{full} is {value!r}; expected one of {', '.join(names)}, or module:function")
        return
    low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
    wrong = (
        (low is not None and not value >= low)
        or (high is not None and not value <= high)
        or (above is not None and not value > above)
    )
    if wrong:
        bounds = [f"at least {low}" if low is not None else "", f"more than {above}" if above is not None else ""]
        bounds.append(f"at most {high}" if high is not None else "")
        mistakes.append(f"{full} is {value!r}; expected {' and '.join(filter(None, bounds))}")
        return
    values[name] = value
