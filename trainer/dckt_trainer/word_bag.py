"""A text without the order of its words: what is used where texts are too few to train a Word CNN on.

Two sums over the words, each weighted by the word's inverse document frequency: of its word vector, which knows words
from elsewhere, and of its row in a latent semantic analysis (Deerwester et al., 1990) of the training texts, which
knows what these texts are about. Nothing here has seen a label.

Shape letters: B texts, L tokens, V words, E width of word vectors, T topics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional

from dckt.preprocessing.text import SPECIAL
from dckt_trainer.words import Words

# Length of the word vectors' block beside 1 of the topics'. Between .5 and 1 validation MAP hardly moved.
VECTOR_LENGTH = 0.7


class WordBag(nn.Module):
    """Token ids (B, L) int64, padded with 0, to text vectors (B, E + T) float32.

    Args:
        table: (V, E + T) what each word adds to both sums; row 0, padding, is 0.
        topics: T, the last columns.
    """

    def __init__(self, table: Tensor, topics: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(table.shape[0], table.shape[1], padding_idx=0, _weight=table, _freeze=True)
        self.topics, self.outputs = topics, table.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """The two sums, of fixed length each; a text of unknown words alone is 0."""
        sums = self.embedding(tokens).sum(1)
        vectors, topics = sums.split([self.outputs - self.topics, self.topics], 1)
        return torch.cat([functional.normalize(vectors) * VECTOR_LENGTH, functional.normalize(topics)], 1)


def fit_word_bag(words: Words, texts: Sequence[Sequence[int]], topics: int) -> WordBag:
    """Learns how rare words are, and topics, from token ids of the training texts of both domains.

    Args:
        words: the vocabulary and its vectors.
        texts: token ids of each text.
        topics: T; fewer where the texts hold fewer.
    """
    count = len(words.vocabulary.words)
    counts = [Counter(token for token in text if token >= len(SPECIAL)) for text in texts]
    documents = np.bincount([token for text in counts for token in text], minlength=count)
    rarity = np.log((1 + len(texts)) / (1 + documents)) + 1
    rarity[: len(SPECIAL)] = 0
    known = _topics(counts, rarity, topics)
    table = np.concatenate([words.vectors, known], axis=1) * rarity[:, None]
    return WordBag(torch.from_numpy(table.astype(np.float32)), known.shape[1])


def _topics(counts: Sequence[Counter[int]], rarity: NDArray[np.float64], topics: int) -> NDArray[np.float64]:
    """(V, T): the first right singular vectors of the texts' unit rows of tf-idf, the strongest first."""
    rows = np.repeat(np.arange(len(counts)), [len(text) for text in counts])
    columns = np.array([token for text in counts for token in text], np.int64)
    values = np.array([count for text in counts for count in text.values()]) * rarity[columns]
    lengths = np.sqrt(np.bincount(rows, weights=values**2, minlength=len(counts)))
    table = csr_matrix((values / lengths[rows], (rows, columns)), shape=(len(counts), len(rarity)))
    most = min(topics, int(np.count_nonzero(lengths)) - 1, np.unique(columns).size - 1)
    if most < 1:
        return np.zeros((len(rarity), 0))
    start = np.ones(min(table.shape))  # ARPACK's own would be random
    _, strengths, directions = svds(table, k=most, v0=start)
    directions = directions[np.argsort(-strengths)]
    # The sign of a singular vector is arbitrary: the largest entry shall be positive.
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    found: NDArray[np.float64] = (directions * np.sign(largest)).T
    return found
