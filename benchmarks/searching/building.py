"""Filling an index and opening one."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hnswlib
import numpy as np

from dckt.index import Index
from searching.data import Rows, probabilities, soft
from searching.measure import Spread
from searching.peers import EF_CONSTRUCTION, M, add_rows, empty_index
from searching.table import Table, verdict


def add(folder: Path, items: int, *, batch: int, rounds: int, threads: int) -> Table:
    """Adding vectors in batches, durable, against a graph in memory."""
    data = soft(items, 1, 200).items
    table = Table(
        "add",
        f"Adding {items:,} vectors (D = 200) in batches of {batch:,}, {threads} threads, {rounds} rounds: seconds "
        "until the last can be found and the index is closed",
    )

    def raw() -> str:
        graph = hnswlib.Index(space="ip", dim=200)
        graph.init_index(max_elements=items, M=M, ef_construction=EF_CONSTRUCTION)
        for start, rows in _batches(data, batch):
            graph.add_items(rows, np.arange(start, start + len(rows)), num_threads=threads)
        return "all in the graph"

    def ours() -> str:
        with (
            tempfile.TemporaryDirectory(dir=folder) as place,
            empty_index(Path(place) / "index", 200, kind="auto", threads=threads) as index,
        ):
            for start, rows in _batches(data, batch):
                add_rows(index, rows, start)
            return _state(index)

    contenders: dict[str, Callable[[], str]] = {"hnswlib": raw, "dckt": ours}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    states = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            began, spent = time.perf_counter(), time.process_time()
            states[name] = run()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - spent)
    for name in contenders:
        ratio = Spread.of([own / base for own, base in zip(wall[name], wall["hnswlib"], strict=True)])
        work = Spread.of([own / base for own, base in zip(cpu[name], cpu["hnswlib"], strict=True)])
        row = {
            "contender": name,
            "seconds": Spread.of(wall[name]).show("{:.1f}"),
            "CPU seconds": Spread.of(cpu[name]).show("{:.1f}"),
            "times hnswlib": (ratio.show(), ratio.median),
            "times its CPU seconds": (work.show(), work.median),
            "in the end": states[name],
        }
        if name == "dckt":
            row["goal"] = verdict(ratio.median <= 1.3, "≤ 1.3 times")
        table.rows.append(row)
    table.notes.append("hnswlib keeps it in memory; dckt has every batch on the disk before the next.")
    return table


def _batches(rows: Rows, size: int) -> Iterator[tuple[int, Rows]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _state(index: Index) -> str:
    medium = index.info().media["text"]
    shown = {name: value for name, value in vars(medium).items() if isinstance(value, int | str)}
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in shown.items()
    )


def opening(folder: Path, items: int, *, repeats: int, threads: int) -> Table:
    """Opening an index that was closed, in fresh processes."""
    table = Table(
        "open",
        f"Opening {items:,} vectors (D = 200), nothing to replay, files in the page cache: {repeats} fresh processes, "
        f"memory that came with it, in MB",
    )
    paths = {"hnswlib": _raw_graph(folder, items, threads), "dckt": _index(folder, items, threads)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            command = [sys.executable, "-m", "searching.opened", name, str(path), "200"]
            place = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
            found = subprocess.run(command, env={**os.environ, "PYTHONPATH": place}, capture_output=True, text=True)
            if found.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr}")
            runs[name].append(json.loads(found.stdout))
    base = statistics.median(run["searched"] for run in runs["hnswlib"])
    for name, own in runs.items():
        seconds = Spread.of([run["seconds"] for run in own])
        grown = statistics.median(run["searched"] for run in own)
        row: dict[str, object] = {
            "contender": name,
            "seconds to open": (seconds.show(), seconds.median),
            **{
                column: (f"{1e-6 * (value := statistics.median(run[key] for run in own)):,.0f}", value)
                for column, key in MEMORY.items()
            },
            "times hnswlib, after searches": (f"{grown / base:.2f}", grown / base),
        }
        if name == "dckt":
            row["goal"] = f"{verdict(seconds.median < 2, '< 2 s')}; {verdict(grown <= 1.25 * base, '≤ 1.25 times')}"
        table.rows.append(row)
    table.notes.append(
        "hnswlib holds vectors and links and nothing else; its links are made with little effort, for they take the "
        "same room. dckt holds ids too. Searches: 100, of random vectors."
    )
    return table


MEMORY = {"after opening": "opened", "after searches": "searched", "of that no file's": "own", "at most": "peak"}


def _raw_graph(folder: Path, items: int, threads: int) -> Path:
    path = folder / f"open-hnswlib-{items}x200"
    if not path.exists():
        graph = hnswlib.Index(space="ip", dim=200)
        graph.init_index(max_elements=items, M=M, ef_construction=M)
        for start, rows in _made(items):
            graph.add_items(rows, np.arange(start, start + len(rows)), num_threads=threads)
        unfinished = path.with_suffix(".part")
        graph.save_index(str(unfinished))
        unfinished.rename(path)
    return path


def _index(folder: Path, items: int, threads: int) -> Path:
    """An index that is closed in order. It is kept whatever becomes of the code, for to build it takes long."""
    path = folder / f"open-dckt-{items}x200"
    if not path.exists():
        unfinished = path.with_suffix(".part")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        with empty_index(unfinished, 200, kind="auto", threads=threads) as index:
            for start, rows in _made(items):
                add_rows(index, rows, start)
                print(f"\rbuilding: {start + len(rows):,} of {items:,}", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
        unfinished.rename(path)
    Index.open(path, threads=threads).close()  # what another version left behind is put in order now
    return path


def _made(items: int, batch: int = 10_000) -> Iterator[tuple[int, Rows]]:
    for start in range(0, items, batch):
        generator = np.random.default_rng(start)
        yield start, probabilities(generator, min(batch, items - start), 200, margin=(2.0, 2.0))
