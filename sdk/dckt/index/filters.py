"""Filters over metadata: ``{"shop": "A", "price": {"lt": 20}}``. All of a mapping's entries must hold.

A key is a top-level key of the metadata, or a path into mappings, its keys joined by dots; a key that itself holds a
dot, and one named ``and``, ``or`` or ``not``, cannot be asked for. Types are strict: the text ``"5"`` is not the number
5, and ``true`` is not 1. A key that is missing has no value: ``eq``, ``in`` and comparisons fail, ``ne`` holds.

=========  =================================================================
eq, ne     the same number, text, truth value or ``None``; or not
lt le      numbers with numbers, and texts with texts in the order of their
gt ge      code points; anything else does not match
in         one of a list of such values
exists     ``true``: the key is there, whatever its value; ``false``: not
and, or    ``{"or": [{...}, {...}]}``
not        ``{"not": {...}}``
=========  =================================================================

A filter is compiled twice, to SQL with bound parameters and to a Python function; both give the same answer.
"""

# ruff: noqa: S608 - conditions are put together from our own text; every key and value is bound.
from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dckt.errors import ConfigError

Scalar: TypeAlias = str | int | float | bool | None
Match: TypeAlias = Callable[[Mapping[str, Any]], bool]

_ORDER: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "lt": ("<", operator.lt),
    "le": ("<=", operator.le),
    "gt": (">", operator.gt),
    "ge": (">=", operator.ge),
}
OPERATORS = ("eq", "ne", *_ORDER, "in", "exists")
_GROUPS = ("and", "or", "not")
_DEPTH = 20
_MISSING = object()
# JSON's names of types, by what is compared with what.
_KIND = "CASE {0}.type WHEN 'integer' THEN 'number' WHEN 'real' THEN 'number' ELSE {0}.type END"


@dataclass(frozen=True)
class Filter:
    """A filter that was checked.

    Attributes:
        sql: a condition on a row of ``items``.
        parameters: for its question marks.
        matches: whether metadata pass.
        key: the same for equal filters.
    """

    sql: str
    parameters: tuple[Any, ...]
    matches: Match
    key: str


def parse_filter(where: object) -> Filter | None:
    """Checks a filter; None lets everything pass and gives None.

    Raises:
        ConfigError: it is none; the message shows it, and what is offered.
    """
    if where is None:
        return None
    try:
        part = _all_of(where, _DEPTH)
        return Filter(*part, key=json.dumps(where, sort_keys=True, default=list))
    except _MistakeError as mistake:
        raise ConfigError(
            f"the filter {_shown(where)}: {mistake}; a filter is a mapping such as "
            '{"shop": "A", "price": {"lt": 20}}, with the operators '
            f"{', '.join(OPERATORS)}, and {', '.join(_GROUPS)} over lists of filters"
        ) from mistake


class _MistakeError(Exception):
    pass


_Part: TypeAlias = tuple[str, tuple[Any, ...], Match]


def _all_of(where: object, depth: int) -> _Part:
    if not isinstance(where, Mapping):
        raise _MistakeError(f"{_shown(where)} is a {type(where).__name__}; expected a mapping")
    if not depth:
        raise _MistakeError(f"it is nested more than {_DEPTH} deep")
    return _joined([_entry(key, value, depth - 1) for key, value in where.items()], "AND", all)


def _entry(key: object, value: object, depth: int) -> _Part:
    if not isinstance(key, str) or not _is_text(key):
        raise _MistakeError(f"the key {_shown(key)} is not a Unicode text")
    if key == "not":
        sql, parameters, inner = _all_of(value, depth)
        return f"NOT {sql}", parameters, lambda metadata: not inner(metadata)
    if key in _GROUPS:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise _MistakeError(f"{key!r} takes a list of at least one filter, not {_shown(value)}")
        parts = [_all_of(part, depth) for part in value]
        return _joined(parts, "AND", all) if key == "and" else _joined(parts, "OR", any)
    conditions = value if isinstance(value, Mapping) else {"eq": value}
    if not conditions:
        raise _MistakeError(f"{key!r} has no condition")
    return _joined([_condition(key, name, operand) for name, operand in conditions.items()], "AND", all)


def _joined(parts: Sequence[_Part], word: str, combine: Callable[[Any], bool]) -> _Part:
    if not parts:
        return "1", (), lambda _: True
    if len(parts) == 1:
        return parts[0]
    tests = [part[2] for part in parts]
    return (
        f"({f' {word} '.join(part[0] for part in parts)})",
        tuple(value for part in parts for value in part[1]),
        lambda metadata: combine(test(metadata) for test in tests),
    )


def _condition(key: str, name: object, operand: object) -> _Part:
    path = key.split(".")
    if name == "exists":
        if not isinstance(operand, bool):
            raise _MistakeError(f"'exists' takes true or false, not {_shown(operand)}")
        sql, parameters = _found(path, "1", ())
        return (
            sql if operand else f"NOT {sql}",
            parameters,
            lambda metadata: (_value(metadata, path) is not _MISSING) is operand,
        )
    if name in ("eq", "ne"):
        wanted = [_scalar(operand)]
    elif name == "in":
        if not isinstance(operand, Sequence | set | frozenset) or isinstance(operand, str | bytes):
            raise _MistakeError(f"'in' takes a list of values, not {_shown(operand)}")
        wanted = [_scalar(value) for value in operand]
    elif isinstance(name, str) and name in _ORDER:
        return _comparison(path, name, operand)
    else:
        raise _MistakeError(f"{_shown(name)} is no operator")
    values = frozenset(map(_typed, wanted))
    alias = f"e{len(path) - 1}"
    sql, parameters = _found(
        path,
        f"({_KIND.format(alias)}, coalesce({alias}.atom, 0)) IN "
        f"(SELECT {_KIND.format('w')}, coalesce(w.atom, 0) FROM json_each(?) AS w)",
        (json.dumps(wanted),),
    )
    if name == "ne":
        return f"NOT {sql}", parameters, lambda metadata: _typed(_value(metadata, path)) not in values
    return sql, parameters, lambda metadata: _typed(_value(metadata, path)) in values


def _comparison(path: list[str], name: str, operand: object) -> _Part:
    limit = _scalar(operand)
    kind, _ = _typed(limit)
    if kind not in ("number", "text"):
        raise _MistakeError(f"{name!r} takes a number or a text, not {_shown(operand)}")
    sign, compare = _ORDER[name]
    alias = f"e{len(path) - 1}"
    sql, parameters = _found(
        path, f"{_KIND.format(alias)} = ? AND {alias}.atom {sign} json_extract(?, '$[0]')", (kind, json.dumps([limit]))
    )

    def matches(metadata: Mapping[str, Any]) -> bool:
        found, value = _typed(_value(metadata, path))
        return found == kind and compare(value, limit)

    return sql, parameters, matches


def _found(path: list[str], condition: str, parameters: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """That the path leads to a value that fulfils a condition; the value's row of json_each is the last ``e``."""
    sources = ["json_each(items.metadata) AS e0"]
    for place in range(1, len(path)):
        above = f"e{place - 1}"
        # json_each refuses a text that is no JSON, so it is only given objects.
        sources.append(f"json_each(CASE {above}.type WHEN 'object' THEN {above}.value ELSE '{{}}' END) AS e{place}")
    keys = " AND ".join(f"e{place}.key = ?" for place in range(len(path)))
    return f"EXISTS (SELECT 1 FROM {', '.join(sources)} WHERE {keys} AND {condition})", (*path, *parameters)


def _value(metadata: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(metadata, Mapping) or key not in metadata:
            return _MISSING
        metadata = metadata[key]
    return metadata


def _typed(value: Any) -> tuple[str, Any]:
    """A value with what it may be compared with; lists and mappings equal nothing."""
    if isinstance(value, bool):
        return "true" if value else "false", 1
    if isinstance(value, int | float):
        return "number", value
    if isinstance(value, str):
        return "text", value
    return ("null", 0) if value is None else ("other", None)


def _scalar(value: object) -> Scalar:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise _MistakeError(f"{value} has more than 64 bits")
        return int(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise _MistakeError(f"{value} is not finite")
        return float(value)
    if isinstance(value, str) and _is_text(value):
        return str(value)
    raise _MistakeError(f"{_shown(value)} is not a number, a text, true, false or None")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    try:
        text = ascii(value)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep to show"
    return text if len(text) <= 200 else f"{text[:200]}..."
