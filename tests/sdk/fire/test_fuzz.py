"""Random input: no exception but ours, and SQL is data. The full run tries thousands of examples."""

from __future__ import annotations

import pytest

from faults import fuzz

EXAMPLES = 40


@pytest.mark.parametrize("name", fuzz.PROPERTIES)
def test_random_input(name):
    fuzz.run(name, examples=EXAMPLES, seed=1)


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(20_000, 20_000), (65_535, 65_535), (1, 2**31 - 1)])
def test_a_decompression_bomb(form, size):
    assert len(fuzz.bomb(form, *size)) < 200
    fuzz.claimed_size(form, *size)
