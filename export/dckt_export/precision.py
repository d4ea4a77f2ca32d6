"""float16 inside the graph, and the proof of what a graph computes in.

TensorRT 11 takes every type from the graph and has no switch, so the casts are written here: inputs and outputs stay
float32, the body is float16, and islands stay float32. *Layers* are convolutions and matrix products.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from dckt.errors import BundleError
from dckt_export.ranges import tensor_types

FP32, FP16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# They add up many numbers, exponentiate, or divide by something near zero. None holds a large weight, so nothing is
# lost in size, and float16 is what ruins them most often.
ISLANDS = frozenset(
    {
        *("Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "CumSum"),
        *("BatchNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization"),
        *("RMSNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN"),
        *("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd", "ReduceLogSumExp"),
        *("GlobalAveragePool", "GlobalLpPool", "LpPool"),
    }
)
SCALING = frozenset({"Add", "Sub", "Mul", "Div"})
MULTIPLIED = frozenset({*LAYERS, "Mul", "Div"})
RESHAPING = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})

LARGEST = 65504.0
# Other inputs go beyond those that the ranges were read from: 100 pictures passed the ranges of 16 by up to 1.9 times,
# those of 64 by 1.4 (SqueezeNet 1.1; MobileNetV2 less). So only half of what float16 reaches is used.
MARGIN = 2.0
# Smallest normal number. A tensor that stays below it loses mantissa in all of its values.
SMALLEST = 2.0**-14
# Rounding to 11 bits is wrong by at most 2^-11 of each weight; more, over all of them, means that they are too small.
WEIGHT_ERROR = 2.0**-10
# Of a graph's layers, this share computes in the precision that the graph is named after.
LABEL_SHARE = 0.9

_NAMES: Mapping[int, str] = {FP32: "fp32", FP16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "fp64"}


def fp16_from_fp32(model: onnx.ModelProto, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """The same graph with a float16 body; equal graphs and ranges give equal bytes.

    Computed in float32 are: what stands in :data:`ISLANDS`; the scaling of the input, such as (pixels / 255 - mean) /
    std; what makes indices or truth values; operators that ONNX does not define for float16; and every node one of
    whose tensors leaves, on real inputs, the part of float16's range that :data:`MARGIN` allows, or whose weights
    float16 cannot hold; and what is left between them without a layer. Names of nodes stay.

    Args:
        model: the graph in float32, weights included; it is not changed.
        ranges: largest absolute value of each of its tensors, see :func:`dckt_export.ranges.tensor_ranges`.

    Raises:
        BundleError: the graph holds float16 already, or a graph inside a node, or ``ranges`` is of another graph.
    """
    types = tensor_types(model)
    if FP16 in types.values():
        raise BundleError("the graph holds float16 already; convert the float32 graph")
    half = _half(model, types, ranges)
    written = _Writer(model, types)
    for number, node in enumerate(model.graph.node):
        written.add(node, FP16 if number in half else FP32)
    return written.model()


def layer_precisions(model: onnx.ModelProto) -> dict[str, int]:
    """How many layers compute in which precision, such as ``{"fp16": 17, "fp32": 1}``.

    A layer between DequantizeLinear nodes, for its data and for its weights, counts as int8: runtimes compute such a
    layer with integers. If only its weights do, it counts as ``int8 weights``. Weights need not be loaded.

    Raises:
        BundleError: the types of the graph contradict each other.
    """
    counts = Counter(precision for _, precision in _layers(model))
    return {precision: counts[precision] for precision in sorted(counts)}


def check_label(model: onnx.ModelProto, precision: str) -> None:
    """Refuses to name a graph after a precision that fewer than :data:`LABEL_SHARE` of its layers have.

    A layer has fp16 or fp32 if it computes in it, and int8 if its weights are stored in it; how many compute in it is
    for the gate to say, and stands in the manifest.

    Args:
        model: the graph; weights need not be loaded.
        precision: ``fp32``, ``fp16`` or ``int8``.

    Raises:
        BundleError: names the layers that have another.
    """
    layers = list(_layers(model))
    others = [f"{name} ({found})" for name, found in layers if found.partition(" ")[0] != precision]
    computing = len(layers) - len(others)
    if not layers or computing < LABEL_SHARE * len(layers):
        raise BundleError(
            f"{computing} of {len(layers)} layers are in {precision}, expected at least {LABEL_SHARE:.0%}; "
            f"others: {', '.join(others[:5]) or 'none'}; "
            f"too many tensors are outside of what {precision} can hold: leave {precision} out"
        )


# --- which nodes ----------------------------------------------------------------------------------------------


def _half(model: onnx.ModelProto, types: Mapping[str, int], ranges: Mapping[str, float]) -> set[int]:
    """Numbers of the nodes that compute in float16."""
    nodes = model.graph.node
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == FP32}
    scaling = _scaling(model, types, weights)
    opset = {entry.domain: entry.version for entry in model.opset_import}
    half = set()
    for number, node in enumerate(nodes):
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise BundleError(
                f"{node.op_type} {node.name!r} holds a graph of its own, which has no fp16 form; use another trunk"
            )
        if (
            node.op_type not in ISLANDS
            and number not in scaling
            and _takes_half(node, types, opset.get(node.domain, 0))
            and all(_fits(ranges, name) for name in _floats(node, types) if name not in weights)
            and all(
                _holds(weights[name], multiplied=node.op_type in MULTIPLIED and place < 2)
                for place, name in enumerate(node.input)
                if name in weights
            )
        ):
            half.add(number)
    return _around_layers(nodes, types, weights, half)


def _floats(node: NodeProto, types: Mapping[str, int]) -> Iterator[str]:
    return (name for name in (*node.input, *node.output) if name and types[name] == FP32)


def _scaling(model: onnx.ModelProto, types: Mapping[str, int], weights: Mapping[str, TensorProto]) -> set[int]:
    """Nodes that bring the input to the first layer's layout and scale; float16 would round before that."""
    raw = {given.name for given in model.graph.input if types[given.name] == FP32}
    found = set()
    for number, node in enumerate(model.graph.node):
        data = [name for name in node.input if name and name not in weights]
        if node.op_type == "Cast" and types[node.output[0]] == FP32:
            raw.add(node.output[0])
        elif node.op_type in SCALING | RESHAPING and data and all(name in raw for name in data):
            raw.update(node.output)
            found.add(number)
    return found


def _takes_half(node: NodeProto, types: Mapping[str, int], opset: int) -> bool:
    """Whether a node makes float numbers, and may do so from float16 and in float16."""
    made = [name for name in node.output if name and types[name] == FP32]
    given = any(name and types[name] == FP32 for name in node.input)
    # Other nodes that make numbers of nothing, such as a range, name their type in ways of their own.
    if not made or not (given or node.op_type == "Cast"):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for place, name in enumerate(names):
            formal = formals[min(place, len(formals) - 1)]  # the last one may stand for many
            if name and types[name] == FP32 and "tensor(float16)" not in allowed.get(formal.type_str, ()):
                return False
    return True


def _fits(ranges: Mapping[str, float], name: str) -> bool:
    if name not in ranges:
        raise BundleError(f"no range of the tensor {name!r}; read the ranges from the graph that is converted")
    return ranges[name] == 0 or SMALLEST <= ranges[name] <= LARGEST / MARGIN


def _holds(weight: TensorProto, *, multiplied: bool) -> bool:
    """Whether float16 can hold a weight. What is only added or compared may vanish; what multiplies may not."""
    values: NDArray[np.float32] = numpy_helper.to_array(weight)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if np.any(np.isinf(rounded) & np.isfinite(values)):
        return False
    if not multiplied or not values.any():
        return True
    top = np.abs(values).max()
    return bool(top >= SMALLEST) and bool(
        np.linalg.norm(values - rounded) <= WEIGHT_ERROR * np.linalg.norm(values)  # finite: see top, and above
    )


def _around_layers(
    nodes: Sequence[NodeProto], types: Mapping[str, int], weights: Mapping[str, TensorProto], half: set[int]
) -> set[int]:
    """The nodes that tensors join to a layer; two casts around a piece without layers would buy nothing."""
    joined = defaultdict(set)
    for number in half:
        for name in _floats(nodes[number], types):
            joined[name].add(number)
    found: set[int] = set()
    waiting = [number for number in half if nodes[number].op_type in LAYERS]
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            made = (name for name in _floats(nodes[number], types) if name not in weights)
            waiting.extend(other for name in made for other in joined[name])
    return found


# --- writing --------------------------------------------------------------------------------------------------


class _Writer:
    """Writes nodes in the precision asked for, with one Cast for each tensor that is read in another than its own.

    Args:
        model: the graph in float32.
        types: of its tensors.
    """

    def __init__(self, model: onnx.ModelProto, types: Mapping[str, int]) -> None:
        self._source, self._types = model, types
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == FP32}
        self._outputs = {output.name for output in model.graph.output}
        self._nodes: list[NodeProto] = []
        # By name in the source and precision: the name here.
        self._made: dict[tuple[str, int], str] = {
            (given.name, types[given.name]): given.name for given in model.graph.input
        }
        self._used: dict[str, set[int]] = defaultdict(set)

    def add(self, node: NodeProto, precision: int) -> None:
        written = NodeProto()
        written.CopyFrom(node)
        for place, name in enumerate(node.input):
            if name and self._types[name] == FP32:
                written.input[place] = self._read(name, precision)
        for place, name in enumerate(node.output):
            if name and self._types[name] == FP32:
                inner = precision == FP16 and name in self._outputs
                written.output[place] = self._made[name, precision] = _named(name, FP16) if inner else name
        if node.op_type == "Cast" and self._types[node.output[0]] == FP32:
            next(attribute for attribute in written.attribute if attribute.name == "to").i = precision
        self._nodes.append(written)
        for name in node.output:
            if name in self._outputs and self._types[name] == FP32 and precision == FP16:
                self._cast(name, FP16, FP32, name)

    def model(self) -> onnx.ModelProto:
        graph = self._source.graph
        return onnx.helper.make_model(
            onnx.helper.make_graph(self._nodes, graph.name, graph.input, graph.output, list(self._initializers())),
            opset_imports=self._source.opset_import,
            ir_version=self._source.ir_version,
            producer_name=self._source.producer_name,
        )

    def _read(self, name: str, precision: int) -> str:
        if name in self._weights:
            self._used[name].add(precision)
            return _named(name, precision) if precision == FP16 else name
        if (name, precision) not in self._made:
            own = FP32 if precision == FP16 else FP16
            self._cast(name, own, precision, _named(name, precision))
        return self._made[name, precision]

    def _cast(self, name: str, own: int, precision: int, result: str) -> None:
        label = f"cast_{_named(name, precision)}"
        self._nodes.append(onnx.helper.make_node("Cast", [self._made[name, own]], [result], label, to=precision))
        self._made[name, precision] = result

    def _initializers(self) -> Iterator[TensorProto]:
        for tensor in self._source.graph.initializer:
            if tensor.name not in self._weights:
                yield tensor
                continue
            if FP32 in self._used[tensor.name]:
                yield tensor
            if FP16 in self._used[tensor.name]:
                values = numpy_helper.to_array(tensor).astype(np.float16)
                yield numpy_helper.from_array(values, _named(tensor.name, FP16))


def _named(name: str, precision: int) -> str:
    return f"{name}.{_NAMES[precision]}"


# --- proof ----------------------------------------------------------------------------------------------------


def _layers(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Each layer's name and the precision that it computes in."""
    types = tensor_types(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in LAYERS:
            data, weights = (_dequantised(name, makers, types) for name in node.input[:2])
            kind = types[node.input[0]]
            if weights:
                yield node.name, "int8" if data else "int8 weights"
            else:
                yield node.name, _NAMES.get(kind, f"type {kind}")


def _dequantised(name: str, makers: Mapping[str, NodeProto], types: Mapping[str, int]) -> bool:
    while name in makers and makers[name].op_type in RESHAPING:
        name = makers[name].input[0]
    return (
        name in makers
        and makers[name].op_type == "DequantizeLinear"
        and types[makers[name].input[0]] in (TensorProto.INT8, TensorProto.UINT8)
    )
