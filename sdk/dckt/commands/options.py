"""Arguments and options that several commands have, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dckt.errors import ConfigError

BundlePath = Annotated[Path, typer.Argument(help="Model bundle, as dckt-export writes it.")]
IndexPath = Annotated[Path, typer.Argument(help="Index that dckt index wrote.")]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu, or cuda (an error if it is not there).")]
Variant = Annotated[
    str, typer.Option(help="How the model is served, such as openvino-bf16 (see dckt inspect); auto: the fastest here.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of the model and of decoding; every core unless given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Where = Annotated[
    str | None,
    typer.Option(
        help='Only items whose metadata is so, as JSON: {"shop": "A", "price": {"lt": 20}}. Operators: eq, ne, lt, le, '
        "gt, ge, in, exists, and, or, not.",
        metavar="JSON",
    ),
]


def parse_where(text: str | None) -> dict[str, Any] | None:
    """A filter as it was typed; what it means is checked by the index.

    Raises:
        ConfigError: it is not a JSON object.
    """
    if text is None:
        return None
    try:
        where = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--where is {text!r}, which is not JSON ({error}); {_EXAMPLE}") from error
    if not isinstance(where, dict):
        raise ConfigError(f"--where is {text!r}; expected a JSON object; {_EXAMPLE}")
    return where


_EXAMPLE = """give for example: --where '{"shop": "A", "price": {"lt": 20}}'"""
