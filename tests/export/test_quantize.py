"""int8 graphs: what is quantised and how, on graphs small enough to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dckt.errors import BundleError, ConfigError
from dckt.preprocessing import image_batch, token_batch
from dckt.runtime.openvino import OpenVinoEncoder
from dckt_export.graphs import save_graph
from dckt_export.precision import layer_precisions
from dckt_export.quantize import PASSES, calibrate, int8_from_fp32
from dckt_trainer.data.corpus import Corpus
from dckt_trainer.model import DomainModel

Batches = Callable[[], Iterable[NDArray[Any]]]
OUTPUTS = ["probability", "fc9"]


def in_batches(rows: NDArray[Any], size: int = 8) -> Batches:
    return lambda: (rows[start : start + size] for start in range(0, len(rows), size))


@pytest.fixture(scope="module")
def pixels(corpus: Corpus, model: DomainModel) -> NDArray[np.uint8]:
    return image_batch([pair.image for pair in corpus.part("train")], model.trunk.spec)


@pytest.fixture(scope="module")
def tokens(corpus: Corpus, model: DomainModel) -> NDArray[np.int64]:
    encoded = [model.vocabulary.encode(pair.text, model.text, allow_unknown=True) for pair in corpus.part("train")]
    return token_batch(encoded)


@pytest.fixture(scope="module")
def files(
    graphs: dict[str, onnx.ModelProto],
    pixels: NDArray[np.uint8],
    tokens: NDArray[np.int64],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """image.onnx and text.onnx in float32, image.int8.onnx and text.int8.onnx made from them; do not change them."""
    folder = tmp_path_factory.mktemp("graphs")
    for name, rows in (("image", pixels), ("text", tokens)):
        save_graph(graphs["pixels" if name == "image" else "tokens"], folder, f"{name}.onnx")
        quantise(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", in_batches(rows))
    return folder


def quantise(graph: Path, out: Path, batches: Batches, weights_only: Iterable[str] = ()) -> None:
    int8_from_fp32(graph, out, calibrate(graph, batches), weights_only=list(weights_only))


def run(graph: Path, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(OUTPUTS, {session.get_inputs()[0].name: batch})
    return outputs


def run_openvino(graph: Path, batch: NDArray[Any]) -> list[NDArray[np.float32]]:
    pytest.importorskip("openvino")
    results = []
    for name in OUTPUTS:
        with OpenVinoEncoder.open(graph, output=name, precision="fp32") as encoder:
            results.append(encoder.run(batch))
    return results


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    cosine: NDArray[np.float32] = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    return cosine


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def a_network(folder: Path, weight: NDArray[np.float32], *, operator: str = "MatMul") -> Path:
    """vector float32 (B, D) to fc9, a product and ReLU, and to probability, a second product and softmax."""
    nodes = [
        helper.make_node(operator, ["vector", "first"], ["sum"], "first_product"),
        helper.make_node("Relu", ["sum"], ["fc9"], "relu"),
        helper.make_node(operator, ["fc9", "second"], ["logits"], "second_product"),
        helper.make_node("Softmax", ["logits"], ["probability"], "softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", len(weight)])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in OUTPUTS],
        [
            numpy_helper.from_array(weight, "first"),
            numpy_helper.from_array(weight[: weight.shape[1], :5].copy() / 50, "second"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return save_graph(model, folder, "vector.onnx")["vector.onnx"]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return a_network(tmp_path, np.random.default_rng(5).normal(size=(64, 48)).astype(np.float32))


@pytest.fixture
def vectors() -> NDArray[np.float32]:
    return np.random.default_rng(6).normal(size=(40, 64)).astype(np.float32)


class TestWhatIsQuantised:
    @pytest.mark.parametrize("medium", ["image", "text"])
    def test_all_layers_are_int8(self, files: Path, medium: str) -> None:
        before, after = (layer_precisions(onnx.load(files / f"{medium}{kind}.onnx")) for kind in ("", ".int8"))
        assert set(after) == {"int8"}
        assert after["int8"] == before["fp32"]

    @pytest.mark.parametrize("medium", ["image", "text"])
    def test_zero_points_are_zero_and_types_int8(self, files: Path, medium: str) -> None:
        model = onnx.load(files / f"{medium}.int8.onnx")
        values = constants(model)
        pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert pairs
        for node in pairs:
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
            assert (values[node.input[1]] > 0).all()

    def test_weights_have_a_step_a_channel(self, files: Path) -> None:
        model = onnx.load(files / "image.int8.onnx")
        values = constants(model)
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in values:
                (axis,) = (one.i for one in node.attribute if one.name == "axis")
                weight, step = values[node.input[0]], values[node.input[1]]
                assert step.shape == (weight.shape[axis],)
                assert weight.min() >= -127
                others = tuple(one for one in range(weight.ndim) if one != axis)
                assert (np.abs(weight.astype(int)).max(axis=others) == 127).all()

    def test_pixels_softmax_biases_and_outputs_stay_float32(self, files: Path) -> None:
        model = onnx.load(files / "image.int8.onnx")
        values, makers = constants(model), {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                assert node.input[0] != "pixels"
                assert makers[node.input[0]].op_type not in ("Cast", "Sub", "Softmax", "Conv", "Gemm")
            if node.op_type in ("Conv", "Gemm"):
                assert values[node.input[2]].dtype == np.float32
        assert [makers[output.name].op_type for output in model.graph.output] == ["Softmax", "Relu"]
        assert [output.type.tensor_type.elem_type for output in model.graph.output] == [TensorProto.FLOAT] * 2

    def test_the_embedding_table_is_int8_with_one_step(self, files: Path) -> None:
        model = onnx.load(files / "text.int8.onnx")
        makers = {name: node for node in model.graph.node for name in node.output}
        (gather,) = (node for node in model.graph.node if node.op_type == "Gather")
        values, table = constants(model), makers[gather.input[0]]
        assert values[table.input[0]].dtype == np.int8
        assert values[table.input[1]].shape == ()

    def test_the_file_shrinks_to_a_quarter(self, tmp_path: Path) -> None:
        graph = a_network(tmp_path, np.random.default_rng(5).normal(size=(512, 512)).astype(np.float32))
        quantise(graph, tmp_path / "out.onnx", in_batches(np.ones((4, 512), np.float32)))
        assert (tmp_path / "out.onnx").stat().st_size <= 0.27 * graph.stat().st_size

    def test_names_and_free_axes_of_inputs_and_outputs_stay(self, files: Path) -> None:
        for medium in ("image", "text"):
            before, after = (onnx.load(files / f"{medium}{kind}.onnx").graph for kind in ("", ".int8"))
            assert list(after.input) == list(before.input)
            assert list(after.output) == list(before.output)


class TestOutputs:
    @pytest.mark.parametrize("runner", [run, run_openvino])
    def test_they_are_close_to_float32(
        self, files: Path, pixels: NDArray[Any], tokens: NDArray[Any], runner: Callable[..., Any]
    ) -> None:
        for medium, rows in (("image", pixels), ("text", tokens)):
            expected = run(files / f"{medium}.onnx", rows)
            for one, other in zip(expected, runner(files / f"{medium}.int8.onnx", rows), strict=True):
                assert cosines(one, other).min() > 0.97

    @pytest.mark.parametrize("runner", [run, run_openvino])
    def test_batch_and_length_are_free(self, files: Path, tokens: NDArray[Any], runner: Callable[..., Any]) -> None:
        whole = runner(files / "text.int8.onnx", tokens[:5])
        padded = runner(files / "text.int8.onnx", np.pad(tokens[:5], ((0, 0), (0, 9))))
        alone = runner(files / "text.int8.onnx", tokens[:1])
        for one, longer, single in zip(whole, padded, alone, strict=True):
            np.testing.assert_allclose(one, longer, atol=2e-2)
            np.testing.assert_allclose(one[:1], single, atol=2e-2)

    @pytest.mark.parametrize("runner", [run, run_openvino])
    def test_a_vector_medium(self, network: Path, vectors: NDArray[Any], tmp_path: Path, runner: Any) -> None:
        quantise(network, tmp_path / "out.onnx", in_batches(vectors))
        for one, other in zip(run(network, vectors), runner(tmp_path / "out.onnx", vectors), strict=True):
            assert cosines(one, other).min() > 0.99

    def test_means_of_channels_are_kept(self, tmp_path: Path) -> None:
        """All data alike, so quantising shifts every row by the same, and the bias can take it back."""
        weight = np.random.default_rng(5).normal(size=(32, 24)).astype(np.float32)
        graph = onnx.load(a_network(tmp_path, weight, operator="Gemm"))
        save_graph(graph, tmp_path, "gemm.onnx")
        row = np.random.default_rng(8).normal(size=(1, 32)).astype(np.float32).repeat(4, 0)
        quantise(tmp_path / "gemm.onnx", tmp_path / "out.onnx", in_batches(row), weights_only=["second_product"])
        np.testing.assert_allclose(run(tmp_path / "out.onnx", row)[1], run(tmp_path / "gemm.onnx", row)[1], atol=1e-4)


class TestCalibration:
    def test_equal_input_gives_equal_bytes(self, files: Path, tokens: NDArray[Any], tmp_path: Path) -> None:
        quantise(files / "text.onnx", tmp_path / "again.onnx", in_batches(tokens))
        assert (tmp_path / "again.onnx").read_bytes() == (files / "text.int8.onnx").read_bytes()

    def test_larger_data_gives_larger_steps(self, network: Path, vectors: NDArray[Any], tmp_path: Path) -> None:
        steps = []
        for factor in (1, 3):
            quantise(network, tmp_path / "out.onnx", in_batches(vectors * np.float32(factor)))
            steps.append(constants(onnx.load(tmp_path / "out.onnx"))["vector/scale"])
        np.testing.assert_allclose(steps[1], 3 * steps[0], rtol=1e-5)

    def test_an_outlier_does_not_set_the_range(self, network: Path, tmp_path: Path) -> None:
        rows = np.random.default_rng(6).normal(size=(4000, 64)).astype(np.float32)
        rows[0, 0] = 12
        quantise(network, tmp_path / "out.onnx", in_batches(rows, 500))
        assert constants(onnx.load(tmp_path / "out.onnx"))["vector/scale"] < 0.6 * 12 / 127

    def test_each_batch_of_each_pass_is_told(self, network: Path, vectors: NDArray[Any]) -> None:
        told: list[int] = []
        calibrate(network, in_batches(vectors), advance=told.append)
        assert sum(told) == PASSES * 5

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_data_that_is_not_finite(self, network: Path, vectors: NDArray[Any], tmp_path: Path, value: float) -> None:
        vectors[20, 3] = value
        with pytest.raises(BundleError, match="not finite on calibration data"):
            quantise(network, tmp_path / "out.onnx", in_batches(vectors))
        assert not (tmp_path / "out.onnx").exists()

    def test_no_data(self, network: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no pairs to calibrate"):
            quantise(network, tmp_path / "out.onnx", list)

    def test_a_tensor_that_is_always_zero(self, network: Path, tmp_path: Path) -> None:
        rows = np.zeros((3, 64), np.float32)
        quantise(network, tmp_path / "out.onnx", in_batches(rows))
        assert np.isfinite(run(tmp_path / "out.onnx", rows)[0]).all()


class TestWeightsOnly:
    def test_their_data_stays_float_and_their_weights_do_not(
        self, network: Path, vectors: NDArray[Any], tmp_path: Path
    ) -> None:
        quantise(network, tmp_path / "out.onnx", in_batches(vectors), ["first_product"])
        model = onnx.load(tmp_path / "out.onnx")
        assert layer_precisions(model) == {"int8": 1, "int8 weights": 1}
        assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] == 1
        weight = constants(onnx.load(network))["first"]
        step = np.abs(weight).max(axis=0) / 127
        expected = np.maximum(vectors @ (np.round(weight / step) * step), 0)
        # ONNX Runtime may pack such a product anew, in blocks.
        assert cosines(run(tmp_path / "out.onnx", vectors)[1], expected).min() > 0.9998

    def test_they_are_closer_and_no_larger(self, network: Path, vectors: NDArray[Any], tmp_path: Path) -> None:
        errors, sizes, expected = [], [], run(network, vectors)
        for kept in ([], ["first_product"], ["first_product", "second_product"]):
            out = tmp_path / f"{len(kept)}.onnx"
            quantise(network, out, in_batches(vectors), kept)
            errors.append(float(np.square(run(out, vectors)[1] - expected[1]).sum()))
            sizes.append(out.stat().st_size)
        assert errors[0] > errors[1] == errors[2]  # fc9 is before the second product
        assert sizes == sorted(sizes, reverse=True)

    def test_one_of_two_readers_of_a_tensor(self, tmp_path: Path, vectors: NDArray[Any]) -> None:
        graph = onnx.load(a_network(tmp_path, np.random.default_rng(5).normal(size=(64, 48)).astype(np.float32)))
        twin = helper.make_node("MatMul", ["vector", "first"], ["other"], "other_product")
        graph.graph.node.insert(1, twin)
        graph.graph.node[2].input[0] = "other"  # ReLU reads the twin
        save_graph(graph, tmp_path, "twins.onnx")
        quantise(tmp_path / "twins.onnx", tmp_path / "out.onnx", in_batches(vectors), ["other_product"])
        inputs = {node.name: list(node.input) for node in onnx.load(tmp_path / "out.onnx").graph.node}
        assert inputs["other_product"] == ["vector", "first/int8"]
        assert inputs["first_product"] == ["vector/int8", "first/int8"]

    def test_an_unknown_name(self, network: Path, vectors: NDArray[Any], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="weights_only names relu; vector"):
            quantise(network, tmp_path / "out.onnx", in_batches(vectors), ["relu"])

    def test_the_most_sensitive_layer_is_first(self, tmp_path: Path) -> None:
        """One step for inputs of very different size loses the small ones, which the weights make large."""
        sizes = np.geomspace(1, 1e-4, 32, dtype=np.float32)
        weight = np.random.default_rng(5).normal(size=(32, 24)).astype(np.float32) / sizes[:, None]
        graph = a_network(tmp_path, weight)
        rows = np.random.default_rng(6).normal(size=(40, 32)).astype(np.float32) * sizes
        found = calibrate(graph, in_batches(rows))
        assert found.most_sensitive == ["first_product", "second_product"]
        assert found.weights["first_product"].noise < found.whole["first_product"].noise


class TestFiles:
    def test_a_graph_that_cannot_be_read(self, tmp_path: Path, vectors: NDArray[Any]) -> None:
        (tmp_path / "broken.onnx").write_bytes(b"broken")
        with pytest.raises(BundleError, match="cannot be read"):
            quantise(tmp_path / "broken.onnx", tmp_path / "out.onnx", in_batches(vectors))

    def test_an_interruption_leaves_nothing(
        self, network: Path, vectors: NDArray[Any], tmp_path: Path, temporary_folder: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        passes = iter(range(PASSES))

        def interrupted() -> Iterator[NDArray[Any]]:
            yield vectors
            if next(passes) == PASSES - 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantise(network, tmp_path / "out" / "out.onnx", interrupted)
        assert list((tmp_path / "out").iterdir()) == []
        assert list(temporary_folder.iterdir()) == []

    def test_success_leaves_the_file_alone_and_says_nothing(
        self,
        network: Path,
        vectors: NDArray[Any],
        tmp_path: Path,
        temporary_folder: Path,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        (tmp_path / "out").mkdir()
        quantise(network, tmp_path / "out" / "out.onnx", in_batches(vectors))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.onnx"]
        assert list(temporary_folder.iterdir()) == []
        assert capfd.readouterr() == ("", "")
        assert caplog.records == []

    def test_external_data(
        self, network: Path, vectors: NDArray[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beyond the limit of protobuf, on the way in, while calibrating, and on the way out."""
        outside = tmp_path / "outside"
        outside.mkdir()
        model = onnx.load(network)
        onnx.save_model(
            model, outside / "in.onnx", save_as_external_data=True, location="in.onnx.data", size_threshold=0
        )
        monkeypatch.setattr("dckt_export.quantize.EXTERNAL_ABOVE", 100)
        quantise(outside / "in.onnx", outside / "out.onnx", in_batches(vectors))
        quantise(network, tmp_path / "whole.onnx", in_batches(vectors))
        assert (outside / "out.onnx.data").exists()
        for one, other in zip(run(outside / "out.onnx", vectors), run(tmp_path / "whole.onnx", vectors), strict=True):
            np.testing.assert_array_equal(one, other)
