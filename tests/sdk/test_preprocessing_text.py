from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dckt.errors import ConfigError, TextError
from dckt.preprocessing import TextSpec, Vocabulary, token_batch, tokenize
from dckt.preprocessing.text import UNKNOWN

SPEC = TextSpec()
VOCABULARY = Vocabulary.of(["red", "bag", "हिन्दी"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red leather Handbag, isn't it?", ["a", "red", "leather", "handbag", "isn't", "it"]),
        ("isn\u2019t", ["isn't"]),
        ("'quoted' rock'n'roll '", ["quoted", "rock'n'roll"]),
        ("state-of-the-art", ["state", "of", "the", "art"]),
        ("hand_bag no. 7", ["hand_bag", "no", "7"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("café cafe\u0301", ["café", "café"]),
        ("\u01f0", ["\u01f0"]),  # case folding takes it apart
        ("ﬁne ｗｉｄｅ ²", ["fine", "wide", "2"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ภาษาไทย", ["ภาษาไทย"]),
        ("العَرَبِيَّة", ["العَرَبِيَّة"]),
        ("红色 皮包。", ["红色", "皮包"]),
        ("two\nlines\tand\u00a0space", ["two", "lines", "and", "space"]),
        ("❤️ 👍🏽 !!! ...", []),
        ("\u0301 alone", ["alone"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert tokenize(text) == [unicodedata.normalize("NFKC", word) for word in words]


@given(st.text())
def test_words_of_words_are_the_same_words(text: str) -> None:
    """So a vocabulary made of words finds them again, however the text was written."""
    words = tokenize(text)
    assert tokenize(" ".join(words)) == words
    assert all(word and not any(letter.isspace() for letter in word) for word in words)


@given(st.text())
def test_composed_or_not_it_is_the_same_text(text: str) -> None:
    assert tokenize(unicodedata.normalize("NFD", text)) == tokenize(unicodedata.normalize("NFC", text))


# --- vocabulary ---------------------------------------------------------------------------------------------------


def test_vocabulary_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(VOCABULARY.dumps().encode())
    assert Vocabulary.load(path) == VOCABULARY
    assert path.read_bytes() == "<pad>\n<unk>\nred\nbag\nहिन्दी\n".encode()
    assert VOCABULARY.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(VOCABULARY.dumps().removesuffix("\n").encode())
    assert Vocabulary.load(path) == VOCABULARY, "the last line need not end"
    assert len(VOCABULARY) == 5


def test_ids_are_places() -> None:
    assert [VOCABULARY.ids[word] for word in VOCABULARY.words] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content", [b"", b"red\nbag\n", b"<unk>\n<pad>\n", b"<pad>\n<unk>\nred\nred\n", b"<pad>\n<unk>\n\n", b"<pad>\n\xff"]
)
def test_no_vocabulary(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(TextError, match="vocabulary"):
        Vocabulary.load(tmp_path / "v.txt")


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read"):
        Vocabulary.load(tmp_path / "v.txt")


@pytest.mark.parametrize("word", ["", "a\nb", "a\rb"])
def test_word_that_is_no_line(word: str) -> None:
    with pytest.raises(TextError, match="line"):
        Vocabulary.of(["red", word])


# --- encoding -----------------------------------------------------------------------------------------------------


def test_encode() -> None:
    assert VOCABULARY.encode("A RED bag", SPEC) == [UNKNOWN, 2, 3]
    assert VOCABULARY.encode("हिन्दी", SPEC) == [4]


def test_max_tokens() -> None:
    assert VOCABULARY.encode("red bag red bag", TextSpec(max_tokens=3)) == [2, 3, 2]
    assert len(VOCABULARY.encode("red " * 1000, SPEC)) == 300
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        TextSpec(max_tokens=0)


@pytest.mark.parametrize("text", ["", "   ", "?!", "❤️"])
def test_text_without_a_word(text: str) -> None:
    for allow_unknown in (False, True):
        with pytest.raises(TextError, match="holds no word"):
            VOCABULARY.encode(text, SPEC, allow_unknown=allow_unknown)


def test_text_without_a_known_word() -> None:
    with pytest.raises(TextError, match=r"none of the words of 'green shoes' \(it has 3\)"):
        VOCABULARY.encode("green shoes", SPEC)
    assert VOCABULARY.encode("green shoes", SPEC, allow_unknown=True) == [UNKNOWN, UNKNOWN]
    assert VOCABULARY.encode("green bag", SPEC) == [UNKNOWN, 3]


def test_the_special_words_cannot_be_written() -> None:
    assert VOCABULARY.encode("<pad> <unk>", SPEC, allow_unknown=True) == [UNKNOWN, UNKNOWN]


def test_long_text_is_shown_short() -> None:
    with pytest.raises(TextError) as caught:
        VOCABULARY.encode("x" * 10_000, SPEC)
    assert len(str(caught.value)) < 300


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[5, 6], [7]], [[5, 6], [7, 0]]),
        ([[1]], [[1]]),
        ([[], [4, 4]], [[0, 0], [4, 4]]),
        ([[]], [[0]]),
    ],
)
def test_token_batch(rows: list[list[int]], expected: list[list[int]]) -> None:
    batch = token_batch(rows)
    assert batch.tolist() == expected
    assert batch.dtype == np.int64


def test_empty_token_batch() -> None:
    assert token_batch([]).shape == (0, 1)
