"""Where two computations of one model part: the first layer whose numbers differ. Asked when the gate has refused."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dckt_export.precision import LAYERS
from dckt_export.ranges import Intermediates, largest
from dckt_trainer.layers import BatchNorm

# A vector that is wrong by this share of its length, at a right angle, has the cosine 0.9992 with the right one.
TOLERANCE = 0.04
INT8_TOLERANCE = 0.14  # likewise 0.99
# Of the same numbers in another order of sums.
FP32_TOLERANCE = 1e-3

Key = tuple[str, int]
"""A tensor by what made it: the node's name and the place among its outputs. Conversions rename tensors, not nodes."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The first node whose output differs.

    Attributes:
        layer: name of the node.
        op: what it computes, such as ``Conv``.
        error: length of the difference, relative to that of the right output; infinite if a number is not finite.
        finite: whether all numbers are.
        largest: largest absolute value of the right output.
    """

    layer: str
    op: str
    error: float
    finite: bool
    largest: float

    def __str__(self) -> str:
        wrong = f"relative error {self.error:.2g}" if self.finite else "numbers that are not finite"
        return f"{self.layer} ({self.op}): {wrong}; in float32 its output reaches {self.largest:.4g}"


def first_drift(reference: Path, variant: Path, batch: NDArray[Any], *, tolerance: float = TOLERANCE) -> Drift | None:
    """The first node, in the order of the float32 graph, whose output another graph of the same model computes wrong.

    Args:
        reference: the float32 graph.
        variant: the graph in float16, or quantised.
        batch: what both take; a row or two are enough, for all tensors of both are held at once.
        tolerance: largest relative error that is not a drift.

    Returns:
        None if nothing differs by more. Nodes that the variant does not have are passed over.

    Raises:
        BundleError: one of the graphs cannot be run.
    """
    right = _by_node(reference, batch)
    found = _by_node(variant, batch)
    for key, (node, values) in right.items():
        if key in found and found[key][1].shape == values.shape:
            drift = _drift(node, values, found[key][1], tolerance)
            if drift is not None:
                return drift
    return None


def first_unlike(
    graph: Path, encoder: nn.Module, batch: NDArray[Any], *, tolerance: float = FP32_TOLERANCE
) -> Drift | None:
    """The first layer of an exported float32 graph that computes something else than the PyTorch encoder does.

    Args:
        graph: the float32 graph.
        encoder: what it was exported from.
        batch: what both take.
        tolerance: largest relative error that is not a drift.

    Returns:
        None if no layer differs by more. Layers whose weights carry no module's name are passed over.

    Raises:
        BundleError: the graph cannot be run.
    """
    right = _by_module(encoder, torch.from_numpy(batch))
    for node, values in _by_node(graph, batch).values():
        module = node.input[1].rpartition(".")[0] if node.op_type in LAYERS else ""
        if module in right and right[module].size == values.size:
            drift = _drift(node, right[module].reshape(values.shape), values, tolerance)
            if drift is not None:
                return drift
    return None


def _by_node(graph: Path, batch: NDArray[Any]) -> Mapping[Key, tuple[NodeProto, NDArray[Any]]]:
    """What each node makes, in the order of the graph."""
    inside = Intermediates(graph)
    tensors = inside.run(batch)
    return {
        (node.name or node.output[0], place): (node, tensors[name])
        for node in inside.model.graph.node
        for place, name in enumerate(node.output)
        if name in tensors
    }


def _by_module(encoder: nn.Module, batch: Tensor) -> Mapping[str, NDArray[np.float32]]:
    """What each layer makes, by the module's name; with the normalisation behind it, since that is folded into it."""
    outputs: dict[str, NDArray[np.float32]] = {}
    made_by: dict[int, str] = {}
    alive = []  # so that no two tensors have one identity

    def keep(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        if isinstance(module, (BatchNorm, _BatchNorm)):
            name = made_by.get(id(given), name)
        outputs[name] = output.numpy().copy()  # what follows may work in place
        made_by[id(output)] = name
        alive.append(output)

    with ExitStack() as hooks, torch.no_grad():
        for name, module in encoder.named_modules():
            if next(module.children(), None) is None:
                hook = module.register_forward_hook(
                    lambda module, given, output, name=name: keep(name, module, given[0], output)
                )
                hooks.callback(hook.remove)
        encoder(batch)
    return outputs


def _drift(node: NodeProto, right: NDArray[Any], found: NDArray[Any], tolerance: float) -> Drift | None:
    before, after = right.astype(np.float64), found.astype(np.float64)
    finite = bool(np.isfinite(after).all())
    length = float(np.linalg.norm(before))
    distance = float(np.linalg.norm(before - after)) if finite else float("inf")
    error = distance / length if length > 0 else (float("inf") if distance else 0.0)
    if error <= tolerance:
        return None
    return Drift(layer=node.name, op=node.op_type, error=error, finite=finite, largest=largest(right))
