"""Parts of a corpus of either kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dckt.errors import ConfigError
from dckt_trainer.data.corpus import Labelled, ranked
from dckt_trainer.data.feature_corpus import AnyCorpus, FeatureCorpus


def only(corpus: AnyCorpus, keep: Callable[[Labelled], bool]) -> AnyCorpus:
    """The corpus with those of its pairs that ``keep`` says yes to, in their order."""
    if isinstance(corpus, FeatureCorpus):
        return replace(corpus, pairs=tuple(filter(keep, corpus.pairs)))
    return replace(corpus, pairs=tuple(filter(keep, corpus.pairs)))


def subset_per_class(corpus: AnyCorpus, pairs_per_class: int, seed: int) -> AnyCorpus:
    """Keeps that many train pairs of each label, for studies with few pairs; val and test stay as they are.

    Within each label the ids are ordered by a hash of seed and id, and the first ones are kept, so with one
    seed a smaller subset is part of every larger one. A label with fewer train pairs keeps them all.

    Raises:
        ConfigError: ``pairs_per_class`` is below 1.
    """
    if pairs_per_class < 1:
        raise ConfigError(f"pairs_per_class is {pairs_per_class}; expected at least 1")
    train = [(pair.id, pair.label) for pair in corpus.part("train")]
    kept = {key for ids in ranked(train, f"subset:{seed}") for key in ids[:pairs_per_class]}
    return only(corpus, lambda pair: pair.split != "train" or pair.id in kept)
