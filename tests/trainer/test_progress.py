"""What a training tells people: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dckt_trainer import progress as module
from dckt_trainer.progress import Bars, Silent, counted

FIGURES = {"loss": 2.34567, "mmd": 0.5, "semantic": 1.25e-5}


class Clock:
    """Time that only passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def log_file():
    file = io.StringIO()
    return file, Bars(Console(file=file, width=80))


def terminal(width=80):
    file = io.StringIO()
    return file, Bars(Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False))


def shown(text):
    """The lines that stand on a terminal at the end, without control sequences."""
    last = re.split(r"\x1b\[1A\x1b\[2K|\r\x1b\[2K", text)[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", last).split("\n") if line.strip()]


def test_a_log_gets_one_line_for_a_short_task(clock):
    file, bars = log_file()
    with bars.task("word [vectors]", 3) as advance:
        advance(1)
        clock.now += 5
        advance(2, FIGURES)
    assert file.getvalue() == "word [vectors]: 3 of 3, 0:00:05, loss 2.346  mmd 0.5  semantic 1.25e-05\n"


def test_a_log_shows_life_every_minute(clock):
    file, bars = log_file()
    with bars.task("round 1 of 2", 100) as advance:
        for _ in range(100):
            clock.now += 1.5
            advance(1, {"loss": clock.now})
    lines = file.getvalue().splitlines()
    assert lines == [
        "round 1 of 2: 40 of 100, 0:01:00, about 0:01:30 left, loss 160",
        "round 1 of 2: 80 of 100, 0:02:00, about 0:00:30 left, loss 220",
        "round 1 of 2: 100 of 100, 0:02:30, loss 250",
    ]


def test_a_log_has_no_control_characters_and_its_lines_are_never_broken(clock):
    file, bars = log_file()
    name = "checking " + "long " * 30
    with bars.task(name, 2) as advance:
        advance(2)
    bars.say("word " * 40)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", file.getvalue())


def test_a_log_says_how_far_a_failed_task_came(clock):
    file, bars = log_file()

    def work():
        with bars.task("pretraining", 10) as advance:
            advance(4)
            clock.now += 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert file.getvalue() == "pretraining: 4 of 10, 0:00:02, about 0:00:03 left\n"


def test_a_task_of_nothing(clock):
    file, bars = log_file()
    with bars.task("image features", 0):
        pass
    assert file.getvalue() == "image features: 0 of 0, 0:00:00\n"


@pytest.mark.parametrize("name", ["round 3 of 20", "image features, source.train", "checking a-very-long-name" * 3])
def test_a_bar_and_its_figures_fit_into_80_columns(name):
    file, bars = terminal()
    with bars.task(name, 12345) as advance:
        advance(12000)
        advance(45, FIGURES)
    lines = shown(file.getvalue())
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(name[:20])
    assert "12045/12345" in lines[0]
    assert "left" in lines[0]
    assert re.search("[━╸]{5}", lines[0])
    assert lines[1].strip() == "loss 2.346  mmd 0.5  semantic 1.25e-05"


def test_figures_stay_until_others_come():
    file, bars = terminal()
    with bars.task("round 1", 3) as advance:
        advance(1, {"loss": 3.0})
        advance(1)
    assert shown(file.getvalue())[1].strip() == "loss 3"


def test_a_bar_without_figures_is_one_line():
    file, bars = terminal()
    with bars.task("[bold]", 3) as advance:
        advance(3)
    (line,) = shown(file.getvalue())
    assert "[bold]" in line


def test_many_figures_are_cut_not_wrapped():
    file, bars = terminal(60)
    with bars.task("round 1", 3) as advance:
        advance(1, {f"term{number}": 1 / 3 for number in range(20)})
    lines = shown(file.getvalue())
    assert len(lines) == 2
    assert max(map(len, lines)) <= 60


def test_silent_takes_figures(capsys):
    with Silent().task("x", 2) as advance:
        advance(1)
        advance(1, FIGURES)
    Silent().say("nothing")
    assert capsys.readouterr() == ("", "")


def test_counted_opens_with_the_first_total(clock):
    file, bars = log_file()
    with counted(bars, "pictures") as progress:
        assert file.getvalue() == ""
        progress(1, 4)
        progress(4, 4)
    assert file.getvalue() == "pictures: 4 of 4, 0:00:00\n"
