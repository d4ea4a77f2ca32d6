"""Sweeps: how they are read, that runs are shared, gone on with and reported, and that the table is what runs found."""

import csv
import json
import os
import shutil
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dckt.errors import ConfigError, RunError
from dckt_trainer import sweep_jobs
from dckt_trainer import train as train_module
from dckt_trainer.cli import app
from dckt_trainer.config import load_config
from dckt_trainer.progress import Silent
from dckt_trainer.runs import open_run
from dckt_trainer.sweep import Row, Sweep, grid_sweep, read_sweep, sweep_names
from dckt_trainer.sweep_jobs import Job, Options, run_jobs
from dckt_trainer.sweep_run import run_sweep
from dckt_trainer.sweep_table import estimate, markdown, table_lines, write_table

TINY = [
    "image.trunk=squeezenet1_1",
    "image.weights=random",
    "image.side=48",
    "text.dimension=8",
    "text.epochs=1",
    "text.maps=4",
    "text.cnn_epochs=1",
    "network.width=8",
    "pretrain.source_epochs=1",
    "pretrain.target_epochs=2",
    "pretrain.batch=16",
    "transfer.rounds=1",
    "transfer.batch=16",
    "transfer.alpha=0.5",
]
ROWS = (
    Row(title="alone", network="model_t0"),
    Row(title="DCKT", network="last"),
    Row(title="all", changes=("transfer.law=all",), network="last"),
)
SWEEP = Sweep(name="two laws", preset="small", seeds=2, rows=ROWS)
SHIPPED = {"table3", "figure4"}


@pytest.fixture(scope="module", autouse=True)
def quick_reports():
    """The plots of a run's own report take ten times as long as these small trainings; no test here looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "write_run_report", lambda run, *_: (run.path / "report.html").touch())
        yield


@pytest.fixture
def go(corpora, cache):
    def run(out, sweep=SWEEP, **options):
        options = {"changes": TINY, "options": Options(device="cpu", cache=cache), **options}
        return run_sweep(sweep, corpora / "source", corpora / "target", out, **options)

    return run


@pytest.fixture(scope="module")
def finished(corpora, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    options = Options(device="cpu", cache=cache)
    result = run_sweep(SWEEP, corpora / "source", corpora / "target", out, changes=TINY, options=options)
    assert result.failures == {}
    write_table(result)
    return result


@pytest.fixture
def trained(monkeypatch):
    """The run folders that are trained or gone on with, in their order."""
    seen = []
    for name in ("train", "resume"):
        real = getattr(sweep_jobs, name)

        def spy(*arguments, real=real, name=name, **options):
            path = Path(arguments[2] if name == "train" else arguments[0])
            seen.append((name, path.name))
            return real(*arguments, **options)

        monkeypatch.setattr(sweep_jobs, name, spy)
    return seen


class StopAfter(Silent):
    """Stops the training, as Ctrl-C would, at the end of the task whose name starts so."""

    def __init__(self, name):
        self.name = name

    @contextmanager
    def task(self, name, total):
        with super().task(name, total) as advance:
            yield advance
        if name.startswith(self.name):
            raise KeyboardInterrupt


def base_of(path):
    """Name of the run whose pretraining a run took over."""
    base = open_run(path).facts["pretrained_from"]
    return base and Path(base).name


def records(out):
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- reading -------------------------------------------------------------------------------------------------------


def test_every_shipped_sweep_is_a_change_of_the_papers_presets():
    assert set(sweep_names()) == SHIPPED
    for name in SHIPPED:
        for row in read_sweep(name, overlap=["car"] if name == "table3" else []).rows:
            for preset in ("paper", "released"):
                assert load_config(preset, row.changes)


def test_table3_has_the_papers_variants():
    sweep = read_sweep("table3", overlap=["car", "a dog"])
    configs = {row.title.split(",")[0]: load_config("paper", row.changes) for row in sweep.rows}
    paper = load_config("paper")
    mmd = {title: [getattr(c.losses, f"mmd_fc{n}") for n in (6, 7, 8, 9)] for title, c in configs.items()}
    assert mmd["Transfer_1"] == [1, 1, 0, 0]
    assert mmd["Transfer_2"] == [0, 0, 1, 2]
    assert mmd["as long without the source (no MMD"] == [0, 0, 0, 0]
    assert {title: config.transfer.law for title, config in configs.items() if config.transfer.law != "paper"} == {
        "as long without the source (no MMD": "all",
        "DCKT_All": "all",
        "DCKT_Random": "random",
    }
    assert configs["DCKT_No overlap"].source.exclude == ("car", "a dog")
    assert configs["DCKT"] == configs["Model_t(0)"] == paper
    assert [row.network for row in sweep.rows if row.title.startswith(("Model", "DCKT,"))] == ["model_t0", "best"]
    without = read_sweep("table3")
    assert len(without.rows) == len(sweep.rows) - 1
    assert "DCKT_No overlap: left out" in without.notes[0]


def test_an_axis_makes_a_curve_and_a_flat_row_a_line():
    sweep = read_sweep("figure4")
    flat, *curve = sweep.rows
    assert (flat.x, flat.changes) == (None, ())
    assert [row.x for row in curve] == [0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert curve[3].title == "DCKT, alpha = 0.2"
    assert {row.curve for row in curve} == {"DCKT"}
    assert [load_config("paper", row.changes).transfer.alpha for row in curve] == [row.x for row in curve]


def test_a_table_of_changes_is_as_good_as_a_list(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "small"\nseeds = 3\n[[row]]\ntitle = "a"\nset = ["mmd.kernels=1", "transfer.law=all"]\n'
        '[[row]]\ntitle = "b"\n[row.set]\nmmd.kernels = 1\n"transfer.law" = "all"\n'
        '[[row]]\ntitle = "c"\n[row.set.text]\nwindows = [2, 3]\ntarget_cnn = "source"\n'
    )
    sweep = read_sweep(file)
    one, two, three = (load_config("small", row.changes) for row in sweep.rows)
    assert one == two
    assert (three.text.windows, three.text.target_cnn) == ((2, 3), "source")
    assert (sweep.name, sweep.preset, sweep.seeds, sweep.rows[0].network) == ("mine", "small", 3, "kept")


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text(
        'seeds = 0\ncolour = 1\n[axis]\nkey = "alpha"\nvalues = []\n[[row]]\nnetwork = "first"\nset = 3\n'
        '[[row]]\ntitle = "b"\nflat = 1\nsett = []\n'
    )
    with pytest.raises(ConfigError) as error:
        read_sweep(file)
    for words in (
        "9 mistakes",
        "unknown key 'colour'",
        "seeds is 0",
        "key is 'alpha'",
        "values is []",
        "title is None",
        "network is 'first'; expected one of kept, model_t0, last, best",
        "set is 3",
        "row 2 (b): unknown key 'sett'",
        "flat is 1",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("row = 3", "begin each row with"),
        ("[[row]]\ntitle = 'a'\n[[row]]\ntitle = 'a'", "several rows are called 'a'"),
        ("seeds = 2", "no rows"),
        ("[[row]", "not valid TOML"),
        ("[[row]]\ntitle = 'a'\nflat = true", "flat has no meaning"),
        ("axis = 1\n[[row]]\ntitle = 'a'", "axis is 1"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, text, words):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_sweep(file)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"table4: neither a sweep \(figure4, table3\)"):
        read_sweep("table4")
    with pytest.raises(ConfigError, match="no row has overlap"):
        read_sweep("figure4", overlap=["car"])


def test_a_grid_is_every_combination():
    sweep = grid_sweep(["transfer.law=all,paper", "text.windows=[2],[3, 4]"])
    configs = [load_config("small", row.changes) for row in sweep.rows]
    assert [(c.transfer.law, c.text.windows) for c in configs] == [
        ("all", (2,)),
        ("all", (3, 4)),
        ("paper", (2,)),
        ("paper", (3, 4)),
    ]
    assert sweep.axis == ""
    curves = grid_sweep(["transfer.alpha=0.1, 0.2", "transfer.law=paper,all"])
    assert curves.axis == "transfer.alpha"
    assert [(row.curve, row.x) for row in curves.rows] == [
        ("transfer.law=paper", 0.1),
        ("transfer.law=all", 0.1),
        ("transfer.law=paper", 0.2),
        ("transfer.law=all", 0.2),
    ]
    for wrong in ("transfer.alpha", "=1", "transfer.alpha="):
        with pytest.raises(ConfigError, match="a grid is written"):
            grid_sweep([wrong])
    with pytest.raises(ConfigError, match="a key twice"):
        grid_sweep(["mmd.kernels=1", "mmd.kernels=2"])


# -- running -------------------------------------------------------------------------------------------------------


def test_rows_with_the_same_settings_share_a_run(finished):
    names = {path.name for path in (finished.path / "runs").iterdir()}
    assert names == {"small-0", "small-1", "transfer.law=all-0", "transfer.law=all-1"}
    for name in names:
        run = open_run(finished.path / "runs" / name)
        assert run.complete
        assert run.config.seed == int(name[-1])
        assert run.config.transfer.law == ("all" if "law" in name else "paper")
    memory = json.loads((finished.path / "sweep.json").read_text(encoding="utf-8"))
    assert memory["rows"]["DCKT"] == {"folder": "small", "network": "last"}
    assert memory["settings"]["transfer.law=all"]["transfer"]["law"] == "all"


def test_settings_that_differ_in_the_joint_stage_alone_pretrain_once_a_seed(finished):
    for seed in (0, 1):
        assert base_of(finished.path / "runs" / f"small-{seed}") is None
        assert base_of(finished.path / "runs" / f"transfer.law=all-{seed}") == f"small-{seed}"
        first, second = (open_run(finished.path / "runs" / f"{name}-{seed}") for name in ("small", "transfer.law=all"))
        assert first.evaluation["test"]["model_t0"] == second.evaluation["test"]["model_t0"]


def test_models_are_deleted_and_figures_stay(finished):
    for path in (finished.path / "runs").iterdir():
        names = {each.name for each in path.iterdir()}
        assert not names & {"checkpoints", "source", "target"}
        assert {"evaluation.json", "report.html", "metrics.jsonl", "selection.jsonl", "run.json"} <= names
        assert not [name for name in names if name.startswith(".")]


def test_keep_models_keeps_them_for_good(go, trained, tmp_path):
    one = Sweep(name="one", preset="small", seeds=1, rows=ROWS[1:2])
    go(tmp_path / "s", one, keep_models=True)
    base = tmp_path / "s" / "runs" / "small-0"
    assert open_run(base).model()
    two = Sweep(name="two", preset="small", seeds=1, rows=ROWS[1:])
    go(tmp_path / "s", two)  # it remembers, and the row that is new finds the pretraining
    assert open_run(base).model()
    other = tmp_path / "s" / "runs" / "transfer.law=all-0"
    assert open_run(other).model()
    for name in ("source-0", "target-0"):
        one, same = (path / "checkpoints" / f"{name}.safetensors" for path in (base, other))
        assert one.samefile(same)
    assert trained == [("train", "small-0"), ("train", "transfer.law=all-0")]


def test_what_is_complete_is_not_run_again_and_what_is_missing_is(finished, go, trained, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished.path, out)
    shutil.rmtree(out / "runs" / "small-1")
    again = go(out)
    assert trained == [("train", "small-1")]
    assert markdown(again) == markdown(finished)
    more = Sweep(name="more", preset="small", seeds=1, rows=(*ROWS, Row(title="few", changes=("transfer.alpha=0.1",))))
    result = go(out, more)
    assert trained[1:] == [("train", "transfer.alpha=0.1-0")]
    assert [line.seeds for line in table_lines(result)] == [1, 1, 1, 1]


def test_an_interrupted_sweep_goes_on(finished, go, trained, tmp_path):
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        go(out, seeds=1, reporter=StopAfter("pretraining, source"))
    (out / "runs" / "transfer.law=all-0" / "checkpoints").mkdir(parents=True)  # as a kill may leave it
    assert go(out, seeds=1).failures == {}
    assert trained == [("train", "small-0"), ("resume", "small-0"), ("train", "transfer.law=all-0")]
    for name in ("small-0", "transfer.law=all-0"):
        there, here = (open_run(path / "runs" / name).evaluation for path in (finished.path, out))
        assert here == there


def test_a_changed_row_is_an_error_that_names_it(finished, go, trained):
    changed = Row(title="all", changes=("transfer.law=random",), network="last")
    with pytest.raises(ConfigError, match=r"row 'all' is not what .*transfer.law is 'all' there and 'random' here"):
        go(finished.path, Sweep(name="changed", preset="small", rows=(ROWS[0], changed)))
    other = Row(title="alone", network="best")
    with pytest.raises(ConfigError, match=r"row 'alone' .*network is 'model_t0' there and 'best' here"):
        go(finished.path, Sweep(name="changed", preset="small", rows=(other,)))
    with pytest.raises(ConfigError, match=r"row 'alone' .*network.width is 8 there and 16 here"):
        go(finished.path, changes=[*TINY, "network.width=16"])
    assert trained == []


def test_a_folder_is_of_one_pair_of_corpora(finished, corpora, trained):
    with pytest.raises(ConfigError, match=r"of other corpora: source is .*source there and .*target here"):
        run_sweep(SWEEP, corpora / "target", corpora / "target", finished.path, changes=TINY)
    assert trained == []


def test_a_failed_run_is_told_and_the_others_go_on(go, corpora, cache, tmp_path):
    bad = Row(title="bad", changes=('source.exclude=["zebra"]',), network="last")
    sweep = Sweep(name="bad", preset="small", seeds=1, rows=(bad, ROWS[1]))
    result = go(tmp_path / "s", sweep)
    lines = write_table(result)
    assert [line.seeds for line in lines] == [0, 1]
    assert lines[0].cells == ("–", "–", "–", "–", "–", "0 of 1", "–")
    assert lines[1].difference is None  # the first row has no run to compare with
    (path,) = result.failures
    assert "zebra" in result.failures[path]
    assert "zebra" in (tmp_path / "s" / "logs" / f"{path.name}.log").read_text(encoding="utf-8")
    assert [record["state"] for record in records(tmp_path / "s")] == ["failed", "complete"]
    assert "zebra" in (tmp_path / "s" / "table.md").read_text(encoding="utf-8")
    assert "zebra" in (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    mended = Row(title="bad", changes=("transfer.law=all",), network="last")
    again = go(tmp_path / "s", Sweep(name="mended", preset="small", seeds=1, rows=(mended, ROWS[1])))
    assert again.failures == {}  # a row that never began may still be changed


def test_a_corpus_for_each_seed(corpora, cache, tmp_path):
    for seed in (0, 1):
        shutil.copytree(corpora, tmp_path / f"corpora-{seed}")
    manifest = tmp_path / "corpora-1" / "target" / "pairs.jsonl"
    lines = manifest.read_text(encoding="utf-8").splitlines()
    manifest.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    paths = [tmp_path / "corpora-{seed}" / name for name in ("source", "target")]
    options = Options(device="cpu", cache=cache)
    sweep = Sweep(name="one", preset="small", seeds=2, rows=ROWS[1:2])
    result = run_sweep(sweep, *paths, tmp_path / "s", changes=TINY, options=options)
    pairs = [outcome.run.facts["target"]["pairs"]["test"] for outcome in result.outcomes]
    assert pairs == [12, 11]
    with pytest.raises(ConfigError, match=r"--source: there is no .*corpora-2"):
        run_sweep(sweep, *paths, tmp_path / "s", changes=TINY, seeds=3, options=options)
    assert result.failures == {}


def test_a_corpus_that_changed_between_runs_is_noticed(finished, go, trained, tmp_path):
    shutil.copytree(finished.path, tmp_path / "s")
    file = tmp_path / "s" / "runs" / "small-1" / "run.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["target"]["fingerprint"] = "of another day"
    file.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(RunError, match=r"target corpus .* changed between the runs .*small-0 and .*small-1"):
        go(tmp_path / "s")
    assert trained == []


def test_what_cannot_be_run_is_refused_before_anything_is_written(go, corpora, tmp_path):
    out = tmp_path / "s"
    with pytest.raises(ConfigError, match=r"row 'all'.*\n.*transfer.lawn: unknown key"):
        go(out, Sweep(name="s", rows=(Row(title="all", changes=("transfer.lawn=all",)),)))
    with pytest.raises(ConfigError, match="the seeds are the sweep's own"):
        go(out, changes=["seed=3"])
    for wrong in ({"seeds": 0}, {"processes": 0}):
        with pytest.raises(ConfigError, match="at least 1 of each"):
            go(out, **wrong)
    with pytest.raises(ConfigError, match="row 'alone' has 1 rounds of transfer, which need --source"):
        run_sweep(SWEEP, None, corpora / "target", out, changes=TINY)
    assert not out.exists()
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="is not a sweep"):
        go(stranger)
    (stranger / "sweep.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="damaged or not of a sweep"):
        go(stranger)
    (stranger / "sweep.json").write_text('{"format": "dckt-sweep", "version": 9}', encoding="utf-8")
    with pytest.raises(RunError, match="sweep format 9"):
        go(stranger)


# -- the table -----------------------------------------------------------------------------------------------------


def test_an_estimate_is_the_mean_and_students_interval():
    assert estimate([0.5]).low is None
    two = estimate([0.0, 2.0])  # the quantile of one degree of freedom is 12.7062; sd / sqrt(2) is 1
    assert (two.mean, two.low, two.high) == pytest.approx((1.0, 1 - 12.7062, 1 + 12.7062), abs=1e-4)
    five = estimate([1.0, 2.0, 3.0, 4.0, 5.0])  # 2.77645 * sqrt(2.5) / sqrt(5)
    assert (five.low, five.high) == pytest.approx((3 - 1.96324, 3 + 1.96324), abs=1e-4)


def test_the_csv_holds_what_the_runs_wrote(finished):
    found = records(finished.path)
    assert [(r["row"], r["seed"]) for r in found] == [(row.title, str(s)) for row in ROWS for s in (0, 1)]
    for record in found:
        evaluation = open_run(finished.path / record["run"]).evaluation
        test = evaluation["test"][record["network"]]
        assert float(record["test_average"]) == test["average"]
        assert float(record["test_image_to_text"]) == test["image_to_text"]
        assert [float(record["test_interval_low"]), float(record["test_interval_high"])] == list(test["interval"])
        assert int(record["round"]) == test["round"]
        (validation,) = [each for each in evaluation["validation"] if each["round"] == test["round"]]
        assert float(record["validation_average"]) == validation["average"]
        assert record["state"] == "complete"
        events = open_run(finished.path / record["run"]).events("selection")
        expected = "" if record["row"] == "alone" else str(float(len(events[0]["selected"])))
        assert record["selected"] == expected
    assert [record["transfer.law"] for record in found] == ["paper"] * 4 + ["all"] * 2
    assert "network.width" not in found[0]  # the same in all rows


def test_the_table_is_the_statistics_of_the_csv(finished):
    found = records(finished.path)
    by_row = {row.title: [r for r in found if r["row"] == row.title] for row in ROWS}
    first = [float(record["test_average"]) for record in by_row["alone"]]
    for line in table_lines(finished):
        values = [float(record["test_average"]) for record in by_row[line.row.title]]
        assert line.cells[2] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        validation = [float(record["validation_average"]) for record in by_row[line.row.title]]
        assert line.cells[4].startswith(f"{statistics.mean(validation):.3f} ±")
        assert line.cells[5] == "2"
        if line.row.title == "alone":
            assert line.difference is None
            assert line.cells[6] == "–"
            continue
        one, two = (value - start for value, start in zip(values, first, strict=True))
        half = 12.7062 * abs(one - two) / 2
        assert line.difference.mean == pytest.approx((one + two) / 2)
        assert line.difference.high - line.difference.mean == pytest.approx(half, rel=1e-4)
        assert line.cells[3].startswith(f"{(one + two) / 2:+.3f} [")
    text = (finished.path / "table.md").read_text(encoding="utf-8")
    assert all(" | ".join(["| " + line.row.title, *line.cells]) in text for line in table_lines(finished))


def test_the_report_shows_table_plot_and_settings(finished):
    assert (finished.path / "table.png").read_bytes().startswith(b"\x89PNG")
    page = (finished.path / "report.html").read_text(encoding="utf-8")
    assert all(line.cells[2] in page for line in table_lines(finished))
    assert "transfer.law=all" in page
    assert "data:image/png" in page


def test_a_curve_is_drawn_with_its_level_line(go, tmp_path, monkeypatch):
    from dckt_trainer import plots

    drawn = []
    real = plots.bands
    monkeypatch.setattr(plots, "bands", lambda panels, **names: drawn.append(panels) or real(panels, **names))
    rows = (
        Row(title="alone", network="model_t0", curve="alone"),
        *(Row(title=f"a{x}", changes=(f"transfer.alpha={x}",), curve="DCKT", x=x) for x in (0.9, 0.3)),
    )
    result = go(tmp_path / "s", Sweep(name="curve", axis="transfer.alpha", preset="small", seeds=1, rows=rows))
    lines = write_table(result)
    (panels,) = drawn
    averages = [line.test["average"][0] for line in lines]
    assert panels["test"] == {
        "alone": [(x, *[averages[0]] * 3) for x in (0.3, 0.9)],
        "DCKT": [(0.3, *[averages[2]] * 3), (0.9, *[averages[1]] * 3)],
    }
    assert set(panels) == {"test", "validation"}
    assert (tmp_path / "s" / "table.png").read_bytes().startswith(b"\x89PNG")


# -- processes and the command ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_side_by_side_come_to_the_same_figures(finished, go, tmp_path):
    """One goes on with an interrupted run, the other takes its pretraining over."""
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        go(out, seeds=1, reporter=StopAfter("pretraining, target"))
    assert go(out, seeds=1, processes=2).failures == {}
    for name in ("small-0", "transfer.law=all-0"):
        there, here = (open_run(path / "runs" / name).evaluation for path in (finished.path, out))
        assert here == there
    assert base_of(out / "runs" / "transfer.law=all-0") == "small-0"
    assert "validation MAP" in (out / "logs" / "transfer.law=all-0.log").read_text(encoding="utf-8")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a program in the place of Python, so that processes are quick."""

    def put(text):
        script = tmp_path / "python"
        script.write_text(text)
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return put


def a_job(folder, name, group):
    return Job(folder / name, folder / "logs" / f"{name}.log", "s", "t", "small", (), group)


def test_the_first_of_a_group_goes_first(stand_in, tmp_path):
    """No other of a group begins before its first has ended; the first ones of two groups run side by side."""
    stand_in(
        f"#!{sys.executable}\nimport json, sys, time, pathlib\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "base = '--pretrained-from' in sys.argv\nstart = time.monotonic()\n"
        "(out / 'checkpoints').mkdir(parents=True)\n"
        # Each first one ends only after it has seen the other: one after the other, both would fail.
        "other = out.parent / {'a0': 'b0', 'b0': 'a0'}.get(out.name, out.name)\n"
        "while not other.exists():\n"
        "    if time.monotonic() > start + 60:\n"
        "        sys.exit('error: alone')\n"
        "    time.sleep(0.01)\n"
        "facts = dict(format='dckt-run', version=1, state='complete', source={}, target={}, trunk='', started='', "
        "config_sha256='', base=base, start=start, end=time.monotonic())\n"
        "(out / 'run.json').write_text(json.dumps(facts))\n"
    )
    jobs = [a_job(tmp_path, f"{group}{number}", group) for group in "ab" for number in range(3)]
    assert run_jobs(jobs, Options(), 3, keep_models=True, reporter=Silent()) == {}
    facts = {job.path.name: json.loads((job.path / "run.json").read_text()) for job in jobs}
    for group in "ab":
        assert not facts[f"{group}0"]["base"]
        for number in (1, 2):
            assert facts[f"{group}{number}"]["base"]
            assert facts[f"{group}{number}"]["start"] > facts[f"{group}0"]["end"]


def test_why_a_process_failed_is_read_from_its_log(stand_in, tmp_path):
    stand_in('#!/bin/sh\necho a bar\necho "error: no zebra here" >&2\necho "  more"\nexit 2\n')
    job = a_job(tmp_path, "a", "a")
    failures = run_jobs([job], Options(), 2, keep_models=True, reporter=Silent())
    assert failures == {job.path: f"no zebra here (exit code 2, {job.log})"}
    stand_in("#!/bin/sh\nkill -9 $$\n")
    failures = run_jobs([job], Options(), 2, keep_models=True, reporter=Silent())
    assert failures == {job.path: f"nothing was printed (exit code -9, {job.log})"}


def test_an_interrupt_ends_the_processes(stand_in, tmp_path):
    pids = tmp_path / "pids"
    stand_in(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 60\n")

    class StopAtTheSecond(Silent):
        def say(self, text):
            if text.startswith("run 2"):
                deadline = time.monotonic() + 30
                while not pids.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                raise KeyboardInterrupt

    jobs = [a_job(tmp_path, group, group) for group in "ab"]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, Options(), 2, keep_models=True, reporter=StopAtTheSecond())
    (pid,) = map(int, pids.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def command(corpora, cache):
    """The command, which handles SIGTERM for as long as it runs."""
    before = signal.getsignal(signal.SIGTERM)
    given = ["--source", corpora / "source", "--target", corpora / "target", "--cache", cache, "--device", "cpu"]
    yield lambda *arguments: CliRunner().invoke(app, ["sweep", *map(str, [*given, *arguments])])
    signal.signal(signal.SIGTERM, before)


def test_the_command(finished, command, tmp_path):
    shutil.copytree(finished.path, tmp_path / "s")
    file = tmp_path / "laws.toml"
    file.write_text(
        'preset = "small"\nseeds = 2\n[[row]]\ntitle = "alone"\nnetwork = "model_t0"\n'
        '[[row]]\ntitle = "all"\nnetwork = "last"\nset = ["transfer.law=all"]\n'
    )
    done = command(file, "--out", tmp_path / "s", *[word for change in TINY for word in ("--set", change)])
    assert done.exit_code == 0, done.output
    assert table_lines(finished)[2].cells[2] in done.output
    assert "report.html" in done.output


def test_the_command_ends_with_an_error_when_a_run_failed(command, tmp_path):
    out = tmp_path / "s"
    grid = ["--grid", "transfer.alpha=0.1,0.2", "--set", 'source.exclude=["zebra"]']
    done = command(*grid, "--preset", "small", "--seeds", 1, "--out", out)
    assert isinstance(done.exception, RunError)
    assert "2 runs failed, and the table lacks them" in str(done.exception)
    assert [record["state"] for record in records(out)] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a sweep"),
        (["table3", "--grid", "mmd.kernels=1,2"], "give either a sweep"),
        (["--grid", "mmd.kernels=1,2", "--overlap", "car"], "--overlap is for a SWEEP"),
        (["table3", "--on-bad-pair", "mend"], "expected raise or skip"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, arguments, words):
    done = CliRunner().invoke(app, ["sweep", *arguments, "--target", "t", "--out", str(tmp_path / "s")])
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
