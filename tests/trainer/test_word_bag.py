"""Texts as bags of words, beside a dense computation written from the formulas."""

import numpy as np
import pytest
import torch

from dckt.preprocessing import Vocabulary, token_batch
from dckt_trainer.word_bag import VECTOR_LENGTH, fit_word_bag
from dckt_trainer.words import Words

TEXTS = [[2, 3, 3, 4], [3, 5], [6, 2, 2], [7, 8, 4], [5, 6, 7], [1, 8, 2]]


@pytest.fixture
def words():
    vocabulary = Vocabulary.of(list("abcdefgh"))  # ids 2 to 9; 9 stands in no text
    vectors = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    vectors[:2] = 0
    return Words(vocabulary, vectors)


def encoded(bag, texts):
    with torch.inference_mode():
        return bag(torch.from_numpy(token_batch(texts))).numpy()


def unit(row):
    return row / max(np.linalg.norm(row), 1e-12)


def test_equals_a_dense_computation(words):
    bag = fit_word_bag(words, TEXTS, 3)
    counts = np.array([[text.count(word) if word > 1 else 0 for word in range(10)] for text in TEXTS])
    idf = 1 - np.log(((counts > 0).sum(0) + 0.5) / 7)
    idf[:2] = 0
    tfidf = np.array([unit(row) for row in counts * idf])
    topics = np.linalg.svd(tfidf)[2][:3].T
    found = encoded(bag, TEXTS)
    assert found.shape == (6, 7)
    for row, text in zip(found, counts, strict=True):
        np.testing.assert_allclose(row[:4], VECTOR_LENGTH * unit(text * idf @ words.vectors), atol=1e-5)
        np.testing.assert_allclose(np.abs(row[4:]), np.abs(unit(text * idf @ topics)), atol=1e-5)


def test_neither_padding_nor_order_matters(words):
    bag = fit_word_bag(words, TEXTS, 3)
    alone, reordered = encoded(bag, [[2, 3, 3, 4]]), encoded(bag, [[4, 3, 2, 3]])
    padded = encoded(bag, [[2, 3, 3, 4], [2] * 30])[:1]
    np.testing.assert_allclose(alone, reordered, atol=1e-6)
    np.testing.assert_allclose(alone, padded, atol=1e-6)


def test_words_that_no_training_text_holds(words):
    bag = fit_word_bag(words, TEXTS, 3)
    unknown, new = encoded(bag, [[1], [9]])
    assert not unknown.any()
    np.testing.assert_allclose(new[:4], VECTOR_LENGTH * unit(words.vectors[9]), atol=1e-6)  # its vector serves
    assert not new[4:].any()  # no topic knows it


def test_the_same_texts_give_the_same_bag(words):
    one, other = (fit_word_bag(words, TEXTS, 3, TEXTS[:4]).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_source_adds_topics_and_says_how_rare_words_are(words):
    alone, both = fit_word_bag(words, TEXTS, 2), fit_word_bag(words, TEXTS, 2, [[9, 2], [9, 3], [2, 3, 3]])
    assert alone.topics == 2
    assert both.topics == 5  # three texts span three more directions
    assert not encoded(alone, [[9]])[0, 4:].any()
    assert encoded(both, [[9]])[0, 4:].any()
    # In no text of the target and two of three of the source, half a text added in each.
    share = np.mean([0.5 / 7, 2.5 / 4])
    rarity = (both.embedding.weight * both.scale)[9, :4].numpy() / words.vectors[9]
    np.testing.assert_allclose(rarity, 1 - np.log(share), rtol=1e-5)


@pytest.mark.parametrize(("texts", "topics"), [(TEXTS[:2], 2), (TEXTS[:1], 1), ([[1], [1, 1]], 0), ([[2], [2]], 1)])
def test_few_texts_have_few_topics(words, texts, topics):
    bag = fit_word_bag(words, texts, 200)
    assert (bag.topics, bag.outputs) == (topics, 4 + topics)
    assert np.isfinite(encoded(bag, [*texts, [3]])).all()
