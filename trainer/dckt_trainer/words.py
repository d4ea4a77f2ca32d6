"""Word vectors and the vocabulary, ONE for both domains.

The source network must read target texts when it scores them (section 4 of the paper), so both domains share one
table of words. It is made from training texts only.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeAlias

import numpy as np
import torch
from gensim.models import KeyedVectors, Word2Vec
from numpy.typing import NDArray

from dckt.errors import ConfigError
from dckt.preprocessing import Vocabulary, tokenizer
from dckt.preprocessing.text import SPECIAL
from dckt_trainer.checkpoint import load_with_metadata, save_tensors, unfit_error
from dckt_trainer.config import TextConfig
from dckt_trainer.seeds import seed_of

Keep: TypeAlias = Callable[[int, str], bool]
MAX_WIDTH = 65_536
_HEADER = re.compile(r"(\d+)\s+(\d+)")


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
        ConfigError: the file of vectors or the tokenizer cannot be used, or no word is frequent enough.
        TextError: the tokenizer yields what is no word.
    """
    split = tokenizer(config.tokenizer)
    sentences = [split(text) for text in texts]
    if config.vectors == "word2vec":
        return _skip_gram(sentences, config, seed)
    counts = Counter(word for sentence in sentences for word in sentence)
    used = {word for word, count in counts.items() if count >= config.min_count}

    # Words of the training texts come with their vectors; the commonest others serve queries in words not seen here,
    # if the tokenizer can yield them.
    def keep(place: int, word: str) -> bool:
        return word in used or (place < config.extra_words and word != "" and split(word) == [word])

    words = _from_file(config, keep)
    if used.isdisjoint(words.vocabulary.words[len(SPECIAL) :]):
        raise ConfigError(
            f"text.vectors: {config.vectors} knows no word of the training texts; is it of their language?"
        )
    return _with_others(words, sorted(used)) if config.encoder == "bag" else words


def _with_others(words: Words, used: Sequence[str]) -> Words:
    """Words that have no vector too: a bag knows them by the texts in which they stand."""
    known = set(words.vocabulary.words)
    others = [word for word in used if word not in known]
    vectors = np.concatenate([words.vectors, np.zeros((len(others), words.vectors.shape[1]), np.float32)])
    return Words(Vocabulary.of([*words.vocabulary.words[len(SPECIAL) :], *others]), vectors)


def save_words(path: Path, words: Words) -> None:
    """Writes words as a checkpoint."""
    notes = {"words": json.dumps(words.vocabulary.words, ensure_ascii=False)}
    save_tensors(path, {"vectors": torch.from_numpy(words.vectors)}, notes)


def load_words(path: Path) -> Words:
    """Reads what :func:`save_words` wrote.

    Raises:
        RunError: the file is missing or damaged, or holds something else.
    """
    tensors, notes = load_with_metadata(path)
    try:
        return Words(Vocabulary(tuple(json.loads(notes["words"]))), tensors["vectors"].numpy())
    except KeyError as error:
        raise unfit_error(path, f"it has no {error}") from error


def check_vectors(config: TextConfig) -> None:
    """Refuses a file of vectors that is not there or that is a pickle, reading no more than its first byte.

    Raises:
        ConfigError: see above.
    """
    path = Path(config.vectors)
    if not path.is_file():
        raise ConfigError(f"text.vectors is {config.vectors!r}; expected 'word2vec' or a file of word vectors")
    try:
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"  # what every pickle of Python 3 begins with, and no text in UTF-8
    except OSError as error:
        raise ConfigError(f"text.vectors: {path} cannot be read ({error})") from error
    if pickled or path.suffix in (".kv", ".model", ".pkl"):
        raise ConfigError(
            f"text.vectors: {path} is a pickle, which can run code when it is read; save it with "
            "KeyedVectors.save_word2vec_format('vectors.bin', binary=True) and give that file"
        )


def _skip_gram(sentences: list[list[str]], config: TextConfig, seed: int) -> Words:
    try:
        # gensim 4 starts the vectors from the seed and the order of the words alone. Its `hashfxn`, by default Python's
        # own hash, which differs from process to process, is without effect.
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
    return _words(dict(zip(model.wv.index_to_key, model.wv.vectors, strict=True)), config.dimension)


def _from_file(config: TextConfig, keep: Keep) -> Words:
    path = Path(config.vectors)
    check_vectors(config)
    try:
        binary = path.name.removesuffix(".gz").endswith(".bin")
        width, rows = _read_binary(path, keep) if binary else _read_text(path, keep)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ConfigError(
            f"text.vectors: {path} is not in word2vec format ({error}); expected a word and its numbers a line, "
            "with or without a first line 'words width', or the binary form in a .bin file"
        ) from error
    if not all(np.isfinite(row).all() for row in rows.values()):
        raise ConfigError(f"text.vectors: {path} holds numbers that are not finite")
    return _words(rows, width)


def _read_binary(path: Path, keep: Keep) -> tuple[int, dict[str, NDArray[np.float32]]]:
    table = KeyedVectors.load_word2vec_format(str(path), binary=True)
    kept = (word for place, word in enumerate(table.index_to_key) if keep(place, word))
    return table.vector_size, {word: table[word] for word in kept}


def _read_text(path: Path, keep: Keep) -> tuple[int, dict[str, NDArray[np.float32]]]:
    """Width and rows of a text file: word2vec's and fastText's have a first line 'words width', GloVe's has none.

    gensim reads this form too, but holds the whole file in memory, repeats a line's only number over its row, and
    stops at words with blanks in them, which the largest GloVe file has.
    """
    with _open_text(path) as file:
        first = file.readline().rstrip()
        header = _HEADER.fullmatch(first)
        width = int(header[2]) if header else first.count(" ")
        if not (1 if header else 2) <= width <= MAX_WIDTH:
            raise ValueError(f"the first line is {first[:60]!r}")
        lines = file if header else itertools.chain([first], file)
        rows: dict[str, NDArray[np.float32]] = {}
        count = 0
        for count, line in enumerate(lines, 1):
            word, *numbers = line.rstrip().rsplit(" ", width)
            if len(numbers) != width:
                raise ValueError(f"word {count} has {len(numbers)} numbers, not {width}")
            if word not in rows and keep(count - 1, word):
                rows[word] = np.array(numbers, np.float32)
    if header and count != int(header[1]):
        raise ValueError(f"it says that it holds {header[1]} words, and holds {count}")
    return width, rows


def _open_text(path: Path) -> TextIO:
    # Lines end with a line feed alone: a word may hold what Python would otherwise take for another end of line.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def _words(rows: Mapping[str, NDArray[np.float32]], width: int) -> Words:
    words = [word for word in rows if word not in SPECIAL]  # a file, or a tokenizer of one's own, may have these
    zeros = np.zeros((2, width), np.float32)
    return Words(Vocabulary.of(words), np.stack([*zeros, *(rows[word] for word in words)]))
