"""What TensorBoard reads is what the .jsonl files say, also after a stop."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from stopping import StopAfter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from dckt.errors import MissingExtraError
from dckt_trainer.analysis import score_spread
from dckt_trainer.cli import app
from dckt_trainer.config import load_config
from dckt_trainer.runs import create_run, open_run
from dckt_trainer.tensorboard import export, mirrored
from dckt_trainer.train import resume, train


def read(run):
    """Every curve as a list of (step, value), and every histogram as a list of (step, value)."""
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [(e.step, e.histogram_value) for e in events.Histograms(tag)] for tag in tags["histograms"]}


def same(curve, expected):
    assert [step for step, _ in curve] == [step for step, _ in expected]
    np.testing.assert_allclose([value for _, value in curve], [value for _, value in expected], rtol=1e-6)


def agrees_with_the_logs(run):
    """Each kind of curve, read from the logs anew."""
    metrics, selection = run.events("metrics"), run.events("selection")
    scalars, histograms = read(run)
    rounds = {int(e["stage"].split("/")[1]): e for e in metrics if e["stage"].startswith("round/")}
    for way in ("image_to_text", "text_to_image", "average"):
        same(scalars[f"round/validation/{way}"], [(n, e["validation"][way]) for n, e in rounds.items()])
    trained = {n: e for n, e in rounds.items() if n}
    same(scalars["round/total"], [(n, e["total"]) for n, e in trained.items()])
    same(scalars["round/selected"], [(n, e["selected"]) for n, e in trained.items()])
    for name in next(iter(trained.values()))["weighted"]:
        same(scalars[f"round/weighted/{name}"], [(n, e["weighted"][name]) for n, e in trained.items()])
    for domain in ("source", "target"):
        words = [e for e in metrics if e["stage"] == f"word-cnn/{domain}"]
        curve = scalars[f"word-cnn/{domain}/validation_accuracy"]
        same(curve, [(e["epoch"], e["validation_accuracy"]) for e in words])
        parts = [e for e in metrics if e["stage"] == f"pretrain/{domain}"]
        steps = np.cumsum([e["steps"] for e in parts])
        same(scalars[f"pretrain/{domain}/total"], [(s, e["total"]) for s, e in zip(steps, parts, strict=True)])
    assert [step for step, _ in histograms["selection/scores"]] == [e["round"] for e in selection]
    for (_, histogram), event in zip(histograms["selection/scores"], selection, strict=True):
        assert histogram.num == event["pairs"]
        assert (histogram.min, histogram.max) == (event["quantiles"][0], event["quantiles"][-1])
        assert histogram.bucket == event["histogram"]["counts"]
    return scalars


@pytest.fixture
def run(tmp_path):
    facts = {"path": str(tmp_path), "fingerprint": "f"}
    return create_run(tmp_path / "run", load_config("small"), facts, facts, trunk="t")


def test_events_reach_tensorboard_as_they_happen(run):
    scores = np.array([0.1, 0.5, 0.5, 1.9])
    with mirrored(run, wanted=True) as both:
        both.log("metrics", {"stage": "round/0", "validation": {"average": 0.25, "interval": [0.2, 0.3]}})
        assert read(run)[0] == {"round/validation/average": [(0, 0.25)]}, "before the end"
        both.log("metrics", {"stage": "round/1", "validation": {"average": 0.5}, "lr": 0.125})
        both.log("selection", {"stage": "round/1", "round": 1, "selected": ["a"], **score_spread(scores)})
    scalars, histograms = read(run)
    assert scalars == {"round/validation/average": [(0, 0.25), (1, 0.5)], "round/lr": [(1, 0.125)]}
    ((step, histogram),) = histograms["selection/scores"]
    assert (step, histogram.num, histogram.min, histogram.max) == (1, 4, 0.1, 1.9)
    assert sum(histogram.bucket) == 4
    for low, high, count in zip([0, *histogram.bucket_limit], histogram.bucket_limit, histogram.bucket, strict=False):
        assert count == ((scores >= low) & (scores < high)).sum()
    assert run.events("metrics")[0]["validation"]["interval"] == [0.2, 0.3], "the log has everything"


def test_a_run_that_asks_for_nothing_gets_nothing(run):
    with mirrored(run, wanted=False) as plain:
        plain.log("metrics", {"stage": "round/0", "validation": {"average": 0.25}})
    assert not (run.path / "tensorboard").exists()


def test_what_an_interrupted_stage_logged_is_forgotten(run):
    run.log("metrics", {"stage": "round/0", "loss": 1.0})
    with mirrored(run, wanted=True) as both:
        both.log("metrics", {"stage": "word-cnn/source", "epoch": 1, "loss": 8.0})
        both.log("metrics", {"stage": "word-cnn/source", "epoch": 2, "loss": 4.0})
    with mirrored(run, wanted=False) as both:  # it has the folder, so it goes on
        both.rewrite("metrics", [e for e in both.events("metrics") if e["stage"] != "word-cnn/source"])
        assert read(run)[0] == {"round/loss": [(0, 1.0)]}
        both.log("metrics", {"stage": "word-cnn/source", "epoch": 1, "loss": 16.0})
    assert read(run)[0] == {"round/loss": [(0, 1.0)], "word-cnn/source/loss": [(1, 16.0)]}


def test_a_viewer_that_is_open_forgets_it_too(run):
    viewer = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    with mirrored(run, wanted=True) as both:
        both.log("metrics", {"stage": "round/0", "loss": 1.0})
        both.log("metrics", {"stage": "round/1", "loss": 9.0})
        viewer.Reload()
        assert [e.value for e in viewer.Scalars("round/loss")] == [1.0, 9.0]
        both.rewrite("metrics", both.events("metrics")[:1])
        both.log("metrics", {"stage": "round/1", "loss": 2.0})
        viewer.Reload()
    assert [(e.step, e.value) for e in viewer.Scalars("round/loss")] == [(0, 1.0), (1, 2.0)]


def test_pretraining_is_counted_in_solver_steps(run):
    with mirrored(run, wanted=True) as both:
        for loss in (4.0, 2.0, 1.0):
            both.log("metrics", {"stage": "pretrain/source", "epoch": 0, "steps": 7, "total": loss})
        both.log("metrics", {"stage": "pretrain/target", "epoch": 0, "steps": 3, "total": 5.0})
    scalars, _ = read(run)
    assert scalars["pretrain/source/total"] == [(7, 4.0), (14, 2.0), (21, 1.0)]
    assert scalars["pretrain/target/total"] == [(3, 5.0)]


def test_without_the_package_nothing_begins(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'tensorboard'.*dckt\[tensorboard\]"):
        export(run)
    assert not (run.path / "tensorboard").exists()
    with pytest.raises(MissingExtraError):
        train(tmp_path, tmp_path, tmp_path / "out", load_config("small"), tensorboard=True)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_curves_of_a_run_that_is_there(run):
    run.log("metrics", {"stage": "round/0", "loss": 1.0})
    for _ in range(2):  # twice is no other than once
        result = CliRunner().invoke(app, ["tensorboard", str(run.path)])
        assert (result.exit_code, result.stdout.strip()) == (0, str(run.path / "tensorboard"))
    assert read(run)[0] == {"round/loss": [(0, 1.0)]}


def test_a_training_that_was_stopped_twice_has_every_point_once(run_training, cache, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_training(out, "transfer.rounds=2", tensorboard=True, reporter=StopAfter("Word CNN, target"))
    interrupted = open_run(out)
    assert len(read(interrupted)[0]["word-cnn/target/loss"]) == 3, "the stage is not over, but its points are there"
    with pytest.raises(KeyboardInterrupt):
        resume(out, cache=cache, device="cpu", reporter=StopAfter("round 2"))
    run = resume(out, cache=cache, device="cpu")
    scalars = agrees_with_the_logs(run)
    assert [step for step, _ in scalars["word-cnn/target/loss"]] == [1, 2, 3]
    assert [step for step, _ in scalars["round/validation/average"]] == [0, 1, 2]
    export(run)
    assert agrees_with_the_logs(run) == scalars
