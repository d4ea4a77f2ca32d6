"""From a picture to hits: what the way there costs, and many callers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from dckt.batching import Batching
from dckt.bundle import Bundle
from dckt.index import Index
from dckt.preprocessing import image_array
from dckt.searcher import Searcher
from searching.data import soft
from searching.measure import Spread, Times, storm, take_turns
from searching.peers import SHOPS
from searching.table import Table, verdict

PICTURES = 20
TEXTS_MORE = 8  # times as many searches of texts as of pictures: they are quick, and all callers start at once


def end_to_end(bundle: Path, folder: Path, *, items: int, turns: int) -> Table:
    """A JPEG file to hits, beside Pillow's decoding and the bare runtime."""
    index, files = filled(bundle, folder, items), photographs(folder / "pictures")
    table = Table(
        "end-to-end",
        f"From a JPEG file (640 x 480, {files[0].stat().st_size // 1000} kB) to 10 of {items:,} hits with metadata, "
        f"{bundle.name}, one thread: milliseconds, {turns} turns of {PICTURES} pictures",
    )
    model = Bundle.open(bundle)
    for variant in ("onnxruntime-fp32", "auto"):
        with Searcher.open(bundle, index, variant=variant, device="cpu", threads=1) as searcher:
            name = searcher.providers["image"]
            if table.rows and table.rows[-1]["variant"] == name:
                break
            table.rows.append(_stages(searcher, model, files, turns, name))
    table.notes.append(
        "Decode and encode are the searcher's own stages; decode ends with the pixels that the network sees. The rest "
        "is all that is neither. Bare: the same picture decoded by Pillow, neither cropped nor scaled, and one call of "
        "ONNX Runtime; what is over that holds scaling too."
    )
    return table


def _stages(searcher: Searcher, model: Bundle, files: Sequence[Path], turns: int, name: str) -> dict[str, Any]:
    stages: dict[str, list[float]] = {}
    rests: list[float] = []

    def whole(number: int) -> None:
        start = time.perf_counter()
        timings = searcher.search(files[number]).timings
        taken = time.perf_counter() - start
        rests.append(1 - (timings["decode"] + timings["encode"]) / taken)
        for stage, seconds in timings.items():
            stages.setdefault(stage, []).append(seconds)

    calls: dict[str, Callable[[int], object]] = {"whole": whole, "decode": lambda number: decoded(files[number])}
    bare = name.startswith("onnxruntime-fp32")
    if bare:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(model.graph("image")), options, providers=["CPUExecutionProvider"])
        batches = [image_array(file, model.manifest.image)[None] for file in files]
        output = [model.manifest.representation]
        calls["encode"] = lambda number: session.run(output, {"pixels": batches[number]})
    times = take_turns(calls, len(files), turns=turns, block=len(files))
    rest = Spread.of([100 * share for share in rests])
    row: dict[str, Any] = {
        "variant": name,
        "whole: median / p99": _median_p99(times["whole"]),
        **{stage: _ms(float(np.median(seconds))) for stage, seconds in stages.items()},
        "rest, % (half of the calls)": (rest.show("{:.1f}"), rest.median),
    }
    if bare:
        row["bare decode"], row["bare encode"] = (_ms(times[part].median) for part in ("decode", "encode"))
        over = 1 - (times["decode"].median + times["encode"].median) / times["whole"].median
        row["over bare, %"] = (f"{100 * over:.1f}", 100 * over)
    row["goal"] = verdict(rest.median < 5, "rest < 5 %")
    return row


def callers(
    bundle: Path, folder: Path, *, items: int, device: str, threads: int, turns: int, count: int, calls: int
) -> Table:
    """Many callers at once, with micro-batches and without."""
    batching = Batching()
    index = filled(bundle, folder, items)
    table = Table(
        "callers",
        f"{count} callers at once, each {calls} searches with pictures and {TEXTS_MORE * calls} with texts, among "
        f"{items:,} items, {bundle.name}, model on {threads} threads, {turns} turns; max_batch {batching.max_batch}",
    )
    model = Bundle.open(bundle)
    side = model.manifest.image.side
    pictures = np.random.default_rng(0).integers(0, 256, (PICTURES, side, side, 3), np.uint8)
    words = [word for word in model.vocabulary.words if word.isalpha() and word.isascii()]
    queries: dict[str, Sequence[Any]] = {
        "image": list(pictures),
        "text": [" ".join(words[start : start + 8]) for start in range(0, 8 * PICTURES, 8)],
    }
    with (
        Searcher.open(bundle, index, device=device, threads=threads) as alone,
        Searcher.open(bundle, index, device=device, threads=threads, batching=batching) as shared,
    ):
        for medium, asked in queries.items():
            searchers = {"each for itself": alone, "batched": shared}
            each = calls if medium == "image" else TEXTS_MORE * calls
            table.rows += _rush(medium, asked, searchers, batching, turns, count, each)
    table.notes.append(
        "Bound: three times the median time of one call with a full batch: the batch that runs when a "
        "caller comes, the one that it may find full, and its own."
    )
    return table


def _rush(
    medium: str,
    asked: Sequence[Any],
    searchers: Mapping[str, Searcher],
    batching: Batching,
    turns: int,
    count: int,
    calls: int,
) -> list[dict[str, Any]]:
    """The rows of one kind of query; the first searcher is what the others are compared with."""
    word = "images" if medium == "image" else "texts"
    full: dict[str, Any] = {word: [asked[number % len(asked)] for number in range(batching.max_batch)]}
    seconds: dict[str, list[float]] = {name: [] for name in searchers}
    waits: dict[str, list[NDArray[np.float64]]] = {name: [] for name in searchers}
    base, plain = next(iter(searchers.items()))
    fulls = []
    for turn in range(turns + 1):
        for name, searcher in searchers.items():
            taken, each = storm(lambda number: searcher.search(**{medium: asked[number % len(asked)]}), count, calls)  # noqa: B023
            if turn:  # the first warms up
                seconds[name].append(taken)
                waits[name].append(each)
        start = time.perf_counter()
        plain.search_batch(**full)
        fulls.append(time.perf_counter() - start)
    bound = 3 * float(np.median(fulls))
    rows = []
    for name, searcher in searchers.items():
        own = Times(np.stack(waits[name]))
        rate = Spread.of([count * calls / taken for taken in seconds[name]])
        gain = Spread.of([slow / taken for slow, taken in zip(seconds[base], seconds[name], strict=True)])
        row: dict[str, Any] = {
            "query": medium,
            "callers": name,
            "variant": searcher.providers[medium],
            "searches a second": (rate.show("{:,.0f}"), rate.median),
            f"times {base}": (gain.show(), gain.median),
            "median / p99, ms": _median_p99(own),
        }
        if searcher is not plain:
            row["bound, ms"] = _ms(bound)
            more, soon = verdict(gain.median >= 1.8, "≥ 1.8 times"), verdict(own.p99 <= bound, "p99 ≤ bound")
            row["goal"] = f"{more}; {soon}"
        rows.append(row)
    return rows


def filled(bundle: Path, folder: Path, items: int) -> Path:
    """A new index for a bundle, with soft class probabilities, half of them pictures and half texts."""
    path = folder / "index"
    if not path.exists():
        manifest = Bundle.open(bundle).manifest
        width = manifest.dimensions[manifest.representation]
        rows = soft(items, 1, width).items
        with Index.create(
            path, model_id=manifest.model_id, representation=manifest.representation, dimension=width
        ) as index:
            for medium, part in (("image", rows[::2]), ("text", rows[1::2])):
                numbers = range(len(part))
                index.add(
                    medium,
                    [f"{number:08d}" for number in numbers],
                    part,
                    metadata=[{"shop": SHOPS[number % len(SHOPS)], "price": number % 100} for number in numbers],
                )
    return path


def photographs(folder: Path) -> list[Path]:
    """JPEG files like photographs: smooth shapes, some grain."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    files = []
    for number in range(PICTURES):
        shapes = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).resize((640, 480))
        grain = generator.normal(0, 4, (480, 640, 1))
        pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files


def _ms(seconds: float) -> tuple[str, float]:
    return f"{1e3 * seconds:.2f}", 1e3 * seconds


def _median_p99(times: Times) -> tuple[str, list[float]]:
    median, p99 = _ms(times.median), _ms(times.p99)
    return f"{median[0]} / {p99[0]}", [median[1], p99[1]]


def decoded(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))
