"""The graphs compute what the encoders compute, at any size, and carry nothing that does not belong to the weights."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dckt.errors import BundleError, ConfigError
from dckt.runtime.onnx import OnnxEncoder
from dckt_export.graphs import OPSETS, onnx_from_encoder, save_graph
from dckt_trainer.config import ImageConfig
from dckt_trainer.encoders import ImageEncoder, encode
from dckt_trainer.layers import BatchNorm
from dckt_trainer.network import DomainNetwork
from dckt_trainer.trunk import build_trunk

OUTPUTS = ("probability", "fc9")


def image_graph(encoder, **options):
    side = encoder.trunk.spec.side
    pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    return onnx_from_encoder(encoder, pixels, input_name="pixels", dynamic={0: "batch"}, **options)


def text_graph(encoder, **options):
    tokens = torch.ones(3, 7, dtype=torch.int64)
    return onnx_from_encoder(encoder, tokens, input_name="tokens", dynamic={0: "batch", 1: "length"}, **options)


def some_pixels(batch, side=64):
    return np.random.default_rng(batch).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)


def some_tokens(batch, length):
    """Each row has at least one word, and is padded at the end."""
    generator = np.random.default_rng(batch * 100 + length)
    tokens = generator.integers(1, 50, (batch, length))
    for row in tokens:
        row[generator.integers(1, length + 1) :] = 0
    return tokens


def session(graph):
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def assert_same(encoder, running, name, batch):
    expected = encode(encoder, torch.from_numpy(batch))
    for output, vectors in zip(OUTPUTS, running.run(OUTPUTS, {name: batch}), strict=True):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected[output].numpy(), atol=2e-5, rtol=1e-4)


@pytest.fixture
def image(graphs):
    return graphs["pixels"]


@pytest.fixture
def text(graphs):
    return graphs["tokens"]


def shape(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_the_interface_is_the_one_that_a_bundle_promises(image, text):
    assert {v.name: (v.type.tensor_type.elem_type, shape(v)) for v in image.graph.input} == {
        "pixels": (onnx.TensorProto.UINT8, ["batch", 64, 64, 3])
    }
    assert {v.name: (v.type.tensor_type.elem_type, shape(v)) for v in text.graph.input} == {
        "tokens": (onnx.TensorProto.INT64, ["batch", "length"])
    }
    for graph in (image, text):
        assert [(v.name, v.type.tensor_type.elem_type, shape(v)) for v in graph.graph.output] == [
            ("probability", onnx.TensorProto.FLOAT, ["batch", 5]),
            ("fc9", onnx.TensorProto.FLOAT, ["batch", 16]),
        ]


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_an_image_graph_takes_any_batch(model, image, batch):
    assert_same(model.image_encoder(), session(image), "pixels", some_pixels(batch))


@pytest.mark.parametrize("batch", [1, 2, 5, 33])
@pytest.mark.parametrize("length", [1, 2, 7, 60])
def test_a_text_graph_takes_any_batch_and_length(model, text, batch, length):
    assert_same(model.text_encoder(), session(text), "tokens", some_tokens(batch, length))


def test_a_text_vector_does_not_depend_on_its_padding(text):
    running = session(text)
    tokens = some_tokens(4, 6)
    alone = running.run(OUTPUTS, {"tokens": tokens})
    padded = running.run(OUTPUTS, {"tokens": np.pad(tokens, ((0, 0), (0, 30)))})
    for one, other in zip(alone, padded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_normalisation_is_folded_and_the_other_medium_is_left_out(image, text):
    for graph, other in ((image, "pathways.text"), (text, "pathways.image")):
        assert Counter(node.op_type for node in graph.graph.node)["BatchNormalization"] == 0
        assert Counter(node.op_type for node in graph.graph.node)["Gemm"] == 5  # fc6 to fc10
        assert not [tensor.name for tensor in graph.graph.initializer if other in tensor.name]


def test_the_encoder_is_not_changed(model):
    encoder = model.text_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    text_graph(encoder)
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert isinstance(encoder.network.pathways["text"].norm, BatchNorm)


def test_a_graph_carries_no_notes_about_the_machine(image, text):
    for graph in (image, text):
        content = graph.SerializeToString()
        unwanted = ("metadata_props", "stack_trace", ".py", "dckt_trainer", torch.__version__, "pkg.torch")
        assert [note for note in unwanted if note.encode() in content] == []
        assert (graph.producer_name, graph.producer_version) == ("dckt", "")
        assert len(graph.graph.value_info) == 0


def test_two_exports_give_the_same_bytes(model, text):
    again = text_graph(model.text_encoder())
    assert again.SerializeToString(deterministic=True) == text.SerializeToString(deterministic=True)


def test_the_opset_is_the_one_that_was_asked_for(model, text):
    assert [opset.version for opset in text.opset_import] == [20]
    for opset in (OPSETS[0], OPSETS[-1]):
        graph = text_graph(model.text_encoder(), opset=opset)
        assert [opset.version for opset in graph.opset_import] == [opset]
        assert_same(model.text_encoder(), session(graph), "tokens", some_tokens(3, 5))


@pytest.mark.parametrize("opset", [17, 24])
def test_an_opset_that_the_exporter_does_not_write_is_refused(model, opset):
    with pytest.raises(ConfigError, match=f"opset is {opset}; expected 18 to 23"):
        text_graph(model.text_encoder(), opset=opset)


def test_the_exporter_says_nothing(model, capfd):
    text_graph(model.text_encoder())
    assert capfd.readouterr() == ("", "")


class FixesLength(nn.Module):
    """torch.onnx.export alone would write a graph for texts of 7 words, and say nothing."""

    outputs = ("probability", "fc9")

    def forward(self, tokens):
        rows = nn.functional.max_pool1d(tokens.float().unsqueeze(1), 1, 1).squeeze(1)
        return rows.softmax(1), rows


def test_a_network_that_fixes_a_free_axis_is_refused():
    with pytest.raises(BundleError, match=r"encoder of tokens has no ONNX form at opset 20 .*length"):
        text_graph(FixesLength())


def test_a_small_graph_is_one_file(text, tmp_path):
    assert save_graph(text, tmp_path, "text.onnx") == {"text.onnx": tmp_path / "text.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]


def test_the_weights_of_a_large_graph_get_their_own_file(model, text, tmp_path):
    copy = onnx.ModelProto.FromString(text.SerializeToString())
    files = save_graph(copy, tmp_path, "text.onnx", external_above=10_000)
    assert files == {name: tmp_path / name for name in ("text.onnx", "text.onnx.data")}
    assert files["text.onnx"].stat().st_size < files["text.onnx.data"].stat().st_size
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    tokens = some_tokens(3, 5)
    expected = encode(model.text_encoder(), torch.from_numpy(tokens))
    for output in OUTPUTS:
        with OnnxEncoder.open(moved / "text.onnx", output=output, device="cpu") as encoder:
            np.testing.assert_allclose(encoder.run(tokens), expected[output].numpy(), atol=1e-5)


def test_a_graph_that_breaks_the_rules_is_refused(text, tmp_path):
    broken = onnx.ModelProto.FromString(text.SerializeToString())
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BundleError, match=r"text\.onnx: the exported graph breaks the rules of ONNX"):
        save_graph(broken, Path(tmp_path), "text.onnx")


@pytest.mark.parametrize(
    ("trunk", "grid"),
    [
        ("vgg11_bn", 0),  # 2 x 2 maps are spread to 7 x 7
        ("resnet18", 2),
        pytest.param("mobilenet_v2", 0, marks=pytest.mark.slow),
        pytest.param("densenet121", 0, marks=pytest.mark.slow),  # some of its normalisation cannot be folded
    ],
)
def test_other_trunks(trunk, grid):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = build_trunk(ImageConfig(trunk=trunk, weights="random", side=64, grid=grid), 1)
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        network = DomainNetwork({"image": body.features, "text": 4}, 16, 5)
        network({"image": body(torch.from_numpy(some_pixels(20)))[:, None], "text": torch.randn(20, 1, 4)})
    encoder = ImageEncoder(body, network)
    graph = image_graph(encoder)
    if trunk != "densenet121":
        assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    for batch in (1, 3):
        assert_same(encoder, session(graph), "pixels", some_pixels(batch))
