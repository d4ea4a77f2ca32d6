"""What an export came to, as tables: for the terminal, for report.html, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table as RichTable

from dckt.report import Cell, Table
from dckt_export.parity import Thresholds
from dckt_export.variants import Outcome

_SHORT = 24  # a cell of so many characters is not broken into lines


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All that was found of a variant, as JSON holds it."""
    return {
        "precision": outcome.variant.precision,
        "graph": outcome.variant.graph,
        "bytes": outcome.bytes,
        "build_seconds": outcome.build_seconds,
        "parity": {output: asdict(parity) for output, parity in outcome.parity.items()},
        "refused": list(outcome.refused),
        **(
            {
                "latency": {
                    medium: {str(size): asdict(one) for size, one in of.items()}
                    for medium, of in outcome.latency.items()
                },
                "pairs_per_second": outcome.pairs_per_second,
            }
            if outcome.latency
            else {}
        ),
    }


def tables(outcomes: Sequence[Outcome], pairs: str) -> list[Table]:
    """The variants side by side: size, speed, vectors, rankings, and what was refused.

    Args:
        outcomes: of every variant that was tried, the first of them the float32 graphs on ONNX Runtime.
        pairs: which pairs they were compared on, in words.
    """
    found = [_sizes(outcomes), _speed(outcomes), _vectors(outcomes, pairs), _rankings(outcomes)]
    refused = [(outcome.variant.name, line) for outcome in outcomes for line in outcome.refused]
    return [*found, Table("Refused by the gate", ["variant", "why"], refused)] if refused else found


def rich_table(table: Table) -> RichTable:
    """The same for the terminal, without lines: no first cell is written twice, and what is short is not broken."""
    shown = RichTable(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title=f"\n{table.title}",
        title_justify="left",
        title_style="bold",
        caption=table.note or None,
        caption_justify="left",
        header_style="dim",
    )
    rows = [[_text(cell) for cell in row] for row in table.rows]
    for place, column in enumerate(table.columns):
        cells = [row[place] for row in rows]
        words, longest = any(cell[:1].isalpha() for cell in cells), max(map(len, cells), default=0)
        short = longest <= _SHORT
        title = column.replace(" ", "\n") if short and len(column) > longest else column
        shown.add_column(title, justify="left" if words else "right", overflow="fold", no_wrap=short)
    before = None
    for row in rows:
        shown.add_row("" if row[0] == before else row[0], *row[1:])
        before = row[0]
    return shown


def thresholds_table(thresholds: Mapping[str, Thresholds]) -> Table:
    """What each precision had to keep."""
    rows = [(name, one.cosine_min, one.cosine_median, one.map_change) for name, one in thresholds.items()]
    return Table(
        "Thresholds of the gate",
        ["precision", "cosine of every row at least", "median at least", "MAP changes by less than"],
        rows,
    )


def _sizes(outcomes: Sequence[Outcome]) -> Table:
    base = outcomes[0]
    rows = [
        (
            outcome.variant.name,
            outcome.bytes / 1e6,
            f"{outcome.bytes / base.bytes:.1%}",
            outcome.build_seconds,
            outcome.pairs_per_second if outcome.latency else None,
        )
        for outcome in outcomes
    ]
    largest = max(base.latency["image"]) if base.latency else "-"
    return Table(
        "Size and speed",
        ["variant", "MB", "of fp32", "build, s", "pairs/s"],
        rows,
        note=f"pairs/s: all media of a pair together, in batches of {largest}.",
    )


def _speed(outcomes: Sequence[Outcome]) -> Table:
    """Of what passed: speed says nothing about what gives other vectors."""
    sizes = list(outcomes[0].latency["image"]) if outcomes[0].latency else []
    rows = [
        (outcome.variant.name, medium, *(f"{1000 * of[size].p50:.1f} / {1000 * of[size].p95:.1f}" for size in sizes))
        for outcome in outcomes
        for medium, of in outcome.latency.items()
    ]
    note = "Median / 95 of 100, on the CPU of this machine, every core."
    return Table("Milliseconds for a batch", ["variant", "medium", *(f"of {size}" for size in sizes)], rows, note=note)


def _vectors(outcomes: Sequence[Outcome], pairs: str) -> Table:
    rows = [
        (outcome.variant.name, output, medium, row.cosine_min, row.cosine_p1, row.cosine_median, row.max_difference)
        for outcome in outcomes
        for output, parity in outcome.parity.items()
        for medium, row in parity.media.items()
    ]
    columns = ["variant", "output", "medium", "cosine min", "1 %", "median", "largest difference"]
    shown = [(*row[:3], *(f"{value:.6f}" for value in row[3:6]), f"{row[6]:.1e}") for row in rows]
    return Table(f"Vectors beside PyTorch's, {pairs}", columns, shown)


def _rankings(outcomes: Sequence[Outcome]) -> Table:
    rows = []
    for outcome in outcomes:
        for output, parity in outcome.parity.items():
            for direction, row in parity.directions.items():
                change = row.map_exported - row.map_torch
                rows.append(
                    (
                        outcome.variant.name,
                        output,
                        direction.replace("_", " "),
                        f"{row.map_torch:.4f}",
                        f"{change:+.4f} ± {row.interval:.4f}",
                        f"{row.top10_overlap:.1%}",
                    )
                )
    columns = ["variant", "output", "direction", "MAP PyTorch", "change", "top 10 kept"]
    note = "Change: with the half of its 95 % interval, from the differences of the queries' AP."
    return Table("Rankings beside PyTorch's", columns, rows, note=note)


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)
