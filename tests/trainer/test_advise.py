"""The advice: how candidates are judged, what is told of them, and that no test pair is read on the way."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dckt.errors import ConfigError, RunError
from dckt_trainer.advice import run as advise_run
from dckt_trainer.advice.candidates import configs, trials
from dckt_trainer.advice.judgement import Advice, Figures, LeftOut, interval, judge
from dckt_trainer.advice.run import advise
from dckt_trainer.advice.words import duration, markdown, paragraphs, record, rows, seconds_of
from dckt_trainer.cli import app
from dckt_trainer.config import load_config
from dckt_trainer.inputs import prepare
from dckt_trainer.plan import make_plan, remake_plan
from dckt_trainer.progress import Silent
from dckt_trainer.runs import open_run
from dckt_trainer.sweep_jobs import Options
from dckt_trainer.train import resume, train

TRIALS = {trial.name: trial for trial in trials(source=True, vectors=False)}
CANDIDATES = {each.key: each for trial in TRIALS.values() for each in trial.candidates}
ORDER = list(CANDIDATES)


# --- made-up figures ----------------------------------------------------------------------------------------------


def figures(key, mean, *, noise=0.0, pairs=100, seeds=1, offered=True, seconds=3.0):
    """AP of pairs that all candidates find equally hard, and noise of the candidate's own around its mean."""
    hardness = np.random.default_rng(0).normal(0, 0.1, (1, pairs))
    own = np.random.default_rng(ORDER.index(key) + 1).normal(0, 1, (seeds, pairs))
    own -= own.mean()
    return Figures(CANDIDATES[key], mean + hardness - hardness.mean() + noise * own, seconds, offered)


def advice(*found, source="big", left_out=(), seeds=1, changes=(), **more):
    pairs = {"train": 80, "val": found[0].per_pair.shape[1]}
    facts = {"skip_bad": False, "budget": 1200.0, "spent": 100.0, **more}
    return Advice(
        source, "data/mine", pairs, 20, changes, facts.pop("skip_bad"), seeds, *facts.values(), found, left_out
    )


def told(*found, **more):
    return " ".join(paragraphs(advice(*found, **more)))


def test_an_interval_is_that_of_students_t_over_pairs():
    values = np.random.default_rng(3).normal(0.4, 0.2, (1, 30))
    found = interval(values)
    half = 2.04523 * values.std(ddof=1) / 30**0.5  # the quantile for 29 degrees of freedom
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((half, half), rel=1e-5)


def test_chance_in_training_widens_an_interval():
    pairs = np.random.default_rng(3).normal(0, 0.1, 30)
    alike, apart = np.stack([pairs, pairs]), np.stack([pairs - 0.1, pairs + 0.1])
    assert interval(alike).mean == pytest.approx(interval(apart).mean)
    assert interval(apart).high - interval(apart).low > 3 * (interval(alike).high - interval(alike).low)


def test_differences_are_pair_by_pair():
    one, other = figures("modern", 0.52, noise=0.01), figures("modern-alone", 0.5, noise=0.01)
    assert one.map.low < other.map.high, "each by itself, they overlap"
    assert one.less(other).mean == pytest.approx(0.02)
    assert one.less(other).above
    assert other.less(one).below


def test_the_best_is_advised_where_it_is_clearly_ahead():
    found = [figures("modern-alone", 0.5, noise=0.01), figures("dckt", 0.6, noise=0.01), figures("modern", 0.55)]
    verdict = judge(found)
    assert verdict.chosen is found[1]
    assert verdict.level == ()
    assert verdict.behind == (found[2], found[0])


def test_of_two_that_are_level_the_cheaper_is_advised():
    cheap, dear, worse = (
        figures(k, m, noise=0.2) for k, m in (("modern", 0.5), ("dckt", 0.51), ("network-alone", 0.3))
    )
    verdict = judge([cheap, worse, dear])
    assert verdict.chosen is cheap
    assert verdict.level == (dear,)
    assert verdict.behind == (worse,)


def test_one_that_another_is_clearly_ahead_of_is_not_advised_though_the_best_is_level_with_it():
    cheap, middle = figures("modern-alone", 0.50, noise=0.01), figures("modern", 0.52, noise=0.01)
    best = figures("dckt", 0.525, noise=0.5)
    assert not best.less(cheap).above
    assert judge([cheap, middle, best]).chosen is middle


def test_what_its_own_run_would_not_hand_out_is_not_advised():
    left = figures("modern", 0.6, noise=0.01, offered=False)
    alone = figures("modern-alone", 0.5, noise=0.01)
    verdict = judge([alone, left])
    assert (verdict.chosen, verdict.level, verdict.behind) == (alone, (), ())


@pytest.mark.parametrize("seed", range(20))
def test_there_always_is_one_that_nobody_is_clearly_ahead_of(seed):
    chance = np.random.default_rng(seed)
    found = [Figures(CANDIDATES[key], chance.uniform(0, 1, (2, 4)) ** chance.uniform(0.2, 5), 1.0) for key in ORDER]
    verdict = judge(found)
    others = [each for each in found if each is not verdict.chosen]
    assert not any(each.less(verdict.chosen).above for each in others)
    for cheaper in found[: found.index(verdict.chosen)]:
        assert any(each.less(cheaper).above for each in found)
    assert {*verdict.level, *verdict.behind} == set(others)


# --- words --------------------------------------------------------------------------------------------------------


def test_words_where_the_source_helps():
    words = told(figures("modern-alone", 0.56, noise=0.01), figures("modern", 0.58, noise=0.01))
    assert words.startswith("Use `modern` with the source. On 100 validation pairs its MAP is 0.580 (95 % interval 0.5")
    assert "It is clearly ahead of modern alone, by +0.020 (95 % interval +0.01" in words
    assert "The source brings +0.020 (95 % interval +0.01" in words
    assert "over the best without it, modern alone." in words
    assert "Level" not in words


def test_words_where_the_source_does_not_help_clearly():
    words = told(figures("modern-alone", 0.56, noise=0.1), figures("modern", 0.565, noise=0.1, offered=False))
    assert words.startswith("Use `modern` without the source.")
    assert "The source does not help clearly: the best with it, modern with source, is at +0.005 (95 %" in words
    assert "Nothing else was trained that could be advised" in words


def test_words_where_the_source_does_harm():
    words = told(figures("modern-alone", 0.56, noise=0.01), figures("network-from-source", 0.46, noise=0.01))
    assert "The source does not help: the best with it, network from source, is at -0.100" in words


def test_words_where_the_run_is_stricter_than_the_interval():
    words = told(figures("modern-alone", 0.56, noise=0.01), figures("modern", 0.58, noise=0.01, offered=False))
    assert words.startswith("Use `modern` without the source.")
    assert "The source may help" in words
    assert "leaves it out" in words


def test_words_where_the_source_is_not_needed_for_as_much():
    words = told(
        figures("modern-alone", 0.5, noise=0.01),
        figures("modern", 0.56, noise=0.1),
        figures("network-alone", 0.56, noise=0.1),
    )
    assert words.startswith("Use `modern` with the source.")
    assert "Whether the source helps is not clear: over the best without it, network alone" in words


def test_words_without_a_source():
    words = told(figures("modern-alone", 0.6), figures("network-alone", 0.5, noise=0.01), source=None)
    assert words.startswith("Use `modern`. On")
    assert "No source was given" in words
    assert "source helps" not in words


def test_words_where_two_are_level():
    words = told(figures("modern-alone", 0.6, noise=0.1), figures("dckt", 0.61, noise=0.1))
    assert "Level with it: DCKT with transfer, at +0.010 (95 % interval -0.0" in words
    assert "take the cheaper, which it is" in words
    assert "clearly ahead" not in words


def test_words_where_three_are_level_and_one_is_behind():
    words = told(
        figures("modern-alone", 0.6, noise=0.1),
        figures("modern", 0.61, noise=0.1),
        figures("network-alone", 0.2, noise=0.1),
        figures("dckt", 0.605, noise=0.1),
    )
    assert words.index("modern with source, at") < words.index("DCKT with transfer, at")
    assert "take the cheapest, which it is" in words
    assert "It is clearly ahead of network alone, by +0.4" in words


def test_words_where_one_candidate_fitted_into_the_budget():
    left = LeftOut(TRIALS["network-alone"], "time", 750.0, 65.0)
    words = told(figures("modern-alone", 0.6), left_out=(left,))
    assert "Nothing else was trained that could be advised" in words
    assert "What the source brings is not known, for nothing with it was trained." in words
    assert "network alone: left out, for it would take about 12.5 min, and 1.1 min were left." in words
    assert "larger --budget goes on" in words
    assert "may be chance" not in words, "there is no difference to speak of"


def test_words_where_nothing_without_the_source_was_trained():
    assert "nothing without it was trained" in told(figures("network-from-source", 0.6))


@pytest.mark.parametrize(
    ("why", "seconds", "detail", "expected"),
    [
        (
            "stopped",
            30.0,
            "",
            "DCKT with transfer: stopped when the budget was over; it was expected to take about 30 s.",
        ),
        ("memory", None, "it takes 9 GB", "DCKT with transfer: left out, for it takes 9 GB."),
        ("failed", 3.0, "not finite", "DCKT with transfer: failed (not finite)."),
    ],
)
def test_words_of_what_was_left_out(why, seconds, detail, expected):
    words = told(figures("modern-alone", 0.6), left_out=(LeftOut(TRIALS["dckt"], why, seconds, 9.0, detail),))
    assert expected in words
    assert ("larger --budget" in words) == (why == "stopped")


def test_words_say_how_far_they_can_be_trusted():
    few = [figures(key, mean, noise=0.1, pairs=12) for key, mean in (("modern-alone", 0.6), ("network-alone", 0.58))]
    words = told(*few)
    half = (few[1].less(few[0]).high - few[1].less(few[0]).low) / 2
    assert "chosen on these same pairs, so expect somewhat less on new ones. The test pairs were not read." in words
    assert f"With 12 validation pairs, a difference of less than about {half:.3f} may be chance." in words
    assert "So few pairs decide little" in words
    assert "Each network was trained once" in words
    many = [figures(each.candidate.key, 0.6, noise=0.1, seeds=3) for each in few]
    assert "So few pairs" not in told(*many, seeds=3)
    assert "trained once" not in told(*many, seeds=3)
    assert "trained once" not in told(figures("modern-alone", 0.6), figures("modern", 0.7))


def test_the_command_is_that_of_what_is_advised():
    changes = ("image.trunk=alexnet", 'source.exclude=["a b"]')
    both = figures("modern-alone", 0.5, noise=0.01), figures("modern", 0.6, noise=0.01)
    common = ["--preset", "modern", "--set", "image.trunk=alexnet"]
    assert advice(*both, changes=changes, skip_bad=True).command == [
        *("dckt-train", "--source", "big", "--target", "data/mine"),
        *common,
        *("--set", 'source.exclude=["a b"]', "--on-bad-pair", "skip", "--out", "runs/mine"),
    ]
    alone = advice(*both[:1], changes=changes).command
    assert alone == ["dckt-train", "--target", "data/mine", *common, "--out", "runs/mine"]
    network = advice(figures("network-from-source", 0.6)).command
    assert "--set transfer.rounds=0 --set pretrain.target_start=source" in " ".join(network)


def test_the_page_and_the_table_hold_the_figures():
    found = advice(figures("modern-alone", 0.5, noise=0.01, seconds=80), figures("modern", 0.6, noise=0.01))
    assert rows(found)[0][1:2] + rows(found)[0][4:] == ("0.500", "1.3 min")
    assert rows(found)[1][0] == "modern with source *"
    page = markdown(found)
    assert "80 training and 100 validation pairs of 20 classes. Source: big." in page
    assert "    dckt-train --source big" in page
    assert all(" | ".join(row) in page for row in rows(found))
    assert json.loads(json.dumps(record(found)))["advised"] == "modern"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5H", 5400), (" 2m5s", 125)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["20", "", "m", "0s", "-5m", "5d", "5m1h", "nan", "1e9s"])
def test_budgets_that_are_none(text):
    with pytest.raises(ConfigError, match="expected a time with its unit"):
        seconds_of(text)


def test_durations():
    assert [duration(each) for each in (0, 1, 59, 59.6, 61, 3569, 3571, 7200)] == [
        *("under 1 s", "1 s", "59 s", "1 min", "1 min", "59.5 min", "1 h", "2 h"),
    ]


# --- candidates ---------------------------------------------------------------------------------------------------


def names(**kinds):
    return [trial.name for trial in trials(**kinds)]


def test_candidates_depend_on_what_there_is():
    every = ["modern", "modern-alone", "network-alone", "network-from-source", "dckt"]
    assert names(source=True, vectors=False) == every
    assert names(source=False, vectors=False) == ["modern-alone", "network-alone"]
    assert names(source=True, vectors=True) == every[2:]
    assert names(source=False, vectors=True) == ["network-alone"]


def test_settings_of_the_candidates():
    found = configs(list(TRIALS.values()), ["transfer.rounds=4", 'source.exclude=["a"]', "network.width=64"])
    assert {name: config.transfer.rounds for name, config in found.items() if config.model.kind == "network"} == {
        "network-alone": 0,
        "network-from-source": 0,
        "dckt": 4,
    }
    assert {name for name, config in found.items() if config.source.exclude} == {
        "modern",
        "network-from-source",
        "dckt",
    }
    assert found["network-from-source"].pretrain.target_start == "source"
    assert found["dckt"].pretrain.target_start == "random"


@pytest.mark.parametrize(
    "change", ["seed=3", "model.kind=network", "pretrain.target_start=source", "transfer.rounds=0"]
)
def test_settings_that_the_candidates_differ_in_are_refused(change):
    with pytest.raises(ConfigError, match="leave it out"):
        configs(list(TRIALS.values()), [change])


def test_there_is_no_advice_without_labels():
    with pytest.raises(ConfigError, match="judged by labels"):
        configs([TRIALS["modern"]], ["target.labels=unknown"])


# --- whole advice -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changes(small):
    return [each for each in small if not each.startswith("transfer.keep")]


@pytest.fixture(scope="module")
def ask(corpora, cache, changes):
    def asked(out, *, source=corpora / "source", target=corpora / "target", budget=600.0, more=(), **options):
        how = Options("cpu", cache)
        return advise(source, target, out, budget=budget, changes=[*changes, *more], options=how, **options)

    return asked


@pytest.fixture(scope="module")
def whole(ask, tmp_path_factory):
    """An advice with all candidates, and its folder; do not write into it."""
    out = tmp_path_factory.mktemp("advice") / "whole"
    return ask(out), out


def maps(found):
    return {each.candidate.key: each.per_pair.tolist() for each in found.figures}


def nothing(*_args, **_options):
    raise AssertionError("nothing was to be trained, estimated or read")


def test_every_candidate_is_trained_and_judged(whole):
    found, out = whole
    assert [each.candidate.key for each in found.figures] == ORDER
    assert found.left_out == ()
    assert found.pairs == {"train": 15, "val": 9}
    written = json.loads((out / "advice.json").read_text())
    assert written == json.loads(json.dumps(record(found)))
    assert written["test_pairs_read"] is False
    assert (out / "advice.md").read_text() == markdown(found)
    for each in found.figures:
        assert each.per_pair.shape == (1, 9)
        assert each.seconds > 0


def test_figures_are_those_that_the_runs_logged(whole):
    found, out = whole
    logged = {
        name: open_run(out / "runs" / f"{name}-0").evaluation
        for name in TRIALS
        if (out / "runs" / f"{name}-0").exists()
    }
    assert set(logged) == set(TRIALS) - {"modern-alone"}, "the run `modern` shows the target alone as well"
    by_key = {each.candidate.key: each.map.mean for each in found.figures}
    rounds = {name: [entry["average"] for entry in of["validation"]] for name, of in logged.items()}
    assert by_key["modern-alone"] == pytest.approx(rounds["modern"][0])
    assert by_key["modern"] == pytest.approx(rounds["modern"][1])
    assert by_key["network-from-source"] == pytest.approx(rounds["network-from-source"][0])
    assert len(rounds["dckt"]) == 4
    assert by_key["dckt"] == pytest.approx(max(rounds["dckt"])), "the preset keeps the best round"


def test_the_pretrained_source_is_shared(whole):
    run = open_run(whole[1] / "runs" / "dckt-0")
    assert run.facts["pretrained_from"].endswith("network-from-source-0")
    assert set(run.facts["taken_over"]) >= {"source-0.safetensors", "text-source.safetensors"}


def test_a_finished_advice_leaves_figures_and_no_models(whole):
    for run in (whole[1] / "runs").iterdir():
        assert not {"target", "source", "checkpoints", "report.html"} & {path.name for path in run.iterdir()}


def test_a_finished_advice_is_given_again_at_once(whole, ask, monkeypatch):
    found, out = whole
    for name in ("train", "resume", "estimate"):
        monkeypatch.setattr(advise_run, name, nothing)
    again = ask(out)
    assert record(again) == record(found)
    assert ask(out, budget=9999.0).verdict.chosen.candidate == found.verdict.chosen.candidate  # nothing was left out


def test_without_a_source(ask, tmp_path):
    found = ask(tmp_path / "a", source=None, seeds=2, more=["target.pairs_per_class=4"])
    assert [each.candidate.key for each in found.figures] == ["modern-alone", "network-alone"]
    assert found.figures[0].per_pair.shape == (2, 9)
    assert not np.array_equal(*found.figures[1].per_pair), "another seed, another network"
    assert "No source was given" in " ".join(paragraphs(found))
    with pytest.raises(ConfigError, match="seeds is 2 there and 1 here"):
        ask(tmp_path / "a", source=None, more=["target.pairs_per_class=4"])


def test_ready_features_and_the_pretraining_that_waits_for_a_larger_budget(ask, arrays, tmp_path, monkeypatch):
    np.savez(tmp_path / "both.npz", **arrays)
    both, runs = {"source": tmp_path / "both.npz", "target": tmp_path / "both.npz"}, tmp_path / "a" / "runs"
    monkeypatch.setattr(advise_run, "estimate", costly("dckt", 5000.0))
    assert [each.candidate.key for each in ask(tmp_path / "a", **both).figures] == ORDER[:-1]
    assert [run.name for run in runs.iterdir() if (run / "checkpoints").exists()] == ["network-from-source-0"]
    found = ask(tmp_path / "a", **both, budget=1e6)
    assert [each.candidate.key for each in found.figures] == ORDER
    assert open_run(runs / "dckt-0").facts["taken_over"] == ["source-0.safetensors"]
    assert not list(runs.glob("*/checkpoints"))


# --- the test split -----------------------------------------------------------------------------------------------


def scrambled(corpus, folder):
    """A copy whose test pairs have other labels, texts and pictures."""
    shutil.copytree(corpus, folder)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    test = [line for line in lines if line["split"] == "test"]
    labels = sorted({line["label"] for line in lines})
    chance = np.random.default_rng(0)
    for line in test:
        line["label"] = labels[labels.index(line["label"]) - 1]
        line["text"] = "nothing of the kind"
        with Image.open(folder / line["image"]) as picture:
            size = picture.size
        Image.fromarray(chance.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / line["image"])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_advice_does_not_depend_on_test_pairs(whole, ask, corpora, tmp_path):
    target = scrambled(corpora / "target", tmp_path / "target")
    assert maps(ask(tmp_path / "a", target=target)) == maps(whole[0])


def test_a_trial_has_no_test_pairs_to_read(corpora, small, cache, tmp_path):
    for changes in ([*small, "transfer.rounds=1"], ["model.kind=linear", "text.encoder=bag"]):
        config = load_config("small", [*small, *changes])
        out = tmp_path / config.model.kind
        run = train(corpora / "source", corpora / "target", out, config, device="cpu", cache=cache, trial=True)
        assert run.trial
        plan = remake_plan(run, device="cpu", reporter=Silent())
        assert all(corpus.part("train") and not corpus.part("test") for corpus in plan.corpora.values())
        assert not [name for name in prepare(run, plan, cache=cache, reporter=Silent()).pairs if "test" in name]
        assert "trial" in run.evaluation
        assert "test" not in run.evaluation
        with pytest.raises(RunError, match="a trial"):
            run.model()


def test_no_picture_of_a_test_pair_goes_through_the_trunk(corpora, changes, tmp_path):
    cache = tmp_path / "cache"
    advise(None, corpora / "target", tmp_path / "a", budget=600.0, changes=changes, options=Options("cpu", cache))
    assert sorted(len(np.load(path)) for path in cache.rglob("*.npy")) == [9, 15]  # validation and training


def test_the_pretraining_of_a_trial_serves_a_normal_run(corpora, small, cache, tmp_path):
    config = load_config("small", [*small, "transfer.rounds=0"])
    paths = corpora / "source", corpora / "target"
    train(*paths, tmp_path / "trial", config, device="cpu", cache=cache, trial=True)
    plan = make_plan(
        *paths,
        None,
        config,
        device="cpu",
        on_bad_pair="raise",
        force=False,
        pretrained_from=tmp_path / "trial",
        reporter=Silent(),
    )
    assert "target-0.safetensors" in plan.taken
    assert len(plan.corpora["target"].part("test")) == 12


# --- time and interruption ----------------------------------------------------------------------------------------


def costly(name, seconds):
    """An estimate that gives one preset's trainings so many seconds, and all others none."""

    def estimated(source, target, out, config, **options):
        cost = advise_run_estimate(source, target, out, config, **options)
        slow = name == "dckt" and config.transfer.rounds and config.model.kind == "network"
        return SimpleNamespace(
            pairs=cost.pairs,
            warnings=("it is too large",),
            seconds={"in all": seconds if slow or name == "all" else 0.0},
        )

    return estimated


advise_run_estimate = advise_run.estimate


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of the whole advice from before DCKT was tried; its state must be made by a call."""

    def copied():
        out = tmp_path / "begun"
        shutil.copytree(whole[1], out)
        shutil.rmtree(out / "runs" / "dckt-0")
        state = json.loads((out / "state.json").read_text())
        state["state"] |= {"done": False, "spent": 10.0}
        (out / "state.json").write_text(json.dumps(state))
        return out

    return copied()


def test_a_candidate_that_does_not_fit_is_left_out_and_named(whole, ask, begun, monkeypatch):
    monkeypatch.setattr(advise_run, "estimate", costly("dckt", 5000.0))
    found = ask(begun)
    assert [each.candidate.key for each in found.figures] == ORDER[:-1]
    assert [(each.trial.name, each.why) for each in found.left_out] == [("dckt", "time")]
    assert "DCKT with transfer: left out, for it would take about 1 h" in " ".join(paragraphs(found))
    assert json.loads((begun / "advice.json").read_text())["left_out"][0]["candidate"] == "dckt"

    monkeypatch.setattr(advise_run, "estimate", nothing)
    assert record(ask(begun)) == record(found), "with the same budget nothing is tried again"
    monkeypatch.undo()
    assert maps(ask(begun, budget=1e6)) == maps(whole[0]), "with a larger one it is, from its own pretraining"


def test_what_took_longer_than_expected_teaches_the_estimate(whole, ask, begun, monkeypatch):
    state = json.loads((begun / "state.json").read_text())
    assert set(state["state"]["rates"]) == {"linear", "network"}
    state["state"]["rates"] = {"network": 100.0}  # seconds a pair
    (begun / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(advise_run, "estimate", costly("dckt", 7.0))
    facts = open_run(begun / "runs" / "network-from-source-0").facts
    read = sum(facts["source"]["pairs"].values()) + sum(facts["target"]["pairs"].values())
    assert ask(begun).left_out[0].seconds == pytest.approx(7.0 + 100.0 * read)


def test_without_the_time_for_the_source_the_target_is_tried_alone(ask, tmp_path, monkeypatch):
    def slow_with_a_source(source, *others, **options):
        return costly("all" if source else "none", 5000.0)(source, *others, **options)

    monkeypatch.setattr(advise_run, "estimate", slow_with_a_source)
    found = ask(tmp_path / "a")
    assert [each.candidate.key for each in found.figures] == ["modern-alone", "network-alone"]
    assert [each.trial.name for each in found.left_out] == ["modern", "network-from-source", "dckt"]
    words = " ".join(paragraphs(found))
    assert "What the source brings is not known, for nothing with it was trained." in words
    assert "modern with source: left out" in words
    assert "modern alone: left out" not in words


def test_nothing_fits(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(advise_run, "estimate", costly("all", 5000.0))
    with pytest.raises(
        ConfigError, match="no candidate fits into the budget of 10 min; give a larger --budget:\n  modern"
    ):
        ask(tmp_path / "a")


def test_what_needs_too_much_memory_is_left_out(ask, begun, monkeypatch):
    monkeypatch.setattr(advise_run, "estimate", costly("dckt", None))
    assert "DCKT with transfer: left out, for it is too large." in " ".join(paragraphs(ask(begun)))


def test_a_training_is_stopped_when_the_budget_is_over(whole, ask, begun, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Leaps(Silent):
        def say(self, text):
            if text.startswith("round 1"):
                clock.now += 1000.0

    monkeypatch.setattr(advise_run, "estimate", costly("dckt", 0.0))
    monkeypatch.setattr(advise_run, "time", SimpleNamespace(monotonic=lambda: clock.now))
    found = ask(begun, reporter=Leaps())
    assert [(each.trial.name, each.why) for each in found.left_out] == [("dckt", "stopped")]
    assert found.spent == 1010.0
    run = open_run(begun / "runs" / "dckt-0")
    assert not run.complete
    assert [event["round"] for event in run.events("selection")] == [1]
    monkeypatch.undo()
    assert maps(ask(begun, budget=1e6)) == maps(whole[0]), "a larger budget goes on with it"


def test_an_interrupted_advice_goes_on(whole, ask, tmp_path, monkeypatch):
    out, trained = tmp_path / "a", []

    def interrupted(source, target, path, config, **options):
        trained.append(path.name)
        if config.transfer.rounds and config.model.kind == "network":
            raise KeyboardInterrupt
        return train(source, target, path, config, **options)

    monkeypatch.setattr(advise_run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(out)
    assert trained == ["modern-0", "network-alone-0", "network-from-source-0", "dckt-0"]
    assert not (out / "advice.json").exists()
    monkeypatch.setattr(
        advise_run, "train", lambda s, t, path, c, **o: trained.append(path.name) or train(s, t, path, c, **o)
    )
    assert maps(ask(out)) == maps(whole[0])
    assert trained[4:] == ["dckt-0"], "what is complete is not trained again"


def test_a_run_that_was_interrupted_is_gone_on_with(whole, ask, begun, monkeypatch):
    resumed = []

    def once(source, target, path, config, **options):
        class Stops(Silent):
            def say(self, text):
                if text.startswith("round 1"):
                    raise KeyboardInterrupt

        return train(source, target, path, config, **{**options, "reporter": Stops()})

    monkeypatch.setattr(advise_run, "train", once)
    with pytest.raises(KeyboardInterrupt):
        ask(begun)
    monkeypatch.setattr(advise_run, "train", nothing)
    monkeypatch.setattr(
        advise_run, "resume", lambda path, **options: resumed.append(path.name) or resume(path, **options)
    )
    assert maps(ask(begun)) == maps(whole[0])
    assert resumed == ["dckt-0"]


def test_a_candidate_that_fails_is_named_and_tried_again(whole, ask, begun, monkeypatch):
    def fails(*_args, **_options):
        raise RunError("numbers are not finite\nmore of it")

    monkeypatch.setattr(advise_run, "train", fails)
    assert "DCKT with transfer: failed (numbers are not finite)." in " ".join(paragraphs(ask(begun)))
    monkeypatch.undo()
    assert maps(ask(begun)) == maps(whole[0])


def test_where_all_fail_there_is_no_advice(ask, tmp_path, monkeypatch):
    def fails(*_args, **_options):
        raise RunError("broken")

    monkeypatch.setattr(advise_run, "train", fails)
    with pytest.raises(RunError, match="no candidate could be trained"):
        ask(tmp_path / "a", source=None)
    assert not (tmp_path / "a" / "advice.json").exists()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "phrase"),
    [
        ({"more": ["network.width=8"]}, "network.width is 16 there and 8 here"),
        ({"source": None}, "source is .* there and None here"),
        ({"seeds": 2}, "seeds is 1 there and 2 here"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(whole, ask, more, phrase):
    with pytest.raises(ConfigError, match=f"is the advice on something else: .*{phrase}.* Name another --out"):
        ask(whole[1], **more)


def test_a_corpus_that_changed_between_the_runs_is_refused(ask, begun, corpora, tmp_path):
    run = begun / "runs" / "modern-0" / "run.json"
    facts = json.loads(run.read_text())
    facts["target"]["fingerprint"] = "another"
    run.write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"the target corpus .* changed between the runs"):
        ask(begun)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "dckt-advice-state", "version": 9}'])
def test_folders_that_are_no_advice_are_refused(ask, tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "state.json").write_text(content)
    with pytest.raises(RunError, match="name another --out"):
        ask(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not of an advice \(no state.json\)"):
        ask(tmp_path / "b")


def test_bad_input_is_refused_and_leaves_nothing_behind(ask, arrays, tmp_path):
    for wrong, phrase in (
        ({"source": tmp_path / "none"}, "--source: there is no"),
        ({"target": tmp_path / "none"}, "--target: there is no"),
        ({"seeds": 0}, "seeds is 0"),
        ({"more": ["network.wide=3"]}, "unknown key"),
        ({"more": ["text.encoder=cnn"]}, "modern with source: model.kind is 'linear'"),
        ({"more": ["seed=1"]}, "leave it out"),
    ):
        with pytest.raises(ConfigError, match=phrase):
            ask(tmp_path / "a", **wrong)
    one = arrays | {"split": np.array(["val" if row == 24 else "train" if row < 30 else "test" for row in range(42)])}
    np.savez(tmp_path / "one.npz", **one)
    with pytest.raises(ConfigError, match="1 validation pair"):
        ask(tmp_path / "a", source=None, target=tmp_path / "one.npz")
    assert not (tmp_path / "a").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_the_advice(whole, corpora, changes, cache):
    found, out = whole
    words = ["advise", "--source", corpora / "source", "--target", corpora / "target", "--out", out, "--budget", "10m"]
    words = [*map(str, words), *[word for each in changes for word in ("--set", each)]]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    flat = " ".join(done.output.split())
    for paragraph in paragraphs(found):
        assert paragraph in flat
    assert "Train and test it with: dckt-train" in flat
    done = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(done.stdout)["advised"] == found.verdict.chosen.candidate.key


def test_help_and_bad_words(tmp_path):
    done = CliRunner().invoke(app, ["advise", "--help"])
    assert done.exit_code == 0
    assert "dckt-train advise --source big --target mine" in done.output
    for words, phrase in (
        (["--budget", "soon"], "expected a time with its unit"),
        (["--on-bad-pair", "mend"], "expected raise or skip"),
    ):
        done = CliRunner().invoke(app, ["advise", "--target", "mine", "--out", str(tmp_path / "a"), *words])
        assert isinstance(done.exception, ConfigError)
        assert phrase in str(done.exception)


def test_the_command_that_is_advised_trains(whole, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DCKT_CACHE", str(cache))
    done = CliRunner().invoke(app, [*whole[0].command[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["test"]["pairs"] == 12


def test_resuming_a_trial_shows_no_test_figures(corpora, small, cache, tmp_path):
    config = load_config("small", [*small, "transfer.rounds=1"])
    run = train(corpora / "source", corpora / "target", tmp_path / "t", config, device="cpu", cache=cache, trial=True)
    facts = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(facts | {"state": "training"}))
    done = CliRunner().invoke(app, ["--resume", str(run.path), "--device", "cpu", "--cache", str(cache)])
    assert done.exit_code == 0, done.output
    assert "judged on validation alone" in done.stdout
