"""From a run to a bundle, past the retrieval gate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dckt import __version__
from dckt.bundle import GRAPHS, VOCABULARY, Bundle, write_bundle
from dckt.errors import BundleError, ConfigError, CorpusError, ItemError, ParityError, RunError
from dckt.preprocessing import image_batch, token_batch
from dckt.runtime.onnx import OnnxEncoder
from dckt_export.graphs import OPSET, onnx_from_encoder, save_graph
from dckt_export.parity import FP32, Parity, Vectors, check, measure
from dckt_trainer.data.corpus import Corpus, Pair, Split, read_corpus
from dckt_trainer.encoders import OUTPUTS, encode
from dckt_trainer.model import DomainModel
from dckt_trainer.progress import Reporter, Silent
from dckt_trainer.runs import Run, open_run

BATCH = 16
LIMIT = 500


def export_bundle(
    run: str | Path,
    out: str | Path,
    *,
    representation: str = "probability",
    pairs: str | Path | None = None,
    split: Split = "val",
    limit: int = LIMIT,
    opset: int = OPSET,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Bundle:
    """Exports a run's target model, and writes the bundle only if it retrieves as the PyTorch model does.

    Both models encode the same real pairs, the exported one as it will be served: ONNX Runtime on the CPU, behind the
    SDK's own preprocessing. Both representations must pass :func:`dckt_export.parity.check`.

    Args:
        run: folder of a finished run.
        out: the bundle to write, by custom ``NAME.dckt``.
        representation: what an index of this model stores, ``probability`` or ``fc9``.
        pairs: corpus to compare on; None is the run's target corpus.
        split: part of that corpus.
        limit: at most so many of its pairs, spread evenly over it.
        opset: version of the ONNX operators.
        force: replace a bundle that is there already.
        reporter: told how far the work is.

    Raises:
        ParityError: the exported model differs; nothing was written.
        RunError: the run is missing, unfinished, damaged, or of a newer version.
        CorpusError: the pairs cannot be read, or there are none.
        ConfigError: an argument with a value that is not offered.
        BundleError: ``out`` exists, or the network cannot be exported.
    """
    out, reporter = Path(out), reporter or Silent()
    if representation not in OUTPUTS:
        raise ConfigError(f"representation is {representation!r}; expected one of {', '.join(OUTPUTS)}")
    if limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1 pair")
    if out.exists() and not force:
        raise BundleError(f"{out}: exists already; choose another name, or replace it with --force")
    opened = open_run(run)
    model, trained = opened.model(), _trained(opened)
    corpus = _corpus(opened, pairs)
    chosen = _spread(corpus.part(split), limit)
    if not chosen:
        raise CorpusError(f"{corpus.root}: no {split} pairs to compare the models on; name another --split or --pairs")
    with tempfile.TemporaryDirectory(prefix="dckt-export-") as name:
        files = _graphs(model, Path(name), opset, reporter)
        parity = _parity(model, Path(name), chosen, reporter)
        check(parity)
        return write_bundle(
            out,
            files={**files, VOCABULARY: model.vocabulary.dumps().encode()},
            image=model.trunk.spec,
            text=model.text,
            labels=model.labels,
            representation=representation,
            dimensions={"probability": len(model.labels), "fc9": model.network.width},
            produced_by=_produced_by(opened, opset),
            measured={
                "pairs": {"corpus": corpus.name, "split": split, "count": len(chosen)},
                "thresholds": asdict(FP32),
                "parity": {output: asdict(one) for output, one in parity.items()},
                **trained,
            },
            force=force,
        )


def _corpus(run: Run, pairs: str | Path | None) -> Corpus:
    if pairs is not None:
        return read_corpus(pairs, check_images="exists")
    try:
        path, skip = run.target, run.facts["target"]["on_bad_pair"] == "skip"
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}: run.json does not name the target corpus; name one with --pairs") from error
    try:
        # Only the pictures that are compared need decoding; but what training left out is to be left out again.
        return read_corpus(path, on_bad_pair="skip" if skip else "raise", check_images="decode" if skip else "exists")
    except CorpusError as error:
        raise CorpusError(
            f"{error}\nthis is the target corpus that the run was trained on; if it has moved, name it with --pairs"
        ) from error


def _spread(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """At most ``limit`` pairs, evenly spaced, because manifests are often sorted by class."""
    count = min(limit, len(pairs))
    return [pairs[place * len(pairs) // count] for place in range(count)]


def _graphs(model: DomainModel, folder: Path, opset: int, reporter: Reporter) -> dict[str, Path]:
    side = model.trunk.spec.side
    # Two of each, since 1 would be taken for a constant; what the numbers are has no effect on the graph.
    pixels, tokens = torch.zeros(2, side, side, 3, dtype=torch.uint8), torch.ones(2, 7, dtype=torch.int64)
    parts = (
        ("image", model.image_encoder(), pixels, "pixels", {0: "batch"}),
        ("text", model.text_encoder(), tokens, "tokens", {0: "batch", 1: "length"}),
    )
    files: dict[str, Path] = {}
    with reporter.task("exporting graphs", len(parts)) as advance:
        for medium, encoder, example, input_name, dynamic in parts:
            graph = onnx_from_encoder(encoder, example, input_name=input_name, dynamic=dynamic, opset=opset)
            files |= save_graph(graph, folder, GRAPHS[medium])
            advance(1)
    return files


def _parity(model: DomainModel, folder: Path, pairs: Sequence[Pair], reporter: Reporter) -> dict[str, Parity]:
    def pixels(part: Sequence[Pair]) -> NDArray[np.uint8]:
        return image_batch([pair.image for pair in part], model.trunk.spec)

    def tokens(part: Sequence[Pair]) -> NDArray[np.int64]:
        return token_batch([model.vocabulary.encode(pair.text, model.text, allow_unknown=True) for pair in part])

    with reporter.task("comparing images", len(pairs)) as advance:
        images = _both(model.image_encoder(), folder / GRAPHS["image"], pairs, pixels, advance)
    with reporter.task("comparing texts", len(pairs)) as advance:
        texts = _both(model.text_encoder(), folder / GRAPHS["text"], pairs, tokens, advance)
    labels, ids = [pair.label for pair in pairs], [pair.id for pair in pairs]
    return {
        output: measure(
            {"image": images["torch"][output], "text": texts["torch"][output]},
            {"image": images["onnx"][output], "text": texts["onnx"][output]},
            labels,
            ids,
        )
        for output in OUTPUTS
    }


def _both(
    encoder: torch.nn.Module,
    graph: Path,
    pairs: Sequence[Pair],
    prepare: Callable[[Sequence[Pair]], NDArray[Any]],
    advance: Callable[[int], None],
) -> Mapping[str, Vectors]:
    """Every representation of one medium, (N, D) float32 by output, from PyTorch and from ONNX Runtime."""
    parts: dict[str, dict[str, list[NDArray[np.float32]]]] = {
        model: {output: [] for output in OUTPUTS} for model in ("torch", "onnx")
    }
    with ExitStack() as stack:
        served = {
            output: stack.enter_context(OnnxEncoder.open(graph, output=output, device="cpu")) for output in OUTPUTS
        }
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            batch = prepare(part)
            expected = encode(encoder, torch.from_numpy(batch))
            for output in OUTPUTS:
                parts["torch"][output].append(expected[output].numpy())
                try:
                    parts["onnx"][output].append(served[output].run(batch))
                except ItemError as error:
                    raise ParityError(
                        f"{graph.name}, pairs {part[0].id} to {part[-1].id}: {error}; nothing was written"
                    ) from error
            advance(len(part))
    return {model: {output: np.concatenate(rows) for output, rows in of.items()} for model, of in parts.items()}


def _produced_by(run: Run, opset: int) -> dict[str, str]:
    return {
        "dckt": __version__,
        **{name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        "opset": str(opset),
        "config_sha256": run.facts["config_sha256"],
        "seed": str(run.config.seed),
    }


def _trained(run: Run) -> dict[str, Any]:
    """MAP on the test split, as training measured it; nothing if training left no evaluation."""
    if not (run.path / "evaluation.json").exists():
        return {}
    try:
        test = run.evaluation["test"]
        return {"test": {"pairs": test["pairs"], **test[run.evaluation["kept"]]}}
    except (KeyError, TypeError) as error:
        raise RunError(f"{run.path}: evaluation.json is not what dckt-train writes ({error}); train again") from error
