"""int8 inside the graph: Q/DQ pairs, calibrated on real inputs, that every runtime reads from the same file.

The weights of each *layer* (convolution or matrix product with fixed weights) are int8, with a scale for each output
channel, and a QuantizeLinear and DequantizeLinear pair stands on the data that goes into it. All zero points are 0,
since TensorRT knows no other. A pair never stands between a layer and its activation, where runtimes fuse the two.
Biases stay float32, for TensorRT reads no int32 ones; so do softmax, the scaling of pixels and the outputs.

Three things keep the error small. A range is not the largest value, but the one that makes the mean squared error
smallest. What quantisation adds to the mean of each output channel is taken out of the bias. And the data of the most
sensitive layers may stay float: *weights only*. That costs speed there, and no byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dckt.errors import BundleError, ConfigError
from dckt_export.graphs import EXTERNAL_ABOVE, save_graph

Batches = Callable[[], Iterable[NDArray[Any]]]
Floats = NDArray[np.float32]

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
PASSES = 3  # over the batches
LEVELS = 127  # to both sides of 0
BINS = 4096
# Shares of the largest value that are tried as the range.
RANGES = np.linspace(0.2, 1.0, 81)


@dataclass(frozen=True)
class _Layer:
    """One convolution or matrix product: its name, what goes into it, its weights, and the axis of their channels."""

    name: str
    data: str
    weight: Floats
    axis: int


@dataclass(frozen=True)
class Damage:
    """What quantising one layer does to its output.

    Attributes:
        shift: of each channel's mean, float32 less int8.
        noise: what is left, squared, by the square of the output.
    """

    shift: NDArray[np.float64]
    noise: float


@dataclass(frozen=True)
class Calibration:
    """What real inputs tell of a graph.

    Attributes:
        steps: of each tensor that goes into a layer: the size of one step of int8.
        whole: the damage to each layer by its name, weights and data quantised.
        weights: likewise, weights alone quantised.
    """

    steps: Mapping[str, np.float32]
    whole: Mapping[str, Damage]
    weights: Mapping[str, Damage]

    @property
    def most_sensitive(self) -> list[str]:
        """The layers, first the one that loses most when its data is quantised too, all before it in float32."""
        return sorted(self.whole, key=lambda name: -self.whole[name].noise)


def calibrate(graph: Path, batches: Batches, *, advance: Callable[[int], None] = lambda count: None) -> Calibration:
    """Runs a float32 graph on real inputs, for the ranges of its data and for what int8 does to each layer.

    Args:
        graph: an ONNX file with one input; its external data, if it has any, lies beside it.
        batches: gives real inputs of the graph, (B, ...) each, and is called :data:`PASSES` times. A hundred training
            pairs are enough. Memory grows with B, not with the number of batches.
        advance: told of each batch that was read, in each of the passes.

    Raises:
        ConfigError: there are no batches.
        BundleError: the graph cannot be read, it has no layer to quantise, or a value is not finite.
    """
    model = _read(graph)
    layers = _layers(model)
    steps = _steps(model, layers, batches, advance)
    whole, weights = _damage(model, layers, steps, batches, advance)
    return Calibration(steps, whole, weights)


def int8_from_fp32(graph: Path, out: Path, calibration: Calibration, *, weights_only: Collection[str] = ()) -> None:
    """Writes a graph whose layers and embedding tables are int8; equal input gives equal bytes.

    Args:
        graph: the float32 graph.
        out: file to write, with its weights in ``NAME.data`` beside it if they are large. It appears whole or not at
            all.
        calibration: of this graph.
        weights_only: names of layers whose data stays float.

    Raises:
        ConfigError: ``weights_only`` names something that is no layer of this graph.
        BundleError: the graph cannot be read, or it has no layer to quantise.
    """
    model = _read(graph)
    layers = _layers(model)
    unknown = sorted(set(weights_only) - {layer.name for layer in layers})
    if unknown:
        raise ConfigError(f"weights_only names {', '.join(unknown)}; {graph.name} has no such layer with fixed weights")
    _insert(model, layers, calibration, weights_only)
    _quantise_tables(model)
    _drop_unused(model)
    _save(model, Path(out))


def _read(graph: Path) -> onnx.ModelProto:
    try:
        return onnx.load(graph)
    # onnx raises errors of protobuf, of its checker and of the operating system here.
    except Exception as error:
        raise BundleError(f"{graph}: cannot be read ({error}); export the model again") from error


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    """Layers with fixed float32 weights, in the order of the graph."""
    fixed = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    layers = []
    for node in model.graph.node:
        if node.op_type in LAYERS and node.input[1] in fixed and node.input[0] not in fixed:
            weight = numpy_helper.to_array(fixed[node.input[1]])
            if weight.ndim > 1:
                layers.append(_Layer(node.name, node.input[0], weight, _channel_axis(node, weight.ndim)))
    if not layers:
        raise BundleError("the graph has no convolution or matrix product with fixed float32 weights to quantise")
    return layers


def _channel_axis(node: NodeProto, rank: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
        return 0
    return rank - 1


def _attribute(node: NodeProto, name: str, default: float) -> float:
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _steps(
    model: onnx.ModelProto, layers: Sequence[_Layer], batches: Batches, advance: Callable[[int], None]
) -> dict[str, np.float32]:
    """The step of each tensor that goes into a layer, from a histogram of its absolute values."""
    names = list(dict.fromkeys(layer.data for layer in layers))
    probe = _copy(model)
    _set_outputs(probe, names)
    largest = dict.fromkeys(names, 0.0)
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    with tempfile.TemporaryDirectory(prefix="dckt-int8-") as folder:
        run = _runner(probe, Path(folder))
        for _, values in run(batches, advance):
            for name, value in zip(names, values, strict=True):
                # In this order, for max() would pass over NaN.
                largest[name] = float(np.maximum(np.abs(value).max(), largest[name]))
                if not np.isfinite(largest[name]):
                    raise BundleError(
                        f"{name}: not finite on calibration data, so it has no range in int8; "
                        "look at the model's weights and at the pairs"
                    )
        for _, values in run(batches, advance):
            for name, value in zip(names, values, strict=True):
                if largest[name] > 0:
                    places = (np.abs(value).ravel() * np.float32(BINS / largest[name])).astype(np.int32)
                    counts[name] += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
    return {name: _step(counts[name], largest[name]) for name in names}


def _step(counts: NDArray[np.int64], largest: float) -> np.float32:
    """The step with the smallest mean squared error, values beyond its range included."""
    if largest == 0:
        return np.float32(1.0)
    values = (np.arange(BINS) + 0.5) * (largest / BINS)
    steps = RANGES * largest / LEVELS
    rounded = np.minimum(np.round(values / steps[:, None]), LEVELS) * steps[:, None]
    errors = ((values - rounded) ** 2) @ counts
    return np.float32(steps[int(np.argmin(errors))])


def _int8(weight: Floats, axis: int | None) -> tuple[NDArray[np.int8], Floats]:
    """Weights in -127 to 127, and the step of each channel, or the one step where ``axis`` is None."""
    axes = tuple(one for one in range(weight.ndim) if one != axis)
    largest = np.abs(weight).max(axis=axes, keepdims=True)
    step = np.where(largest > 0, largest / LEVELS, 1).astype(np.float32)
    return np.round(weight / step).astype(np.int8), step.reshape(-1) if axis is not None else step.reshape(())


def _damage(
    model: onnx.ModelProto,
    layers: Sequence[_Layer],
    steps: Mapping[str, np.float32],
    batches: Batches,
    advance: Callable[[int], None],
) -> tuple[dict[str, Damage], dict[str, Damage]]:
    """Runs each layer three times on the same data and compares within the graph: as it is, whole, and weights alone.

    So what leaves the graph is a few numbers a channel, however large the feature maps are.
    """
    probe = _copy(model)
    nodes, made, outputs = [], _Inserted(probe), []
    by_name = {layer.name: layer for layer in layers}
    for node in probe.graph.node:
        nodes.append(node)
        if node.name not in by_name:
            continue
        layer = by_name[node.name]
        nodes += made.data(layer.data, steps[layer.data])
        nodes += made.weight(layer, node.input[1])
        axes = made.constant(f"{node.name}/axes", _other_axes(node, layer))
        for way, data in (("whole", made.names[layer.data]), ("weights", layer.data)):
            twin = NodeProto()
            twin.CopyFrom(node)
            twin.name = f"{node.name}/{way}"
            twin.input[0], twin.input[1] = data, made.names[node.input[1]]
            twin.output[0] = f"{node.output[0]}/{way}"
            difference = f"{twin.output[0]}/difference"
            nodes += [
                twin,
                helper.make_node("Sub", [node.output[0], twin.output[0]], [difference]),
                helper.make_node("ReduceMean", [difference, axes], [f"{difference}/mean"], keepdims=0),
                helper.make_node("ReduceSumSquare", [difference], [f"{difference}/squares"], keepdims=0),
                helper.make_node("ReduceSumSquare", [node.output[0]], [f"{difference}/signal"], keepdims=0),
            ]
            outputs += [f"{difference}/{kind}" for kind in ("mean", "squares", "signal")]
    _set_nodes(probe, nodes)
    _set_outputs(probe, outputs)
    rows, sums = 0, [np.zeros(())] * len(outputs)
    with tempfile.TemporaryDirectory(prefix="dckt-int8-") as folder:
        run = _runner(probe, Path(folder))
        for count, values in run(batches, advance):
            rows += count
            # A mean counts by its rows; sums of squares are sums already.
            weights = (count, 1, 1) * (len(outputs) // 3)
            sums = [
                total + weight * value.astype(np.float64)
                for total, weight, value in zip(sums, weights, values, strict=True)
            ]
    found = [
        Damage(mean / rows, float(squares) / max(float(signal), 1e-30))
        for mean, squares, signal in zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    ]
    names = [layer.name for layer in layers]
    return dict(zip(names, found[::2], strict=True)), dict(zip(names, found[1::2], strict=True))


def _other_axes(node: NodeProto, layer: _Layer) -> NDArray[np.int64]:
    """All axes of a layer's output but that of its channels: 1 for convolutions, the last for products."""
    rank = layer.weight.ndim
    if node.op_type == "Conv":
        return np.array([axis for axis in range(rank) if axis != 1], np.int64)
    return np.arange(-rank, -1, dtype=np.int64)


class _Inserted:
    """Makes the Q/DQ nodes of a graph, each tensor's once, and the constants that they read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.names: dict[str, str] = {}
        self._model = model
        self._makers = {name: node for node in model.graph.node for name in node.output}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def data(self, name: str, size: np.float32) -> list[NodeProto]:
        if name in self.names:
            return []
        step = self.constant(f"{name}/scale", np.array(size))
        zero = self.constant(f"{name}/zero", np.array(0, np.int8))
        nodes, given = [], name
        if self._gathers_reductions(name):
            # OpenVINO (2026.4) would move the pair through Concat to before the reductions, and compute them wrongly.
            # The clipping is what QuantizeLinear does anyway.
            top = np.float32(LEVELS * size)
            low = self.constant(f"{name}/low", np.array(-top))
            given = f"{name}/clipped"
            nodes.append(
                helper.make_node("Clip", [name, low, self.constant(f"{name}/high", np.array(top))], [given], given)
            )
        self.names[name] = f"{name}/int8"
        quantised = f"{name}/quantised"
        return [
            *nodes,
            helper.make_node("QuantizeLinear", [given, step, zero], [quantised], quantised),
            helper.make_node("DequantizeLinear", [quantised, step, zero], [self.names[name]], self.names[name]),
        ]

    def weight(self, layer: _Layer, name: str) -> list[NodeProto]:
        return self._fixed(name, layer.weight, layer.axis)

    def table(self, name: str, table: Floats) -> list[NodeProto]:
        return self._fixed(name, table, None)

    def _fixed(self, name: str, weight: Floats, axis: int | None) -> list[NodeProto]:
        if name in self.names:
            return []
        values, step = _int8(weight, axis)
        inputs = [
            self.constant(f"{name}/quantised", values),
            self.constant(f"{name}/scale", step),
            self.constant(f"{name}/zero", np.zeros(step.shape, np.int8)),
        ]
        self.names[name] = f"{name}/int8"
        axes: dict[str, Any] = {} if axis is None else {"axis": axis}
        return [helper.make_node("DequantizeLinear", inputs, [self.names[name]], self.names[name], **axes)]

    def _gathers_reductions(self, name: str) -> bool:
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "Concat":
            return False
        return any(one in self._makers and self._makers[one].op_type.startswith("Reduce") for one in maker.input)


def _insert(
    model: onnx.ModelProto, layers: Sequence[_Layer], calibration: Calibration, weights_only: Collection[str]
) -> None:
    """Puts the pairs before the layers, and corrects the biases."""
    made, by_name = _Inserted(model), {layer.name: layer for layer in layers}
    nodes = []
    for node in model.graph.node:
        if node.name in by_name:
            layer = by_name[node.name]
            nodes += made.weight(layer, node.input[1])
            node.input[1] = made.names[node.input[1]]
            if node.name in weights_only:
                damage = calibration.weights[node.name]
            else:
                damage = calibration.whole[node.name]
                nodes += made.data(layer.data, calibration.steps[layer.data])
                node.input[0] = made.names[node.input[0]]
            _correct_bias(model, made, node, damage.shift)
        nodes.append(node)
    _set_nodes(model, nodes)


def _correct_bias(model: onnx.ModelProto, made: _Inserted, node: NodeProto, shift: NDArray[np.float64]) -> None:
    """Adds the shift of the means to a layer's bias. A product without one, MatMul, stays as it is."""
    if node.op_type == "MatMul":
        return
    if node.op_type == "Gemm":
        shift = shift / (_attribute(node, "beta", 1.0) or 1.0)
    bias: NDArray[Any] = np.zeros(1)
    if len(node.input) > 2 and node.input[2]:
        fixed = [tensor for tensor in model.graph.initializer if tensor.name == node.input[2]]
        if not fixed:
            return
        bias = numpy_helper.to_array(fixed[0])
    else:
        del node.input[2:]
        node.input.append("")
    node.input[2] = made.constant(f"{node.name}/bias", (bias + shift).astype(np.float32))


def _quantise_tables(model: onnx.ModelProto) -> None:
    """Embedding tables get one step each: one a row would make runtimes dequantise the whole table each time."""
    made, nodes = _Inserted(model), []
    fixed = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in fixed:
            table = numpy_helper.to_array(fixed[node.input[0]])
            if table.ndim > 1:
                nodes += made.table(node.input[0], table)
                node.input[0] = made.names[node.input[0]]
        nodes.append(node)
    _set_nodes(model, nodes)


def _drop_unused(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _set_nodes(model: onnx.ModelProto, nodes: Sequence[NodeProto]) -> None:
    held = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(held)


def _set_outputs(model: onnx.ModelProto, names: Iterable[str]) -> None:
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)


Run = Callable[[Batches, Callable[[int], None]], Iterator[tuple[int, list[NDArray[Any]]]]]


def _runner(model: onnx.ModelProto, folder: Path) -> Run:
    """Runs a graph on the CPU over batches; gives the number of rows and the outputs of each."""
    (name,) = (one.name for one in model.graph.input)
    path = folder / "probe.onnx"
    onnx.save_model(model, path, save_as_external_data=model.ByteSize() > EXTERNAL_ABOVE, location="probe.onnx.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Else it would fuse Q/DQ pairs into integer kernels, and on old CPUs those overflow.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batches: Batches, advance: Callable[[int], None]) -> Iterator[tuple[int, list[NDArray[Any]]]]:
        empty = True
        for batch in batches():
            if len(batch):
                empty = False
                yield len(batch), session.run(None, {name: batch})
            advance(1)
        if empty:
            raise ConfigError("there are no pairs to calibrate int8 on; give at least one batch, anew each time")

    return run


def _save(model: onnx.ModelProto, out: Path) -> None:
    """Weights in a file of their own come first, so that a graph that is there has them."""
    with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as folder:
        files = save_graph(model, Path(folder), out.name, external_above=EXTERNAL_ABOVE)
        for name in sorted(files, reverse=True):
            files[name].replace(out.with_name(name))
