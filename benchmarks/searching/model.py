"""A model with random weights, for searching end to end where no trained one is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from dckt.bundle import write_bundle
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary

SIDE, CLASSES, WIDTH = 224, 20, 512
CHANNELS = (3, 32, 64, 128, 256, WIDTH)
WORDS = tuple("".join(letters) for letters in product("bdfglm", "aeiou", "nprst", "aeiou"))  # 750
Weights = Mapping[str, NDArray[np.generic]]


def write_model(folder: Path) -> Path:
    """Writes a bundle with five convolutions, 0.24 G multiplications a picture: about as many as squeezenet1_1 has."""
    generator = np.random.default_rng(0)
    vocabulary = Vocabulary.of(WORDS)
    write_bundle(
        folder,
        files={
            "image.onnx": _image_graph(generator),
            "text.onnx": _text_graph(generator, len(vocabulary.words)),
            "vocabulary.txt": vocabulary.dumps().encode(),
        },
        image=ImageSpec(side=SIDE),
        text=TextSpec(max_tokens=32),
        labels=[f"class{number}" for number in range(CLASSES)],
        representation="probability",
        dimensions={"probability": CLASSES, "fc9": WIDTH},
        produced_by={"made by": "benchmarks/searching/model.py"},
        measured={},
    )
    return folder


def _image_graph(generator: np.random.Generator) -> bytes:
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["numbers", "brightest"], ["shares"]),
        helper.make_node("Transpose", ["shares"], ["layer0"], perm=[0, 3, 1, 2]),
    ]
    weights: dict[str, NDArray[np.generic]] = {"brightest": np.array(255, np.float32)}
    for layer, (before, after) in enumerate(pairwise(CHANNELS)):
        weights[f"kernel{layer}"] = _random(generator, after, before, 3, 3)
        nodes += [
            helper.make_node(
                "Conv", [f"layer{layer}", f"kernel{layer}"], [f"sum{layer}"], strides=[2, 2], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Relu", [f"sum{layer}"], [f"layer{layer + 1}"]),
        ]
    nodes += [
        helper.make_node("GlobalAveragePool", [f"layer{len(CHANNELS) - 1}"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    return _model(generator, pixels, nodes, weights)


def _text_graph(generator: np.random.Generator, words: int) -> bytes:
    nodes = [
        helper.make_node("Gather", ["embedding", "tokens"], ["words"]),
        helper.make_node("ReduceMax", ["words", "positions"], ["features"], keepdims=0),
    ]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])
    return _model(generator, tokens, nodes, {"embedding": _random(generator, words, WIDTH), "positions": np.array([1])})


def _model(generator: np.random.Generator, given: ValueInfoProto, nodes: list[NodeProto], weights: Weights) -> bytes:
    """The nodes that make ``features`` (B, WIDTH), and the two outputs that follow."""
    weights = {
        **weights,
        "common": _random(generator, WIDTH, WIDTH),
        "classes": 100 * _random(generator, WIDTH, CLASSES),
    }
    nodes = [
        *nodes,
        helper.make_node("MatMul", ["features", "common"], ["fc9"]),
        helper.make_node("MatMul", ["fc9", "classes"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probability"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("probability", CLASSES), ("fc9", WIDTH))
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "random", [given], outputs, constants)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )


def _random(generator: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    inputs = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
    numbers: NDArray[np.float32] = (generator.standard_normal(shape) * np.sqrt(2 / inputs)).astype(np.float32)
    return numbers
