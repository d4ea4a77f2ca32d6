"""How long MAP over the whole ranking takes, beside other ways to compute it.

    python benchmarks/evaluation.py            # a few minutes
    python benchmarks/evaluation.py --quick    # seconds

Prints Markdown. All evaluators rank all items for every query by cosine. They take turns, so that what else the
machine does falls on all of them. The slow ones answer the first queries only, and their time is scaled to all. They
take ties as their sort leaves them, where dckt gives the expectation over all orders and both bounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from dckt.metrics import mean_average_precision
from dckt_trainer.selection import domain_consistency

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]
CLASSES = 10


@dataclass(frozen=True)
class Evaluator:
    """A way to compute MAP.

    Attributes:
        name: in the table.
        run: from unit queries, their labels, unit items and their labels to MAP.
        queries: how many queries it answers at most.
    """

    name: str
    run: Callable[[Rows, Labels, Rows, Labels], float]
    queries: int | None = None


def ours(queries: Rows, query_labels: Labels, items: Rows, item_labels: Labels) -> float:
    return mean_average_precision(queries, query_labels, items, item_labels).map


def stable_argsort(queries: Rows, query_labels: Labels, items: Rows, item_labels: Labels) -> float:
    total, step = 0.0, max(1, (1 << 20) // len(items))
    ranks = np.arange(1, len(items) + 1)
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ items.T
        order = np.argsort(-scores, axis=1, kind="stable")
        hit = item_labels[order] == query_labels[start : start + step, None]
        precision = hit.cumsum(axis=1) / ranks
        total += float(((precision * hit).sum(axis=1) / np.maximum(hit.sum(axis=1), 1)).sum())
    return total / len(queries)


def loop_over_ranks(queries: Rows, query_labels: Labels, items: Rows, item_labels: Labels) -> float:
    """How evaluators in cross-media retrieval are usually written."""
    values = []
    for query, label in zip(queries, query_labels, strict=True):
        order = np.argsort(1 - items @ query)
        hits, total = 0, 0.0
        for rank in range(len(order)):
            if item_labels[order[rank]] == label:
                hits += 1
                total += hits / (rank + 1)
        values.append(total / max(hits, 1))
    return float(np.mean(values))


def loop_over_relevant(queries: Rows, query_labels: Labels, items: Rows, item_labels: Labels) -> float:
    """The same loop with less to do: NumPy finds the relevant ranks."""
    values = []
    for query, label in zip(queries, query_labels, strict=True):
        order = np.argsort(1 - items @ query)
        total, nth = 0.0, 0
        for nth, rank in enumerate(np.flatnonzero(item_labels[order] == label), start=1):
            total += nth / (rank + 1)
        values.append(total / max(nth, 1))
    return float(np.mean(values))


def sklearn_loop(queries: Rows, query_labels: Labels, items: Rows, item_labels: Labels) -> float:
    return float(
        np.mean(
            [
                average_precision_score(item_labels == label, items @ query)
                for query, label in zip(queries, query_labels, strict=True)
            ]
        )
    )


EVALUATORS = (
    Evaluator("dckt.metrics", ours),
    Evaluator("NumPy, stable argsort in chunks", stable_argsort),
    Evaluator("Python loop over all ranks of each query", loop_over_ranks, queries=100),
    Evaluator("Python loop over the relevant ranks of each query", loop_over_relevant, queries=100),
    Evaluator("scikit-learn average_precision_score of each query", sklearn_loop, queries=100),
)


def probabilities(generator: np.random.Generator, labels: Labels, classes: int, *, sharpness: float) -> Rows:
    """Class probabilities of a network that is often right, each row scaled to length 1.

    Args:
        generator: of the logits.
        labels: of the rows.
        classes: how many.
        sharpness: factor of the logits. At 10 most rows are saturated; they go through float16, as from a network in
            half precision, and many become equal.
    """
    logits = generator.standard_normal((len(labels), classes))
    logits[np.arange(len(labels)), labels % classes] += 2
    weights = np.exp(sharpness * (logits - logits.max(axis=1, keepdims=True)))
    rows = weights / weights.sum(axis=1, keepdims=True)
    rows = rows.astype(np.float16 if sharpness > 1 else np.float32).astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f}–{max(seconds):.3f})"


def compare(size: int, kind: str, sharpness: float, repetitions: int) -> None:
    generator = np.random.default_rng(size)
    labels = generator.integers(CLASSES, size=size)
    image, text = (probabilities(generator, labels, CLASSES, sharpness=sharpness) for _ in range(2))
    result = mean_average_precision(image, labels, text, labels)
    different = len(np.unique(text, axis=0))
    print(
        f"\n{size:,} queries x {size:,} items, {CLASSES} class probabilities, {kind}: {different:,} different items; "
        f"MAP {result.map:.6f}, from {result.lowest:.6f} to {result.highest:.6f} by the order within ties\n"
    )
    seconds: dict[str, list[float]] = {evaluator.name: [] for evaluator in EVALUATORS}
    values = {}
    for _ in range(repetitions):
        for evaluator in EVALUATORS:
            count = min(evaluator.queries or size, size)

            def run(evaluator: Evaluator = evaluator, count: int = count) -> None:
                values[evaluator.name] = evaluator.run(image[:count], labels[:count], text, labels)

            seconds[evaluator.name].append(timed(run) * size / count)
    print("| evaluator | queries answered | seconds for all: median (min–max) | times dckt | MAP of its queries |")
    print("|---|---|---|---|---|")
    base = statistics.median(seconds[EVALUATORS[0].name])
    for evaluator in EVALUATORS:
        own = seconds[evaluator.name]
        answered = f"{evaluator.queries:,}, scaled" if evaluator.queries else "all"
        ratio = statistics.median(own) / base
        print(f"| {evaluator.name} | {answered} | {spread(own)} | {ratio:.1f} | {values[evaluator.name]:.6f} |")


def consistency(pairs: int, repetitions: int) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(20, size=pairs)
    image, text = (probabilities(generator, labels, 200, sharpness=1) for _ in range(2))
    seconds = [timed(lambda: domain_consistency(image, text, labels)) for _ in range(repetitions)]
    print(
        f"\nDomain consistency of {pairs:,} pairs, 200 class probabilities, 20 labels, both directions: "
        f"{spread(seconds)} seconds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("dckt", "numpy", "scikit-learn"))
    threads = os.environ.get("OMP_NUM_THREADS") or "not set"
    print(f"Python {platform.python_version()}, {packages}; {os.cpu_count()} cores, OMP_NUM_THREADS {threads}")
    print(f"{args.repetitions} repetitions; load before: {os.getloadavg()[0]:.1f}")
    for size in (200, 1000) if args.quick else (2000, 10_000):
        compare(size, "soft", 1, args.repetitions)
        compare(size, "saturated", 10, args.repetitions)
    consistency(800 if args.quick else 8000, args.repetitions)
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
