"""Trying a variant: what it makes of real pairs, beside PyTorch, and how fast.

Shape letters: N pairs, D width of a representation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dckt.bundle import Variant
from dckt.errors import ItemError, ParityError
from dckt.preprocessing import image_batch, token_batch
from dckt.runtime import Encoder
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.openvino import OpenVinoEncoder
from dckt_export.graphs import Part
from dckt_export.latency import Latency, measure_latency, pairs_per_second
from dckt_export.parity import Parity, Thresholds, Vectors, failures, measure
from dckt_trainer.data.corpus import Pair
from dckt_trainer.encoders import encode
from dckt_trainer.model import DomainModel

BATCH = 16

Advance = Callable[[int], None]
Represented = Mapping[str, Vectors]
"""By representation, then by medium: (N, D) float32."""


@dataclass(frozen=True)
class Inputs:
    """What the encoders are given: the same pairs for every variant.

    Attributes:
        ids: N ids.
        labels: N labels.
        batches: by medium; batches of at most :data:`BATCH` rows, N in all.
    """

    ids: Sequence[str]
    labels: Sequence[str]
    batches: Mapping[str, Sequence[NDArray[Any]]]

    def rows(self, medium: str) -> NDArray[Any]:
        """All rows of a medium as one array; tokens are padded at the end to the longest text."""
        batches = self.batches[medium]
        if medium != "text":
            return np.concatenate(batches)
        length = max(batch.shape[1] for batch in batches)
        return np.concatenate([np.pad(batch, ((0, 0), (0, length - batch.shape[1]))) for batch in batches])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of trying a variant.

    Attributes:
        variant: which.
        parity: by representation; empty if it gave no vectors to compare.
        refused: why it is not offered, a line each; empty if it passed.
        latency: of the default representation by medium, then by batch size; empty if it was refused.
        bytes: of its graphs.
        build_seconds: what making its graphs took.
    """

    variant: Variant
    parity: Mapping[str, Parity]
    refused: tuple[str, ...]
    latency: Mapping[str, Mapping[int, Latency]]
    bytes: int
    build_seconds: float

    @property
    def milliseconds(self) -> float:
        """Median time for one picture, by which variants are ordered."""
        return 1000 * self.latency["image"][1].p50

    @property
    def pairs_per_second(self) -> float:
        """Pairs encoded in a second with the largest batches."""
        return pairs_per_second(self.latency)


def prepare(model: DomainModel, pairs: Sequence[Pair], parts: Mapping[str, Part], advance: Advance) -> Inputs:
    """Decodes pictures and tokenizes texts; other media are vectors already."""
    batches: dict[str, list[NDArray[Any]]] = {medium: [] for medium in parts}
    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        for medium in parts:
            if medium == "image":
                batch: NDArray[Any] = image_batch([pair.image for pair in some], model.trunk.spec)
            elif medium == "text":
                batch = token_batch(
                    [model.vocabulary.encode(pair.text, model.text, allow_unknown=True) for pair in some]
                )
            else:
                batch = np.stack([pair.vectors[medium] for pair in some])
            batches[medium].append(batch)
        advance(len(some))
    return Inputs([pair.id for pair in pairs], [pair.label for pair in pairs], batches)


def expected(inputs: Inputs, parts: Mapping[str, Part], advance: Advance) -> dict[str, dict[str, NDArray[np.float32]]]:
    """What PyTorch makes of the inputs, by representation and medium."""
    vectors: dict[str, dict[str, NDArray[np.float32]]] = {}
    for medium, part in parts.items():
        rows: dict[str, list[NDArray[np.float32]]] = {output: [] for output in part.encoder.outputs}
        for batch in inputs.batches[medium]:
            for output, tensor in encode(part.encoder, torch.from_numpy(batch)).items():
                rows[output].append(tensor.numpy())
            advance(len(batch))
        for output in part.encoder.outputs:
            vectors.setdefault(output, {})[medium] = np.concatenate(rows[output])
    return vectors


def open_variant(variant: Variant, graph: Path, output: str, threads: int | None = None) -> Encoder:
    """The encoder that serves a graph in the way of the variant, on the CPU."""
    if variant.runtime == "openvino":
        return OpenVinoEncoder.open(graph, output=output, precision=variant.precision, threads=threads)
    return OnnxEncoder.open(graph, output=output, device="cpu", threads=threads, precision=variant.precision)


def try_variant(
    variant: Variant,
    graphs: Mapping[str, Path],
    inputs: Inputs,
    torch_vectors: Represented,
    thresholds: Thresholds,
    *,
    compared: Mapping[str, Path] | None = None,
    representation: str,
    seconds: float,
    build_seconds: float,
    advance: Advance,
) -> Outcome:
    """Runs a variant over the inputs, holds it against PyTorch, and times it if it passes.

    Args:
        variant: which.
        graphs: its graphs by medium.
        inputs: of every medium.
        torch_vectors: what PyTorch makes of them.
        thresholds: what must be kept.
        compared: graphs to compare in place of ``graphs``, by medium, where a CPU does not compute what these say.
        representation: the output that is timed.
        seconds: how long to time each batch size.
        build_seconds: what making the graphs took.
        advance: told of rows encoded, each representation by itself.

    Raises:
        ProviderError: the runtime cannot serve this variant on this machine.
    """
    parity: dict[str, Parity] = {}
    refused: list[str] = []
    for output in torch_vectors:
        try:
            served = {
                medium: _run(variant, graph, output, inputs, medium, advance)
                for medium, graph in (compared or graphs).items()
            }
            parity[output] = measure(torch_vectors[output], served, inputs.labels, inputs.ids)
        except ParityError as error:
            refused.append(f"{output}: {error}")
    refused += failures(parity, thresholds)
    latency = {}
    if not refused:
        for medium, graph in graphs.items():
            with open_variant(variant, graph, representation) as encoder:
                latency[medium] = measure_latency(encoder, inputs.rows(medium), seconds=seconds)
    return Outcome(
        variant=variant,
        parity=parity,
        refused=tuple(refused),
        latency=latency,
        bytes=sum(file.stat().st_size for graph in graphs.values() for file in with_data(graph)),
        build_seconds=build_seconds,
    )


def with_data(graph: Path) -> list[Path]:
    """A graph's file, and that of its external data if it has any."""
    data = graph.with_name(f"{graph.name}.data")
    return [graph, data] if data.exists() else [graph]


def _run(
    variant: Variant, graph: Path, output: str, inputs: Inputs, medium: str, advance: Advance
) -> NDArray[np.float32]:
    rows = []
    with open_variant(variant, graph, output) as encoder:
        for number, batch in enumerate(inputs.batches[medium]):
            try:
                rows.append(encoder.run(batch))
            except ItemError as error:
                first = number * BATCH
                raise ParityError(
                    f"{graph.name}, pairs {inputs.ids[first]} to {inputs.ids[first + len(batch) - 1]}: {error}"
                ) from error
            advance(len(batch))
    return np.concatenate(rows)
