"""Options that several commands have, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dckt.errors import ConfigError

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of cached image features. Unless given, $DCKT_CACHE, else ~/.cache/dckt.")
]
BadPairs = Annotated[str, typer.Option(help="raise lists all bad pairs; skip leaves them out.")]


def read_bad_pairs(text: str) -> Literal["raise", "skip"]:
    """What ``--on-bad-pair`` says.

    Raises:
        ConfigError: it is neither of the two.
    """
    if text not in ("raise", "skip"):
        raise ConfigError(f"--on-bad-pair is {text!r}; expected raise or skip")
    return "skip" if text == "skip" else "raise"
