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
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn
from torch.nn import functional

from dckt.preprocessing.text import SPECIAL
from dckt_trainer.words import Words

# Length of the word vectors' block beside 1 of the topics'. Between .5 and 1 validation MAP hardly moved.
VECTOR_LENGTH = 0.7
SOURCE_TOPICS = 200
WEAKEST = 1e-6  # singular value, of rows of length 1, below which a direction is rounding


class WordBag(nn.Module):
    """Token ids (B, L) int64, padded with 0, to text vectors (B, E + T) float32.

    Args:
        table: (V, E + T) what each word adds to both sums, columns of like range; row 0, padding, is 0.
        scale: (E + T,) by which the columns of the sums are multiplied.
        topics: T, the last columns.
    """

    def __init__(self, table: Tensor, scale: Tensor, topics: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.embedding = nn.Embedding(table.shape[0], table.shape[1], padding_idx=0, _weight=table, _freeze=True)
        self.topics, self.outputs = topics, table.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """The two sums, of fixed length each; a text of unknown words alone is 0."""
        sums = self.embedding(tokens).sum(1) * self.scale
        vectors, topics = sums.split([self.outputs - self.topics, self.topics], 1)
        return torch.cat([functional.normalize(vectors) * VECTOR_LENGTH, functional.normalize(topics)], 1)


def fit_word_bag(
    words: Words, target: Sequence[Sequence[int]], topics: int, source: Sequence[Sequence[int]] = ()
) -> WordBag:
    """Learns how rare words are, and topics, from the token ids of training texts.

    The target's topics come first, because few texts would be lost among many. Where the source has texts, a word is as
    rare as it is on average in both: few texts tell little of common words.

    Args:
        words: the vocabulary and its vectors.
        target: token ids of each text.
        topics: of the target's texts; fewer where they span fewer.
        source: texts of the other domain, which add at most ``SOURCE_TOPICS``; there may be none.
    """
    count = len(words.vocabulary.words)
    domains = [
        [Counter(token for token in text if token >= len(SPECIAL)) for text in texts] for texts in (target, source)
    ]
    shares = [_document_share(counts, count) for counts in domains if counts]
    rarity = 1 - np.log(np.mean(shares, axis=0))
    rarity[: len(SPECIAL)] = 0
    texts = [_unit_rows(counts, rarity) for counts in domains]
    known = _leading_directions(texts[0], topics)
    rest = _beside(_leading_directions(texts[1], SOURCE_TOPICS), known)
    table = np.concatenate([words.vectors, known, rest], axis=1) * rarity[:, None]
    scale = np.maximum(np.abs(table).max(axis=0), np.finfo(np.float32).tiny)  # in 8 bits the whole table has one step
    columns, scales = (torch.from_numpy(part.astype(np.float32)) for part in (table / scale, scale))
    return WordBag(columns, scales, known.shape[1] + rest.shape[1])


def _document_share(counts: Sequence[Counter[int]], words: int) -> NDArray[np.float64]:
    """(V,) in which part of the texts each word stands; half a text is added, so that none stands nowhere."""
    documents = np.bincount([token for text in counts for token in text], minlength=words)
    share: NDArray[np.float64] = np.minimum((documents + 0.5) / (len(counts) + 1), 1)
    return share


def _unit_rows(counts: Sequence[Counter[int]], rarity: NDArray[np.float64]) -> csr_matrix:
    """(N, V) tf-idf, each row of length 1 but for those without a word."""
    rows = np.repeat(np.arange(len(counts)), [len(text) for text in counts])
    columns = np.array([token for text in counts for token in text], np.int64)
    values = np.array([count for text in counts for count in text.values()]) * rarity[columns]
    lengths = np.sqrt(np.bincount(rows, weights=values**2, minlength=len(counts)))
    return csr_matrix((values / lengths[rows], (rows, columns)), shape=(len(counts), len(rarity)))


def _leading_directions(rows: csr_matrix, count: int) -> NDArray[np.float64]:
    """(V, T): the strongest right singular vectors of the rows."""
    wanted = min(count, *rows.shape)
    if not wanted:
        return np.zeros((rows.shape[1], 0))
    _, strengths, found = randomized_svd(rows, wanted, n_iter=4, random_state=0)
    directions: NDArray[np.float64] = found[strengths > WEAKEST].T
    return directions


def _beside(directions: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns that span what ``known``, orthonormal ones, do not of some directions."""
    left, strengths, _ = np.linalg.svd(directions - known @ (known.T @ directions), full_matrices=False)
    rest: NDArray[np.float64] = left[:, strengths > WEAKEST]
    return rest
