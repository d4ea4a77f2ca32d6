"""The table of a sweep: table.csv for programs, table.md, table.png and report.html for people.

It reads what each run wrote at its end, and no corpus: the test split is read once, by the run itself.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from dckt.files import atomic_write
from dckt.report import Cell, Figure, Section, Table, write_report
from dckt_trainer import plots
from dckt_trainer.config import flat_config
from dckt_trainer.markdown import markdown_table
from dckt_trainer.runs import Run
from dckt_trainer.sweep import Row
from dckt_trainer.sweep_run import SweepResult

CONFIDENCE = 0.95
WAYS = {"image_to_text": "image → text", "text_to_image": "text → image", "average": "average"}
COLUMNS = (*WAYS.values(), "difference", "validation", "seeds", "selected")
NOTE = (
    "Test MAP over the whole ranking, mean ± standard deviation over seeds. Difference: of the averages, to the first "
    "row, seed by seed, with the 95 % interval of a paired t test; it tells of the chance in training, not of that in "
    "the choice of test pairs. Validation: average MAP of the same network, which is what to choose by. Selected: "
    "pairs a round."
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval by Student's t; without an interval where there is one seed only."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        row: its definition.
        seeds: complete runs.
        wanted: runs that there should be.
        test: values by seed of each of ``WAYS``.
        validation: average MAP by seed.
        difference: to the first row, over the seeds that both have; None for the first row, and without such seeds.
        selected: pairs a round, mean over rounds and seeds; None where there is no transfer.
    """

    row: Row
    seeds: int
    wanted: int
    test: Mapping[str, Sequence[float]]
    validation: Sequence[float]
    difference: Estimate | None
    selected: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table shows, in the order of ``COLUMNS``."""
        difference = "–"
        if self.difference:
            difference = f"{self.difference.mean:+.3f}"
            if self.difference.low is not None and self.difference.high is not None:
                difference += f" [{self.difference.low:+.3f}, {self.difference.high:+.3f}]"
        return (
            *(_spread(self.test[way]) for way in WAYS),
            difference,
            _spread(self.validation),
            str(self.seeds) if self.seeds == self.wanted else f"{self.seeds} of {self.wanted}",
            "–" if self.selected is None else f"{self.selected:.0f}",
        )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of values that vary by seed.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, low=-0.48413771..., high=4.48413771...)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def table_lines(result: SweepResult) -> list[Line]:
    """The rows of the table, in the order of the sweep."""
    found: dict[str, dict[int, _Figures]] = {row.title: {} for row in result.sweep.rows}
    for outcome in result.outcomes:
        if outcome.run:
            found[outcome.row.title][outcome.seed] = _figures(outcome.row, outcome.run)
    first = found[result.sweep.rows[0].title]
    lines = []
    for place, row in enumerate(result.sweep.rows):
        figures = found[row.title]
        differences = [
            each.test["average"] - first[seed].test["average"] for seed, each in figures.items() if seed in first
        ]
        selected = [each.selected for each in figures.values() if each.selected is not None]
        lines.append(
            Line(
                row=row,
                seeds=len(figures),
                wanted=sum(outcome.row == row for outcome in result.outcomes),
                test={way: [each.test[way] for each in figures.values()] for way in WAYS},
                validation=[each.validation["average"] for each in figures.values()],
                difference=estimate(differences) if place and differences else None,
                selected=statistics.fmean(selected) if selected else None,
            )
        )
    return lines


def markdown(result: SweepResult) -> str:
    """The table as Markdown."""
    return markdown_table(("", *COLUMNS), [(line.row.title, *line.cells) for line in table_lines(result)])


def write_table(result: SweepResult) -> list[Line]:
    """Writes table.csv, table.md, table.png and report.html into the folder of the sweep.

    Returns:
        The rows of the table.
    """
    lines = table_lines(result)
    png = _plot(result, lines)
    notes = _notes(result)
    atomic_write(result.path / "table.csv", _csv(result))
    parts = [f"# {result.sweep.name}", _subtitle(result), markdown(result), NOTE, *(f"- {note}" for note in notes)]
    atomic_write(result.path / "table.md", "\n\n".join(parts) + "\n")
    atomic_write(result.path / "table.png", png)
    sections: list[Section] = [
        Table("MAP on test", ("", *COLUMNS), [(line.row.title, *line.cells) for line in lines], NOTE),
        Figure("Comparison", png, "Bars and bands are 95 % intervals over seeds.", _alt(lines)),
        Table(
            "Rows",
            ("row", "network", f"changes of {result.preset}"),
            [(row.title, row.network, ", ".join(row.changes) or "none") for row in result.sweep.rows],
        ),
    ]
    if notes:
        sections.append(Table("Notes", ("",), [(note,) for note in notes]))
    write_report(
        result.path / "report.html", title=f"Sweep: {result.sweep.name}", subtitle=_subtitle(result), sections=sections
    )
    return lines


# -- figures of runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Figures:
    """What counts of one run: the network, its test MAP, its validation MAP, and pairs that a round selected."""

    network: str
    test: Mapping[str, Any]
    validation: Mapping[str, Any]
    selected: float | None


def _figures(row: Row, run: Run) -> _Figures:
    evaluation = run.evaluation
    network = evaluation["kept"] if row.network == "kept" else row.network
    test = evaluation["test"][network]
    validation = next(entry for entry in evaluation["validation"] if entry["round"] == test["round"])
    counts = [len(event["selected"]) for event in run.events("selection") if event["round"] <= test["round"]]
    return _Figures(network, test, validation, statistics.fmean(counts) if counts else None)


def _notes(result: SweepResult) -> list[str]:
    runs = [outcome.run for outcome in result.outcomes if outcome.run]
    versions = {
        name: {run.facts["versions"].get(name, "?") for run in runs} for run in runs for name in run.facts["versions"]
    }
    mixed = [f"{name} {' and '.join(sorted(each))}" for name, each in versions.items() if len(each) > 1]
    return [
        *result.sweep.notes,
        *(f"{path.name} failed: {why}" for path, why in result.failures.items()),
        *([f"the runs were made by different versions: {', '.join(mixed)}"] if mixed else []),
    ]


def _subtitle(result: SweepResult) -> str:
    seeds = len({outcome.seed for outcome in result.outcomes})
    corpora = f"{Path(result.source).name} → {Path(result.target).name}" if result.source else Path(result.target).name
    runs = [outcome.run for outcome in result.outcomes if outcome.run]
    versions = runs[0].facts["versions"] if runs else {}
    made = "".join(f", {name} {versions[name]}" for name in ("dckt", "torch") if name in versions)
    return f"{corpora}, preset {result.preset}, {seeds} seed{'s' if seeds > 1 else ''}{made}"


# -- the forms of the table ----------------------------------------------------------------------------------------


def _csv(result: SweepResult) -> str:
    """A line for each row and seed, with every figure of the network that counts, and the settings that differ."""
    settings = [flat_config(outcome.config) for outcome in result.outcomes]
    varying = [key for key in settings[0] if key != "seed" and len({str(each[key]) for each in settings}) > 1]
    records: list[dict[str, Cell]] = []
    for outcome, flat in zip(result.outcomes, settings, strict=True):
        record: dict[str, Cell] = {
            "row": outcome.row.title,
            "seed": outcome.seed,
            "run": str(outcome.path.relative_to(result.path)),
            "state": "complete" if outcome.run else "failed",
            **{key: " ".join(flat[key]) if isinstance(flat[key], tuple) else flat[key] for key in varying},
        }
        if outcome.run:
            found = _figures(outcome.row, outcome.run)
            record |= {"network": found.network, "round": found.test["round"], "selected": found.selected}
            for split, figures in (("test", found.test), ("validation", found.validation)):
                record |= {f"{split}_{key}": value for key, value in _numbers(figures).items()}
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers among the figures of a round, and the two ends of the interval."""
    flat = {key: value for key, value in figures.items() if isinstance(value, int | float) and key != "round"}
    if "interval" in figures:
        flat["interval_low"], flat["interval_high"] = figures["interval"]
    return flat


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _plot(result: SweepResult, lines: Sequence[Line]) -> bytes:
    test = [_interval(estimate(line.test["average"])) if line.seeds else None for line in lines]
    if result.sweep.axis:
        validation = [_interval(estimate(line.validation)) if line.seeds else None for line in lines]
        panels = {"test": _curves(lines, test), "validation": _curves(lines, validation)}
        return plots.bands(panels, x=result.sweep.axis, y="MAP")
    differences = [_interval(line.difference) if line.difference else None for line in lines]
    titles = [line.row.title for line in lines]
    return plots.interval_bars({"test MAP": test, "difference to the first row": differences}, titles)


def _interval(estimated: Estimate) -> tuple[float, float, float]:
    mean, low, high = estimated.mean, estimated.low, estimated.high
    return mean, mean if low is None else low, mean if high is None else high


def _curves(lines: Sequence[Line], values: Sequence[tuple[float, float, float] | None]) -> plots.Bands:
    """The points of each curve; a row without a place on the axis becomes a level line."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    places = [line.row.x for line in lines if line.row.x is not None]
    numeric = all(type(x) in (int, float) for x in places)
    known = list(dict.fromkeys(map(str, places)))
    ends = [float(x) for x in places if isinstance(x, int | float)] if numeric else list(map(float, range(len(known))))
    for line, value in zip(lines, values, strict=True):
        if value is None:
            continue
        x = line.row.x
        if x is None:
            at = [min(ends), max(ends)]
        else:
            at = [float(x) if numeric and isinstance(x, int | float) else float(known.index(str(x)))]
        found.setdefault(line.row.curve, []).extend((each, *value) for each in at)
    return {name: sorted(points) for name, points in found.items()}


def _alt(lines: Sequence[Line]) -> str:
    told = [f"{line.row.title}: {statistics.fmean(line.test['average']):.3f}" for line in lines if line.seeds]
    return f"Average test MAP. {'; '.join(told)}."
