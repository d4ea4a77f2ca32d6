"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: the part that it belongs to, such as ``bundle``.
        name: what was looked at.
        state: ``ok``; ``note``, something to know that stops nothing; ``problem``, something that does not work.
        found: what is there.
        do: what to do about it; empty where there is nothing to do.
    """

    area: str
    name: str
    state: State
    found: str
    do: str = ""
