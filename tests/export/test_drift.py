"""The layer that is named is the one that was spoilt."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dckt_export.drift import first_drift, first_unlike
from dckt_export.graphs import save_graph
from dckt_export.precision import fp16_from_fp32
from dckt_export.ranges import tensor_ranges

SIDE = 64
FP32 = TensorProto.FLOAT


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def tokens():
    return np.array([[3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0]])


@pytest.fixture(scope="module")
def files(graphs, tmp_path_factory):
    """Both float32 graphs on disk, by the name of their input."""
    folder = tmp_path_factory.mktemp("fp32")
    return {name: save_graph(copy_of(graphs[name]), folder, f"{name}.onnx")[f"{name}.onnx"] for name in graphs}


def copy_of(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def spoilt(model, name, change):
    """A copy in which one weight is another."""
    model = copy_of(model)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


def saved(model, folder):
    return save_graph(model, folder, "variant.onnx")["variant.onnx"]


def reader(model, weight):
    return next(node for node in model.graph.node if weight in node.input)


def overflowing(peak):
    """vectors (B, 4) through three convolutions; the second makes ``peak``, and the third takes it back."""
    chance = np.random.default_rng(0)
    weights = [chance.uniform(0.1, 0.5, (6, 4 if place == 0 else 6, 1, 1)) for place in range(3)]
    weights[1] *= peak
    weights[2] /= peak
    nodes = [helper.make_node("Reshape", ["vectors", "shape"], ["maps"], "spread")]
    name = "maps"
    for place in range(3):
        nodes.append(helper.make_node("Conv", [name, f"w{place}"], [f"c{place}"], f"conv{place}"))
        nodes.append(helper.make_node("Relu", [f"c{place}"], [f"r{place}"], f"relu{place}"))
        name = f"r{place}"
    nodes.append(helper.make_node("Flatten", [name], ["fc9"], "flat"))
    tensors = [numpy_helper.from_array(weight.astype(np.float32), f"w{place}") for place, weight in enumerate(weights)]
    graph = helper.make_graph(
        nodes,
        "overflow",
        [helper.make_tensor_value_info("vectors", FP32, ["batch", 4])],
        [helper.make_tensor_value_info("fc9", FP32, ["batch", None])],
        [*tensors, numpy_helper.from_array(np.array([-1, 4, 1, 1]), "shape")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_overflow_names_the_convolution_and_islands_heal_it(tmp_path):
    model = overflowing(1e5)
    path = tmp_path / "fp32.onnx"
    onnx.save(model, path)
    rows = np.random.default_rng(1).uniform(1, 2, (3, 4)).astype(np.float32)
    ranges = tensor_ranges(path, [rows])
    assert 65504 < ranges["c1"] < 1e6

    # As if no range had been read; only the weights that float16 cannot hold are brought into it.
    blind = fp16_from_fp32(model, dict.fromkeys(ranges, 1.0))
    drift = first_drift(path, saved(blind, tmp_path), rows)
    assert drift is not None
    assert (drift.layer, drift.op, drift.finite, drift.error) == ("conv1", "Conv", False, float("inf"))
    assert drift.largest == pytest.approx(ranges["c1"], rel=1e-6)
    assert str(drift) == f"conv1 (Conv): numbers that are not finite; in float32 its output reaches {drift.largest:.4g}"

    assert first_drift(path, saved(fp16_from_fp32(model, ranges), tmp_path), rows) is None


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("pixels", "trunk.body.6.squeeze.weight"),
        ("pixels", "network.fc8.linear.weight"),
        ("tokens", "reader.convolutions.1.weight"),
        ("tokens", "network.pathways.text.fc6.linear.weight"),
    ],
)
def test_a_spoilt_weight_is_found_in_float16_and_against_pytorch(
    graphs, files, model, pixels, tokens, tmp_path, name, weight
):
    def change(values):
        values.reshape(-1)[: values.size // 4] *= -1

    batch = {"pixels": pixels, "tokens": tokens}[name]
    encoder = {"pixels": model.image_encoder, "tokens": model.text_encoder}[name]()
    damaged = spoilt(graphs[name], weight, change)
    expected = reader(damaged, weight).name

    drift = first_drift(files[name], saved(damaged, tmp_path), batch)
    assert drift is not None
    assert drift.layer == expected
    assert drift.finite
    assert drift.error > 0.04

    half = fp16_from_fp32(damaged, tensor_ranges(files[name], [batch]))
    drift = first_drift(files[name], saved(half, tmp_path), batch)
    assert drift is not None
    assert drift.layer == expected

    drift = first_unlike(saved(damaged, tmp_path), encoder, batch)
    assert drift is not None
    assert drift.layer == expected


def test_a_sound_export_is_like_pytorch_in_every_layer(files, model, pixels, tokens):
    assert first_unlike(files["pixels"], model.image_encoder(), pixels) is None
    assert first_unlike(files["tokens"], model.text_encoder(), tokens) is None
    # and every layer is compared: with no tolerance the first one differs
    drift = first_unlike(files["tokens"], model.text_encoder(), tokens, tolerance=-1)
    assert drift is not None
    assert drift.op == "Conv"


def test_watching_pytorch_leaves_no_hooks(files, model, tokens):
    encoder = model.text_encoder()
    first_unlike(files["tokens"], encoder, tokens)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_the_tolerance_decides(graphs, files, pixels, tmp_path):
    half = saved(fp16_from_fp32(graphs["pixels"], tensor_ranges(files["pixels"], [pixels])), tmp_path)
    assert first_drift(files["pixels"], half, pixels) is None
    drift = first_drift(files["pixels"], half, pixels, tolerance=1e-6)
    assert drift is not None
    assert drift.op == "Conv"  # the scaling before it is in float32
    assert 1e-6 < drift.error < 0.01
    assert first_drift(files["pixels"], files["pixels"], pixels, tolerance=0) is None


def test_renamed_tensors_and_inserted_nodes_are_no_hindrance(graphs, files, tokens, tmp_path):
    damaged = spoilt(graphs["tokens"], "network.fc8.linear.weight", lambda values: values.__imul__(-1))
    for node in damaged.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_q" if name.startswith("getitem") else name for name in names]
    drift = first_drift(files["tokens"], saved(damaged, tmp_path), tokens)
    assert drift is not None
    assert drift.layer == reader(graphs["tokens"], "network.fc8.linear.weight").name


def test_a_right_output_of_zeros_has_no_direction_to_lose(tmp_path):
    model = overflowing(1.0)
    silent = spoilt(model, "w0", lambda values: values.fill(0))
    onnx.save(silent, tmp_path / "zero.onnx")
    onnx.save(model, tmp_path / "some.onnx")
    rows = np.ones((1, 4), np.float32)
    assert first_drift(tmp_path / "zero.onnx", tmp_path / "zero.onnx", rows) is None
    drift = first_drift(tmp_path / "zero.onnx", tmp_path / "some.onnx", rows)
    assert drift is not None
    assert (drift.layer, drift.error, drift.finite, drift.largest) == ("conv0", float("inf"), True, 0.0)
