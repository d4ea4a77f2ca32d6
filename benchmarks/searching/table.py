"""Figures as a Markdown table, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Rows of one measurement.

    Attributes:
        name: of the section.
        title: a sentence above the table, with the setting.
        rows: by column a text or a number, or a pair of the text to show and the value for programs.
        notes: sentences below.
    """

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The title, the rows, the notes."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        lines = [
            f"### {self.title}\n",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(f"| {' | '.join(_text(row.get(column, '')) for column in columns)} |" for row in self.rows),
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def json(self) -> Mapping[str, Any]:
        """The same for programs."""
        rows = [{column: _number(cell) for column, cell in row.items()} for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "notes": self.notes}


def verdict(met: bool, goal: str) -> str:
    return f"{goal}: {'met' if met else 'MISSED'}"


def _text(cell: Any) -> str:
    return str(cell[0] if isinstance(cell, tuple) else cell)


def _number(cell: Any) -> Any:
    return cell[1] if isinstance(cell, tuple) else cell
