"""Word vectors and the vocabulary, ONE for both domains.

The source network must read target texts when it scores them (section 4 of the paper), so both domains share one
table of words. It is made from training texts only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gensim.models import KeyedVectors, Word2Vec
from numpy.typing import NDArray

from dckt.errors import ConfigError
from dckt.preprocessing import Vocabulary, tokenize
from dckt_trainer.config import TextConfig
from dckt_trainer.seeds import seed_of


@dataclass(frozen=True)
class Words:
    """A vocabulary and its vectors.

    Attributes:
        vocabulary: V words, the two special ones first.
        vectors: (V, E) float32; padding and the unknown word have zeros.
    """

    vocabulary: Vocabulary
    vectors: NDArray[np.float32]


def learn_words(texts: Sequence[str], config: TextConfig, seed: int) -> Words:
    """Word vectors for the training texts of both domains, as the configuration says.

    Raises:
        ConfigError: the file of vectors cannot be used, or no word is frequent enough.
    """
    sentences = [tokenize(text) for text in texts]
    return _skip_gram(sentences, config, seed) if config.vectors == "word2vec" else _from_file(sentences, config)


def check_vectors(config: TextConfig) -> None:
    """Refuses a file of vectors that is not there or that is a pickle, without reading it.

    Raises:
        ConfigError: see above.
    """
    path = Path(config.vectors)
    if not path.is_file():
        raise ConfigError(f"text.vectors is {config.vectors!r}; expected 'word2vec' or a file of word vectors")
    if path.suffix in (".kv", ".model", ".pkl"):
        raise ConfigError(
            f"text.vectors: {path} is a pickle, which can run code when it is read; save it with "
            "KeyedVectors.save_word2vec_format('vectors.bin', binary=True) and give that file"
        )


def _skip_gram(sentences: list[list[str]], config: TextConfig, seed: int) -> Words:
    try:
        model = Word2Vec(
            sentences,
            vector_size=config.dimension,
            sg=1,
            window=5,
            negative=10,
            min_count=config.min_count,
            epochs=config.epochs,
            seed=seed_of(seed, "word2vec") % 2**31,
            workers=1,  # more than one is not reproducible
        )
    except RuntimeError as error:
        raise ConfigError(
            f"no word stands {config.min_count} times in the training texts; lower text.min_count"
        ) from error
    return _table(list(model.wv.index_to_key), model.wv.vectors)


def _from_file(sentences: list[list[str]], config: TextConfig) -> Words:
    path = Path(config.vectors)
    check_vectors(config)
    try:
        table = KeyedVectors.load_word2vec_format(str(path), binary=path.suffix == ".bin")
    except (ValueError, EOFError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"text.vectors: {path} is not in word2vec format ({error}); expected a first line 'words width', then "
            "a word and its numbers a line, or the binary form in a .bin file"
        ) from error
    if not np.isfinite(table.vectors).all():
        raise ConfigError(f"text.vectors: {path} holds numbers that are not finite")
    counts = Counter(word for sentence in sentences for word in sentence)
    used = {word for word, count in counts.items() if count >= config.min_count}
    # Words of the training texts come with their vectors; the commonest others serve queries in words not seen here.
    kept = [w for place, w in enumerate(table.index_to_key) if w in used or place < config.extra_words]
    if not used & set(kept):
        raise ConfigError(f"text.vectors: {path} knows no word of the training texts; is it of their language?")
    return _table(kept, np.stack([table[word] for word in kept]))


def _table(words: list[str], vectors: NDArray[np.float32]) -> Words:
    # A file may hold words that tokenising would never yield, and the special ones; leave those out.
    places = [place for place, word in enumerate(words) if tokenize(word) == [word]]
    zeros = np.zeros((2, vectors.shape[1]), np.float32)
    kept = np.concatenate([zeros, vectors[places].astype(np.float32)])
    return Words(Vocabulary.of(words[place] for place in places), kept)
