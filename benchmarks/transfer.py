"""What transfer brings on real corpora: Model_t(0), DCKT, and the same extra training without the source.

    DCKT_DATA=... python benchmarks/transfer.py --source caltech101 --target pascal_sentences

Prints a Markdown table of test MAP over seeds. The runs stay in --out and are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dckt_trainer.progress import Bars
from dckt_trainer.sweep import Row, Sweep
from dckt_trainer.sweep_run import run_sweep
from dckt_trainer.sweep_table import markdown, write_table
from setting import data_folder, machine, trunk_changes

ALONE = (*(f"losses.mmd_fc{layer}=0" for layer in (6, 7, 8, 9)), "transfer.law=all")
SWEEP = Sweep(
    name="transfer",
    preset="small",
    rows=(
        Row(title="Model_t(0), no transfer", network="model_t0"),
        Row(title="as long as DCKT but without the source (MMD off, all pairs)", changes=ALONE, network="last"),
        Row(title="DCKT, last round", network="last"),
        Row(title="DCKT, best round on validation", network="best"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="caltech101")
    parser.add_argument("--target", default="pascal_sentences")
    parser.add_argument("--trunk", default="mobilenet_v2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    data = data_folder(parser)
    result = run_sweep(
        SWEEP,
        data / args.source,
        data / args.target,
        args.out / f"{args.source}-{args.target}-{args.trunk}",
        changes=trunk_changes(data, args.trunk),
        seeds=args.seeds,
        processes=args.jobs,
        reporter=Bars(),
    )
    write_table(result)
    print(f"\n{args.source} → {args.target}, trunk {args.trunk}, preset {SWEEP.preset}, {args.seeds} seeds")
    print(f"{machine()}\n\n{markdown(result)}")


if __name__ == "__main__":
    main()
