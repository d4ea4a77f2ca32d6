"""How fast the joint stage trains at the paper's width, against the same step as one writes it first.

    python benchmarks/training.py                 the paper's size: 343 million parameters, about 8 GB, some ten minutes
    python benchmarks/training.py --width 512     smaller

A step is ten passes of 64 + 64 pairs, their mean gradient, and SGD. The plain loop does one pass after the other, in
float32, with PyTorch's own layers and default SGD. Ours folds the passes into one product a layer, and
tests/trainer/test_folding.py shows that gradients are equal. Ours keeps freed memory, as `dckt-train` does; the plain
loop is shown as it is and with that. The variants take turns, each turn in a process of its own. Prints medians, spread
and ratios, the largest peak of memory, the share of reading features, and that of scoring
the target's pairs in a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dckt_trainer.config import ComputeConfig, LossConfig, MmdConfig, OptimizerConfig
from dckt_trainer.losses import joint_terms
from dckt_trainer.memory import keep_freed_memory
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream
from dckt_trainer.selection import domain_consistency
from plain import PlainNetwork, by_product, by_subtraction, plain_joint_loss

CLASSES = {"source": 200, "target": 20}
BATCH, ACCUMULATE = 64, 10
STEPS, ROUND_STEPS = 3, 50  # in one call of ours, and in a round of transfer
SELECTION, TARGET_PAIRS = "selection", 8000  # a turn of its own
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--features", type=int, default=25088, help="of an image: 512 x 7 x 7 for VGG")
    parser.add_argument("--pairs", type=int, default=2000, help="in the cache, of each domain")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--variants", default="plain,kept,folded,bfloat16", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--turn", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.turn:
        print(json.dumps(selection_turn() if args.turn == SELECTION else turn(args, stored_pairs(args))))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("DCKT_CACHE")) as folder:
        args.folder = Path(folder)
        for classes in CLASSES.values():
            store_images(args, classes)
        report(args)


def store_images(args: argparse.Namespace, classes: int) -> None:
    """Random features on disk, to be memory-mapped as the feature cache is."""
    rng, path = np.random.default_rng(classes), args.folder / f"{classes}.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (args.pairs, args.features))
    for start in range(0, args.pairs, 100):
        rows[start : start + 100] = rng.standard_normal((len(rows[start : start + 100]), args.features), np.float32)
    rows.flush()


def stored_pairs(args: argparse.Namespace) -> dict[str, PairSet]:
    return {name: _pairs(args, classes) for name, classes in CLASSES.items()}


def _pairs(args: argparse.Namespace, classes: int) -> PairSet:
    rng, path = np.random.default_rng(classes), args.folder / f"{classes}.npy"
    image = torch.from_numpy(np.load(path, mmap_mode="c"))
    text = torch.from_numpy(rng.standard_normal((args.pairs, 300), np.float32))
    labels = torch.from_numpy(rng.integers(0, classes, args.pairs))
    return PairSet({"image": image, "text": text}, labels, tuple(map(str, range(args.pairs))))


def streams(pairs: dict[str, PairSet]) -> dict[str, PairStream]:
    cpu = torch.device("cpu")
    return {name: PairStream(each, np.arange(len(each)), BATCH, 0, name, cpu) for name, each in pairs.items()}


def plain(
    args: argparse.Namespace, pairs: dict[str, PairSet], distance: Any = by_product, passes: int = ACCUMULATE
) -> Step:
    torch.manual_seed(0)
    inputs = {"image": args.features, "text": 300}
    networks = {name: PlainNetwork(inputs, args.width, classes) for name, classes in CLASSES.items()}
    drawn = streams(pairs)
    parameters = [p for network in networks.values() for p in network.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(passes):
            batches = {}
            for name, stream in drawn.items():
                draw = stream.draw()
                batches[name] = ({m: rows[:, 0] for m, rows in draw.features.items()}, draw.labels[:, 0])
            loss = plain_joint_loss(networks, batches, distance) / passes
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(args: argparse.Namespace, pairs: dict[str, PairSet], **compute: Any) -> Step:
    torch.manual_seed(0)
    inputs = {"image": args.features, "text": 300}
    networks = {name: DomainNetwork(inputs, args.width, classes) for name, classes in CLASSES.items()}
    drawn = streams(pairs)
    domains = {name: Domain(network, drawn[name]) for name, network in networks.items()}
    optimizer = sgd(list(networks.values()), OptimizerConfig())
    terms = joint_terms(tuple(inputs), LossConfig(), MmdConfig())

    def step() -> None:
        optimize(
            domains,
            terms,
            optimizer,
            passes=STEPS * ACCUMULATE,
            accumulate=ACCUMULATE,
            rate=lambda number: 0.01,
            compute=ComputeConfig(**compute),
            stage="benchmark",
        )

    return step


def keeping(step_of: Callable[[argparse.Namespace, dict[str, PairSet]], Step]) -> Any:
    """The same in a process that keeps the memory it frees."""

    def variant(args: argparse.Namespace, pairs: dict[str, PairSet]) -> Step:
        if not keep_freed_memory():
            print("this C library cannot be told to keep freed memory", file=sys.stderr)
        return step_of(args, pairs)

    return variant


VARIANTS: dict[str, Callable[[argparse.Namespace, dict[str, PairSet]], Step]] = {
    "plain": plain,
    "kept": keeping(plain),
    "plain-subtraction": lambda args, pairs: plain(args, pairs, by_subtraction, 1),
    "unfolded": keeping(lambda args, pairs: ours(args, pairs, fold=1)),
    "folded": keeping(ours),
    "bfloat16": keeping(lambda args, pairs: ours(args, pairs, precision="bfloat16")),
}
SCALE = {"plain": 1.0, "kept": 1.0, "plain-subtraction": float(ACCUMULATE)}  # from what was timed to one step
TITLES = {
    "plain": "plain loop: float32, a batch at a time, default SGD",
    "kept": "the same, freed memory kept",
    "plain-subtraction": "plain loop, MMD by subtraction (n, n, d); one pass, times ten",
    "unfolded": "dckt, float32, not folded: gradients in place, fused SGD",
    "folded": "dckt, float32",
    "bfloat16": "dckt, bfloat16 products",
}


def turn(args: argparse.Namespace, pairs: dict[str, PairSet]) -> dict[str, float]:
    """Seconds of one step, and the peak of this process's memory in GB; the memory-mapped cache counts in it."""
    step = VARIANTS[args.turn](args, pairs)
    step()  # touches memory for the first time
    begin = time.perf_counter()
    step()
    seconds = (time.perf_counter() - begin) * SCALE.get(args.turn, 1 / STEPS)
    return {"seconds": seconds, "peak": high_water() * 1024 / 1e9}


def selection_turn() -> dict[str, float]:
    """Seconds that it takes to score the target's pairs, which every round begins with."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES["target"], size=TARGET_PAIRS)
    said = torch.from_numpy(rng.standard_normal((2, TARGET_PAIRS, CLASSES["source"]), np.float32)).softmax(-1).numpy()
    small = slice(800)
    domain_consistency(said[0, small], said[1, small], labels[small])  # imports and threads
    begin = time.perf_counter()
    domain_consistency(said[0], said[1], labels)
    return {"seconds": time.perf_counter() - begin, "peak": high_water() * 1024 / 1e9}


def report(args: argparse.Namespace) -> None:
    names = args.variants.split(",")
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, SELECTION)}
    for _ in range(args.repeats):
        for name, own in turns.items():
            own.append(in_own_process(args, name))
    times = {name: [each["seconds"] for each in own] for name, own in turns.items()}
    peaks = {name: max(each["peak"] for each in own) for name, own in turns.items()}
    drawn = streams(stored_pairs(args))
    begin = time.perf_counter()
    for _ in range(5):
        for stream in drawn.values():
            stream.draw(ACCUMULATE)
    reading = (time.perf_counter() - begin) / 5
    base = statistics.median(times[names[0]])
    count = 2 * ACCUMULATE * BATCH
    size = f"width {args.width}, {args.features} image features, step of {ACCUMULATE} x ({BATCH} + {BATCH}) pairs"
    print(f"\n{size}, {args.repeats} repeats, {args.threads} threads")
    print(f"Python {platform.python_version()}, torch {version('torch')}, load average {os.getloadavg()[0]:.1f}\n")
    print("| step | seconds, median (min to max) | pairs/s | ratio, median | ratio, best to best | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    for name in names:
        median, best = statistics.median(times[name]), min(times[name])
        print(
            f"| {TITLES[name]} | {median:.2f} ({best:.2f} to {max(times[name]):.2f}) | {count / median:.0f} "
            f"| {base / median:.2f} | {min(times[names[0]]) / best:.2f} | {peaks[name]:.1f} |"
        )
    share = reading / statistics.median(times[names[-1]])
    print(f"\nreading a step's features from the cache: {reading * 1e3:.0f} ms, {share:.1%} of the last variant's step")
    scoring, lap = times[SELECTION], ROUND_STEPS * statistics.median(times[names[-1]])
    median = statistics.median(scoring)
    print(
        f"domain consistency of {TARGET_PAIRS:,} pairs: {median:.2f} s ({min(scoring):.2f} to {max(scoring):.2f}), "
        f"{median / lap:.2%} of {ROUND_STEPS} steps of the last variant, a round"
    )
    print(json.dumps({"times": times, "peaks": peaks, "reading": reading}))


def high_water() -> int:
    """Largest resident memory of this process, in KiB; unlike ru_maxrss it does not start from the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def in_own_process(args: argparse.Namespace, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--turn", name, "--folder", str(args.folder), "--width", str(args.width)]
    command += ["--features", str(args.features), "--pairs", str(args.pairs), "--threads", str(args.threads)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(found.stdout)
    return figures


if __name__ == "__main__":
    main()
