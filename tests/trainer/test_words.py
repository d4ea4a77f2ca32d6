"""Words and their vectors: the same in every process, from any file that holds them, by any tokenizer."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gensim.models import KeyedVectors

from dckt.errors import ConfigError, TextError
from dckt.preprocessing import TextSpec, register_tokenizer
from dckt.preprocessing import text as text_module
from dckt_trainer.config import TextConfig
from dckt_trainer.model import load_model
from dckt_trainer.words import check_vectors, learn_words

TEXTS = ["a red ball and a blue cube", "the red cube", "one blue ball", "red and blue"] * 5
ROWS = {"the": [0, 1, 2], "red": [1, 0, 2], "zebra": [2, 2, 2], "Red": [9, 9, 9], ". .": [5, 5, 5], "blue": [0, 0, 1]}
LINES = "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in ROWS.items())


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(text_module, "_registered", {})


def of_file(path, texts=TEXTS, **settings):
    return learn_words(texts, TextConfig(vectors=str(path), **{"min_count": 1, "extra_words": 3, **settings}), 0)


# --- skip-gram ----------------------------------------------------------------------------------------------------

LEARN = """
import hashlib
from dckt_trainer.config import TextConfig
from dckt_trainer.words import learn_words
words = learn_words({texts!r}, TextConfig(dimension=16, epochs=3, min_count=1), 3)
print(hash("red") % 10_000, words.vocabulary.sha256, hashlib.sha256(words.vectors.tobytes()).hexdigest())
"""


def test_vectors_do_not_depend_on_how_python_hashes_in_this_process():
    printed = []
    for number in ("1", "2"):
        finished = subprocess.run(
            [sys.executable, "-c", LEARN.format(texts=TEXTS)],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        printed.append(finished.stdout.split())
    first, second = printed
    assert first[0] != second[0], "the two processes hash alike, so this test shows nothing"
    assert first[1:] == second[1:]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "6 3\n", "6 3 \r\n"])
@pytest.mark.parametrize("name", ["vectors.txt", "vectors.vec", "vectors.txt.gz"])
def test_text_with_a_header_and_as_glove_writes_it(tmp_path, header, name):
    path = tmp_path / name
    content = (header + LINES).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    words = of_file(path)
    assert words.vocabulary.words[2:] == ("the", "red", "zebra", "blue"), "and neither 'Red' nor '. .'"
    assert words.vectors.dtype == np.float32
    assert words.vectors[2:].tolist() == [ROWS[word] for word in words.vocabulary.words[2:]]
    assert not words.vectors[:2].any()
    assert of_file(path, extra_words=0).vocabulary.words[2:] == ("the", "red", "blue")


@pytest.mark.parametrize("binary", [False, True])
def test_what_gensim_saves(tmp_path, binary):
    table = KeyedVectors(3)
    table.add_vectors(list(ROWS)[:4], np.array(list(ROWS.values())[:4], np.float32))
    path = tmp_path / ("vectors.bin" if binary else "vectors.txt")
    table.save_word2vec_format(str(path), binary=binary)
    assert of_file(path).vocabulary.words[2:] == ("the", "red", "zebra")
    packed = tmp_path / f"{path.name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert np.array_equal(of_file(packed).vectors, of_file(path).vectors)


def test_the_first_of_two_lines_for_a_word_counts(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("red 1 2\nred 3 4\n")
    assert of_file(path).vectors[2:].tolist() == [[1, 2]]


def test_words_of_other_scripts_and_line_ends_that_are_none(tmp_path):
    path = tmp_path / "v.txt"
    path.write_bytes("हिन्दी 1 2\nред\x85 5 5\n红 3 4\u2028\n红色 7 7\n".encode())
    words = of_file(path, ["红色 हिन्दी"], extra_words=9)
    assert words.vocabulary.words[2:] == ("हिन्दी", "红")
    assert words.vectors[2:].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"red 1 2\nblue 1\n", "word 2 has 1 numbers, not 2"),
        (b"2 2\nred 1\nblue 1 2\n", "word 1 has 1 numbers, not 2"),
        (b"red 1 2\nred one two\nblue one two\n", "could not convert"),
        (b"3 2\nred 1 2\nblue 1 2\n", "says that it holds 3 words, and holds 2"),
        (b"1 2\nred 1 2\nblue 1 2\n", "says that it holds 1 words, and holds 2"),
        (b"red 1\nblue 2\n", "the first line is 'red 1'"),
        (b"1 0\nred\n", "the first line is '1 0'"),
        (b"1 99999999999999999999999\nred 1\n", "the first line"),
        (b"", "the first line is ''"),
        (b"red 1 2\n\xff 1 2\n", "can't decode"),
        (b"red 1 inf\n", "not finite"),
    ],
)
def test_text_that_is_not_what_it_should_be(tmp_path, content, says):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        of_file(path)


def test_a_packed_file_that_is_cut(tmp_path):
    path = tmp_path / "v.txt.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-20])
    with pytest.raises(ConfigError, match="word2vec format"):
        of_file(path)


def test_a_pickle_is_refused_whatever_its_name(tmp_path):
    path = tmp_path / "word2vec.wordvectors"
    table = KeyedVectors(3)
    table.add_vectors(["red"], np.ones((1, 3), np.float32))
    table.save(str(path))
    with pytest.raises(ConfigError, match="is a pickle"):
        check_vectors(TextConfig(vectors=str(path)))


@pytest.mark.data
@pytest.mark.parametrize("header", [True, False])
def test_real_glove(data_dir, tmp_path, header):
    path = data_dir / "word_vectors" / "glove.6B.50d.subset.txt"
    table = KeyedVectors.load_word2vec_format(str(path))
    if not header:
        bare = tmp_path / "glove.txt"
        bare.write_bytes(path.read_bytes().split(b"\n", 1)[1])
        path = bare
    words = of_file(path, ["A man and a woman, near their car."], extra_words=2000)
    known = words.vocabulary.words[2:]
    assert {"man", "and", "a", "woman", "near", "their", "car", "the"} <= set(known)
    assert 1000 < len(known) < 2003
    assert "," not in known
    assert np.array_equal(words.vectors[2:], np.stack([table[word] for word in known]))


# --- tokenizers ---------------------------------------------------------------------------------------------------


def syllables(text):
    """Pairs of letters: what it makes of a word depends on what stands before it."""
    text = "".join(text.lower().split())
    return [text[place : place + 2] for place in range(0, len(text), 2)]


def test_a_registered_tokenizer_makes_the_words():
    register_tokenizer("syllables", syllables)
    settings = {"tokenizer": "syllables", "dimension": 4, "epochs": 1, "min_count": 1}
    words = learn_words(["re d", "bl ue"], TextConfig(**settings), 0)
    assert set(words.vocabulary.words[2:]) == {"re", "d", "bl", "ue"}
    assert words.vocabulary.encode("BLUE", TextSpec(tokenizer="syllables")) == [
        words.vocabulary.ids["bl"],
        words.vocabulary.ids["ue"],
    ]


def test_a_file_gives_the_words_that_the_tokenizer_yields(tmp_path):
    register_tokenizer("syllables", syllables)
    path = tmp_path / "v.txt"
    path.write_text("re 1 1\nred 2 2\nzz 3 3\n 4 4\nqq 5 5\n")
    words = of_file(path, ["red"], tokenizer="syllables", extra_words=4)
    assert words.vocabulary.words[2:] == ("re", "zz")


def test_words_of_the_texts_are_kept_though_alone_they_would_be_split(tmp_path):
    """As a segmenter does that looks at what stands beside a word."""
    register_tokenizer("context", lambda text: ["red bag"] if text == "a red bag" else text.split())
    path = tmp_path / "v.txt"
    path.write_text("red 1 1\nbag 2 2\nred bag 3 3\n")
    words = of_file(path, ["a red bag"], tokenizer="context", extra_words=1)
    assert words.vocabulary.words[2:] == ("red", "red bag")


@pytest.mark.parametrize("vectors", ["word2vec", "v.txt"])
def test_the_special_words_never_become_ordinary_ones(tmp_path, vectors):
    register_tokenizer("blanks", str.split)
    if vectors != "word2vec":
        (tmp_path / vectors).write_text("<pad> 7 7\n<unk> 7 7\nred 1 2\n")
        vectors = str(tmp_path / vectors)
    config = TextConfig(vectors=vectors, tokenizer="blanks", dimension=2, epochs=1, min_count=1, extra_words=9)
    words = learn_words(["<pad> red <unk>"], config, 0)
    assert words.vocabulary.words == ("<pad>", "<unk>", "red")
    assert not words.vectors[:2].any()
    assert words.vocabulary.encode("<pad> red <unk>", TextSpec(tokenizer="blanks")) == [1, 2, 1]
    if vectors != "word2vec":
        with pytest.raises(ConfigError, match="knows no word of the training texts"):
            learn_words(["<pad> <unk>"], config, 0)


def test_a_tokenizer_that_is_not_there_or_no_good():
    with pytest.raises(ConfigError, match="no tokenizer 'syllables'"):
        learn_words(TEXTS, TextConfig(tokenizer="syllables"), 0)
    register_tokenizer("syllables", lambda text: ["a\nb"])
    with pytest.raises(TextError, match="the tokenizer 'syllables' made"):
        learn_words(TEXTS, TextConfig(tokenizer="syllables"), 0)


def test_a_training_uses_the_tokenizer_and_its_model_remembers_it(run_training, tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer 'syllables'"):
        run_training(tmp_path / "run", "text.tokenizer=syllables")
    assert not (tmp_path / "run").exists()
    register_tokenizer("syllables", syllables)
    run = run_training(tmp_path / "run", "text.tokenizer=syllables", "transfer.rounds=0")
    model = load_model(run.path / "target")
    assert model.text == TextSpec(tokenizer="syllables", max_tokens=run.config.text.max_tokens)
    words = model.vocabulary.words[2:]
    assert len(words) > 20
    assert max(map(len, words)) == 2


def test_a_text_in_which_the_tokenizer_finds_nothing_stops_before_the_pictures_are_read(run_training, tmp_path):
    register_tokenizer("nothing", lambda text: text.split() if len(text) % 2 else [])
    with pytest.raises(TextError, match="holds no word that the tokenizer 'nothing' finds"):
        run_training(tmp_path / "run", "text.tokenizer=nothing", "text.min_count=1", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_model_from_before_tokenizers_has_the_built_in_one(finished, tmp_path):
    folder = shutil.copytree(finished.path / "target", tmp_path / "target")
    shape = json.loads((folder / "model.json").read_text())
    assert shape["text"].pop("tokenizer") == "words"
    (folder / "model.json").write_text(json.dumps(shape))
    assert load_model(folder).text == load_model(finished.path / "target").text
