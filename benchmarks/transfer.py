"""What transfer brings on real corpora: Model_t(0), DCKT, and the same extra training without the source.

    DCKT_DATA=... python benchmarks/transfer.py --source caltech101 --target pascal_sentences

Prints a Markdown table of test MAP over seeds. The runs stay in --out and are not repeated.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

from grid import Row, grid, markdown, save

NO_MMD = [f"losses.mmd_fc{layer}=0" for layer in (6, 7, 8, 9)]
ROWS = (
    Row("Model_t(0), no transfer", "dckt", "model_t0"),
    Row("Model_t, as long as DCKT but without the source (MMD off, all pairs)", "alone", "last"),
    Row("DCKT, last round", "dckt", "last"),
    Row("DCKT, best round on validation", "dckt", "best"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="caltech101")
    parser.add_argument("--target", default="pascal_sentences")
    parser.add_argument("--trunk", default="mobilenet_v2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    data = Path(os.environ.get("DCKT_DATA") or parser.error("set DCKT_DATA to the folder of corpora"))
    trunk = [f"image.trunk={args.trunk}", f"image.weights={data / 'weights' / args.trunk}_features.safetensors"]
    settings = {"dckt": trunk, "alone": [*trunk, *NO_MMD, "transfer.law=all"]}
    corpora = dict.fromkeys(range(args.seeds), (data / args.source, data / args.target))
    out = args.out / f"{args.source}-{args.target}-{args.trunk}"
    found = grid(corpora, settings, out)
    save(out / "evaluations.json", found)
    packages = ", ".join(f"{name} {version(name)}" for name in ("dckt", "torch", "torchvision", "gensim", "numpy"))
    print(f"\n{args.source} → {args.target}, trunk {args.trunk}, preset small, {args.seeds} seeds")
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores\n")
    print(markdown(ROWS, found))


if __name__ == "__main__":
    main()
