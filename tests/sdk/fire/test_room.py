"""A full disk and folders that may not be written: our error, nothing lost, and all well afterwards."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from faults import room

CASES = 3  # of each kind


@pytest.fixture
def base():
    # pytest's own folder is closed to other users, and one trial runs as another user.
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        yield Path(base)


@pytest.mark.parametrize("kind", room.KINDS)
def test_without_room(base, kind):
    first = room.KINDS.index(kind)
    cases = range(first, first + CASES * len(room.KINDS), len(room.KINDS))
    trials = [trial for _, trial in room.check(cases, seed=1, workers=1, base=base)]
    assert {trial.kind for trial in trials} == {kind}
    assert [trial.wrong for trial in trials if trial.wrong] == []
    if skipped := [trial.skipped for trial in trials if trial.skipped]:
        pytest.skip(f"{kind}: this system does not allow it ({skipped[0]})")
    assert sum(trial.refused for trial in trials) > 0
