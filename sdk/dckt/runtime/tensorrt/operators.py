"""Whether TensorRT's ONNX parser takes a graph, by its published table of operators and types."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

# An operator and the type of the data that it works on, in NumPy's names: ("Conv", "float16").
Use = tuple[str, str]


def unsupported(uses: Iterable[Use], opset: int) -> list[str]:
    """What a parser would refuse, one line each; empty if nothing.

    Args:
        uses: operators of a graph with the type of their data: of the first input, of Where of the output. Axes,
            shapes and indices are no data.
        opset: version of the operators.
    """
    types, first, last = _table()
    mistakes = [] if first <= opset <= last else [f"opset {opset}; TensorRT takes {first} to {last}"]
    for operator, dtype in sorted(set(uses)):
        if operator not in types:
            mistakes.append(f"{operator} is not among the operators that were checked")
        elif dtype not in types[operator]:
            mistakes.append(f"{operator} on {dtype}; TensorRT takes {', '.join(types[operator])}")
    return mistakes


@cache
def _table() -> tuple[dict[str, list[str]], int, int]:
    content = tomllib.loads(files(__package__).joinpath("operators.toml").read_text(encoding="utf-8"))
    return content["types"], content["opset"]["first"], content["opset"]["last"]
