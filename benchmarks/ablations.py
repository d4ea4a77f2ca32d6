"""The paper's ablations (Table 3) and its curve over alpha (Figure 4), on real corpora.

    DCKT_DATA=... python benchmarks/ablations.py --sources caltech101 --presets paper --seeds 5

The defaults are what benchmarks/RESULTS.md was made with: a narrow network, GloVe vectors of 50 numbers and a fourth of
the presets' passes over the source in pretraining. Prints a Markdown
section for each table. The runs stay in --out and are not repeated; tables, plots and reports lie there as well. The
whole takes hours: name what is wanted with --sweeps, --presets and --sources.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dckt_trainer.progress import Bars
from dckt_trainer.sweep import Row, Sweep, read_sweep
from dckt_trainer.sweep_run import SweepResult, run_sweep
from dckt_trainer.sweep_table import NOTE, markdown, write_table
from setting import data_folder, input_changes, machine

TARGET = "pascal_sentences"

# Which labels of the source are left out for "No overlap", by the names of the labels. A label overlaps where its
# pictures would bear a label of the target, which are those of the Visual Object Classes challenge; its guidelines for
# annotators say what counts (host.robots.ox.ac.uk/pascal/VOC/voc2007/guidelines.html). The paper does not list its own.
OVERLAP = {
    "caltech101": {
        "airplanes": "aeroplane, by another name",
        "emu": "bird: all birds",
        "flamingo": "bird: all birds",
        "flamingo_head": "bird: a part of one",
        "ibis": "bird: all birds",
        "pigeon": "bird: all birds",
        "rooster": "bird: all birds",
        "ferry": "boat: ships count",
        "ketch": "boat: a sailing boat",
        "schooner": "boat: a sailing ship",
        "car_side": "car, from the side",
        "wild_cat": "cat: only domestic ones count, but this is their next of kin and their likeness",
        "chair": "chair, by the same name",
        "windsor_chair": "chair: a kind of it",
        "dalmatian": "dog: a breed",
        "Motorbikes": "motorbike, by another name",
        "Faces": "person: a face counts",
        "Faces_easy": "person: a face counts",
        "bonsai": "pottedplant: a tree in a pot",
    },
    # No label of one is a label of the other: articles of sale here, animals, vehicles and furniture there. Models who
    # wear the articles are persons, but no label says so.
    "fashion": {},
}
# Near the border, and left in by the same rule: helicopter (no aeroplane), cougar_body, cougar_face, Leopards (no
# domestic cats), garfield and snoopy (drawings), wheelchair (no chair), laptop (no standalone screen), cup and ewer (no
# bottles), sunflower, lotus, water_lilly and joshua_tree (not in pots), and buddha (a statue).

FEATURES = "wikipedia/features.npz:text={text},val=val231,test=test462"
ALONE = Sweep(
    name="target alone",
    rows=(
        Row(title="semantic and pair losses", changes=("transfer.rounds=0",), network="last"),
        Row(title="semantic loss only", changes=("transfer.rounds=0", "losses.pair_target=0"), network="last"),
    ),
)


def with_alphas(sweep: Sweep, alphas: str) -> Sweep:
    """A sweep over alpha with other values; any other sweep as it is."""
    if sweep.axis != "transfer.alpha":
        return sweep
    points = tuple(
        Row(title=f"DCKT, alpha = {a}", changes=(f"transfer.alpha={a}",), network="last", curve="DCKT", x=a)
        for a in map(float, alphas.split(","))
    )
    return replace(sweep, rows=(*(row for row in sweep.rows if row.x is None), *points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", default=["table3", "figure4", "alone"])
    parser.add_argument("--presets", nargs="+", default=["paper", "released"])
    parser.add_argument("--sources", nargs="+", default=list(OVERLAP), choices=list(OVERLAP))
    parser.add_argument("--trunk", default="mobilenet_v2")
    parser.add_argument("--width", type=int, default=128, help="outputs of fc6 to fc9; the paper has 4096")
    parser.add_argument("--source-epochs", type=int, default=40, help="in pretraining; the presets have 160")
    parser.add_argument("--alphas", default="0.05,0.1,0.2,0.5,1.0", help="points of the curve of Figure 4")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="any other setting, for all rows")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    data = data_folder(parser)
    changes = [f"network.width={args.width}", f"pretrain.source_epochs={args.source_epochs}", *args.changes]
    pictures = [*changes, *input_changes(data, args.trunk)]
    sections = []

    def trained(sweep: Sweep, source: Path | None, target: Path, preset: str, changes: list[str]) -> SweepResult:
        folder = "-".join([source.name if source else sweep.name, preset])
        return run_sweep(
            sweep,
            source,
            target,
            args.out / folder,
            preset=preset,
            changes=changes,
            seeds=args.seeds,
            processes=args.jobs,
            reporter=Bars(),
        )

    def section(result: SweepResult, changes: list[str]) -> None:
        name = f"{result.sweep.name}, {Path(result.source or result.target).name}, `{result.preset}`"
        write_table(result)
        for path in [*result.path.glob("table.*"), result.path / "report.html"]:  # the next sweep writes its own there
            path.rename(path.with_name(f"{result.sweep.name.replace(' ', '-')}-{path.name}"))
        notes = [f"Not in the table: {path.name} failed: {why}" for path, why in result.failures.items()]
        shown = [change for change in changes if str(data) not in change]
        setting = f"Preset `{result.preset}` with {', '.join(f'`{change}`' for change in shown)}; {args.seeds} seeds."
        sections.append("\n\n".join([f"### {name}", setting, markdown(result), *result.sweep.notes, *notes]))

    for preset in args.presets:
        for source in args.sources:
            sweeps = [
                with_alphas(read_sweep(name, overlap=list(OVERLAP[source]) if name == "table3" else []), args.alphas)
                for name in args.sweeps
                if name != "alone"
            ]
            if not sweeps:
                continue
            # First all runs together, so that they share their pretraining; then a table of each sweep's.
            rows = {row.title: row for sweep in sweeps for row in sweep.rows}
            trained(Sweep(name="all", rows=tuple(rows.values())), data / source, data / TARGET, preset, pictures)
            for sweep in sweeps:
                section(trained(sweep, data / source, data / TARGET, preset, pictures), pictures)
        if "alone" in args.sweeps:
            for text in ("text_lda", "text_tfidf"):
                sweep = replace(ALONE, name=f"target alone {text}")
                section(trained(sweep, None, data / FEATURES.format(text=text), preset, changes), changes)
    print("\n\n".join(["", f"Target {TARGET} unless said. {machine()}. {NOTE}", *sections]))


if __name__ == "__main__":
    main()
