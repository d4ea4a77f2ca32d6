"""What a sweep is: rows of a table, each a change of one preset, read from TOML or from the command line.

`dckt_trainer.sweep_run` trains them, `dckt_trainer.sweep_table` tabulates what came out.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from dckt.errors import ConfigError
from dckt_trainer.config import names_in, read_toml

SWEEP_FOLDER = Path(__file__).parent / "sweeps"
Network: TypeAlias = Literal["kept", "model_t0", "last", "best"]
Value: TypeAlias = str | int | float | bool | list[Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table, over seeds.

    Attributes:
        title: names the row; no other has the same.
        changes: of the preset, ``section.key=value`` each.
        network: which target network of the run counts; ``kept`` is the one that ``transfer.keep`` names.
        curve: with an axis, rows of one curve share this.
        x: where on the axis the row is; None is everywhere.
    """

    title: str
    changes: tuple[str, ...] = ()
    network: Network = "kept"
    curve: str = ""
    x: Value | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings that are compared.

    Attributes:
        name: heading of the table.
        rows: differences are to the first.
        axis: the key that varies along each curve; empty where there are no curves.
        preset: what the rows change, unless the caller names another.
        seeds: so many, from 0 on, unless the caller says otherwise.
        notes: what the reader of the table should know, such as a row that had to be left out.
    """

    name: str
    rows: tuple[Row, ...]
    axis: str = ""
    preset: str = "paper"
    seeds: int = 5
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError(f"sweep {self.name}: it has no rows; a table needs one at least")
        twice = [title for title, count in Counter(row.title for row in self.rows).items() if count > 1]
        if twice:
            raise ConfigError(f"sweep {self.name}: several rows are called {twice[0]!r}; give each a title of its own")


def sweep_names() -> list[str]:
    """The sweeps that come with dckt."""
    return names_in(SWEEP_FOLDER)


def read_sweep(name: str | Path, *, overlap: Sequence[str] = ()) -> Sweep:
    """Reads a sweep that comes with dckt, or a TOML file of the same form; sweeps/table3.toml explains it.

    Args:
        name: of the sweep, or the path of the file.
        overlap: labels of the source that a row with ``overlap = true`` leaves out.

    Raises:
        ConfigError: lists every mistake.
    """
    path, tree = read_toml(name, SWEEP_FOLDER, "sweep")
    reader = _Reader(tuple(overlap))
    sweep = reader.sweep(tree, path.stem)
    if reader.mistakes:
        raise ConfigError("\n  ".join([f"{path}: the sweep has {len(reader.mistakes)} mistakes:", *reader.mistakes]))
    if overlap and not reader.overlap_used:
        raise ConfigError(f"{path}: no row has overlap = true, so the labels of --overlap would do nothing")
    return sweep


def grid_sweep(axes: Sequence[str]) -> Sweep:
    """Every combination of some values; the first key makes curves where all its values are numbers.

    Args:
        axes: ``section.key=value,value`` each; values as TOML or as bare words.

    >>> [row.title for row in grid_sweep(["transfer.law=all,paper", "mmd.kernels=1,5"]).rows][:2]
    ['transfer.law=all, mmd.kernels=1', 'transfer.law=all, mmd.kernels=5']
    """
    values = dict(_grid_axis(axis) for axis in axes)
    if len(values) < len(axes):
        raise ConfigError("--grid names a key twice; give all its values at once: key=v1,v2,v3")
    first = next(iter(values))
    curved = all(type(value) in (int, float) for value in values[first])
    rows = []
    for chosen in product(*values.values()):
        changes = tuple(map(_change, values, chosen))
        shown = [f"{key}={_shown(value)}" for key, value in zip(values, chosen, strict=True)]
        curve = ", ".join(shown[1:]) or "as set"
        row = Row(title=", ".join(shown), changes=changes)
        rows.append(replace(row, curve=curve, x=chosen[0]) if curved else row)
    return Sweep(name="grid", rows=tuple(rows), axis=first if curved else "")


class _Reader:
    """Turns the tree of a TOML file into a sweep, and gathers mistakes."""

    def __init__(self, overlap: tuple[str, ...]) -> None:
        self.overlap = overlap
        self.overlap_used = False
        self.mistakes: list[str] = []
        self.notes: list[str] = []

    def sweep(self, tree: Mapping[str, Any], name: str) -> Sweep:
        self.known(tree, "the top level", ("preset", "seeds", "axis", "row"))
        preset, seeds = tree.get("preset", "paper"), tree.get("seeds", 5)
        if not isinstance(preset, str):
            self.mistakes.append(f"preset is {preset!r}; expected a name or the path of a TOML file")
        if type(seeds) is not int or seeds < 1:
            self.mistakes.append(f"seeds is {seeds!r}; expected a whole number above 0")
        key, values = self.axis(tree["axis"]) if "axis" in tree else ("", [])
        given = tree.get("row", [])
        if not isinstance(given, list) or not all(isinstance(row, Mapping) for row in given):
            self.mistakes.append("row is no list of tables; begin each row with [[row]]")
            given = []
        rows = [row for number, entry in enumerate(given, 1) for row in self.rows(entry, number, key, values)]
        if self.mistakes:
            rows = [Row(title=name)]  # a stand-in; the caller raises
        return Sweep(name=name, rows=tuple(rows), axis=key, preset=preset, seeds=seeds, notes=tuple(self.notes))

    def rows(self, entry: Mapping[str, Any], number: int, key: str, values: list[Value]) -> list[Row]:
        """A row, or one for each value of the axis; none where labels that it needs were not given."""
        title, network = entry.get("title"), entry.get("network", "kept")
        flat, overlap = entry.get("flat", False), entry.get("overlap", False)
        where = f"row {number}" + (f" ({title})" if isinstance(title, str) else "")
        self.known(entry, where, ("title", "set", "network", "flat", "overlap"))
        if not isinstance(title, str) or not title.strip():
            self.mistakes.append(f"{where}: title is {title!r}; expected some words")
        if network not in get_args(Network):
            self.mistakes.append(f"{where}: network is {network!r}; expected one of {', '.join(get_args(Network))}")
        for name, value in (("flat", flat), ("overlap", overlap)):
            if not isinstance(value, bool):
                self.mistakes.append(f"{where}: {name} is {value!r}; expected true or false")
        row = Row(title=str(title), changes=self.changes(entry.get("set", []), where), network=network)
        if overlap is True:
            self.overlap_used = True
            if not self.overlap:
                self.notes.append(f"{title}: left out, for it needs the labels to leave out: --overlap LABEL,LABEL")
                return []
            row = replace(row, changes=(*row.changes, _change("source.exclude", list(self.overlap))))
        if flat is True and not key:
            self.mistakes.append(f"{where}: flat has no meaning without an axis")
        if not key:
            return [row]
        if flat is True:
            return [replace(row, curve=row.title)]
        return [
            replace(
                row,
                title=f"{row.title}, {key.rpartition('.')[2]} = {_shown(value)}",
                changes=(*row.changes, _change(key, value)),
                curve=row.title,
                x=value,
            )
            for value in values
        ]

    def axis(self, tree: Any) -> tuple[str, list[Value]]:
        if not isinstance(tree, Mapping):
            self.mistakes.append(f"axis is {tree!r}; expected a table with key and values")
            return "", []
        self.known(tree, "axis", ("key", "values"))
        key, values = tree.get("key"), tree.get("values")
        if not isinstance(key, str) or "." not in key:
            self.mistakes.append(f"axis: key is {key!r}; expected section.key, for example transfer.alpha")
        if not isinstance(values, list) or not values:
            self.mistakes.append(f"axis: values is {values!r}; expected a list")
            values = []
        return str(key), values

    def changes(self, given: Any, where: str) -> tuple[str, ...]:
        if isinstance(given, Mapping):
            return tuple(_flat(given))
        if isinstance(given, list) and all(isinstance(change, str) for change in given):
            return tuple(given)
        self.mistakes.append(f'{where}: set is {given!r}; expected a list of "section.key=value", or a table')
        return ()

    def known(self, tree: Mapping[str, Any], where: str, names: tuple[str, ...]) -> None:
        names = tuple(names)
        self.mistakes += [
            f"{where}: unknown key {key!r}; it has {', '.join(names)}" for key in tree if key not in names
        ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _change(f"{prefix}{key}", value)


def _change(key: str, value: Value) -> str:
    return f"{key}={_json(value)}"  # numbers, strings and lists are written in TOML as in JSON


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # a date is the one value that JSON lacks


def _grid_axis(text: str) -> tuple[str, list[Value]]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise ConfigError(f"{text!r}: a grid is written section.key=value,value, for example transfer.alpha=0.1,0.2")
    try:
        return key.strip(), _toml_list(values)
    except tomllib.TOMLDecodeError:  # some are bare words
        return key.strip(), [_value(value.strip()) for value in values.split(",")]


def _value(text: str) -> Value:
    try:
        value: Value = _toml_list(text)[0]
    except (tomllib.TOMLDecodeError, IndexError):
        return text
    return value


def _toml_list(text: str) -> list[Any]:
    values: list[Any] = tomllib.loads(f"values = [{text}]")["values"]
    return values
