"""What an engine really computes in, read from TensorRT's engine inspector.

The inspector's JSON is ``{"Layers": [...], "Bindings": [...]}``. With detailed verbosity a layer is an object with
``Name``, ``LayerType``, ``Inputs`` and ``Outputs`` (each with ``Name`` and ``Format/Datatype``), and for some layers
``ParameterType`` and ``Weights``; with less verbosity it is just its name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dckt.errors import BundleError, ProviderError
from dckt.runtime.tensorrt.load import load

if TYPE_CHECKING:
    import tensorrt as trt

# Convolutions and matrix products, under the names of TensorRT's own kernels (CaskConvolution, CaskGemmConvolution,
# MatrixMultiply, ...) and of its graph compiler (gemm, conv).
_COMPUTES = re.compile(r"conv|gemm|matrixmultiply|matmul|fullyconnected", re.IGNORECASE)
# A block that the inspector does not look into; what it computes in cannot be told.
_OPAQUE = re.compile(r"^(myelin|foreignnode)$", re.IGNORECASE)
# As a plain name, "Half", or inside a sentence, "Channel major FP16 format where channel % 8 == 0".
_PRECISIONS: Mapping[str, re.Pattern[str]] = {
    "fp16": re.compile(r"\b(half|fp16|float16)\b", re.IGNORECASE),
    "bf16": re.compile(r"\b(bf16|bfloat16)\b", re.IGNORECASE),
    "fp8": re.compile(r"\bfp8\b", re.IGNORECASE),
    "int8": re.compile(r"\bint8\b", re.IGNORECASE),
    "fp32": re.compile(r"\b(float|fp32|float32)\b", re.IGNORECASE),
}
UNKNOWN = "unknown"
# Precisions that count for an engine of that name. Both may hold a few layers that are kept in float32.
LOW: Mapping[str, tuple[str, ...]] = {"fp16": ("fp16",), "int8": ("int8", "fp16")}
SHARE = 0.9


def engine_information(engine: trt.ICudaEngine, input_name: str, shape: tuple[int, ...]) -> str:
    """The inspector's JSON of all layers.

    Args:
        engine: built with detailed verbosity.
        input_name: the input whose shape is free.
        shape: a size for it; without one the inspector leaves out the types of all tensors.

    Raises:
        ProviderError: TensorRT gives no context, or refuses the shape.
    """
    load()
    import tensorrt as trt

    context = engine.create_execution_context()
    if context is None or not context.set_input_shape(input_name, shape):
        raise ProviderError(f"TensorRT gives no execution context for {input_name} {shape}; is the GPU's memory full?")
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    information: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return information


def layer_precisions(information: str) -> dict[str, int]:
    """Convolution and matrix layers by the precision that they compute in, such as ``{"fp16": 17, "fp32": 1}``.

    A layer computes in the type of its first input; where the inspector does not give it, in that of its weights. A
    layer with neither counts as ``"unknown"``.

    Raises:
        ProviderError: the text is not the inspector's JSON with details, or holds blocks that it does not look into.
    """
    counts: Counter[str] = Counter()
    for layer in _layers(information):
        if not isinstance(layer, dict):
            raise ProviderError(
                f"the engine names its layers without details ({str(layer)[:80]!r}); "
                "it was not built by dckt: build it again with dckt engine"
            )
        kinds = [str(layer.get(key, "")) for key in ("LayerType", "ParameterType")]
        if any(_OPAQUE.search(kind) for kind in kinds):
            raise ProviderError(f"the engine hides what {str(layer.get('Name'))[:80]!r} computes in ({kinds[0]})")
        if any(_COMPUTES.search(kind) for kind in kinds):
            counts[_precision(layer)] += 1
    return dict(counts)


def check_layers(layers: Mapping[str, int], precision: str, name: str) -> None:
    """Refuses an engine that is not what it is called.

    Args:
        layers: as :func:`layer_precisions` gives them.
        precision: ``"fp32"`` promises nothing; fp16 and int8 promise 90 % of the layers.
        name: the engine, for the message.

    Raises:
        BundleError: fewer layers than promised, or no layer at all.
    """
    total = sum(layers.values())
    found = ", ".join(f"{count} in {kind}" for kind, count in sorted(layers.items())) or "none"
    if not total:
        raise BundleError(f"{name}: the engine inspector shows no convolution or matrix layer, so nothing is proved")
    if precision in LOW:
        low = sum(layers.get(kind, 0) for kind in LOW[precision])
        if low < SHARE * total:
            raise BundleError(
                f"{name}: asked for as {precision}, but of {total} convolution and matrix layers {found}; "
                f"expected {SHARE:.0%} in {' or '.join(LOW[precision])}; export the graph again"
            )


def _layers(information: str) -> list[Any]:
    try:
        content = json.loads(information)
        layers = content["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProviderError(f"the engine inspector gave no JSON of layers: {information[:200]!r}") from error
    if not isinstance(layers, list):
        raise ProviderError(f"the engine inspector gave no list of layers: {information[:200]!r}")
    return layers


def _precision(layer: Mapping[str, Any]) -> str:
    inputs, weights = layer.get("Inputs"), layer.get("Weights")
    first = inputs[0] if isinstance(inputs, list) and inputs else None
    texts = (
        first.get("Format/Datatype") if isinstance(first, dict) else None,
        weights.get("Type") if isinstance(weights, dict) else None,
    )
    for text in texts:
        for precision, pattern in _PRECISIONS.items():
            if isinstance(text, str) and pattern.search(text):
                return precision
    return UNKNOWN
