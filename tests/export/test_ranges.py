"""Ranges are those of a naive computation, and a float16 graph is rounded where it says so."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dckt.errors import BundleError
from dckt_export.graphs import save_graph
from dckt_export.ranges import Intermediates, largest, rounding, tensor_ranges, tensor_types

SIDE = 64


def product(weight, path, kind=TensorProto.FLOAT):
    """vectors float32 (B, 2) -> Cast -> MatMul -> Relu -> Cast -> out."""
    tensor = numpy_helper.from_array(weight.astype(helper.tensor_dtype_to_np_dtype(kind)), "weight")
    nodes = [
        helper.make_node("Cast", ["vectors"], ["given"], "take", to=kind),
        helper.make_node("MatMul", ["given", "weight"], ["product"], "multiply"),
        helper.make_node("Relu", ["product"], ["relu"], "bend"),
        helper.make_node("MatMul", ["relu", "weight"], ["second"], "again"),
        helper.make_node("Cast", ["second"], ["out"], "give", to=TensorProto.FLOAT),
    ]
    given = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", 2])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "small", [given], [out], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def test_ranges_by_hand_over_batches(tmp_path):
    graph = product(np.array([[1.0, -2.0], [3.0, 0.5]]), tmp_path / "small.onnx")
    batches = [np.array([[1, 0], [0, -1]], np.float32), np.array([[0, 2]], np.float32)]
    # products: [1, -2], [-3, -.5], [6, 1]; after ReLU [1, 0], [0, 0], [6, 1]; and again [1, -2], [0, 0], [9, -11.5]
    expected = {"vectors": 2.0, "given": 2.0, "product": 6.0, "relu": 6.0, "second": 11.5, "out": 11.5}
    assert tensor_ranges(graph, batches) == expected
    assert tensor_ranges(graph, iter(batches[:1])) == {
        **dict.fromkeys(expected, 1.0),
        "product": 3.0,
        "second": 2.0,
        "out": 2.0,
    }


def test_every_row_counts_and_is_reported(tmp_path):
    graph = product(np.eye(2), tmp_path / "small.onnx")
    rows = np.zeros((11, 2), np.float32)
    told = []
    for place in range(11):
        rows[:] = 0
        rows[place, 1] = -7
        assert tensor_ranges(graph, [rows], advance=told.append)["product"] == 7
    assert sum(told) == 11 * 11


def test_what_is_not_finite_counts_as_infinite(tmp_path):
    graph = product(np.array([[1e30, -1e30], [1e30, 1e30]]), tmp_path / "small.onnx")
    ranges = tensor_ranges(graph, [np.full((1, 2), 1e30, np.float32)])
    assert ranges["vectors"] == np.float32(1e30)
    assert ranges["product"] == float("inf")
    assert largest(np.array([1, np.nan, -3])) == float("inf")
    assert largest(np.array([1, -np.inf])) == float("inf")
    assert largest(np.array([1, -3.5])) == 3.5
    assert largest(np.zeros((0, 4))) == 0


def test_real_graphs_have_a_range_for_every_float_tensor_and_weights_may_lie_outside(graphs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    inside = tensor_ranges(save_graph(graphs["pixels"], tmp_path, "image.onnx")["image.onnx"], [pixels])
    made = {name for node in graphs["pixels"].graph.node for name in node.output}
    types = tensor_types(graphs["pixels"])
    assert inside.keys() == {name for name in made if types[name] == TensorProto.FLOAT}
    assert inside["probability"] <= 1

    copy = onnx.ModelProto()
    copy.CopyFrom(graphs["pixels"])
    (tmp_path / "large").mkdir()
    files = save_graph(copy, tmp_path / "large", "image.onnx", external_above=0)
    assert "image.onnx.data" in files
    assert tensor_ranges(files["image.onnx"], [pixels]) == inside


def test_no_rows_are_refused(tmp_path):
    graph = product(np.eye(2), tmp_path / "small.onnx")
    with pytest.raises(BundleError, match="no rows"):
        tensor_ranges(graph, [np.zeros((0, 2), np.float32)])


def test_a_graph_that_contradicts_itself_is_refused(tmp_path):
    graph = product(np.eye(2), tmp_path / "small.onnx")
    model = onnx.load(graph)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(2, dtype=np.float16), "weight"))
    onnx.save(model, graph)
    with pytest.raises(BundleError, match="types"):
        Intermediates(graph)


def test_float16_is_rounded_as_by_hand(tmp_path):
    weight = np.array([[0.1, -0.7], [0.3, 1.9]])
    graph = product(weight, tmp_path / "half.onnx", TensorProto.FLOAT16)
    rows = np.random.default_rng(1).standard_normal((50, 2)).astype(np.float32) * 100
    half = weight.astype(np.float16).astype(np.float32)
    given = rows.astype(np.float16)
    made = (given.astype(np.float32) @ half).astype(np.float16)
    relu = np.maximum(made, 0)
    second = (relu.astype(np.float32) @ half).astype(np.float16)
    tensors = Intermediates(graph).run(rows)
    for name, expected in (("given", given), ("product", made), ("relu", relu), ("second", second), ("out", second)):
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)
    assert tensors["product"].dtype == np.float16
    onnx.checker.check_model(rounding(onnx.load(graph)), full_check=True)


def test_float16_overflows_although_what_follows_would_bring_it_back(tmp_path):
    weight = np.array([[300.0, 0.0], [0.0, 0.0001]])
    graph = product(weight, tmp_path / "half.onnx", TensorProto.FLOAT16)
    tensors = Intermediates(graph).run(np.array([[300, 1]], np.float32))
    assert tensors["product"][0, 0] == np.inf
    assert tensors["out"][0, 0] == np.inf or np.isnan(tensors["out"][0, 0])


def test_a_graph_without_float16_is_left_as_it_is(graphs):
    assert rounding(graphs["tokens"]) == graphs["tokens"]
