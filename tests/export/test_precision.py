"""float16 graphs: what is in them, that they compute the same, and that no graph is named after what it is not."""

import hashlib
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dckt.errors import BundleError
from dckt.runtime.onnx import OnnxEncoder
from dckt_export.graphs import onnx_from_encoder, save_graph
from dckt_export.precision import LARGEST, MARGIN, check_label, fp16_from_fp32, layer_precisions
from dckt_export.ranges import rounding, tensor_ranges, tensor_types

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16
SIDE = 64


class Vectors(nn.Module):
    """float32 (B, 6), brought to scale by constants, to both outputs."""

    outputs = ("probability", "fc9")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.full((6,), 1000.0))

    def forward(self, rows):
        fc9 = torch.relu(self.first((rows - self.mean) / 4))
        return torch.softmax(self.last(fc9), 1), fc9


class Deep(nn.Module):
    """Pixels through ten convolutions; the third makes numbers of the size of ``peak``, the fourth brings them back."""

    outputs = ("probability", "fc9")

    def __init__(self, peak: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(24)])
        with torch.no_grad():
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            self.layers[2].weight.mul_(peak)
            self.layers[3].weight.div_(peak)
            self.layers[3].bias.zero_()
        self.last = nn.Linear(8, 5)

    def forward(self, pixels):
        maps = pixels.permute(0, 3, 1, 2).float() / 255
        for layer in self.layers:
            maps = torch.relu(layer(maps))
        fc9 = maps.mean((2, 3))
        return torch.softmax(self.last(fc9), 1), fc9


def exported(encoder, example, name, **options):
    return onnx_from_encoder(encoder.eval(), example, input_name=name, dynamic={0: "batch"}, **options)


def ranges_of(model, batch, folder):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    path = folder / "fp32.onnx"
    path.write_bytes(copy.SerializeToString())
    return tensor_ranges(path, [batch])


def run(model, batch, output="fc9"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([output], {model.graph.input[0].name: batch})[0]


def cosine(left, right):
    left, right = left.astype(np.float64), right.astype(np.float64)
    return ((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)).min()


def types_of(model):
    """By node: the float types that go in and out; Casts apart."""
    types = tensor_types(model)
    return {
        node.name: {types[name] for name in (*node.input, *node.output) if name and types[name] in (FP32, FP16)}
        for node in model.graph.node
        if node.op_type != "Cast"
    }


def by_op(model, op):
    return [node for node in model.graph.node if node.op_type == op]


@pytest.fixture(scope="module")
def batches():
    chance = np.random.default_rng(5)
    tokens = chance.integers(1, 48, (6, 9))
    tokens[2, 4:] = 0
    return {"pixels": chance.integers(0, 256, (6, SIDE, SIDE, 3), np.uint8), "tokens": tokens}


@pytest.fixture(scope="module")
def halves(graphs, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    return {name: fp16_from_fp32(graphs[name], ranges_of(graphs[name], batches[name], folder)) for name in graphs}


@pytest.mark.parametrize("name", ["pixels", "tokens"])
def test_the_graph_is_sound_and_close_to_float32(halves, graphs, batches, name, tmp_path):
    half = halves[name]
    path = save_graph(half, tmp_path, "half.onnx")["half.onnx"]
    for output in ("probability", "fc9"):
        expected = run(graphs[name], batches[name], output)
        assert cosine(expected, run(rounding(half), batches[name], output)) > 0.9999
        with OnnxEncoder.open(path, output=output, device="cpu", threads=1) as encoder:
            found = encoder.run(batches[name])
            assert encoder.run(batches[name][:0]).shape == (0, found.shape[1])
        assert found.dtype == np.float32
        assert cosine(expected, found) > 0.9999
        assert not np.array_equal(found, expected)  # something was rounded
    assert half.graph.input[0] == graphs[name].graph.input[0]
    assert list(half.graph.output) == list(graphs[name].graph.output)


@pytest.mark.parametrize("name", ["pixels", "tokens"])
def test_every_node_has_one_type_and_there_is_no_needless_cast(halves, graphs, name):
    half = halves[name]
    assert all(len(types) <= 1 for types in types_of(half).values())
    makers = {output: node for node in half.graph.node for output in node.output}
    casts = by_op(half, "Cast")
    assert all(makers[node.input[0]].op_type != "Cast" for node in casts if node.input[0] in makers)
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    assert {node.name for node in graphs[name].graph.node} <= {node.name for node in half.graph.node}


def test_islands_and_the_scaling_of_pixels_stay_in_float32(halves):
    types = types_of(halves["pixels"])
    assert all(types[node.name] == {FP32} for op in ("Softmax", "ReduceMean") for node in by_op(halves["pixels"], op))
    scaling = [node.name for op in ("Div", "Sub") for node in by_op(halves["pixels"], op)]
    assert len(scaling) == 3
    assert all(types[name] == {FP32} for name in scaling)
    others = ("Conv", "Relu", "MaxPool", "Concat", "Gemm")
    assert all(types[node.name] == {FP16} for op in others for node in by_op(halves["pixels"], op))
    assert len(by_op(halves["pixels"], "Cast")) == 6  # pixels, first layer, mean in and out, softmax, fc9


def test_a_mask_becomes_float16_at_once(halves):
    mask = next(node for node in by_op(halves["tokens"], "Cast") if node.name == "node__to_copy")
    assert mask.attribute[0].i == FP16
    assert len(by_op(halves["tokens"], "Cast")) == 3  # mask, softmax, fc9


def test_batch_and_length_stay_free(halves, graphs):
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    assert [len(run(halves["pixels"], pixels[:rows])) for rows in (1, 3)] == [1, 3]
    tokens = np.random.default_rng(0).integers(1, 48, (2, 4))
    padded = np.pad(tokens, ((0, 0), (0, 13)))
    np.testing.assert_allclose(run(halves["tokens"], tokens), run(halves["tokens"], padded), atol=1e-4)
    assert run(halves["tokens"], tokens[:1, :1]).shape == (1, 16)


def test_the_same_graph_gives_the_same_bytes_and_is_not_changed(graphs, batches, tmp_path):
    before = graphs["tokens"].SerializeToString(deterministic=True)
    ranges = ranges_of(graphs["tokens"], batches["tokens"], tmp_path)
    made = [
        fp16_from_fp32(graphs["tokens"], dict(sorted(ranges.items(), reverse=back))).SerializeToString(
            deterministic=True
        )
        for back in (False, True)
    ]
    assert hashlib.sha256(made[0]).digest() == hashlib.sha256(made[1]).digest()
    assert graphs["tokens"].SerializeToString(deterministic=True) == before


def test_weights_take_half_the_space(halves, graphs):
    def weights(model):
        return sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.data_type in (FP32, FP16))

    for name in graphs:
        assert weights(halves[name]) <= 0.505 * weights(graphs[name])


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_and_vectors_as_input(opset, tmp_path):
    model = exported(Vectors(), torch.zeros(2, 6), "vectors", opset=opset)
    rows = np.random.default_rng(3).normal(1000, 4, (7, 6)).astype(np.float32)
    half = fp16_from_fp32(model, ranges_of(model, rows, tmp_path))
    save_graph(half, tmp_path, "half.onnx")
    assert half.opset_import[0].version == opset
    assert layer_precisions(half) == {"fp16": 2}
    # 1000.3 - 1000 would keep one digit in float16; so the difference is taken in float32
    assert cosine(run(model, rows), run(rounding(half), rows)) > 0.9999


@pytest.mark.parametrize("peak", [3e3, 3e4, 9e4])
def test_what_overflows_becomes_an_island(peak, tmp_path):
    model = exported(Deep(peak), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "pixels")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    ranges = ranges_of(model, pixels, tmp_path)
    convolutions = by_op(model, "Conv")
    top = ranges[convolutions[2].output[0]]
    assert top > 3000
    expected = run(model, pixels)

    blind = fp16_from_fp32(model, dict.fromkeys(ranges, 1.0))
    half = fp16_from_fp32(model, ranges)
    types = types_of(half)
    islands = [node.name for node in convolutions if types[node.name] == {FP32}]
    overflows = top > LARGEST
    assert np.isfinite(run(rounding(blind), pixels)).all() != overflows
    assert islands == ([node.name for node in convolutions[2:4]] if overflows else [])
    found = run(rounding(half), pixels)
    assert np.isfinite(found).all()
    assert cosine(expected, found) > 0.999
    assert layer_precisions(half) == ({"fp16": 23, "fp32": 2} if overflows else {"fp16": 25})
    check_label(half, "fp16")
    # between the two convolutions nothing goes through float16 and back
    assert len(by_op(half, "Cast")) == 6 + 2 * overflows - 1


def chain(*weights, op="MatMul"):
    """vectors (B, n) through products with the weights, each followed by ReLU but the last."""
    nodes, name = [], "vectors"
    for number, _ in enumerate(weights):
        nodes.append(helper.make_node(op, [name, f"w{number}"], [f"p{number}"], f"product{number}"))
        name = f"p{number}"
    width = weights[0].shape[0]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("vectors", FP32, ["batch", width])],
        [helper.make_tensor_value_info(name, FP32, ["batch", None])],
        [numpy_helper.from_array(weight.astype(np.float32), f"w{number}") for number, weight in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def fit(model, **changed):
    names = ["vectors", *(name for node in model.graph.node for name in node.output)]
    return {**dict.fromkeys(names, 1.0), **changed}


@pytest.mark.parametrize(
    ("range_", "kind"),
    [
        (1.0, "fp16"),
        (LARGEST / MARGIN, "fp16"),
        (LARGEST / MARGIN * 1.01, "fp32"),
        (float("inf"), "fp32"),
        (0.0, "fp16"),
        (2.0**-14, "fp16"),
        (1e-6, "fp32"),
    ],
)
def test_the_range_decides(range_, kind):
    model = chain(*[np.eye(3)] * 3)
    counts = layer_precisions(fp16_from_fp32(model, fit(model, p0=range_)))
    assert counts == ({"fp16": 3} if kind == "fp16" else {"fp16": 1, "fp32": 2})


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (np.full((3, 3), 60000.0), "fp16"),
        (np.full((3, 3), 70000.0), "fp32"),
        (np.full((3, 3), 1e-9), "fp32"),
        (np.full((3, 3), 1e-6), "fp32"),
        (np.diag([1, 1e-9, 1e-12]), "fp16"),
        (np.zeros((3, 3)), "fp16"),
        (np.full((3, 3), 0.1), "fp16"),
    ],
)
def test_a_weight_that_float16_cannot_hold_is_left_as_it_is(weight, kind):
    model = chain(weight, np.eye(3))
    half = fp16_from_fp32(model, fit(model))
    assert layer_precisions(half) == ({"fp16": 2} if kind == "fp16" else {"fp16": 1, "fp32": 1})
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    if kind == "fp32":
        np.testing.assert_array_equal(kept["w0"], weight.astype(np.float32))
    else:
        np.testing.assert_array_equal(kept["w0.fp16"], weight.astype(np.float16))


def test_a_weight_that_both_precisions_read_stands_there_in_both():
    model = chain(np.eye(3), np.eye(3), np.eye(3))
    for node in model.graph.node:
        node.input[1] = "w0"
    half = fp16_from_fp32(model, fit(model, vectors=1e6))
    assert {tensor.name: tensor.data_type for tensor in half.graph.initializer} == {"w0": FP32, "w0.fp16": FP16}
    assert layer_precisions(half) == {"fp16": 2, "fp32": 1}
    rows = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(run(half, rows, "p2"), rows)


def test_an_output_that_the_graph_goes_on_with_is_cast_once():
    model = chain(np.eye(3), np.eye(3))
    model.graph.output.insert(0, helper.make_tensor_value_info("p0", FP32, ["batch", 3]))
    half = fp16_from_fp32(model, fit(model))
    onnx.checker.check_model(half, full_check=True)
    assert [output.name for output in half.graph.output] == ["p0", "p1"]
    assert Counter(node.op_type for node in half.graph.node) == {"MatMul": 2, "Cast": 3}


def test_nothing_is_rounded_between_two_islands():
    model = chain(np.eye(3), np.eye(3), np.eye(3), np.eye(3))
    second = list(model.graph.node)[2:]
    second[0].input[0] = "r"
    del model.graph.node[2:]
    light = [helper.make_node("Relu", ["p1"], ["b"], "bend"), helper.make_node("Identity", ["b"], ["r"], "same")]
    model.graph.node.extend([*light, *second])
    half = fp16_from_fp32(model, fit(model, p0=1e6, p2=1e6))
    # product0 and product1 read or make p0, product2 and product3 p2: no layer in float16 is left
    assert half.graph.node == model.graph.node
    half = fp16_from_fp32(model, fit(model, p0=1e6))
    assert types_of(half)["bend"] == types_of(half)["same"] == {FP16}


def test_indices_and_comparisons_are_made_in_float32():
    model = chain(np.eye(3), np.eye(3))
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["p0"], ["whole"], "whole", to=TensorProto.INT64),
            helper.make_node("Greater", ["p0", "w0"], ["more"], "more"),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("whole", TensorProto.INT64, ["batch", 3]))
    half = fp16_from_fp32(model, fit(model))
    onnx.checker.check_model(half, full_check=True)
    types = tensor_types(half)
    nodes = {node.name: node for node in half.graph.node}
    assert types[nodes["whole"].input[0]] == types[nodes["more"].input[0]] == FP32


def test_what_cannot_be_converted_is_refused(halves):
    model = chain(np.eye(3), np.eye(3))
    with pytest.raises(BundleError, match="no range of the tensor 'vectors'"):
        fp16_from_fp32(model, {})
    with pytest.raises(BundleError, match="float16 already"):
        fp16_from_fp32(halves["tokens"], {})
    branch = helper.make_graph(
        [helper.make_node("Identity", ["p0"], ["same"])],
        "branch",
        [],
        [helper.make_tensor_value_info("same", FP32, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["p"], "if", then_branch=branch, else_branch=branch))
    with pytest.raises(BundleError, match="a graph of its own"):
        fp16_from_fp32(model, fit(model))


# --- labels ---------------------------------------------------------------------------------------------------


def test_a_float32_graph_cannot_be_called_fp16(graphs, halves):
    for name in graphs:
        check_label(graphs[name], "fp32")
        check_label(halves[name], "fp16")
        for wrong in ("fp16", "int8"):
            layers = {"pixels": 30, "tokens": 8}[name]
            with pytest.raises(BundleError, match=f"0 of {layers} layers are in {wrong}"):
                check_label(graphs[name], wrong)
        with pytest.raises(BundleError, match="are in fp32"):
            check_label(halves[name], "fp32")
    assert layer_precisions(graphs["tokens"]) == {"fp32": 8}
    assert layer_precisions(halves["pixels"]) == {"fp16": 30}


def test_weights_in_float16_alone_do_not_make_a_graph_fp16():
    model = chain(np.eye(3))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(3, dtype=np.float16), "w0"))
    model.graph.node[0].input[1] = "wide"
    model.graph.node.insert(0, helper.make_node("Cast", ["w0"], ["wide"], "widen", to=FP32))
    assert layer_precisions(model) == {"fp32": 1}


@pytest.mark.parametrize(("islands", "passes"), [(1, True), (2, False)])
def test_nine_of_ten_layers_must_agree(islands, passes):
    weights = [np.full((3, 3), 1e-9)] * islands + [np.eye(3)] * (10 - islands)
    model = chain(*weights)
    half = fp16_from_fp32(model, fit(model))
    assert layer_precisions(half) == {"fp16": 10 - islands, "fp32": islands}
    if passes:
        check_label(half, "fp16")
    else:
        with pytest.raises(BundleError, match=r"8 of 10 .* 90%; others: product0 \(fp32\), product1 \(fp32\)"):
            check_label(half, "fp16")


def test_a_graph_without_layers_has_no_label():
    model = chain(np.eye(3), op="Add")
    with pytest.raises(BundleError, match="0 of 0"):
        check_label(model, "fp32")


@pytest.mark.parametrize(
    ("data", "weights", "kind"), [(True, True, "int8"), (False, True, "int8 weights"), (True, False, "fp32")]
)
def test_a_layer_is_int8_if_data_and_weights_are(data, weights, kind):
    model = chain(np.eye(3))
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    whole = numpy_helper.from_array(np.eye(3, dtype=np.int8), "whole")
    model.graph.initializer.extend([scale, zero, whole])
    nodes = []
    if data:
        nodes += [
            helper.make_node("QuantizeLinear", ["vectors", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        ]
        model.graph.node[0].input[0] = "d"
    if weights:
        nodes += [
            helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["dw"]),
            helper.make_node("Transpose", ["dw"], ["turned"]),
        ]
        model.graph.node[0].input[1] = "turned"
    product = model.graph.node[0]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, product])
    assert layer_precisions(model) == {kind: 1}


def test_layers_are_counted_without_their_weights(graphs, tmp_path):
    copy = onnx.ModelProto()
    copy.CopyFrom(graphs["pixels"])
    path = save_graph(copy, tmp_path, "image.onnx", external_above=0)["image.onnx"]
    assert layer_precisions(onnx.load(path, load_external_data=False)) == {"fp32": 30}
