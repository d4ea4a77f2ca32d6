"""From what a search found to hits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dckt.index.results import Hit, Hits
from dckt.index.scan import Answer

# What json.loads calls, without what it does around it: half of the time for a small mapping.
_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


def hits_of_all(medium: str, answers: list[Answer], min_score: float | None, metadata: bool) -> list[Sequence[Hit]]:
    """The hits of every query, with this score or a higher one, and with their metadata or with empty ones."""
    return [
        _hits_of(medium, min_score, metadata, found)
        if isinstance(found, list)
        else Hits(partial(_hits_of, medium, min_score, metadata, found))
        for found in answers
    ]


def _hits_of(medium: str, min_score: float | None, metadata: bool, answer: Answer) -> list[Hit]:
    found = answer if isinstance(answer, list) else answer()
    if min_score is not None:
        found = [one for one in found if -one[0] >= min_score]
    if not metadata:
        return [Hit(item, -score, medium, {}) for score, item, _ in found]
    texts = [text for _, _, text in found]
    return [
        Hit(item, -score, medium, values) for (score, item, _), values in zip(found, _parsed_all(texts), strict=True)
    ]


def parsed(text: bytes) -> dict[str, Any]:
    """Metadata from JSON that was checked when it was stored."""
    value: dict[str, Any] = _scan(text.decode(), 0)[0]
    return value


def _parsed_all(texts: list[bytes]) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = _scan((b"[%b]" % b",".join(texts)).decode(), 0)[0]
    return values
