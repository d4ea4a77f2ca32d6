"""PyTorch's threads, and whether the processor has cores free for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STAT = Path("/proc/stat")
_LOOK = 0.2  # seconds


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch has so many threads in this block; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def crowding(device: torch.device) -> str | None:
    """What to tell who is about to compute on cores that others use; None where there is nothing to tell.

    PyTorch gives each thread an equal part of every product and waits for the last. A part whose core another program
    has takes as long as that one's turn, so two threads on two busy cores were fifteen times slower than one.
    """
    own, cores = torch.get_num_threads(), os.cpu_count() or 1
    if device.type != "cpu" or own == 1:
        return None
    busy = busy_cores()
    if busy is None or busy + own <= cores + 0.5:
        return None
    free = max(1, int(cores - busy + 0.5))
    return (
        f"other programs keep {busy:.1f} of {cores} cores busy, and PyTorch would use {own}: that can be many times "
        f"slower than to leave them theirs; begin again with --set compute.threads={free}, or when they have ended"
    )


def busy_cores(seconds: float = _LOOK) -> float | None:
    """How many cores are at work while this thread sleeps for so long; None on a system that does not tell."""
    try:
        before = _ticks()
        time.sleep(seconds)
        passed = [late - early for early, late in zip(before, _ticks(), strict=True)]
        idle = passed[3] + passed[4]  # with nothing to do, or waiting for a disk
    except (OSError, ValueError, IndexError):
        return None
    return (os.cpu_count() or 1) * (1 - idle / sum(passed)) if sum(passed) > 0 else None


def _ticks() -> list[int]:
    """Of all cores since the system started: user, nice, system, idle, waiting for a disk, interrupts, stolen."""
    return [int(part) for part in _STAT.read_text(encoding="ascii").partition("\n")[0].split()[1:9]]
