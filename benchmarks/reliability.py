"""The SDK under faults: damaged folders, killed writers, no room, many at once, random input. Counts what comes of it.

    python benchmarks/reliability.py --quick             some minutes
    python benchmarks/reliability.py                     20,000 damaged folders, 500 kills, 60 s of soak: an hour or so
    python benchmarks/reliability.py --only kills soak   some of the parts
    python benchmarks/reliability.py --only corruption --case 4711 --out runs/reliability
                                                         one case again, its folder kept

Nothing that is forbidden may be counted: no crash, no hang, no silently wrong answer, no exception but ours, nothing
acknowledged that is lost. Prints Markdown, writes results.json into --out and, for every forbidden case, the damaged
folder, and ends with 1 if there was any.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults import corruption, fuzz, kills, room, samples, soak
from faults.pool import run_cases

PACKAGES = ("dckt", "numpy", "hnswlib", "onnxruntime", "Pillow", "hypothesis")
OLD = Path(__file__).parents[1] / "tests/sdk/data/index-v1/index"  # an index in format 1
SETTLED = 30.0  # seconds of soak from which on its memory says something
MEMORY = 4 * 2**30  # bytes of address space of a child that is fed random input


@dataclass(frozen=True)
class Sizes:
    """How much of everything: damaged folders, folders of killed writers, trials without room, soak, examples."""

    corruptions: int
    kill_cases: int
    trials: int
    soak: soak.Plan
    examples: int

    def scaled(self, share: float) -> Sizes:
        """A share of all, but for the threads and the processes of the soak."""
        counts = {name: max(1, round(share * value)) for name, value in vars(self).items() if isinstance(value, int)}
        return replace(self, **counts, soak=replace(self.soak, seconds=share * self.soak.seconds))


FULL = Sizes(20_000, 100, 400, soak.Plan(), 5000)
QUICK = Sizes(600, 8, 24, soak.Plan(processes=4, threads=4, seconds=8.0), 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--share", type=float, default=1.0, help="of the full sizes, such as 0.1")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="child processes")
    parser.add_argument("--case", type=int, help="only this case of corruption, kills or room")
    parser.add_argument(
        "--coverage", metavar="PROPERTY", help=f"by atheris instead: one of {', '.join(fuzz.PROPERTIES)}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"))
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL.scaled(args.share)
    if args.coverage:
        fuzz.by_coverage(args.coverage, runs=sizes.examples * 100)
    args.out.mkdir(parents=True, exist_ok=True)
    setting = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "seed": args.seed,
        "sizes": asdict(sizes),
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items() if name != "sizes"))
    found, bad = {}, 0
    for name in args.only:
        began = time.perf_counter()
        found[name], forbidden = PARTS[name](args, sizes)
        bad += forbidden
        print(f"\n{time.perf_counter() - began:.0f} s; forbidden: {forbidden}")
    results = {"setting": setting, "forbidden": bad, "found": found}
    (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    sys.exit(1 if bad else 0)


def run_corruption(args: argparse.Namespace, sizes: Sizes) -> tuple[Any, int]:
    with tempfile.TemporaryDirectory(dir=samples.in_memory()) as base:
        corruption.prepare(Path(base), old=OLD if OLD.is_dir() else None)
        cases = chosen(args, sizes.corruptions)
        keep = args.out / "corruption"
        report = corruption.check(Path(base), cases, seed=args.seed, workers=args.workers, keep=keep)
        if args.case is not None:
            corruption.archive(Path(base), args.seed, args.case, keep)
            print(corruption.run_case(Path(base), args.seed, args.case))
    table(
        f"{len(cases):,} damaged folders",
        ["outcome", "index", "bundle"],
        [(name, *(report.outcomes[of, name] for of in ("index", "bundle"))) for name in corruption.OUTCOMES],
    )
    kinds = sorted({kind for kind, _ in report.kinds})
    table(
        "by damage",
        ["damage", *corruption.OUTCOMES],
        [(kind, *(report.kinds[kind, name] for name in corruption.OUTCOMES)) for kind in kinds],
    )
    for case, verdict in report.forbidden:
        print(f"\ncase {case}: {verdict.outcome}: {verdict.detail}")
    return {
        "outcomes": {" ".join(key): count for key, count in sorted(report.outcomes.items())},
        "forbidden": [{"case": case, **asdict(verdict)} for case, verdict in report.forbidden],
    }, len(report.forbidden)


def run_kills(args: argparse.Namespace, sizes: Sizes) -> tuple[Any, int]:
    found = kills.check(chosen(args, sizes.kill_cases), seed=args.seed, workers=args.workers)
    counted = Counter((killed.during, killed.kept) for _, killed in found)
    table(
        f"{len(found)} kills, {sum(killed.acknowledged for _, killed in found):,} acknowledged changes",
        ["killed during", "kills", "its change is there", "its change is not there"],
        [
            (name, counted[name, True] + counted[name, False], counted[name, True], counted[name, False])
            for name in sorted({killed.during for _, killed in found})
        ],
    )
    return judged([(case, killed.wrong) for case, killed in found], {"kills": len(found)})


def run_room(args: argparse.Namespace, sizes: Sizes) -> tuple[Any, int]:
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        found = room.check(chosen(args, sizes.trials), seed=args.seed, workers=args.workers, base=Path(base))
    trials = [trial for _, trial in found]
    rows = [
        (
            kind,
            sum(trial.kind == kind for trial in trials),
            sum(trial.done for trial in trials if trial.kind == kind),
            sum(trial.refused for trial in trials if trial.kind == kind),
            next((trial.skipped for trial in trials if trial.kind == kind and trial.skipped), ""),
        )
        for kind in room.KINDS
    ]
    table(f"{len(found)} trials without room", ["kind", "trials", "changes done", "our errors", "skipped, for"], rows)
    return judged([(case, trial.wrong) for case, trial in found], {"trials": {row[0]: row[1:] for row in rows}})


def run_soak(args: argparse.Namespace, sizes: Sizes) -> tuple[Any, int]:
    reports = {}
    bad = 0
    for kind in ("exact", "hnsw"):
        report = soak.run(replace(sizes.soak, kind=kind), seed=args.seed)
        reports[kind] = asdict(report)
        missed = report.missed if kind == "exact" else 0
        grew = sizes.soak.seconds >= SETTLED and report.grew(sizes.soak.seconds)
        bad += len(report.errors) + len(report.ghosts) + bool(report.wrong) + missed + grew
        for problem in [*report.errors, *report.ghosts, *([report.wrong] if report.wrong else [])][:20]:
            print(f"\n{kind}: {problem}")
    table(
        f"{sizes.soak.processes} processes of {sizes.soak.threads} threads, {sizes.soak.seconds:g} s",
        ["kind", "changes", "searches", "errors", "ghosts", "missed", "had to be found", "MB", "growth, MB an hour"],
        [
            (
                kind,
                *(f"{of[name]:,}" for name in ("changes", "searches")),
                *(len(of[name]) for name in ("errors", "ghosts")),
                *(f"{of[name]:,}" for name in ("missed", "expected")),
                ", ".join(f"{size / 1e6:.0f}" for size in of["memory"]),
                ", ".join(f"{rate / 1e6:+.0f}" for rate in of["growth"]),
            )
            for kind, of in reports.items()
        ],
    )
    return reports, bad


def run_fuzz(args: argparse.Namespace, sizes: Sizes) -> tuple[Any, int]:
    names = list(fuzz.PROPERTIES)
    work = partial(fuzz_case, args.seed, sizes.examples)
    ended = run_cases(work, range(len(names)), workers=args.workers, seconds=3600, memory=MEMORY)
    rows = sorted((names[one.case], "" if one.how == "returned" else f"{one.how}: {one.value}") for one in ended)
    table(
        f"random input, {sizes.examples:,} examples each",
        ["input", "failure"],
        [(name, " ".join(failure.split())) for name, failure in rows],
    )
    return dict(rows), sum(bool(failure) for _, failure in rows)


def fuzz_case(seed: int, examples: int, case: int) -> None:
    fuzz.run(list(fuzz.PROPERTIES)[case], examples=examples, seed=seed)


PARTS: Mapping[str, Callable[[argparse.Namespace, Sizes], tuple[Any, int]]] = {
    "corruption": run_corruption,
    "kills": run_kills,
    "room": run_room,
    "soak": run_soak,
    "fuzz": run_fuzz,
}


def chosen(args: argparse.Namespace, count: int) -> range:
    """The numbers of the cases to run."""
    return range(count) if args.case is None else range(args.case, args.case + 1)


def judged(ended: Sequence[tuple[int, str | None]], about: dict[str, Any]) -> tuple[Any, int]:
    """Prints what is wrong; what to store, and how many."""
    wrong = [{"case": case, "wrong": text} for case, text in ended if text]
    for one in wrong:
        print(f"\ncase {one['case']}: {one['wrong']}")
    return {**about, "wrong": wrong}, len(wrong)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
