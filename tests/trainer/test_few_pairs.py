"""Trainings on a part of the target's training pairs, and what they take over of each other."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from stopping import StopAfter

from dckt.errors import RunError
from dckt.preprocessing import tokenize
from dckt_trainer.config import load_config
from dckt_trainer.data.corpus import read_corpus
from dckt_trainer.data.feature_corpus import read_feature_corpus
from dckt_trainer.data.subset import subset_per_class
from dckt_trainer.estimate import estimate
from dckt_trainer.plan import make_plan
from dckt_trainer.plots import bands
from dckt_trainer.progress import Silent
from dckt_trainer.sweep import Row, Sweep
from dckt_trainer.sweep_run import run_sweep
from dckt_trainer.train import resume


class Listening(Silent):
    def __init__(self):
        self.lines, self.tasks = [], []

    def say(self, line):
        self.lines.append(line)

    def task(self, name, total):
        self.tasks.append(name)
        return super().task(name, total)


@pytest.fixture(scope="module")
def marked(corpora, tmp_path_factory):
    """The target with two words of its own in each text; the class of the first pair has 2 training pairs."""
    root = tmp_path_factory.mktemp("marked")
    lines = (corpora / "target" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    poor = pairs[0]["label"]
    spare = [pair["id"] for pair in pairs if pair["label"] == poor and pair["split"] == "train"][2:]
    kept = [pair for pair in pairs if pair["id"] not in spare]
    for number, pair in enumerate(kept):
        word = "mark" + "".join(chr(ord("a") + int(digit)) for digit in str(number))
        pair["text"] = f"{pair['text']} {word} {word}"
    (root / "images").symlink_to(corpora / "target" / "images")
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def vectors(corpora, marked, tmp_path_factory):
    """A file of vectors for every word of the corpora."""
    texts = [pair.text for folder in (corpora / "source", marked) for pair in read_corpus(folder).pairs]
    words = sorted({word for text in texts for word in tokenize(text)})
    chance = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    lines = (f"{word} {' '.join(f'{x:.3f}' for x in chance.normal(size=8))}\n" for word in words)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def few(run_training, marked, vectors, tmp_path_factory):
    """A run on one pair of each class, with words from a file."""
    return run_training(
        tmp_path_factory.mktemp("runs") / "few", "target.pairs_per_class=1", f"text.vectors={vectors}", target=marked
    )


def state(run, domain="target"):
    return run.network(domain).state_dict()


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def words_of(pairs):
    return {word for pair in pairs for word in tokenize(pair.text) if word.startswith("mark")}


def test_a_run_learns_from_the_kept_pairs_alone(run_training, marked, cache, tmp_path):
    listening = Listening()
    changes = ("target.pairs_per_class=3", "transfer.rounds=1")
    run = run_training(tmp_path / "run", *changes, target=marked, reporter=listening)
    whole, kept = read_corpus(marked), subset_per_class(read_corpus(marked), 3, 0)
    assert sorted(Counter(pair.label for pair in kept.part("train")).values()) == [2, 3, 3]
    assert run.facts["target"]["pairs"] == {"train": 8, "val": 9, "test": 12}
    assert run.facts["target"]["fingerprint"] == kept.fingerprint != whole.fingerprint
    assert any("8 of 12 training pairs are kept, 3 of each class" in line for line in listening.lines)
    assert any("classes with fewer" in line and "has 2" in line for line in listening.lines)
    # Each text has words of its own, so the vocabulary tells which texts were read.
    model = run.model()
    known = {word for word in model.vocabulary.words if word.startswith("mark")}
    assert known == words_of(kept.part("train")) < words_of(whole.part("train"))
    assert set(run.events("selection")[0]["selected"]) <= {pair.id for pair in kept.part("train")}
    assert run.events("selection")[0]["pairs"] == 8
    assert run.evaluation["test"]["pairs"] == 12
    # Gone on with after a stop, it has the same pairs.
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", *changes, target=marked, reporter=StopAfter("pretraining, source"))
    assert same(state(run), state(resume(tmp_path / "cut", cache=cache, device="cpu")))


def test_the_seed_chooses_and_subsets_are_nested(corpora, tmp_path):
    def kept(path, pairs, seed):
        config = load_config("small", [f"target.pairs_per_class={pairs}", f"seed={seed}", "transfer.rounds=0"])
        options = {"device": "cpu", "on_bad_pair": "raise", "force": False, "pretrained_from": None}
        plan = make_plan(None, path, None, config, **options, reporter=Silent())
        return [{pair.id for pair in plan.corpora["target"].part(part)} for part in ("train", "val", "test")]

    chance = np.random.default_rng(0)
    path = tmp_path / "target.npz"
    labels = np.tile(["ant", "bee"], 30)
    split = np.repeat(["train", "val", "test"], 20)
    np.savez(path, image=chance.normal(size=(60, 5)), text=chance.normal(size=(60, 7)), labels=labels, split=split)
    assert [len(part) for part in kept(path, 4, 0)] == [8, 20, 20]
    assert kept(path, 4, 0)[0] < kept(path, 7, 0)[0] < kept(path, 0, 0)[0]
    assert kept(path, 4, 0)[0] != kept(path, 4, 1)[0]
    assert kept(path, 0, 0) == kept(path, 99, 3)
    corpus = subset_per_class(read_feature_corpus(path), 4, 0)
    assert corpus.vectors("train")["image"].shape == (8, 5)


def test_a_dry_run_counts_the_kept_pairs(corpora, cache, small):
    config = load_config("small", [*small, "target.pairs_per_class=2"])
    found = estimate(corpora / "source", corpora / "target", None, config, device="cpu", cache=cache)
    assert found.pairs["target"] == {"train": 6, "val": 9, "test": 12}


def test_the_source_half_serves_another_target(run_training, few, marked, vectors, cache, tmp_path):
    changes = ("target.pairs_per_class=3", "pretrain.target_epochs=2", f"text.vectors={vectors}")
    listening = Listening()
    taken = run_training(tmp_path / "taken", *changes, target=marked, pretrained_from=few.path, reporter=listening)
    tasks = [name for name in listening.tasks if name.startswith(("Word CNN", "pretraining"))]
    assert tasks == ["Word CNN, target", "pretraining, target"]
    assert any(
        "source's half is taken over" in line and "pairs_per_class is 1 there" in line for line in listening.lines
    )
    anew = run_training(tmp_path / "anew", *changes, target=marked)
    for domain in ("source", "target"):
        assert same(state(anew, domain), state(taken, domain))
    assert anew.evaluation == taken.evaluation
    first, second = (sorted(run.events("metrics"), key=lambda event: event["stage"]) for run in (anew, taken))
    assert first == second
    assert taken.facts["taken_over"] == ["words.safetensors", "text-source.safetensors", "source-0.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        run_training(
            tmp_path / "cut", *changes, target=marked, pretrained_from=few.path, reporter=StopAfter("Word CNN, target")
        )
    listening = Listening()
    assert same(state(anew), state(resume(tmp_path / "cut", cache=cache, device="cpu", reporter=listening)))
    assert "pretraining, source" not in listening.tasks


def test_a_dry_run_knows_which_half_is_taken_over(few, corpora, marked, vectors, cache, small):
    config = load_config("small", [*small, "target.pairs_per_class=3", f"text.vectors={vectors}"])
    where = (corpora / "source", marked, None, config)
    found = estimate(*where, device="cpu", cache=cache, pretrained_from=few.path)
    assert found.seconds["pretraining, source"] == 0 < found.seconds["pretraining, target"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("text.vectors=VECTORS", "text.extra_words=0"), "the training texts of this run's target give other words"),
        (("text.vectors=word2vec",), "word2vec learns from the texts of both"),
        (("text.vectors=VECTORS", "losses.pair_source=1"), r"not that of this run; .*target corpus; target\.pairs.*"),
    ],
)
def test_a_source_half_on_other_words_is_not_taken_over(run_training, few, marked, vectors, tmp_path, changes, says):
    changes = [change.replace("VECTORS", str(vectors)) for change in changes]
    base = few
    if "losses" not in changes[-1]:
        base = run_training(tmp_path / "base", *changes, "target.pairs_per_class=1", "transfer.rounds=0", target=marked)
    with pytest.raises(RunError, match=says):
        run_training(tmp_path / "run", *changes, "target.pairs_per_class=2", target=marked, pretrained_from=base.path)
    assert not (tmp_path / "run").exists()


def test_a_sweep_over_the_number_of_pairs(corpora, cache, small, tmp_path):
    rows = tuple(Row(title=str(n), changes=(f"target.pairs_per_class={n}",), network="last") for n in (1, 2))
    changes = [*small, "transfer.rounds=0"]
    out = tmp_path / "sweep"
    result = run_sweep(
        Sweep(name="few", preset="small", rows=rows), None, corpora / "target", out, changes=changes, seeds=2
    )
    assert [outcome.run.facts["target"]["pairs"]["train"] for outcome in result.outcomes] == [3, 3, 6, 6]


def test_a_curve_over_numbers_of_pairs_may_have_a_logarithmic_axis():
    panels = {"test": {"one": [(1.0, 0.2, 0.1, 0.3), (40.0, 0.5, 0.4, 0.6)]}}
    linear, logarithmic = (
        bands(panels, x="pairs", y="MAP"),
        bands(panels, x="pairs", y="MAP", log_ticks=(1, 2, 5, 10, 20, 40)),
    )
    assert logarithmic.startswith(b"\x89PNG")
    assert logarithmic != linear == bands(panels, x="pairs", y="MAP")
