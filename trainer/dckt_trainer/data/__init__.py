"""Corpora: reading and checking them, and making a synthetic pair of domains."""

from __future__ import annotations

from dckt_trainer.data.corpus import Corpus, Pair, Split, read_corpus
from dckt_trainer.data.subset import subset_per_class
from dckt_trainer.data.synthetic import write_synthetic

__all__ = ["Corpus", "Pair", "Split", "read_corpus", "subset_per_class", "write_synthetic"]
