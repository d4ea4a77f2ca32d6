"""What the source's weights, and what DCKT, bring on generated corpora with 5 pairs per class.

    python benchmarks/synthetic.py

Each seed has corpora of its own. Prints a Markdown table of test MAP. The runs stay in --out and are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dckt_trainer.data.synthetic import write_synthetic
from dckt_trainer.progress import Bars
from dckt_trainer.sweep import Row, Sweep
from dckt_trainer.sweep_run import run_sweep
from dckt_trainer.sweep_table import markdown, write_table

BASE = ("image.trunk=alexnet", "image.weights=random", "image.side=128", "image.grid=3", "image.crop_share=1.0")
SWEEP = Sweep(
    name="synthetic",
    preset="small",
    rows=(
        Row(title="target alone: Model_t(0)", network="model_t0"),
        Row(
            title="target started from the source's weights",
            changes=("pretrain.target_start=source", "transfer.rounds=0"),
            network="last",
        ),
        Row(title="DCKT (preset small), last round", network="last"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="training pairs of each target class")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    args = parser.parse_args()
    corpora = args.out / f"corpora-{args.pairs}-pairs"
    for seed in range(args.seeds):
        if not (corpora / str(seed) / "target").exists():
            write_synthetic(corpora / str(seed), seed=seed, target_pairs_per_class=args.pairs, force=True)
    result = run_sweep(
        SWEEP,
        corpora / "{seed}" / "source",
        corpora / "{seed}" / "target",
        args.out / f"{args.pairs}-pairs",
        changes=BASE,
        seeds=args.seeds,
        processes=args.jobs,
        reporter=Bars(),
    )
    write_table(result)
    print(f"\ngenerated corpora, {args.pairs} pairs per class, {args.seeds} seeds\n\n{markdown(result)}")


if __name__ == "__main__":
    main()
