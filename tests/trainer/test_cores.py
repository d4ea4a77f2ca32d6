"""Whether the processor has cores free for a training."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dckt_trainer import cores

CPU = torch.device("cpu")


def stat(*ticks: int) -> str:
    return f"cpu  {' '.join(map(str, ticks))} 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets how many cores there are, how many are busy, and how many threads PyTorch has."""

    def be(count: int, busy: float, threads: int) -> None:
        file = tmp_path / "stat"
        file.write_text(stat(100, 0, 50, 900, 10, 0, 0, 0), encoding="ascii")
        spent = round(100 * busy / count)
        monkeypatch.setattr(cores, "_STAT", file)
        monkeypatch.setattr(cores.os, "cpu_count", lambda: count)
        monkeypatch.setattr(cores.torch, "get_num_threads", lambda: threads)
        # User, system and stolen time is work; idling and waiting for the disk is none.
        after = stat(
            100 + spent // 2, 0, 50, 900 + (100 - spent) // 2, 10 + (100 - spent + 1) // 2, 0, 0, (spent + 1) // 2
        )
        monkeypatch.setattr(cores.time, "sleep", lambda _: file.write_text(after, encoding="ascii"))

    return be


@pytest.mark.parametrize(
    ("count", "busy", "threads", "advised"),
    [(2, 1.0, 2, 1), (2, 2.0, 2, 1), (16, 5.0, 16, 11), (2, 0.2, 2, None), (2, 2.0, 1, None), (8, 4.0, 4, None)],
)
def test_who_trains_beside_others_is_told_how_many_threads(machine, count, busy, threads, advised):
    machine(count, busy, threads)
    told = cores.crowding(CPU)
    if advised is None:
        assert told is None
    else:
        assert f"{busy:.1f} of {count} cores" in told
        assert f"--set compute.threads={advised}," in told


def test_a_gpu_asks_for_no_cores(machine):
    machine(2, 2.0, 2)
    assert cores.crowding(torch.device("cuda")) is None


@pytest.mark.parametrize("content", [None, "", "cpu a b c d e f g h\n"])
def test_a_system_that_does_not_tell_is_no_error(machine, tmp_path, monkeypatch, content):
    machine(2, 2.0, 2)
    file = tmp_path / "other"
    if content is not None:
        file.write_text(content, encoding="ascii")
    monkeypatch.setattr(cores, "_STAT", file)
    monkeypatch.setattr(cores.time, "sleep", lambda _: None)
    assert cores.busy_cores() is None
    assert cores.crowding(CPU) is None


def test_work_is_seen():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        found = cores.busy_cores(1.0)
    finally:
        process.kill()
        process.wait()
    assert found is not None
    assert found > 0.5  # one process is always at work, or keeps others from it
