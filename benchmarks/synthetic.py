"""What the source's weights, and what DCKT, bring on generated corpora with 5 pairs per class.

    python benchmarks/synthetic.py

Each seed has corpora of its own. Prints a Markdown table of test MAP. The runs stay in --out and are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dckt_trainer.data.synthetic import write_synthetic
from grid import Row, grid, markdown, save

BASE = ["image.trunk=alexnet", "image.weights=random", "image.side=128", "image.grid=3", "image.crop_share=1.0"]
SETTINGS = {
    "dckt": BASE,
    "from-source": [*BASE, "pretrain.target_start=source", "transfer.rounds=0"],
}
ROWS = (
    Row("target alone: Model_t(0)", "dckt", "model_t0"),
    Row("target started from the source's weights", "from-source", "last"),
    Row("DCKT (preset small), last round", "dckt", "last"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="training pairs of each target class")
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    args = parser.parse_args()
    out = args.out / f"{args.pairs}-pairs"
    corpora = {}
    for seed in range(args.seeds):
        root = out / f"corpora-{seed}"
        if not (root / "target").exists():
            write_synthetic(root, seed=seed, target_pairs_per_class=args.pairs, force=True)
        corpora[seed] = (root / "source", root / "target")
    found = grid(corpora, SETTINGS, out)
    save(out / "evaluations.json", found)
    print(f"\ngenerated corpora, {args.pairs} pairs per class, {args.seeds} seeds\n")
    print(markdown(ROWS, found))


if __name__ == "__main__":
    main()
