from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dckt import Searcher
from dckt.bundle import Bundle, write_bundle
from dckt.errors import ConfigError, TextError
from dckt.preprocessing import (
    TextSpec,
    Vocabulary,
    normalise,
    register_tokenizer,
    token_batch,
    tokenize,
    tokenizer,
)
from dckt.preprocessing import text as text_module
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
        ("ශ්\u200dරී", ["ශ්රී"]),  # the joiner changes how it looks, not which word it is
        ("می\u200cخواهم", ["میخواهم"]),
        ("hand\u00adbag \ufeffred\u200e", ["handbag", "red"]),
        ("ปาก\u200bกา", ["ปาก", "กา"]),  # a blank of no width is a blank
        ("красная сумка", ["красная", "сумка"]),
        ("빨간 가방", ["빨간", "가방"]),
        ("\u1112\u1161\u11ab글", ["한글"]),
        ("ᾼ\u0342 ᾷ", ["\u1fb6ι", "\u1fb6ι"]),  # the mark stays at its letter, however the case is folded
        ("红色 皮包。", ["红", "色", "皮", "包"]),
        ("iPhone15手机壳3個", ["iphone15", "手", "机", "壳", "3", "個"]),
        ("ＴＯＫＹＯ駅で", ["tokyo", "駅", "で"]),
        ("don't中don't", ["don't", "中", "don't"]),
        ("中'文", ["中", "文"]),
        ("コーヒー、らーめん", ["コー", "ヒー", "らー", "め", "ん"]),
        ("寒ーーい", ["寒ーー", "い"]),
        ("Aーー", ["a", "ーー"]),
        ("ﾊﾞｯｸﾞ バッグ", ["バ", "ッ", "グ"] * 2),
        ("か\u3099っこう が", ["が", "っ", "こ", "う", "が"]),
        ("う\u3099か\u3099か\u309aに", ["ゔ", "が", "か\u309a", "に"]),
        ("人々〆切 〇二", ["人", "々", "〆", "切", "〇", "二"]),
        ("葛\U000e0100飾", ["葛", "飾"]),
        ("\U00020bb7\U0002f9f4\ufa0e", ["\U00020bb7", "嶲", "\ufa0e"]),
        ("\U00031350\U000323b0", ["\U00031350", "\U000323b0"]),  # of Unicode 15, whatever Python knows
        ("㍿ ㈱", ["株", "式", "会", "社", "株"]),
        ("한국어中文", ["한국어", "中", "文"]),
        ("two\nlines\tand\u00a0space", ["two", "lines", "and", "space"]),
        ("❤️ 👍🏽 !!! ...", []),
        ("\u0301 alone", ["alone"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert tokenize(text) == [unicodedata.normalize("NFKC", word) for word in words]


# What st.text() seldom draws side by side: cased letters, marks, kana, Han, Hangul, joiners, apostrophes.
LETTERS = st.sampled_from(
    "aZsſßﬁİǰ\u00ad\u2019'_1²９éΣςᾳΐЖÅ\u0301\u0327\u0345中文\u8c48\uf900\U0002f800々〇あァがガｶﾞ゙ーｰ・한\u1112\u1161"
    "हि\u094dنَ\u200c\u200d\u200bไ่ \u3000、\ufe0f❤"
)
TEXTS = st.text(LETTERS | st.characters(codec="utf-8"))


@given(TEXTS)
def test_words_of_words_are_the_same_words(text: str) -> None:
    """So a vocabulary made of words finds them again, however the text was written."""
    words = tokenize(text)
    assert tokenize(" ".join(words)) == words
    for word in words:
        assert tokenize(word) == [word]
        assert word
        assert not any(letter.isspace() for letter in word)


@given(TEXTS)
def test_composed_compatible_or_not_it_is_the_same_text(text: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert tokenize(unicodedata.normalize(form, text)) == tokenize(text)


@given(TEXTS)
def test_in_capitals_or_not_it_is_the_same_text(text: str) -> None:
    for variant in (text.lower(), text.casefold()):
        assert tokenize(unicodedata.normalize("NFC", variant)) == tokenize(text)
    # The capital of Turkish dotless i is I. That of an iota subscript is a letter, which leaves its marks behind.
    assume("ı" not in text and "\u0345" not in unicodedata.normalize("NFKD", text))
    assert tokenize(text.upper()) == tokenize(text)


def _words_of_european_text(text: str) -> list[str]:
    """The rule without anything about marks, joiners, Han and kana."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return re.findall(r"\w+(?:'\w+)*", folded)


@given(st.text(st.characters(max_codepoint=0x17F, exclude_characters="\u00adİ") | st.sampled_from("’“”–—…€ ")))
def test_european_text_is_split_at_what_is_no_letter(text: str) -> None:
    assert tokenize(text) == _words_of_european_text(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_goes_a_shorter_way_to_the_same_words(text: str) -> None:
    assert tokenize(text) == text_module._word().findall(text.lower())


def test_every_letter_of_han_and_kana_is_a_word_and_no_other_is() -> None:
    named = re.compile(
        "CJK (UNIFIED|COMPATIBILITY) IDEOGRAPH|HIRAGANA|KATAKANA|HENTAIGANA|HANGZHOU|IDEOGRAPHIC (?!TALLY)|"
        "VERTICAL (KANA|IDEO)|MASU"
    )
    letters = [letter for letter in map(chr, (*range(0xD800), *range(0xE000, 0x30000))) if letter.isalnum()]
    letters = [letter for letter in letters if normalise(letter) == letter]
    assert len(letters) > 100_000
    alone = {letter for letter in letters if tokenize(f"{letter}x{letter}") == [letter, "x", letter]}
    assert alone == {letter for letter in letters if named.match(unicodedata.name(letter, ""))}


# --- other tokenizers ---------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A registry of the test's own, so that no other test sees what it registers."""
    registered: dict[str, object] = {}
    monkeypatch.setattr(text_module, "_registered", registered)
    return registered


def syllables(text: str) -> list[str]:
    """What the tests register: pairs of letters."""
    letters = "".join(text.lower().split())
    return [letters[place : place + 2] for place in range(0, len(letters), 2)]


@pytest.mark.usefixtures("registry")
def test_a_registered_tokenizer_encodes() -> None:
    register_tokenizer("syllables", syllables)
    spec = TextSpec(tokenizer="syllables", max_tokens=3)
    assert tokenizer("syllables")("RED bag") == ["re", "db", "ag"]
    assert Vocabulary.of(["ag", "re"]).encode("RED bag bag", spec) == [3, UNKNOWN, 2]
    register_tokenizer("syllables", str.split)
    assert Vocabulary.of(["ag", "re"]).encode("re ag", spec) == [3, 2]
    with pytest.raises(TextError, match=r"'  ' holds no word that the tokenizer 'syllables' finds"):
        VOCABULARY.encode("  ", spec)


@pytest.mark.usefixtures("registry")
def test_a_tokenizer_cannot_hide_a_word_as_padding() -> None:
    register_tokenizer("blanks", str.split)
    spec = TextSpec(tokenizer="blanks")
    assert VOCABULARY.encode("<pad> red <unk>", spec) == [UNKNOWN, 2, UNKNOWN]
    with pytest.raises(TextError, match="none of the words"):
        VOCABULARY.encode("<pad>", spec)


@pytest.mark.parametrize(
    "words", [("red",), "red", None, ["red", ""], ["red", 1], ["a\nb"], ["a\r"], [b"red"], ["\n" * 1000], iter(["red"])]
)
@pytest.mark.usefixtures("registry")
def test_what_a_tokenizer_yields_is_checked(words: object) -> None:
    register_tokenizer("odd", lambda text: words)  # type: ignore[arg-type, return-value]
    with pytest.raises(TextError, match=r"the tokenizer 'odd' made .* of 'red bag'; expected a list of") as caught:
        VOCABULARY.encode("red bag", TextSpec(tokenizer="odd"))
    assert len(str(caught.value)) < 300


@pytest.mark.usefixtures("registry")
def test_what_cannot_be_registered() -> None:
    for name in ("words", ""):
        with pytest.raises(ConfigError, match=f"cannot be registered as '{name}'"):
            register_tokenizer(name, syllables)
    with pytest.raises(ConfigError, match="'x' is a str; expected a function"):
        register_tokenizer("x", "os:system")  # type: ignore[arg-type]
    assert tokenizer("words") is tokenize


@pytest.mark.parametrize("name", ["syllables", "os:system", "posix.system", "this", "", "../words", "Words"])
@pytest.mark.usefixtures("registry")
def test_a_name_is_never_a_path_to_code(name: str) -> None:
    register_tokenizer("mine", syllables)
    sys.modules.pop("this", None)
    with pytest.raises(ConfigError) as caught:
        tokenizer(name)
    assert f"no tokenizer {name!r} (there are: mine, words); call" in str(caught.value)
    assert "register_tokenizer" in str(caught.value)
    assert "'dckt.tokenizers'" in str(caught.value)
    assert "this" not in sys.modules


def install(folder: Path, package: str, entry_points: str, code: str = "") -> None:
    """What a package manager leaves of a package: a module, and who it is."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dckt.tokenizers]\n{entry_points}\n")
    (folder / f"{package}.py").write_text(code)


def test_a_tokenizer_of_an_installed_package_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    code = "print('loaded')\ndef split(text):\n    return text.split('|')\n"
    install(tmp_path, "barred", "bars = barred:split\nwords = barred:split", code)
    install(tmp_path, "trap", "trap = trap:split", "raise SystemExit('a package that nobody asked for was loaded')")
    script = """
import sys, dckt.preprocessing
from dckt.preprocessing import TextSpec, Vocabulary, tokenizer
assert Vocabulary.of(["a b"]).encode("a b a b", TextSpec(), allow_unknown=True) == [1] * 4
print("asked")
for _ in range(2):
    print(Vocabulary.of(["a b"]).encode("a b|c", TextSpec(tokenizer="bars")))
try:
    tokenizer("other")
except ValueError as error:
    print("there are: bars, trap, words" in str(error))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.stdout.splitlines() == ["asked", "loaded", "[2, 1]", "[2, 1]", "True"], finished.stderr


@pytest.mark.parametrize(
    ("package", "points", "says"),
    [
        ("gone", "bars = not_there_at_all:split", r"'bars' cannot be loaded from not_there_at_all:split \(No module"),
        ("empty", "bars = empty:split", r"'bars' cannot be loaded from empty:split"),
        ("number", "bars = number:split", r"'bars' is a int; expected a function"),
        ("second", "bars = second:split", r"several packages declare a tokenizer 'bars': first, second"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_an_installed_tokenizer_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, points: str, says: str
) -> None:
    install(tmp_path, package, points, "split = 7" if package == "number" else "")
    if package == "second":
        install(tmp_path, "first", "bars = first:split")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=says):
        tokenizer("bars")


@pytest.mark.usefixtures("registry")
def test_the_tokenizer_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "text.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "thai_words.txt").write_text("กระเป๋า สี แดง สีแดง น้ำ ดื่ม", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    words = tokenizer("thai")("กระเป๋าสีแดง, น้ำดื่ม RED ดื่มกขค")
    assert words == [normalise(word) for word in ("กระเป๋า", "สีแดง", "น้ำ", "ดื่ม", "red", "ดื่ม", "กขค")]
    rows = re.findall(r"^\| `(.*?)` \| (`.*?)(?:: .*)? \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for example, split in rows:
        assert tokenize(example) == re.findall("`(.*?)`", split)


def test_a_bundle_searches_with_the_tokenizer_that_it_was_trained_with(
    registry: dict[str, object], tiny_bundle: Path, colour_images: dict[str, Path], tmp_path: Path
) -> None:
    tiny = Bundle.open(tiny_bundle)
    spec = TextSpec(tokenizer="reversed", max_tokens=16)
    bundle = write_bundle(
        tmp_path / "reversed.dckt",
        files={name: tiny.path / name for name in tiny.manifest.files},
        image=tiny.manifest.image,
        text=spec,
        labels=tiny.manifest.labels,
        representation=tiny.manifest.representation,
        dimensions=tiny.manifest.dimensions,
        produced_by={},
        measured={},
    )
    assert bundle.manifest.model_id != tiny.manifest.model_id
    for opening in (Searcher.create, Searcher.open):
        with pytest.raises(ConfigError, match=r"reversed\.dckt: there is no tokenizer 'reversed'.*register_tokenizer"):
            opening(bundle.path, tmp_path / "index")
    assert not (tmp_path / "index").exists()

    register_tokenizer("reversed", lambda text: text[::-1].split())
    trained = tiny.vocabulary.encode("eulb", spec)
    assert trained == [tiny.vocabulary.ids["blue"]]
    with Searcher.create(bundle.path, tmp_path / "index") as searcher:
        assert searcher.model.prepare("text", "eulb") == trained
        searcher.add_images([colour_images[name] for name in ("red", "blue")], ids=["red", "blue"])
        assert [hit.id for hit in searcher.search(text="eulb")] == ["blue", "red"]
        assert [hit.id for hit in searcher.search(text="der")] == ["red", "blue"]
        with pytest.raises(TextError, match="knows none of the words"):
            searcher.search(text="blue")
    registry.clear()
    with pytest.raises(ConfigError, match="no tokenizer 'reversed'"):
        Searcher.open(bundle.path, tmp_path / "index")


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
