"""A domain's encoders as ONNX graphs.

Shape letters: B batch, S side, L tokens, C classes, D width. Same weights, same bytes: what the exporter notes about
machine, source lines and versions is taken out, because the model id is a hash of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from dckt.errors import BundleError, ConfigError
from dckt_trainer.encoders import Encoder, VectorEncoder
from dckt_trainer.layers import BatchNorm
from dckt_trainer.model import DomainModel
from dckt_trainer.network import Pathway

# 18 is the first that the exporter writes. Every ONNX Runtime that dckt accepts reads up to 21.
OPSETS = range(18, 24)
OPSET = 20
# A protocol buffer ends at 2 GiB; what is larger keeps its weights in a file of their own.
EXTERNAL_ABOVE = 1_800_000_000


@dataclass(frozen=True)
class Part:
    """What one medium's graph is made from.

    Attributes:
        encoder: one input, two outputs.
        example: any valid input, with at least 2 on its dynamic axes; its numbers have no effect on the graph.
        input_name: name of the graph's input.
        dynamic: axes whose size is free, with their names.
    """

    encoder: Encoder
    example: Tensor
    input_name: str
    dynamic: Mapping[int, str]

    def onnx(self, opset: int) -> onnx.ModelProto:
        """The graph; see :func:`onnx_from_encoder`."""
        return onnx_from_encoder(
            self.encoder, self.example, input_name=self.input_name, dynamic=self.dynamic, opset=opset
        )


def parts(model: DomainModel) -> dict[str, Part]:
    """What to export of a model, by medium: pictures, texts, and any other medium that its network takes as vectors."""
    side = model.trunk.spec.side
    pixels, tokens = torch.zeros(2, side, side, 3, dtype=torch.uint8), torch.ones(2, 7, dtype=torch.int64)
    known = {
        "image": Part(model.image_encoder(), pixels, "pixels", {0: "batch"}),
        "text": Part(model.text_encoder(), tokens, "tokens", {0: "batch", 1: "length"}),
    }
    others = {
        medium: Part(VectorEncoder(medium, model.network), torch.zeros(2, width), "vectors", {0: "batch"})
        for medium, width in model.network.inputs.items()
        if medium not in known
    }
    return known | others


def onnx_from_encoder(
    encoder: Encoder, example: Tensor, *, input_name: str, dynamic: Mapping[int, str], opset: int = OPSET
) -> onnx.ModelProto:
    """The graph of an encoder, with its two outputs, ``probability`` (B, C) and another (B, D), float32.

    Batch normalisation is folded into the layer before it, and that of text vectors into the layer behind it.

    Args:
        encoder: one input, two outputs; it is not changed.
        example: any valid input. At least 2 on its dynamic axes, since PyTorch takes 1 for a constant.
        input_name: name of the graph's input.
        dynamic: axes whose size is free, with their names; 0, the batch, is one of them.
        opset: version of the ONNX operators.

    Raises:
        ConfigError: the opset is none of :data:`OPSETS`.
        BundleError: the network holds something that has no ONNX form, or that fixes a dynamic axis.
    """
    if opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    folded = _fold_text_norm(copy.deepcopy(encoder).cpu().eval())
    free = {axis: torch.export.Dim(name, min=1) for axis, name in dynamic.items()}
    try:
        with torch.no_grad():
            # Apart from torch.onnx.export, which would fix an axis that it cannot keep free and say nothing.
            program = torch.export.export(folded, (example,), dynamic_shapes=(free,))
            exported = torch.onnx.export(
                program,
                input_names=[input_name],
                output_names=encoder.outputs,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    # The exporter and what it traces raise errors of every kind; all mean that there is no such graph.
    except Exception as error:
        raise BundleError(
            f"the encoder of {input_name} has no ONNX form at opset {opset} "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); use another trunk or opset"
        ) from error
    if exported is None:
        raise BundleError(f"PyTorch {torch.__version__} wrote no graph for the encoder of {input_name}")
    return _plain(exported.model_proto, dynamic)


def save_graph(
    model: onnx.ModelProto, folder: Path, name: str, *, external_above: int = EXTERNAL_ABOVE
) -> dict[str, Path]:
    """Writes a graph, with its weights in ``NAME.data`` beside it if they are large, and checks what was written.

    Args:
        model: the graph; where the weights go to a file of their own, it is left without them.
        folder: must exist.
        name: name of the file.
        external_above: bytes of weights above which they get a file of their own.

    Returns:
        The files by name.

    Raises:
        BundleError: the graph breaks the rules of ONNX.
    """
    path = folder / name
    data = f"{name}.data"
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > external_above:
        onnx.save_model(model, path, save_as_external_data=True, location=data)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(
            f"{name}: the exported graph breaks the rules of ONNX ({error}); try another opset"
        ) from error
    return {file: folder / file for file in (name, data) if (folder / file).exists()}


def _fold_text_norm(encoder: nn.Module) -> nn.Module:
    """Moves the normalisation in front of fc6 into fc6; the exporter folds only what stands behind a layer."""
    for pathway in encoder.modules():
        if isinstance(pathway, Pathway) and isinstance(pathway.norm, BatchNorm):
            norm, linear = copy.deepcopy(pathway.norm).double(), pathway.fc6.linear
            with torch.no_grad():
                width = linear.in_features
                shift = norm(torch.zeros(1, width, dtype=torch.float64))
                scale = norm(torch.ones(1, width, dtype=torch.float64)) - shift
                weight = linear.weight.double()
                linear.bias.copy_(linear.bias.double() + weight @ shift[0])
                linear.weight.copy_(weight * scale)
            pathway.norm = nn.Identity()
    return encoder


def _plain(model: onnx.ModelProto, dynamic: Mapping[int, str]) -> onnx.ModelProto:
    """Takes out notes, and gives free axes their names instead of numbered symbols."""
    _strip(model)
    # The versions stand in the manifest; here they would give the same weights another model id.
    model.producer_name, model.producer_version = "dckt", ""
    (given,) = model.graph.input
    for axis, name in dynamic.items():
        given.type.tensor_type.shape.dim[axis].dim_param = name
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = dynamic[0]
    return model


def _strip(message: Any) -> None:
    """Clears notes in a protocol buffer message and in all that it holds."""
    for field, value in message.ListFields():
        # Shapes of inner values hold symbols that are numbered anew each time, and mislead tools that edit graphs.
        if field.name in ("doc_string", "metadata_props", "value_info"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                _strip(item)
