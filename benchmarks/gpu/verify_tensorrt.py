"""Proves a bundle's TensorRT engines on this machine: builds them, looks into them, compares, times.

    python benchmarks/gpu/verify_tensorrt.py shop.dckt
    python benchmarks/gpu/verify_tensorrt.py shop.dckt --pairs corpus/ --split val --run runs/shop
    python benchmarks/gpu/verify_tensorrt.py shop.dckt --graphs fp16 int8 --profile 1,8,64 --seconds 5

For every precision that the bundle has: builds the engines (dckt's own checks refuse one that does not compute in that
precision or gives other vectors), encodes real pairs (--pairs), or generated inputs, with the engine and with ONNX
Runtime on the CPU in float32, compares vectors and, on labelled pairs, MAP. Times both at batch 1, 8 and 32 beside
ONNX Runtime on CUDA with the same graph and, with --run and PyTorch, the trained model under autocast to float16.

Prints one Markdown table. Ends with 1 if anything failed, with 2 if this machine cannot build engines.
Needs an NVIDIA GPU and pip install 'dckt[tensorrt]'; the comparisons need onnxruntime-gpu and 'dckt[export]'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dckt.bundle import Bundle
from dckt.collect import collect_pairs
from dckt.commands.engine import parse_profile
from dckt.errors import CorpusError, DcktError, ProviderError
from dckt.metrics import cross_media_map
from dckt.preprocessing import image_batch, token_batch
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.tensorrt.cache import Engine
from dckt.runtime.tensorrt.encoder import TensorRTEncoder
from dckt.runtime.tensorrt.engines import MIN_COSINE, build_engines, generated_batch, min_cosine
from dckt.runtime.tensorrt.load import Machine, machine
from dckt_export.latency import Latency, measure_latency

BATCHES = (1, 8, 32)
# How far MAP of either direction may move on real pairs.
MAP_CHANGE = {"fp32": 0.0005, "fp16": 0.002, "int8": 0.005}
GENERATED_ROWS = 40
CHUNK = 32

Rows = Mapping[str, NDArray[Any]]  # inputs of each medium


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", nargs="+", choices=tuple(MIN_COSINE), help="precisions; all that the bundle has")
    parser.add_argument("--profile", default=None, help="batch sizes MIN,OPT,MAX; the bundle's unless given")
    parser.add_argument(
        "--pairs", type=Path, help="corpus of labelled pairs to compare on; generated inputs unless given"
    )
    parser.add_argument("--split", help="part of that corpus")
    parser.add_argument("--limit", type=int, default=500, help="at most so many pairs")
    parser.add_argument("--run", type=Path, help="training run that the bundle came from, to time PyTorch")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to time each batch size")
    parser.add_argument("--hardware-compatible", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder for the engines; a temporary one unless given")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = argument_parser().parse_args(arguments)
    try:
        here = machine()
        bundle = Bundle.open(given.bundle)
        with tempfile.TemporaryDirectory(prefix="dckt-verify-") as folder:
            return verify(bundle, here, given, given.cache or Path(folder))
    except DcktError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify(bundle: Bundle, here: Machine, given: argparse.Namespace, cache: Path) -> int:
    inputs, labels = real_pairs(bundle, given) if given.pairs else (generated(bundle), [])
    profile = None if given.profile is None else parse_profile(given.profile)
    table = Table()
    failures: list[str] = []
    reference = vectors(
        inputs, lambda medium: OnnxEncoder.open(bundle.graph(medium), output=output(bundle), device="cpu")
    )
    precisions = given.graphs or [name for name in MIN_COSINE if name in bundle.manifest.graphs]
    for precision in precisions:
        try:
            engine = build_engines(
                bundle,
                graph=precision,
                profile=profile,
                hardware_compatible=given.hardware_compatible,
                cache=cache,
                force=True,
                progress=None,
            )
            made = vectors(inputs, partial(open_engine, engine, output=output(bundle)))
            failures += compare(engine, made, labels, reference, table)
            time_engine(bundle, engine, inputs, given.seconds, table)
        except DcktError as error:
            failures.append(f"tensorrt-{precision}: {error}")
        failures += time_onnxruntime(bundle, precision, inputs, given.seconds, table)
    if given.run:
        time_torch(given.run, inputs, given.seconds, table)
    print(f"{here.gpu}, compute capability {here.compute_capability}, TensorRT {here.tensorrt}, CUDA {here.runtime}.\n")
    compared = f"{len(next(iter(inputs.values())))} pairs of {given.pairs}" if given.pairs else "generated inputs"
    print(f"Compared with ONNX Runtime on the CPU in float32, {output(bundle)}, on {compared}. Latency: p50 / p95.\n")
    table.show()
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


# --- inputs -------------------------------------------------------------------------------------------------


def output(bundle: Bundle) -> str:
    return bundle.manifest.representation


def generated(bundle: Bundle) -> Rows:
    inputs = {}
    for medium in bundle.manifest.graphs["fp32"]:
        with OnnxEncoder.open(bundle.graph(medium), output=output(bundle), device="cpu") as encoder:
            inputs[medium] = generated_batch(encoder, bundle, GENERATED_ROWS)
    return inputs


def real_pairs(bundle: Bundle, given: argparse.Namespace) -> tuple[Rows, list[str]]:
    collection = collect_pairs(given.pairs, split=given.split)
    count = min(given.limit, len(collection.images))
    chosen = [place * len(collection.images) // count for place in range(count)]
    images = [collection.images[place] for place in chosen]
    texts = [collection.texts[place] for place in chosen]
    labels = [str(item.metadata.get("label", "")) for item in images]
    if not all(labels):
        raise CorpusError(f"{given.pairs}: MAP needs a label for every pair")
    spec, vocabulary = bundle.manifest.text, bundle.vocabulary
    tokens = [vocabulary.encode(item.source, spec, allow_unknown=True) for item in texts]
    inputs: dict[str, NDArray[Any]] = {
        "image": image_batch([item.source for item in images], bundle.manifest.image),
        "text": token_batch(tokens),
    }
    return inputs, labels


def vectors(inputs: Rows, opened: Callable[[str], Any]) -> dict[str, NDArray[np.float32]]:
    """Vectors of each medium, chunk by chunk."""
    made = {}
    for medium, rows in inputs.items():
        with opened(medium) as encoder:
            made[medium] = np.concatenate(
                [encoder.run(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
            )
    return made


# --- what is measured ---------------------------------------------------------------------------------------


class Table:
    """One line for each medium of each variant."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, str]] = {}

    def add(self, variant: str, medium: str, **cells: str) -> None:
        """Fills cells of a line, by the names of their columns."""
        self.rows.setdefault((variant, medium), {}).update(cells)

    def time(self, variant: str, medium: str, latencies: Mapping[int, Latency]) -> None:
        """Fills the cells of latencies."""
        cells = {f"batch {size}": f"{1000 * of.p50:.2f} / {1000 * of.p95:.2f} ms" for size, of in latencies.items()}
        self.add(variant, medium, **cells)

    def show(self) -> None:
        """Prints it as Markdown."""
        columns = ["layers", "build s", "cosine min", "MAP change", *(f"batch {size}" for size in BATCHES)]
        print("| variant | medium | " + " | ".join(columns) + " |")
        print("|---|---|" + "---|" * len(columns))
        for (variant, medium), cells in self.rows.items():
            print(f"| {variant} | {medium} | " + " | ".join(cells.get(column, "-") for column in columns) + " |")


def compare(
    engine: Engine,
    made: Mapping[str, NDArray[np.float32]],
    labels: Sequence[str],
    reference: Mapping[str, NDArray[np.float32]],
    table: Table,
) -> Iterator[str]:
    """Fills the table; gives what failed."""
    variant = f"tensorrt-{engine.precision}"
    for medium, plan in engine.plans.items():
        layers = ", ".join(f"{count} {kind}" for kind, count in plan.layers.items())
        cosine = min_cosine(made[medium], reference[medium]) if medium in made else float("nan")
        table.add(
            variant, medium, layers=layers, **{"build s": f"{plan.build_seconds:.0f}", "cosine min": f"{cosine:.6f}"}
        )
        if cosine < MIN_COSINE[engine.precision]:
            yield f"{variant}, {medium}: smallest cosine {cosine:.6f}, expected {MIN_COSINE[engine.precision]}"
    if not labels:
        return
    before, after = (cross_media_map(of["image"], of["text"], list(labels)) for of in (reference, made))
    changes = {
        "image": after.image_to_text.map - before.image_to_text.map,
        "text": after.text_to_image.map - before.text_to_image.map,
    }
    for medium, change in changes.items():
        table.add(variant, medium, **{"MAP change": f"{change:+.5f}"})
        if not abs(change) <= MAP_CHANGE[engine.precision]:
            yield f"{variant}: MAP of searches with {medium} moved by {change:+.5f}; {MAP_CHANGE[engine.precision]} may"


def open_engine(engine: Engine, medium: str, output: str) -> TensorRTEncoder:
    return TensorRTEncoder.open(
        engine.path(medium), output=output, sha256=engine.plans[medium].sha256, precision=engine.precision
    )


def time_engine(bundle: Bundle, engine: Engine, inputs: Rows, seconds: float, table: Table) -> None:
    for medium, rows in inputs.items():
        with open_engine(engine, medium, output(bundle)) as encoder:
            latencies = measure_latency(encoder, rows, seconds=seconds, batches=BATCHES)
            table.time(encoder.variant, medium, latencies)


def time_onnxruntime(bundle: Bundle, precision: str, inputs: Rows, seconds: float, table: Table) -> list[str]:
    """ONNX Runtime on CUDA; where it does not attach, the table says so, and that is no failure of an engine."""
    for medium, rows in inputs.items():
        variant = f"onnxruntime-{precision} on CUDA"
        try:
            with OnnxEncoder.open(bundle.graph(medium, precision), output=output(bundle), device="cuda") as encoder:
                table.time(variant, medium, measure_latency(encoder, rows, seconds=seconds, batches=BATCHES))
        except ProviderError as error:
            table.add(variant, medium, layers=f"not here: {str(error).splitlines()[0]}")
        except DcktError as error:
            return [f"{variant}, {medium}: {error}"]
    return []


def time_torch(run: Path, inputs: Rows, seconds: float, table: Table) -> None:
    """The trained model with PyTorch, under autocast to float16."""
    import torch

    from dckt_trainer.runs import open_run

    if not torch.cuda.is_available():
        table.add("torch fp16", "all", layers=f"not here: torch {torch.__version__} sees no CUDA device")
        return
    model = open_run(run).model()
    encoders = {"image": model.image_encoder, "text": model.text_encoder}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cuda", torch.float16))
        for medium, rows in inputs.items():
            if medium in encoders:
                encoder = TorchEncoder(encoders[medium]().cuda().eval())
                latencies = measure_latency(encoder, rows, seconds=seconds, batches=BATCHES)  # type: ignore[arg-type]
                table.time("torch fp16", medium, latencies)


class TorchEncoder:
    """From an array to an array, as the other encoders are timed."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Probabilities (B, C) of pixels or tokens."""
        import torch

        probability, _ = self.module(torch.from_numpy(batch).cuda())
        return probability.float().cpu().numpy()  # type: ignore[no-any-return]  # waits for the GPU


if __name__ == "__main__":
    sys.exit(main())
