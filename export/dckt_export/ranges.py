"""What the tensors of a graph hold on real inputs: the way into a graph's middle, and how large the numbers there get.

ONNX Runtime gives only a graph's outputs, so each float tensor is made an output of a copy in memory. On a CPU it also
computes float16 graphs in float32 and leaves out the rounding in between, so overflow would not be seen;
:func:`rounding` puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

from dckt.errors import BundleError

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
# VGG19 makes 120 MB of activations from one picture of 224 pixels, and all of them are held at once.
ROWS = 4
_SILENT = 4


class Intermediates:
    """Runs a graph on the CPU and gives every float tensor that its nodes make, float16 truly rounded.

    Args:
        graph: an ONNX file; its external data, if it has any, lies beside it.

    Attributes:
        model: the graph, without external data.

    Raises:
        BundleError: ONNX or ONNX Runtime cannot read the graph.
    """

    def __init__(self, graph: Path) -> None:
        self.model = onnx.load(graph, load_external_data=False)
        types = tensor_types(self.model)
        shown = {output.name for output in self.model.graph.output}
        probed = rounding(self.model)
        self._names = [name for node in self.model.graph.node for name in node.output if types.get(name) in FLOATS]
        probed.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, types[name], None) for name in self._names if name not in shown
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        # Every node is to run as it stands: fused or with another layout, it would not be what the names say.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(
                probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime raises types of its own, one for each kind of failure.
        except Exception as error:
            raise BundleError(f"{graph}: ONNX Runtime cannot load it ({error}); export the model again") from error
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Tensors by name, float32 or float16, in the order in which they are made; the batch is none of them."""
        return dict(zip(self._names, self._session.run(self._names, {self._input: batch}), strict=True))


def tensor_ranges(
    graph: Path, batches: Iterable[NDArray[Any]], *, advance: Callable[[int], None] = lambda count: None
) -> dict[str, float]:
    """The largest absolute value that each float tensor of a graph takes on real inputs.

    Args:
        graph: an ONNX file in float32.
        batches: what its one input takes; they are looked at once, one after the other.
        advance: told how many rows more are done.

    Returns:
        By the name of the tensor, the graph's input included if it is float32, weights not. What is not a number counts
        as infinite. Empty tensors have 0.

    Raises:
        BundleError: the graph cannot be run, or there are no rows to run it on.
    """
    inside = Intermediates(graph)
    (given,) = inside.model.graph.input
    ranges: dict[str, float] = {}
    for batch in batches:
        for start in range(0, len(batch), ROWS):
            rows = batch[start : start + ROWS]
            tensors = inside.run(rows)
            if rows.dtype == np.float32:
                tensors[given.name] = rows
            for name, values in tensors.items():
                ranges[name] = max(ranges.get(name, 0.0), largest(values))
            advance(len(rows))
    if not ranges:
        raise BundleError(f"{graph}: no rows to read the ranges of its tensors from; give at least one")
    return ranges


def rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph that computes on a CPU what a float16 graph computes on a device that has float16.

    Each product and sum is computed in float32, as half precision kernels accumulate, and each float16 tensor is
    rounded when it is made, by two casts that no optimiser may take out; what overflows becomes infinite. Names of
    nodes and tensors stay. A graph without float16 is only copied.

    Args:
        model: the graph; weights need not be loaded. It is not changed.

    Raises:
        BundleError: the types of the graph contradict each other.
    """
    types = tensor_types(model)
    written = onnx.ModelProto()
    written.CopyFrom(model)
    del written.graph.node[:]

    def half(name: str) -> bool:
        return bool(name) and types[name] == TensorProto.FLOAT16

    def cast(name: str, result: str, to: int) -> None:
        written.graph.node.append(onnx.helper.make_node("Cast", [name], [result], f"{name}.rounded", to=to))

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            cast(tensor.name, f"{tensor.name}.wide", TensorProto.FLOAT)
    for node in model.graph.node:
        added = written.graph.node.add()
        added.CopyFrom(node)
        if node.op_type != "Cast":
            added.input[:] = [f"{name}.wide" if half(name) else name for name in node.input]
            added.output[:] = [f"{name}.exact" if half(name) else name for name in node.output]
        for name in filter(half, node.output):
            if node.op_type != "Cast":
                cast(f"{name}.exact", name, TensorProto.FLOAT16)
            cast(name, f"{name}.wide", TensorProto.FLOAT)
    return written


def largest(values: NDArray[Any]) -> float:
    """Largest absolute value; infinite if one of them is not a number, 0 if there are none."""
    if values.size == 0:
        return 0.0
    top = float(np.maximum(values.max(), -values.min()))  # nan goes through both
    return float("inf") if np.isnan(top) else top


def tensor_types(model: onnx.ModelProto) -> Mapping[str, int]:
    """Element type of each tensor of a graph by name, weights included.

    Weights in float are left out of what ONNX is asked: it would copy them, and gives up above 2 GiB.

    Raises:
        BundleError: the types of the graph contradict each other, or ONNX does not know an operator.
    """
    graph = model.graph
    floats = [tensor for tensor in graph.initializer if tensor.data_type in FLOATS]
    others = [tensor for tensor in graph.initializer if tensor.data_type not in FLOATS]
    given = [onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in floats]
    bare = onnx.helper.make_model(
        onnx.helper.make_graph(graph.node, graph.name or "graph", [*graph.input, *given], graph.output, others),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(f"graph {graph.name!r}: its types do not fit together ({error})") from error
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    types |= {tensor.name: tensor.data_type for tensor in others}
    unknown = [node for node in graph.node if any(name and name not in types for name in node.output)]
    if unknown:
        raise BundleError(
            f"graph {graph.name!r}: ONNX {onnx.__version__} cannot tell the type of what {unknown[0].op_type} "
            f"{unknown[0].name!r} makes; update onnx, or use another trunk"
        )
    return types
