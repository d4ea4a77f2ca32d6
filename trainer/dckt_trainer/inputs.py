"""From corpora to what the networks take: labelled pairs of feature vectors.

Pictures go through the frozen trunk once; texts become token ids, and a Word CNN, trained and then frozen, or a bag of
words makes vectors of them. A corpus of ready features skips both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor

from dckt.errors import ConfigError
from dckt.preprocessing import TextSpec, Vocabulary, token_batch
from dckt_trainer.checkpoint import load_into, load_tensors, save_tensors, unfit_error
from dckt_trainer.config import ImageConfig
from dckt_trainer.data.corpus import SPLITS, Corpus, Pair, Split
from dckt_trainer.data.feature_corpus import AnyCorpus, FeatureCorpus
from dckt_trainer.data.features import cached_features
from dckt_trainer.pairs import PairSet
from dckt_trainer.plan import SMALLEST_SPREAD, Plan
from dckt_trainer.progress import Reporter
from dckt_trainer.runs import Run
from dckt_trainer.seeds import seed_of
from dckt_trainer.word_bag import WordBag, fit_word_bag
from dckt_trainer.word_cnn import WordCNN, text_vectors, train_word_cnn
from dckt_trainer.words import Words, learn_words, load_words, save_words

Tokens: TypeAlias = dict[Split, list[list[int]]]


@dataclass(frozen=True)
class Inputs:
    """What the networks are trained and judged on, and what made it.

    Attributes:
        pairs: ``target.train``, ``target.val``, ``target.test``, the last but for a trial; with a source,
            ``source.train``, and ``target.train.by_source``, ``target.val.by_source``, ...: the target's pairs as
            the source reads them.
        readers: what reads the texts of each domain, a Word CNN or a bag; empty where the corpora are ready features.
        vocabulary: the words of both; None likewise.
        text: what texts are cut to.
    """

    pairs: Mapping[str, PairSet]
    readers: Mapping[str, WordCNN | WordBag] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    text: TextSpec = field(default_factory=TextSpec)

    @property
    def widths(self) -> dict[str, int]:
        """The numbers of each medium that reach fc6; texts may still be token ids."""
        widths = {medium: rows.shape[1] for medium, rows in self.pairs["target.train"].features.items()}
        return {**widths, "text": self.readers["target"].outputs} if self.readers else widths


def prepare(run: Run, plan: Plan, *, cache: Path, reporter: Reporter) -> Inputs:
    """Makes the inputs, or takes them from the run's checkpoints and the feature cache.

    Args:
        run: its checkpoints ``words``, ``text-source`` and ``text-target`` are read where they are, else written.
        plan: corpora, trunk and device.
        cache: folder of cached trunk features.
        reporter: told how far the work is.

    Raises:
        ConfigError: features hardly differ from pair to pair, or the word vectors cannot be used.
        RunError: a checkpoint or a cache file is damaged.
    """
    if plan.trunk is None:
        return Inputs(_ready_pairs(plan.corpora))
    return _Preparation(run, plan, cache, reporter).go()


def class_numbers(corpus: AnyCorpus) -> dict[str, int]:
    """The number of each label."""
    return {label: number for number, label in enumerate(corpus.labels)}


def needed_pictures(corpora: Mapping[str, Corpus]) -> dict[str, list[Path]]:
    """The pictures whose features a training asks for, by the name of the pair set."""
    parts = {f"target.{part}": corpora["target"].part(part) for part in _splits(corpora["target"])}
    if "source" in corpora:
        parts["source.train"] = corpora["source"].part("train")
    return {name: [pair.image for pair in pairs] for name, pairs in parts.items()}


def _splits(target: AnyCorpus) -> list[Split]:
    """The target's splits; a trial has no test pairs."""
    return [part for part in SPLITS if target.part(part)]


def _ready_pairs(corpora: Mapping[str, AnyCorpus]) -> dict[str, PairSet]:
    """Pair sets straight from arrays.

    The features are taken as they are, and no statistics have to be kept. Every layer is batch-normalised, so their
    scale hardly matters: on bags of visual words, whose rows sum to 1, standardising them by the training pairs moved
    validation MAP by less than another seed did, and so did a factor of 30 or 1,000. Only features that spread far
    less than those learn worse; what would train nothing is refused.
    """

    def pair_set(corpus: FeatureCorpus, part: Split) -> PairSet:
        vectors = corpus.vectors(part)
        return _pair_set(corpus, part, {medium: torch.from_numpy(rows) for medium, rows in vectors.items()})

    ready = cast("Mapping[str, FeatureCorpus]", corpora)
    splits = _splits(ready["target"])
    sets = {f"target.{part}": pair_set(ready["target"], part) for part in splits}
    if "source" in ready:
        sets["source.train"] = pair_set(ready["source"], "train")
        sets |= {f"target.{part}.by_source": sets[f"target.{part}"] for part in splits}
    return sets


def _pair_set(corpus: AnyCorpus, part: Split, features: Mapping[str, Tensor]) -> PairSet:
    numbers, pairs = class_numbers(corpus), corpus.part(part)
    labels = torch.tensor([numbers[pair.label] for pair in pairs], dtype=torch.int64)
    return PairSet(features, labels, tuple(pair.id for pair in pairs))


@dataclass
class _Preparation:
    run: Run
    plan: Plan
    cache: Path
    reporter: Reporter

    def __post_init__(self) -> None:
        self.config, self.device = self.plan.config, self.plan.device
        self.corpora = cast("Mapping[str, Corpus]", self.plan.corpora)
        self.spec = TextSpec(max_tokens=self.config.text.max_tokens, tokenizer=self.config.text.tokenizer)

    def go(self) -> Inputs:
        words = self._words()  # texts first: they are quick, and what cannot be used of them shows at once
        tokens = {
            name: {part: self._tokens(corpus.part(part), words.vocabulary) for part in SPLITS}
            for name, corpus in self.corpora.items()
        }
        images = self._image_features()
        bags = self.config.text.encoder == "bag"
        readers = self._word_bags(words, tokens) if bags else self._word_cnns(words, tokens)
        return Inputs(self._pair_sets(images, tokens, readers), readers, words.vocabulary, self.spec)

    def _image_features(self) -> dict[str, Tensor]:
        trunk = self.plan.trunk
        assert trunk is not None  # noqa: S101 - prepare() asked
        features = {}
        for name, paths in needed_pictures(self.corpora).items():
            with self.reporter.task(f"image features, {name}", len(paths)) as advance:
                rows = cached_features(trunk, paths, cache=self.cache, device=self.device, advance=advance)
            features[name] = torch.from_numpy(rows)
        _check_spread(features.get("source.train", features["target.train"]), self.config.image)
        return features

    def _words(self) -> Words:
        path = self.run.checkpoints / "words.safetensors"
        if path.exists():
            words = load_words(path)
            width = words.vectors.shape[1]
            if self.config.text.vectors == "word2vec" and width != self.config.text.dimension:
                raise unfit_error(path, f"vectors of {width} numbers")
            return words
        texts = [pair.text for corpus in self.corpora.values() for pair in corpus.part("train")]
        with self.reporter.task("word vectors", 1) as advance:
            words = learn_words(texts, self.config.text, self.config.seed)
            advance(1)
        save_words(path, words)
        return words

    def _tokens(self, pairs: Sequence[Pair], vocabulary: Vocabulary) -> list[list[int]]:
        return [vocabulary.encode(pair.text, self.spec, allow_unknown=True) for pair in pairs]

    def _word_bags(self, words: Words, tokens: Mapping[str, Tokens]) -> dict[str, WordCNN | WordBag]:
        """Two networks read texts through one bag, for they take inputs of one width.

        A linear model that leaves the source out has seen no text of it, so that what the source brings can be told.
        """
        texts, topics = {domain: of["train"] for domain, of in tokens.items()}, self.config.text.topics
        bags: dict[str, WordCNN | WordBag] = {"target": fit_word_bag(words, texts["target"], topics)}
        if "source" in texts:
            bags["source"] = fit_word_bag(words, texts["target"], topics, texts["source"])
            if self.config.model.kind == "network":
                bags["target"] = bags["source"]
        return {domain: bag.to(self.device) for domain, bag in bags.items()}

    def _word_cnns(self, words: Words, tokens: Mapping[str, Tokens]) -> dict[str, WordCNN | WordBag]:
        settings = self.config.text
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.config.seed, "word-cnn"))
            start = WordCNN(torch.from_numpy(words.vectors), settings.windows, settings.maps)
        if "source" not in tokens:
            return {"target": self._word_cnn("target", start, tokens["target"])}
        source = self._word_cnn("source", start, tokens["source"])
        if settings.target_cnn == "source":
            return {"source": source, "target": source}
        return {"source": source, "target": self._word_cnn("target", source, tokens["target"])}

    def _word_cnn(self, domain: str, start: WordCNN, tokens: Tokens) -> WordCNN:
        path = self.run.checkpoints / f"text-{domain}.safetensors"
        if path.exists():
            cnn = WordCNN(start.embedding.weight, start.windows, self.config.text.maps)
            load_into(cnn, load_tensors(path), path)
            return cnn.to(self.device).eval()
        stage = f"word-cnn/{domain}"
        self.run.begin(stage)
        corpus = self.corpora[domain]
        numbers = class_numbers(corpus)
        train_part = tokens["train"], [numbers[pair.label] for pair in corpus.part("train")]
        val_part = tokens["val"], [numbers[pair.label] for pair in corpus.part("val")]
        with self.reporter.task(f"Word CNN, {domain}", self.config.text.cnn_epochs) as advance:

            def after(figures: dict[str, float]) -> None:
                advance(1, {name: value for name, value in figures.items() if name != "epoch"})
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
        self, images: Mapping[str, Tensor], tokens: Mapping[str, Tokens], readers: Mapping[str, WordCNN | WordBag]
    ) -> dict[str, PairSet]:
        def pair_set(domain: str, part: Split, reader: WordCNN | WordBag) -> PairSet:
            if self.config.text.training == "end_to_end":  # every network has a CNN of its own in front
                texts = torch.from_numpy(token_batch(tokens[domain][part]))
            else:
                texts = text_vectors(reader, tokens[domain][part], self.device)
            corpus = self.corpora[domain]
            others = {medium: torch.from_numpy(rows) for medium, rows in corpus.vectors(part).items()}
            return _pair_set(corpus, part, {"image": images[f"{domain}.{part}"], "text": texts, **others})

        splits = _splits(self.corpora["target"])
        sets = {f"target.{part}": pair_set("target", part, readers["target"]) for part in splits}
        if "source" in readers:
            sets["source.train"] = pair_set("source", "train", readers["source"])
            # The source network scores target pairs, and it reads texts through the source's own Word CNN only.
            read: list[Split] = splits if self.config.model.kind == "linear" else ["train"]
            sets |= {f"target.{part}.by_source": pair_set("target", part, readers["source"]) for part in read}
        return sets


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
