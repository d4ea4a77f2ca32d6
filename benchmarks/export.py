"""What each exported variant costs and keeps, beside PyTorch on the same machine in the same run.

    DCKT_DATA=... python benchmarks/export.py                           # three trunks; VGG19 at width 4,096 takes long
    DCKT_DATA=... python benchmarks/export.py --trunks squeezenet1_1    # a few minutes

Trains a target model on pascal_sentences without a source, exports it with --fp16 and --int8 past the gate on its
validation pairs, and times the image encoder of every variant that passed against eager PyTorch in float32. All take
turns, so that what else the machine does falls on all. VGG19 has random weights: its speed is that of trained ones, its
MAP is not. Prints Markdown. What is exported stays in --out and is not made again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from dckt.bundle import Bundle
from dckt.errors import ParityError
from dckt.runtime import Encoder
from dckt_export.export import export_bundle
from dckt_export.variants import open_variant
from dckt_trainer.config import load_config
from dckt_trainer.encoders import encode
from dckt_trainer.progress import Bars
from dckt_trainer.runs import open_run
from dckt_trainer.train import train
from setting import VECTORS, data_folder, machine, trunk_changes

TARGET = "pascal_sentences"
TRUNKS = ("squeezenet1_1", "mobilenet_v2", "vgg19")
ALONE = ["transfer.rounds=0"]
FULL = ["image.weights=random", "image.grid=7", "network.width=4096", "pretrain.target_epochs=10"]
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunks", nargs="+", default=list(TRUNKS), choices=TRUNKS)
    parser.add_argument("--rounds", type=int, default=9, help="turns of the timing")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="any other setting of the training")
    parser.add_argument("--out", type=Path, default=Path("runs/export"))
    args = parser.parse_args()
    data = data_folder(parser)
    args.out.mkdir(parents=True, exist_ok=True)
    peaks = measured_peaks()
    print(f"{machine()}. {os.getloadavg()[0]:.1f} load before.")
    print(
        "Measured peaks: "
        + ", ".join(f"{name} products {rate / 1e9:,.0f} G/s" for name, rate in peaks.items() if name != "memory")
        + f"; memory {peaks['memory'] / 1e9:.0f} GB/s."
    )
    for trunk in args.trunks:
        section(trunk, data, args, peaks)


def section(trunk: str, data: Path, args: argparse.Namespace, peaks: dict[str, float]) -> None:
    changes = FULL if trunk == "vgg19" else trunk_changes(data, trunk)
    changes = [f"image.trunk={trunk}", *changes, f"text.vectors={data / VECTORS}", *ALONE, *args.changes]
    run, out = args.out / trunk, args.out / f"{trunk}.dckt"
    if not run.exists():
        train(None, data / TARGET, run, load_config("small", changes), reporter=Bars())
    if not out.exists():
        try:
            export_bundle(run, out, fp16=True, int8=True, reporter=Bars())
        except ParityError as refused:  # of one that was asked for by name; the others are timed without it
            print(f"\n{trunk}: {refused}\n")
            export_bundle(run, out, int8=True, reporter=Bars())
    bundle = Bundle.open(out)
    model = open_run(run).model()
    image = model.image_encoder()
    pairs = bundle.manifest.measured["pairs"]
    sizes = {
        precision: sum(
            entry.size
            for graph in graphs.values()
            for name, entry in bundle.manifest.files.items()
            if name in (graph.file, f"{graph.file}.data")
        )
        for precision, graphs in bundle.manifest.graphs.items()
    }
    side = bundle.manifest.image.side
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), side, side, 3), np.uint8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        image(torch.from_numpy(pixels[:1]))
    operations, weights = counter.get_total_flops(), sum(tensor.numel() for tensor in image.state_dict().values())

    encoders: dict[str, Encoder] = {
        variant.name: open_variant(variant, bundle.graph("image", variant.graph), bundle.manifest.representation)
        for variant in bundle.manifest.variants
    }
    runs: dict[str, Callable[[NDArray[np.uint8]], object]] = {
        "PyTorch, eager, float32": lambda batch: encode(image, torch.from_numpy(batch)),
        **{name: encoder.run for name, encoder in encoders.items()},
    }
    seconds = taking_turns(runs, pixels, args.rounds)
    print(
        f"\n### {trunk}, image encoder\n\n{operations / 1e9:.1f} G operations a picture, {weights / 1e6:.1f} M "
        f"weights; gate on {pairs['count']} {pairs['split']} pairs of {pairs['corpus']}; {args.rounds} turns.\n"
    )
    times = [
        text
        for size in BATCHES
        for text in (f"x{size}: ms, median (min–max)", f"times PyTorch x{size}", "of the bound")
    ]
    print(f"| variant | MB | of fp32 | {' | '.join(times)} | cosine min | largest change of MAP |")
    print("|---|" + "---|" * (len(times) + 4))
    base = {size: statistics.median(seconds[next(iter(runs)), size]) for size in BATCHES}
    by_name = {variant.name: variant for variant in bundle.manifest.variants}
    for name in runs:
        variant = by_name.get(name)
        precision = variant.precision if variant else "fp32"
        cells = []
        for size in BATCHES:
            own = seconds[name, size]
            bound = max(operations * size / peaks[PEAK[precision]], weights * BYTES[precision] / peaks["memory"])
            median = statistics.median(own)
            spread = f"{1000 * median:.1f} ({1000 * min(own):.1f}–{1000 * max(own):.1f})"
            cells += [spread, f"{base[size] / median:.1f}", f"{bound / median:.0%}"]
        parity = bundle.manifest.measured["variants"][name]["parity"] if variant else {}
        cosine = min((of["cosine_min"] for one in parity.values() for of in one["media"].values()), default=1.0)
        change = max(
            (abs(of["map_exported"] - of["map_torch"]) for one in parity.values() for of in one["directions"].values()),
            default=0.0,
        )
        size = sizes[variant.graph] if variant else sizes["fp32"]
        shown = [name, f"{size / 1e6:.1f}", f"{size / sizes['fp32']:.1%}", *cells, f"{cosine:.6f}", f"{change:.4f}"]
        print(f"| {' | '.join(shown)} |")
    for name, found in bundle.manifest.measured["variants"].items():
        if found["refused"]:
            print(f"\nRefused: {name}: {'; '.join(found['refused'])}")
    for encoder in encoders.values():
        encoder.close()


PEAK = {
    "fp32": "float32",
    "fp16": "float32",
    "bf16": "bfloat16",
    "int8": "int8",
}  # no CPU runtime here computes in fp16
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def taking_turns(
    runs: dict[str, Callable[[NDArray[np.uint8]], object]], pixels: NDArray[np.uint8], rounds: int
) -> dict[tuple[str, int], list[float]]:
    seconds: dict[tuple[str, int], list[float]] = {(name, size): [] for name in runs for size in BATCHES}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            for size in BATCHES:
                batch = np.ascontiguousarray(pixels[:size])
                start = time.perf_counter()
                run(batch)
                if turn:  # the first warms up
                    seconds[name, size].append(time.perf_counter() - start)
    return seconds


def measured_peaks() -> dict[str, float]:
    """The best rates of square matrix products, operations a second, and of reading memory, bytes a second."""
    side = 2048

    def best(run: Callable[[], object], amount: float) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return amount / min(times)

    square = torch.randn(side, side)
    half, whole = square.bfloat16(), (square * 30).to(torch.int8)
    much = torch.zeros(1 << 28)
    return {
        "float32": best(lambda: square @ square, 2 * side**3),
        "bfloat16": best(lambda: half @ half, 2 * side**3),
        "int8": best(lambda: torch._int_mm(whole, whole), 2 * side**3),
        "memory": best(lambda: much.sum(), much.numel() * 4),
    }


if __name__ == "__main__":
    main()
