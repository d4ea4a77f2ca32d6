"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dckt.bundle import Graph, write_bundle
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "yellow": (255, 255, 0),
}
LABELS = ("blue", "green", "red", "white")
FILLERS = ("a", "picture", "of", "bag")
SIDE = 8


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed the generators that layers are drawn from, before any fixture: no test may depend on those before it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):  # the SDK's tests do without
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora; a test that asks for it is skipped, loudly, where there is none."""
    if "DCKT_DATA" not in os.environ:
        pytest.skip("set DCKT_DATA to the folder of corpora")
    return Path(os.environ["DCKT_DATA"])


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle that knows colours: a red picture and the text "red" get nearly the same vector.

    Both graphs average their input to one colour in 0..1 and share a head: ``fc9`` (B, 6) is the colour beside
    its complement, so never zero; ``probability`` (B, 4) is the nearness to blue, green, red and white. The
    vocabulary holds the names in ``COLOURS`` and the ``FILLERS``, which are grey. Do not write into it; copy it.
    """
    return _write_bundle(tmp_path_factory.mktemp("bundle") / "tiny.dckt", {})


@pytest.fixture(scope="session")
def audio_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a third medium, ``audio``: three numbers, which are a colour in 0..1. Do not write into it."""
    return _write_bundle(tmp_path_factory.mktemp("bundle") / "audio.dckt", {"audio": _audio_graph()})


def _write_bundle(folder: Path, others: Mapping[str, bytes]) -> Path:
    vocabulary = Vocabulary.of((*COLOURS, *FILLERS))
    graphs = {"image": _image_graph(), "text": _text_graph(vocabulary), **others}
    write_bundle(
        folder,
        files={
            **{f"{medium}.onnx": graph for medium, graph in graphs.items()},
            "vocabulary.txt": vocabulary.dumps().encode(),
        },
        graphs={"fp32": {medium: Graph(file=f"{medium}.onnx", layers={}) for medium in graphs}},
        image=ImageSpec(side=SIDE, crop_share=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        text=TextSpec(max_tokens=16),
        labels=LABELS,
        representation="probability",
        dimensions={"probability": len(LABELS), "fc9": 6},
        produced_by={"made by": "tests/conftest.py"},
        measured={"map": {"average": 1.0}},
    )
    return folder


@pytest.fixture
def tiny_bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of its own for a test that damages it."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.dckt"))


@pytest.fixture(scope="session")
def colour_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A PNG file, 12 x 10, filled with each of ``COLOURS``, by the colour's name."""
    folder = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        Image.new("RGB", (12, 10), colour).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in COLOURS}


def _image_graph() -> bytes:
    from onnx import TensorProto, helper

    return _model(
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", SIDE, SIDE, 3]),
        [
            helper.make_node("Cast", ["pixels"], ["float_pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float_pixels", "image_axes"], ["mean"], keepdims=0),
            helper.make_node("Div", ["mean", "scale"], ["colour"]),
        ],
        {"image_axes": np.array([1, 2]), "scale": np.array(255, np.float32)},
    )


def _audio_graph() -> bytes:
    from onnx import TensorProto, helper

    return _model(
        helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", 3]),
        [helper.make_node("Identity", ["vectors"], ["colour"])],
        {},
    )


def _text_graph(vocabulary: Vocabulary) -> bytes:
    from onnx import TensorProto, helper

    grey = (127.5, 127.5, 127.5)
    embedding = np.array([COLOURS.get(word, grey) for word in vocabulary.words], np.float32) / 255
    return _model(
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"]),
        [
            helper.make_node("Gather", ["embedding", "tokens"], ["words"]),
            helper.make_node("Equal", ["tokens", "padding"], ["is_padding"]),
            helper.make_node("Not", ["is_padding"], ["is_word"]),
            helper.make_node("Cast", ["is_word"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["words", "mask3"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "text_axis"], ["total"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "text_axis"], ["count"], keepdims=1),
            helper.make_node("Max", ["count", "one"], ["divisor"]),
            helper.make_node("Div", ["total", "divisor"], ["colour"]),
        ],
        {
            "embedding": embedding,
            "padding": np.array(0),
            "last": np.array([-1]),
            "text_axis": np.array([1]),
            "one": np.array(1, np.float32),
        },
    )


def _model(graph_input: object, nodes: list[object], constants: Mapping[str, np.ndarray]) -> bytes:
    """The nodes that make ``colour`` (B, 3), and the head that both graphs share."""
    from onnx import TensorProto, helper, numpy_helper

    centres = np.array([COLOURS[label] for label in LABELS], np.float32) / 255
    sharpness = 10  # logits are -sharpness * squared distance, less what all classes share
    constants = {
        **constants,
        "fc9_weight": np.hstack([np.eye(3), -np.eye(3)]).astype(np.float32),
        "fc9_bias": np.array([0, 0, 0, 1, 1, 1], np.float32),
        "fc10_weight": (2 * sharpness * centres.T).astype(np.float32),
        "fc10_bias": (-sharpness * (centres**2).sum(axis=1)).astype(np.float32),
    }
    head = [
        helper.make_node("Gemm", ["colour", "fc9_weight", "fc9_bias"], ["fc9"]),
        helper.make_node("Gemm", ["colour", "fc10_weight", "fc10_bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probability"], axis=1),
    ]
    graph = helper.make_graph(
        [*nodes, *head],
        "colours",
        [graph_input],
        [
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", len(LABELS)]),
            helper.make_tensor_value_info("fc9", TensorProto.FLOAT, ["batch", 6]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()
