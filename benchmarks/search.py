"""How fast the index and the searcher answer, beside the libraries that they stand on or compete with.

    export OMP_NUM_THREADS=1
    python benchmarks/search.py                          # all sections, about an hour; graphs are kept in runs/search
    python benchmarks/search.py --only single batch      # some
    python benchmarks/search.py --quick                  # small sizes, to see that it runs
    python benchmarks/search.py --only open --million    # the first time builds an index of 1,000,000
    python benchmarks/search.py --only end-to-end callers --bundle NAME.dckt

Prints Markdown; --json writes the same figures for programs. Contenders take turns in one process, so that what else
the machine does falls on all of them: read ratios, not seconds, and on a busy machine those of CPU time. Goals are
judged by the clock. Recall counts ties as equally good. Each library runs at the smallest effort whose recall@10
reaches 0.99; dckt runs as it comes, with the effort that it measured itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from searching import building, serving, vectors
from searching.peers import Shelf, missing_packages, source_hash
from searching.table import Table
from searching.vectors import Sizes

NEEDS = {"single": ("faiss", "usearch"), "batch": ("faiss", "usearch"), "exact": ("faiss",)}
PACKAGES = ("dckt", "numpy", "hnswlib", "faiss-cpu", "usearch", "onnxruntime", "openvino", "Pillow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)}",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--items", type=int, help="of the big sets (100,000)")
    parser.add_argument("--turns", type=int, default=20, help="that each contender has")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="that build a graph or, for callers, run the model"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/search"), help="folder where built graphs are kept")
    parser.add_argument("--million", action="store_true", help="open 1,000,000 vectors; the first time builds them")
    parser.add_argument("--bundle", type=Path, help="the model of end-to-end and callers (one with random weights)")
    parser.add_argument("--device", default="cpu", help="of callers: cpu, cuda or auto")
    parser.add_argument("--callers", type=int, default=64, help="at once")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    missing = missing_packages([module for name in args.only for module in NEEDS.get(name, ())])
    if missing:
        parser.error(f"this compares with {' and '.join(missing)}; install them: pip install {' '.join(missing)}")
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: each contender searches on one thread, and BLAS would take them all")
    args.items = args.items or (5000 if args.quick else 100_000)
    args.cache.mkdir(parents=True, exist_ok=True)
    print(f"{setting()}\n\nload before: {os.getloadavg()[0]:.1f}", flush=True)
    tables = []
    for name in args.only:
        tables.append(SECTIONS[name](args))
        print(f"\n{tables[-1].markdown()}", flush=True)
        if args.json:
            figures = {"setting": setting(), "sections": [table.json() for table in tables]}
            args.json.write_text(json.dumps(figures, indent=1))
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


def sizes(args: argparse.Namespace) -> Sizes:
    if args.quick:
        return Sizes(items=args.items, copies=2000, queries=100, turns=3, block=20)
    return Sizes(items=args.items, copies=20_000, queries=1000, turns=args.turns, block=100)


def on_vectors(measure: Callable[[Shelf, Sizes], Table]) -> Callable[[argparse.Namespace], Table]:
    return lambda args: measure(Shelf(args.cache, args.threads), sizes(args))


def adding(args: argparse.Namespace) -> Table:
    return building.add(args.cache, args.items, batch=1000, rounds=1 if args.quick else 3, threads=args.threads)


def opening(args: argparse.Namespace) -> Table:
    items = 1_000_000 if args.million else args.items
    return building.opening(args.cache, items, repeats=3 if args.quick else 5, threads=args.threads)


def end_to_end(args: argparse.Namespace) -> Table:
    with serving_folder(args) as (bundle, folder):
        return serving.end_to_end(bundle, folder, items=args.items, turns=3 if args.quick else args.turns)


def callers(args: argparse.Namespace) -> Table:
    with serving_folder(args) as (bundle, folder):
        return serving.callers(
            bundle,
            folder,
            items=args.items,
            device=args.device,
            threads=args.threads,
            turns=2 if args.quick else 5,
            count=args.callers,
            calls=2 if args.quick else 8,
        )


@contextmanager
def serving_folder(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The model to serve, and a folder for its index and pictures."""
    with tempfile.TemporaryDirectory(dir=args.cache) as name:
        folder = Path(name)
        if args.bundle:
            yield args.bundle, folder
        else:
            from searching.model import write_model  # needs onnx, which nothing else here does

            yield write_model(folder / "random.dckt"), folder


SECTIONS: dict[str, Callable[[argparse.Namespace], Table]] = {
    "single": on_vectors(vectors.single),
    "batch": on_vectors(vectors.batch),
    "ties": on_vectors(vectors.ties),
    "exact": on_vectors(vectors.exact),
    "add": adding,
    "open": opening,
    "end-to-end": end_to_end,
    "callers": callers,
}


def setting() -> str:
    """Versions, cores, and the state of the index's code."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return (
        f"Python {platform.python_version()}, {', '.join(found)}; {os.cpu_count()} cores, OMP_NUM_THREADS 1; code "
        f"of dckt.index {source_hash()}"
    )


if __name__ == "__main__":
    main()
