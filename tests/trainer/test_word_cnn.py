"""The Word CNN: equal to a loop, blind to padding, and it learns."""

import numpy as np
import pytest
import torch

from dckt.errors import ConfigError, TrainingError
from dckt_trainer.config import TextConfig
from dckt_trainer.word_cnn import WordCNN, _batches, text_vectors, train_word_cnn
from dckt_trainer.words import learn_words

CPU = torch.device("cpu")


def cnn(words=12, width=6, windows=(3, 4, 5), maps=4, seed=0):
    torch.manual_seed(seed)
    vectors = torch.randn(words, width)
    vectors[:2] = 0
    return WordCNN(vectors, windows, maps)


def test_equals_a_loop_over_windows():
    model, tokens = cnn(), [2, 5, 7, 3]
    rows = model.embedding.weight.numpy()
    expected = []
    for window, convolution in zip(model.windows, model.convolutions, strict=True):
        weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
        padded = np.concatenate([np.zeros((window - 1, 6)), rows[tokens], np.zeros((window - 1, 6))])
        places = range(len(padded) - window + 1)
        values = [(weight * padded[p : p + window].T[None]).sum((1, 2)) + bias for p in places]
        expected.append(np.maximum(np.max(values, axis=0), 0))
    with torch.no_grad():
        got = model(torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(got, np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_vector_does_not_depend_on_padding(length):
    model = cnn()
    for convolution in model.convolutions:
        torch.nn.init.constant_(convolution.bias, 2.0)  # ReLU(bias) of padding would win if it counted
        torch.nn.init.constant_(convolution.weight, -1.0)
    model.embedding.weight.data[2:] = 1.0
    tokens = torch.arange(length) % 10 + 2
    with torch.no_grad():
        alone = model(tokens[None])
        padded = model(torch.cat([tokens, torch.zeros(20, dtype=torch.int64)])[None])
    assert torch.equal(alone, padded)


def test_word_vectors_stay_frozen_and_training_leaves_the_start_as_it_was():
    texts = [[2, 3, 4], [5, 6, 7], [2, 3, 3], [5, 7, 7]] * 8
    labels = [0, 1, 0, 1] * 8
    start = cnn()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    figures = []
    config = TextConfig(cnn_epochs=6, cnn_batch=8, maps=4)
    trained = train_word_cnn(
        start, (texts, labels), (texts[:4], labels[:4]), config, seed=0, stream="t", device=CPU, advance=figures.append
    )
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert torch.equal(trained.embedding.weight, start.embedding.weight)
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert max(f["validation_accuracy"] for f in figures) == 1.0
    assert len(figures) == 6
    again = train_word_cnn(start, (texts, labels), (texts[:4], labels[:4]), config, seed=0, stream="t", device=CPU)
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_best_pass_on_validation_is_kept():
    texts, labels = [[2, 3], [4, 5]] * 10, [0, 1] * 10
    wrong = [1, 0] * 10  # the better it learns, the worse it does here
    config = TextConfig(cnn_epochs=8, cnn_batch=4, maps=4, windows=(2,))
    figures = []
    model = cnn(windows=(2,))
    kept = train_word_cnn(
        model, (texts, labels), (texts, wrong), config, seed=1, stream="t", device=CPU, advance=figures.append
    )
    accuracies = [f["validation_accuracy"] for f in figures]
    best = accuracies.index(max(accuracies)) + 1
    shorter = TextConfig(cnn_epochs=best, cnn_batch=4, maps=4, windows=(2,))
    same = train_word_cnn(model, (texts, labels), ([], []), shorter, seed=1, stream="t", device=CPU)
    vectors = text_vectors(kept, texts[:2], CPU)
    assert torch.equal(vectors, text_vectors(same, texts[:2], CPU))


def test_the_last_layers_norm_is_capped_and_a_loss_that_is_not_finite_stops(monkeypatch):
    made = []
    real = torch.nn.Linear

    class Spy(real):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(torch.nn, "Linear", Spy)
    texts, labels = [[2, 3], [4, 5]] * 10, [0, 1] * 10
    vectors = cnn(windows=(2,))
    with torch.no_grad():
        vectors.convolutions[0].weight.mul_(100)
    config = TextConfig(cnn_epochs=3, cnn_batch=4, maps=4, windows=(2,))
    train_word_cnn(vectors, (texts, labels), ([], []), config, seed=0, stream="t", device=CPU)
    assert made[-1].weight.norm(dim=1).max() <= 3.0 + 1e-5
    vectors.embedding.weight.data[2:] = 3e38
    with pytest.raises(TrainingError, match="t, pass 1: the loss is not finite"):
        train_word_cnn(vectors, (texts, labels), ([], []), config, seed=0, stream="t", device=CPU)


def test_batches_hold_every_text_once_beside_texts_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 90, 1030).tolist()
    generator = torch.Generator().manual_seed(0)
    first, second = _batches(lengths, 50, generator), _batches(lengths, 50, generator)
    for batches in (first, second):
        assert sorted(place for batch in batches for place in batch) == list(range(1030))
        padded = sum(len(batch) * max(lengths[place] for place in batch) for batch in batches)
        assert padded < 1.15 * sum(lengths)
    assert [set(batch) for batch in first] != [set(batch) for batch in second]
    starts = [min(lengths[place] for place in batch) for batch in first]
    assert starts != sorted(starts)


def test_one_vocabulary_with_seeded_vectors():
    texts = ["a red ball and a blue cube", "the red cube", "one blue ball", "red and blue"] * 5
    config = TextConfig(dimension=8, epochs=2, min_count=5)
    first, second = learn_words(texts, config, 3), learn_words(texts, config, 3)
    assert first.vocabulary == second.vocabulary
    assert np.array_equal(first.vectors, second.vectors)
    assert not np.array_equal(first.vectors, learn_words(texts, config, 4).vectors)
    assert first.vectors.shape == (len(first.vocabulary), 8)
    assert not first.vectors[:2].any()
    assert "cube" in first.vocabulary.ids
    rare = learn_words([*texts, "zebra"], config, 3)
    assert "zebra" not in rare.vocabulary.ids
    with pytest.raises(ConfigError, match="min_count"):
        learn_words(["one two three"], config, 0)


def test_vectors_from_a_file(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("4 2\nthe 0 1\nred 1 0\nzebra 2 2\nRed 9 9\n", encoding="utf-8")
    texts = ["red red car"]
    few = TextConfig(vectors=str(path), min_count=1, extra_words=0)
    assert learn_words(texts, few, 0).vocabulary.words[2:] == ("red",)
    words = learn_words(texts, TextConfig(vectors=str(path), min_count=1, extra_words=3), 0)
    assert words.vocabulary.words[2:] == ("the", "red", "zebra")
    assert words.vectors[words.vocabulary.ids["zebra"]].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.txt", None, "expected 'word2vec' or a file"),
        ("pickle.kv", b"\x80\x04.", "pickle"),
        ("garbage.txt", b"hello\nworld\n", "word2vec format"),
        ("other.txt", b"1 2\nunrelated 1 2\n", "knows no word"),
        ("nan.txt", b"1 2\nred nan 2\n", "not finite"),
        ("short.bin", b"3 4\nred \x00\x00", "word2vec format"),
    ],
)
def test_bad_vector_files(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        learn_words(["red car"], TextConfig(vectors=str(path), min_count=1, extra_words=0), 0)
