"""From a text to the token ids that the text graph takes.

A tokenizer turns a text into words. ``words`` is built in; an application registers others by name, and the name
travels in the bundle, so serving splits a text as training did.

Shape letters: B batch, L tokens of the longest text of a batch. Ids are int64, (B, L), padded at the end with
0; the graph masks padding, so a vector does not depend on how far its text was padded.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ConfigError, TextError

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<pad>", "<unk>")
BUILT_IN = "words"
ENTRY_POINTS = "dckt.tokenizers"

Tokenizer: TypeAlias = Callable[[str], list[str]]


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """How a text becomes token ids. Stored in the bundle.

    Attributes:
        max_tokens: words after this many are left out.
        tokenizer: name of what splits a text into words, see :func:`tokenizer`.
    """

    max_tokens: int = 300
    tokenizer: str = BUILT_IN

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"text max_tokens is {self.max_tokens}; expected at least 1")


# --- the built-in tokenizer ---------------------------------------------------------------------------------------

_ASCII_WORD = re.compile(r"\w+(?:'\w+)*")
# Nobody sees these, so they change no word: soft hyphen, joiners, marks of direction, selectors of a glyph. The
# zero-width space is not among them, because it parts words.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180d\u180f\u200c-\u200f\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
# Han and kana, with their numerals and iteration marks, as they are after NFKC. Whole blocks and whole planes: what a
# later version of Unicode adds there is then split alike, whichever version Python knows.
_HAN_AND_KANA = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001aff0-\U0001b16f\U00020000-\U0003fffd"
)
_PROLONGED = "\u30fc"


@cache
def _word() -> re.Pattern[str]:
    r"""One character of Han or kana, or else a run of letters, digits and marks, with the apostrophes inside it.

    ``\w`` leaves combining marks out, which would cut the words of Hindi, Thai and many others to pieces. The mark
    that prolongs a kana's vowel is a letter to Unicode, but says nothing without what it follows.
    """
    marks = [letter for letter in map(chr, range(0x300, 0x1F000)) if unicodedata.category(letter)[0] == "M"]
    near = "".join(letter for letter in marks if letter <= "\uffff")
    far = "".join(letter for letter in marks if letter > "\uffff")
    # Beyond U+FFFF `re` tries one range after another; the look ahead spares nearly every letter that, 4 to 8 times
    # as fast.
    mark = rf"(?:[{near}]|(?=[^\0-\uffff])[{far}])"
    run = rf"[^\W{_HAN_AND_KANA}]+(?:{mark}+[^\W{_HAN_AND_KANA}]*)*"
    return re.compile(rf"{run}(?:'{run})*|[{_HAN_AND_KANA}](?:{mark}|{_PROLONGED})*")


def normalise(text: str) -> str:
    r"""A text without what makes no word another: case, compatibility variants (NFKC), invisible characters.

    A tokenizer of your own may start with this, as the built-in one does.

    >>> normalise("ＮＡÏＶＥ caf\u00ade")
    'naïve cafe'
    """
    if text.isascii():
        return text.lower()
    # Taken apart before folding, because folding turns a mark (iota subscript) into a letter, which stays where it is.
    folded = unicodedata.normalize("NFKD", _INVISIBLE.sub("", text)).casefold()
    return unicodedata.normalize("NFKC", folded).replace("\u2019", "'")


def tokenize(text: str) -> list[str]:
    """The built-in tokenizer ``words``: words of any script; Chinese and Japanese, which have no blanks, by character.

    >>> tokenize("A red leather Handbag, isn't it?")
    ['a', 'red', 'leather', 'handbag', "isn't", 'it']
    >>> tokenize("iPhone15の赤いカバー")
    ['iphone15', 'の', '赤', 'い', 'カ', 'バー']
    """
    text = normalise(text)
    # Looking through Unicode for marks takes a while, which a first query in English need not wait for.
    return (_ASCII_WORD if text.isascii() else _word()).findall(text)


# --- other tokenizers ---------------------------------------------------------------------------------------------

_registered: dict[str, Tokenizer] = {}


def register_tokenizer(name: str, function: Tokenizer) -> None:
    """Makes a tokenizer known by a name, in this process. A second one of the same name replaces the first.

    Args:
        name: what the configuration (``text.tokenizer``) and the bundle call it.
        function: takes any text and returns its words, in their order. It must give the same words for the same text
            always, and it does its own :func:`normalise`.

    Raises:
        ConfigError: the name is that of the built-in tokenizer, or the function is none.
    """
    if not name or name == BUILT_IN:
        raise ConfigError(f"a tokenizer cannot be registered as {name!r}; choose another name")
    if not callable(function):
        raise ConfigError(f"the tokenizer {name!r} is a {type(function).__name__}; expected a function")
    _registered[name] = function


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name: ``words``, one that was registered, or one that an installed package declares.

    A package declares it as an entry point in the group ``dckt.tokenizers``, which is loaded when it is first asked
    for. A name is never taken as a path to code: it may come from a bundle, and a bundle runs nothing.

    Returns:
        A function that takes a text and returns its words; it raises TextError if they are no list of non-empty
        strings without line breaks, for each is one line of the vocabulary.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be loaded.
    """
    if name == BUILT_IN:
        return tokenize
    if name not in _registered:
        register_tokenizer(name, _installed(name))
    function = _registered[name]

    def checked(text: str) -> list[str]:
        words: object = function(text)
        if not isinstance(words, list) or not all(map(_is_word, words)):
            raise TextError(
                f"the tokenizer {name!r} made {_shown(words)} of {_shown(text)}; expected a list of non-empty strings "
                "without line breaks"
            )
        return words

    return checked


def _installed(name: str) -> Tokenizer:
    from importlib.metadata import entry_points  # slow, and hardly ever needed

    offered = entry_points(group=ENTRY_POINTS)
    found = [point for point in offered if point.name == name]
    if not found:
        known = ", ".join(sorted({BUILT_IN, *_registered, *offered.names}))
        raise ConfigError(
            f"there is no tokenizer {name!r} (there are: {known}); call dckt.preprocessing.register_tokenizer with "
            f"that name before, or install the package that declares it as an entry point in the group {ENTRY_POINTS!r}"
        )
    if len(found) > 1:
        packages = ", ".join(sorted(point.dist.name if point.dist else "?" for point in found))
        raise ConfigError(f"several packages declare a tokenizer {name!r}: {packages}; uninstall all but one")
    try:
        function: Tokenizer = found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the tokenizer {name!r} cannot be loaded from {found[0].value} ({error})") from error
    return function


def _is_word(word: object) -> bool:
    return isinstance(word, str) and word != "" and "\n" not in word and "\r" not in word


# --- vocabulary ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """The words that a model knows. A word's id is its place; 0 pads and 1 stands for any unknown word.

    Attributes:
        words: every word, the two special ones first.
    """

    words: tuple[str, ...]
    ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.words[:2] != SPECIAL:
            raise TextError(f"a vocabulary starts with {SPECIAL}; this one starts with {self.words[:2]}")
        ids = {word: place for place, word in enumerate(self.words)}
        if not all(map(_is_word, self.words)):
            raise TextError("a word of a vocabulary is empty or holds a line break; each is one line of its file")
        if len(ids) != len(self.words):
            raise TextError(f"a vocabulary of {len(self.words)} words holds only {len(ids)} different ones")
        object.__setattr__(self, "ids", ids)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, words: Iterable[str]) -> Vocabulary:
        """A vocabulary of ordinary words, in their order, behind the two special ones."""
        return cls((*SPECIAL, *words))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads a file with one word a line, UTF-8.

        Raises:
            TextError: the file is missing, not UTF-8, or not a vocabulary.
        """
        try:
            return cls(tuple(path.read_text(encoding="utf-8").removesuffix("\n").split("\n")))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: the vocabulary cannot be read ({error})") from error

    def dumps(self) -> str:
        """The text of a vocabulary file: one word a line."""
        return "".join(f"{word}\n" for word in self.words)

    @property
    def sha256(self) -> str:
        """Hash of :meth:`dumps`."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    def encode(self, text: str, spec: TextSpec, *, allow_unknown: bool = False) -> list[int]:
        """Token ids of one text, without padding, at least one and at most ``spec.max_tokens``.

        Args:
            text: any text that holds a word.
            spec: the model's tokenizer and limit.
            allow_unknown: a text whose words are all unknown becomes unknown ids instead of an error. A
                collection may hold such texts; a query that is one would find nothing in particular.

        Raises:
            TextError: the text holds no word, or, unless allowed, no known word.
            ConfigError: the model's tokenizer is neither registered nor installed.
        """
        words = tokenizer(spec.tokenizer)(text)[: spec.max_tokens]
        if not words:
            seen = "" if spec.tokenizer == BUILT_IN else f" that the tokenizer {spec.tokenizer!r} finds"
            raise TextError(f"the text {_shown(text)} holds no word{seen}; give it at least one word")
        # The built-in tokenizer never yields "<pad>"; of another one it must not hide the word's place from the graph.
        ids = [self.ids.get(word) or UNKNOWN for word in words]
        if not allow_unknown and all(i == UNKNOWN for i in ids):
            raise TextError(
                f"the model knows none of the words of {_shown(text)} (it has {len(self) - 2:,}); "
                "use other words, or train with texts or word vectors that hold them"
            )
        return ids


def token_batch(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Pads rows of ids to a batch (B, L) of int64; B may be 0, L is at least 1.

    >>> token_batch([[5, 6], [7]]).tolist()
    [[5, 6], [7, 0]]
    """
    length = max([1, *map(len, rows)])
    batch = np.full((len(rows), length), PADDING, dtype=np.int64)
    for place, row in enumerate(rows):
        batch[place, : len(row)] = row
    return batch


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
