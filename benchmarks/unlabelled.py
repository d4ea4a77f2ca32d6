"""A target whose labels are unknown: MAP of what can be done without them, the labels read for the figures alone.

    DCKT_DATA=... OMP_NUM_THREADS=1 python benchmarks/unlabelled.py --seeds 3
    python benchmarks/unlabelled.py --quick

Figures are of validation pairs; with --test they are of the test pairs, and of nothing else. Every method chooses its
space alike, by how well validation partners find each other, and clusters are as many. A seed chooses the target's
training pairs, where not all are taken, and draws the generated corpora.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dckt_trainer.config import Config, load_config
from dckt_trainer.data.features import default_cache
from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.evaluate import evaluate
from dckt_trainer.inputs import prepare
from dckt_trainer.linear import LinearModel, default_clusters, fit_both, fit_unlabelled, transfer_helps
from dckt_trainer.linear.fit import MEDIA, Candidate, Data, class_means, to_model, unit
from dckt_trainer.linear.unlabelled import as_own_classes, choose_space, feature_clusters, join
from dckt_trainer.markdown import markdown_table
from dckt_trainer.pairs import PairSet
from dckt_trainer.plan import make_plan
from dckt_trainer.progress import Bars, Silent
from dckt_trainer.runs import create_run
from setting import data_folder, input_changes, machine

CORPORA = (
    ("caltech101", "pascal_sentences"),
    ("fashion", "pascal_sentences"),
    ("caltech101", "fashion"),
)
PAIRS_PER_CLASS = (10, 0)  # 0 is all
GENERATED = ("image.trunk=alexnet", "image.weights=random", "image.side=128", "image.grid=3", "image.crop_share=1.0")

Pairs = Mapping[str, PairSet]


# -- the methods: a model, and whether it reads texts as the source does ---------------------------------------------


def source_directly(pairs: Pairs) -> tuple[LinearModel, bool]:
    """(a) The source's space and the prototypes of its classes; the target gives its mean and variance alone."""
    source, data = pairs["source.train"], _data(pairs, by_source=True)
    space = choose_space(data, (1.0,))
    labels = source.labels.numpy()
    each = zip(MEDIA, data.bases, space.maps, strict=True)
    rows = [unit(basis.source(source.features[medium].double().numpy()) @ to) for medium, basis, to in each]
    prototypes = unit(np.sum([class_means(part, labels) for part in rows], axis=0))
    return _model(data, join(space, data, prototypes)), True


def pairs_only(pairs: Pairs) -> tuple[LinearModel, bool]:
    """(b) Canonical correlations of the target's pairs."""
    data = _data(pairs, by_source=False)
    space = choose_space(data, (0.0,))
    found = join(space, data, np.zeros((1, space.maps[0].shape[1])))
    return _model(data, replace(found, choice=replace(found.choice, share=0.0))), False


def clusters_only(pairs: Pairs) -> tuple[LinearModel, bool]:
    """(c) Clusters of the features of both media are the classes: of the space, and of the prototypes."""
    pairs_as_classes = _data(pairs, by_source=False)
    labels = feature_clusters(pairs_as_classes, default_clusters(len(pairs["target.train"])))
    train = replace(pairs["target.train"], labels=torch.from_numpy(labels))
    data = Data.of(train, as_own_classes(pairs["target.val"]), None)
    space = choose_space(data, (0.0,))
    return _model(data, join(space, data, unit(class_means(space.places(data.rows), labels)))), False


def without_source(pairs: Pairs) -> tuple[LinearModel, bool]:
    """Ours, of the target alone."""
    train, validation = pairs["target.train"], pairs["target.val"]
    return fit_unlabelled(train, validation, default_clusters(len(train))).model, False


def ours(pairs: Pairs) -> tuple[LinearModel, bool]:
    """(d) What a run keeps: with the source, unless it does clear harm."""
    found = fit_both(pairs, default_clusters(len(pairs["target.train"])), Silent(), labelled=False)
    helps = transfer_helps(found, Silent(), labelled=False)
    return found[helps].model, helps


METHODS: dict[str, Callable[[Pairs], tuple[LinearModel, bool]]] = {
    "(a) source directly": source_directly,
    "(b) pairs only": pairs_only,
    "(c) clusters only": clusters_only,
    "ours without source": without_source,
    "(d) ours": ours,
}


def _data(pairs: Pairs, *, by_source: bool) -> Data:
    how = ".by_source" if by_source else ""
    train, validation = (as_own_classes(pairs[f"target.{part}{how}"]) for part in ("train", "val"))
    return Data.of(train, validation, pairs["source.train"] if by_source else None)


def _model(data: Data, found: Candidate) -> LinearModel:
    return to_model(data.bases, found)


def measure(pairs: Pairs, part: str) -> dict[str, float]:
    """The MAP of every method, the mean of both directions, on the pairs of a split."""
    found = {}
    for name, method in METHODS.items():
        model, by_source = method(pairs)
        asked = pairs[f"target.{part}" + (".by_source" if by_source else "")]
        found[name] = evaluate(model, asked, torch.device("cpu")).average
    return found


# -- corpora and the table -------------------------------------------------------------------------------------------


def read_pairs(source: Path, target: Path, config: Config, *, test: bool) -> Pairs:
    """The pairs of both corpora as features; without ``test``, no test pair is read."""
    plan = make_plan(
        str(source),
        str(target),
        None,
        config,
        device="cpu",
        on_bad_pair="raise",
        force=False,
        pretrained_from=None,
        reporter=Silent(),
        trial=not test,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = create_run(Path(folder) / "run", config, plan.facts["source"], plan.facts["target"], trunk=None)
        return prepare(run, plan, cache=default_cache(), reporter=Bars()).pairs


def _table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    lines = []
    for title, seeds in rows.items():
        cells = []
        for name in METHODS:
            values = [found[name] for found in seeds]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append([title, *cells])
    return markdown_table(["", *METHODS], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", action="store_true", help="read the test pairs, in place of validation")
    parser.add_argument("--quick", action="store_true", help="one pair of small generated corpora")
    args = parser.parse_args()
    part, seeds = "test" if args.test else "val", 1 if args.quick else args.seeds
    rows: dict[str, list[dict[str, float]]] = {}

    def add(title: str, source: Path, target: Path, changes: Sequence[str]) -> None:
        pairs = read_pairs(source, target, load_config("modern", changes), test=args.test)
        rows.setdefault(title, []).append(measure(pairs, part))

    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_synthetic(root, seed=seed, target_pairs_per_class=10, side=64 if args.quick else 96)
            add("generated, 10 a class", root / "source", root / "target", [*GENERATED, f"seed={seed}"])
    if not args.quick:
        data = data_folder(parser).resolve()
        shared = input_changes(data)
        for source, target in CORPORA:
            for count in PAIRS_PER_CLASS:
                title = f"{source} → {target}, {f'{count} a class' if count else 'all'}"
                for seed in range(seeds if count else 1):
                    changes = [*shared, f"target.pairs_per_class={count}", f"seed={seed}"]
                    add(title, data / source, data / target, changes)
    print(f"{machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads")
    print(f"MAP on {'test' if args.test else 'validation'}, mean and standard deviation over seeds\n\n{_table(rows)}")


if __name__ == "__main__":
    main()
