"""Every setting that the docs and the programs' help name is one that there is, with a value that it may have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dckt_trainer.cli import EXAMPLES as TRAIN
from dckt_trainer.commands.advise import EXAMPLES as ADVISE
from dckt_trainer.commands.sweep import EXAMPLES as SWEEP
from dckt_trainer.config import load_config
from dckt_trainer.sweep import grid_sweep

ROOT = Path(__file__).parents[2]
TEXTS = {
    **{page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md"))},
    "README.md": (ROOT / "README.md").read_text("utf-8"),
    "dckt-train --help": TRAIN,
    "dckt-train advise --help": ADVISE,
    "dckt-train sweep --help": SWEEP,
}
GENERAL = "section.key=value"  # how a setting is written
# In quotes, where a shell needs them, or up to what ends it.
_SETTING = re.compile(r"--(?P<option>set|grid) (?:'(?P<quoted>[^']+)'|(?P<bare>[a-z_]+\.[^\s`|]+))")


def settings(text: str) -> list[tuple[str, str]]:
    """Which option, and what it is given."""
    found = [(match["option"], match["quoted"] or match["bare"]) for match in _SETTING.finditer(text)]
    return [(option, setting) for option, setting in found if setting != GENERAL]


def test_settings_are_found_where_they_are_written():
    text = "`--set a.b=c` or --set 'd.e=[\"f\"]' and --grid g.h=1,2 x | --set section.key=value"
    assert settings(text) == [("set", "a.b=c"), ("set", 'd.e=["f"]'), ("grid", "g.h=1,2")]
    assert sum(len(settings(text)) for text in TEXTS.values()) > 20


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if settings(text)])
def test_a_setting_that_is_named_can_be_given(name):
    for option, setting in settings(TEXTS[name]):
        rows = [(setting,)] if option == "set" else [row.changes for row in grid_sweep([setting]).rows]
        for changes in rows:
            load_config("small", changes)
