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
    idf = np.log(7 / (1 + (counts > 0).sum(0))) + 1
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
    one, other = (fit_word_bag(words, TEXTS, 3) for _ in range(2))
    assert torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(("texts", "topics"), [(TEXTS[:2], 1), (TEXTS[:1], 0), ([[1], [1, 1]], 0), ([[2], [2]], 0)])
def test_few_texts_have_few_topics(words, texts, topics):
    bag = fit_word_bag(words, texts, 200)
    assert (bag.topics, bag.outputs) == (topics, 4 + topics)
    assert np.isfinite(encoded(bag, [*texts, [3]])).all()
