"""The few-shot study: test MAP by the number of training pairs per class, with and without transfer, on real corpora.

    DCKT_DATA=... OMP_NUM_THREADS=1 python benchmarks/fewshot.py --seeds 5

Seed s has its own subset of the target's training pairs, and a smaller subset is part of a larger one. Validation and
test pairs are all there. Each run reads the test split once, at its end. Every finished (corpora, pairs, method, seed)
is a line of OUT/rows.jsonl and is not repeated; an interrupted run goes on. OUT/table.md and the curves.png of each
pair of corpora are made anew from the lines after each of its seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from dckt.errors import DcktError
from dckt.files import atomic_folder, atomic_write
from dckt_trainer import plots
from dckt_trainer.config import Config, load_config
from dckt_trainer.data.feature_corpus import is_feature_corpus
from dckt_trainer.data.features import default_cache
from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.inputs import prepare
from dckt_trainer.markdown import markdown_table
from dckt_trainer.pairs import PairSet
from dckt_trainer.plan import remake_plan, source_half
from dckt_trainer.progress import Bars, Silent
from dckt_trainer.runs import Run, open_run
from dckt_trainer.sweep_table import estimate
from dckt_trainer.train import resume, train
from linear_baselines import Measured, canonical_correlations, semantic_matching
from setting import TRUNK, data_folder, input_changes, interval, machine

PAIRS_PER_CLASS = (1, 2, 5, 10, 20, 40)
FEATURES = "wikipedia/features.npz:text=text_lda,val=val231,test=test462"
# Made here. Shuffled: no text belongs to its picture, or to its class. Unrelated: no shape, texture or colour in both.
SYNTHETIC, UNRELATED, SHUFFLED = "synthetic/", "unrelated/", "shuffled/"
CORPORA: dict[str, tuple[str | None, str]] = {  # source and target; the most important first
    "caltech101 → pascal_sentences": ("caltech101", "pascal_sentences"),
    "fashion → pascal_sentences": ("fashion", "pascal_sentences"),
    "caltech101 → fashion": ("caltech101", "fashion"),
    "fashion → caltech101": ("fashion", "caltech101"),
    "pascal_sentences → caltech101": ("pascal_sentences", "caltech101"),
    "synthetic": (f"{SYNTHETIC}source", f"{SYNTHETIC}target"),
    "wikipedia": (None, FEATURES),
    "caltech101, texts shuffled → pascal_sentences": (f"{SHUFFLED}caltech101", "pascal_sentences"),
    "synthetic, the source's texts shuffled": (f"{SHUFFLED}{SYNTHETIC}source", f"{SYNTHETIC}target"),
    "synthetic, nothing in common": (f"{UNRELATED}source", f"{UNRELATED}target"),
}
WIDTH = 128
SOURCE_EPOCHS = {"paper": 40, "released": 40, "small": 20, "modern": 1}  # in pretraining; of modern without effect
TARGET_EPOCHS = 47  # in pretraining with the most pairs; with fewer so many more that the steps are as many
KEPT, ALONE = "modern", "modern, the source left out"


@dataclass(frozen=True)
class Point:
    """What a method is measured on.

    Attributes:
        source: corpus argument; None for the target alone.
        target: likewise.
        pairs: training pairs of each class of the target.
        seed: of the run, and of the choice of pairs.
        changes: settings that all network methods share, ``section.key=value`` each.
        out: folder of the runs on these corpora.
        bases: by source and :func:`source_half`, runs whose checkpoints were kept.
    """

    source: str | None
    target: str
    pairs: int
    seed: int
    changes: tuple[str, ...]
    out: Path
    bases: dict[tuple[str, Config], Path] = field(default_factory=dict)


Figures = dict[str, Any]  # at least `test` and `validation`, the average MAP on each
Method = Callable[[Point], Figures | None]  # None where it needs a source and there is none


def network(preset: str, kept: str, *changes: str) -> Method:
    """A target network of a run: ``model_t0``, ``last`` or ``best``. Methods with the same run share it."""

    def measure(point: Point) -> Figures | None:
        own = changes
        if point.source is None:
            if kept != "model_t0" or changes:
                return None
            own = ("transfer.rounds=0",)
        run = _trained(point, preset, own)
        evaluation = run.evaluation
        test = evaluation["test"][kept]
        validation = next(each for each in evaluation["validation"] if each["round"] == test["round"])
        times = [datetime.fromisoformat(run.facts[name]) for name in ("started", "finished")]
        return {
            "test": test["average"],
            "validation": validation["average"],
            "image_to_text": test["image_to_text"],
            "text_to_image": test["text_to_image"],
            "round": test["round"],
            "training_pairs": run.facts["target"]["pairs"]["train"],
            "run": run.path.name,
            "seconds": (times[1] - times[0]).total_seconds(),
        }

    return measure


def linear(baseline: Callable[[Mapping[str, PairSet]], Measured]) -> Method:
    """A baseline of the target alone, on the inputs of the preset ``modern``."""

    def measure(point: Point) -> Figures:
        run = _trained(point, "modern", ())
        pairs = _pairs(run.path)
        _prune(point, run)
        start = time.perf_counter()
        measured = baseline(pairs)
        return {
            "test": measured.test.average,
            "validation": measured.validation,
            **{way: found.map for way, found in measured.test.directions.items()},
            "settings": measured.settings,
            "training_pairs": run.facts["target"]["pairs"]["train"],
            "seconds": time.perf_counter() - start,
        }

    return measure


@lru_cache(maxsize=1)  # the baselines of a point follow each other
def _pairs(path: Path) -> Mapping[str, PairSet]:
    """The pairs that a run was trained on, as it saw them."""
    run = open_run(path)
    plan = remake_plan(run, device="cpu", reporter=Silent())
    run.checkpoints.mkdir(exist_ok=True)  # the words are learnt again and lie there until they are pruned
    return prepare(run, plan, cache=default_cache(), reporter=Silent()).pairs


METHODS: dict[str, Method] = {
    "logistic semantic matching": linear(semantic_matching),
    "regularised CCA": linear(canonical_correlations),
    "Model_t(0)": network("small", "last", "transfer.rounds=0"),
    "source-initialised": network("small", "last", "transfer.rounds=0", "pretrain.target_start=source"),
    "paper": network("paper", "last"),
    "paper, round 0": network("paper", "model_t0"),
    "released": network("released", "last"),
    "released, round 0": network("released", "model_t0"),
    KEPT: network("modern", "best"),
    ALONE: network("modern", "model_t0"),
}


def _trained(point: Point, preset: str, changes: Sequence[str]) -> Run:
    """The run of a point, trained or gone on with where it is not complete."""
    path = point.out / "+".join([preset, *changes, f"{point.pairs}-pairs", str(point.seed)])
    run = open_run(path) if (path / "run.json").exists() else None
    if run and run.complete:
        return run
    if run:
        run = resume(path, device="cpu", reporter=Bars())
    else:
        config = load_config(
            preset,
            [
                *point.changes,
                f"pretrain.source_epochs={SOURCE_EPOCHS[preset]}",
                f"pretrain.target_epochs={TARGET_EPOCHS * PAIRS_PER_CLASS[-1] // point.pairs}",
                *changes,
                f"target.pairs_per_class={point.pairs}",
                f"seed={point.seed}",
            ],
        )
        pretrains = config.model.kind == "network"
        base = point.bases.get((point.source, source_half(config))) if point.source and pretrains else None
        run = train(point.source, point.target, path, config, device="cpu", pretrained_from=base, reporter=Bars())
    _prune(point, run)
    return run


def _prune(point: Point, run: Run) -> None:
    """Deletes models, and checkpoints too unless they are the first with this half of a source."""
    source = point.source
    first = source is not None and point.bases.setdefault((source, source_half(run.config)), run.path) == run.path
    for name in ("source", "target", *(() if first else ("checkpoints",))):
        shutil.rmtree(run.path / name, ignore_errors=True)


def _known_bases(out: Path) -> dict[tuple[str, Config], Path]:
    found: dict[tuple[str, Config], Path] = {}
    for path in sorted(out.glob("*/*/run.json")):
        run = open_run(path.parent)
        if run.complete and run.checkpoints.exists():
            found.setdefault((str(run.source), source_half(run.config)), run.path)
    return found


# -- corpora -------------------------------------------------------------------------------------------------------


def _corpus(name: str, data: Path, made: Path) -> str:
    """Where a corpus lies; what has to be made for it is."""
    if name.startswith(SHUFFLED):
        return str(_shuffled(Path(_corpus(name.removeprefix(SHUFFLED), data, made)), made / name))
    if name.startswith((SYNTHETIC, UNRELATED)):
        root = (made / name).parent
        if not (made / name).exists():
            unrelated = name.startswith(UNRELATED)
            write_synthetic(root, target_pairs_per_class=PAIRS_PER_CLASS[-1], unrelated=unrelated, force=True)
        return str(made / name)
    return str(data / name)


def _shuffled(corpus: Path, copy: Path) -> Path:
    """A copy whose texts have changed places, so that media have nothing to do with each other."""
    if not copy.exists():
        pairs = [json.loads(line) for line in (corpus / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
        texts = [pair["text"] for pair in pairs]
        random.Random(0).shuffle(texts)
        with atomic_folder(copy) as folder:
            (folder / "images").symlink_to(corpus / "images")
            lines = [json.dumps({**pair, "text": text}) for pair, text in zip(pairs, texts, strict=True)]
            (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return copy


# -- the table -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[Figures]:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _by_seed(rows: Sequence[Figures], corpora: str, pairs: int, method: str, key: str) -> dict[int, float]:
    wanted = (corpora, pairs, method)
    return {row["seed"]: row[key] for row in rows if (row["corpora"], row["pairs"], row["method"]) == wanted}


def _cell(values: Sequence[float], sign: str = "") -> str:
    return interval(estimate(values), sign).replace("0.", ".") if values else "–"


def _section(rows: Sequence[Figures], corpora: str, methods: Sequence[str]) -> str:
    sizes = sorted({row["pairs"] for row in rows if row["corpora"] == corpora})
    head = ["", *map(str, sizes)]
    blocks = [f"### {corpora}"]

    def values(pairs: int, name: str, key: str = "test") -> dict[int, float]:
        return _by_seed(rows, corpora, pairs, name, key)

    def table(title: str, cell: Callable[[int, str], str], named: Sequence[str]) -> None:
        blocks.extend(
            [title, markdown_table(head, [[name, *(cell(pairs, name) for pairs in sizes)] for name in named])]
        )

    def mean(key: str) -> Callable[[int, str], str]:
        def cell(pairs: int, name: str) -> str:
            return _cell(list(values(pairs, name, key).values()))

        return cell

    ours = KEPT if KEPT in methods else ALONE

    def ahead(pairs: int, name: str) -> str:
        first, other = values(pairs, ours), values(pairs, name)
        apart = [value - other[seed] for seed, value in first.items() if seed in other]
        return _cell(apart, "+")

    table("Test MAP by training pairs a class:", mean("test"), methods)
    table(f"How far {ours} is ahead, test MAP, seed by seed:", ahead, [name for name in methods if name != ours])
    table("Validation MAP:", mean("validation"), methods)
    counts = {name: [len(values(pairs, name)) for pairs in sizes] for name in methods}
    same = {count for found in counts.values() for count in found}
    words = [f"Seeds: {same.pop()}." if len(same) == 1 else f"Seeds, by pairs: {_counted(counts)}."]
    if KEPT in methods:
        taken = [values(pairs, KEPT, "round").values() for pairs in sizes]
        shares = ", ".join(f"{sum(map(bool, found))} of {len(found)}" for found in taken)
        words.append(f"Runs that took the source in, by pairs: {shares}.")
    return "\n\n".join([*blocks, " ".join(words)])


def _counted(counts: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{name} {' '.join(map(str, found))}" for name, found in counts.items())


def _bands(rows: Sequence[Figures], corpora: str, methods: Sequence[str], key: str) -> plots.Bands:
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for name in methods:
        for pairs in sorted({row["pairs"] for row in rows}):
            values = list(_by_seed(rows, corpora, pairs, name, key).values())
            if values:
                each = estimate(values)
                low, high = (each.mean if end is None else end for end in (each.low, each.high))
                found.setdefault(name, []).append((float(pairs), each.mean, low, high))
    return found


def write_tables(out: Path, settings: Sequence[str]) -> str:
    """Writes the table, and the curves of each pair of corpora, from the lines that there are; returns the table."""
    rows = _read(out / "rows.jsonl")
    found = {(row["corpora"], row["method"]) for row in rows}
    listed = [name for name in CORPORA if any(name == corpora for corpora, _ in found)]
    methods = {name: [method for method in METHODS if (name, method) in found] for name in listed}
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    text = "\n\n".join(
        [
            f"{machine()}. Settings: {', '.join(f'`{each}`' for each in settings)}. Mean over seeds with the 95 % "
            "interval of Student's t; it tells of the chance in training and in the choice of training pairs, not of "
            f"that in the choice of test pairs. A run took {statistics.median(seconds):.0f} s (median).",
            *(_section(rows, name, methods[name]) for name in listed),
        ]
    )
    atomic_write(out / "table.md", text + "\n")
    for name in listed:
        panels = {key: _bands(rows, name, methods[name], key) for key in ("test", "validation")}
        png = plots.bands(panels, x="training pairs per class", y="MAP", log_ticks=PAIRS_PER_CLASS)
        (out / _folder(name)).mkdir(exist_ok=True)
        atomic_write(out / _folder(name) / "curves.png", png)
    return text


def _folder(corpora: str) -> str:
    return corpora.replace(" → ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA), choices=list(CORPORA))
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS_PER_CLASS), help="per class")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trunk", default=TRUNK, help=f"whose weights lie beside the corpora ({TRUNK})")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="any other setting, for all runs")
    parser.add_argument("--out", type=Path, default=Path("runs/fewshot"))
    parser.add_argument("--tables", action="store_true", help="only write the tables of the lines that there are")
    args = parser.parse_args()
    if args.tables:
        noted = args.out / "settings.txt"
        if not noted.exists():
            parser.error(f"{noted} is not there, so {args.out} is no folder of this study; name another --out")
        print(write_tables(args.out, noted.read_text(encoding="utf-8").split("\n")))
        return
    data = data_folder(parser).resolve()
    settings = [f"network.width={WIDTH}", "compute.threads=1", *args.changes]
    told = settings if args.trunk == TRUNK else [*settings, f"image.trunk={args.trunk}"]
    pictures = [*settings, *input_changes(data, args.trunk)]
    args.out.mkdir(parents=True, exist_ok=True)
    lines, noted = args.out / "rows.jsonl", args.out / "settings.txt"
    if noted.exists() and noted.read_text(encoding="utf-8") != "\n".join(told):
        parser.error(f"{args.out} was made with other settings, which are in {noted}; name another --out")
    atomic_write(noted, "\n".join(told))
    bases = _known_bases(args.out)
    for seed in range(args.seeds):
        for corpora in args.corpora:
            names = CORPORA[corpora]
            source, target = (name and _corpus(name, data, args.out.resolve() / "corpora") for name in names)
            assert target  # every entry names one
            changes = settings if is_feature_corpus(target) else pictures
            for pairs in args.pairs:
                point = Point(source, target, pairs, seed, tuple(changes), args.out / _folder(corpora), bases)
                for method in args.methods:
                    if seed in _by_seed(_read(lines), corpora, pairs, method, "seed"):
                        continue
                    try:
                        figures = METHODS[method](point)
                    except DcktError as error:  # one run must not cost the runs that follow; a later call tries again
                        print(f"{corpora}, {pairs} pairs, {method}, seed {seed} failed: {error}", flush=True)
                        continue
                    if figures is not None:
                        row = {"corpora": corpora, "pairs": pairs, "method": method, "seed": seed, **figures}
                        with lines.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            text = write_tables(args.out, told)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
