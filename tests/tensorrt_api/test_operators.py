"""What our graphs ask of TensorRT's ONNX parser: operators, types, and where pixels become floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from dckt.runtime.tensorrt.operators import unsupported
from dckt_export.graphs import OPSET

Exported = Any  # tests/tensorrt_api/conftest.py


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["squeezenet1_1", "mobilenet_v2"])
@pytest.mark.parametrize("name", ["image", "text", "image.fp16", "text.fp16", "image.int8", "text.int8"])
def test_parser_takes_our_graphs(exported: Mapping[str, Exported], trunk: str, name: str) -> None:
    found = set(uses(exported[trunk].graphs[name]))
    assert {operator for operator, _ in found} >= {"Conv", "Gemm", "Softmax", "Relu"}
    assert (("Conv", "float16") in found) == name.endswith("fp16")
    assert (("DequantizeLinear", "int8") in found) == name.endswith("int8")
    assert unsupported(found, OPSET) == []


def test_pixels_are_cast_before_anything_else() -> None:
    """The table allows uint8 for a network's input alone."""
    node = helper.make_node("Transpose", ["pixels"], ["turned"], perm=[0, 3, 1, 2])
    given = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 8, 8, 3])
    made = helper.make_tensor_value_info("turned", TensorProto.UINT8, ["batch", 3, 8, 8])
    model = helper.make_model(helper.make_graph([node], "turns", [given], [made]))
    (mistake,) = unsupported(uses(model), OPSET)
    assert mistake.startswith("Transpose on uint8")


def uses(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Each operator with the type of its data: of its first input, of Where of its output."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = inferred.graph
    types = {one.name: one.type.tensor_type.elem_type for one in (*graph.value_info, *graph.input, *graph.output)}
    types |= {one.name: one.data_type for one in graph.initializer}
    for node in graph.node:
        data = node.output[0] if node.op_type in {"Where", "Constant"} else node.input[0]
        yield node.op_type, str(helper.tensor_dtype_to_np_dtype(types[data]))
