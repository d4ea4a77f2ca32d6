"""From two corpora to search, in seven commands: what `make demo` runs.

With DCKT_DATA naming a folder of real corpora (caltech101, pascal_sentences, weights) it uses them; else it makes its
own. Every command is printed as it would be typed. Only the report at the end uses the SDK from Python.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dckt import Searcher
from dckt.report import Card, Gallery, GalleryRow, Table, thumbnail, write_report

OUT = Path(os.environ.get("DCKT_DEMO") or "demo")
PRESETS = ("small", "modern")  # DCKT with its rounds, and what to use when pairs are few
BUNDLE, INDEX, REPORT = OUT / "demo.dckt", OUT / "catalog.index", OUT / "report.html"
QUERIES, SHOWN = 6, 5


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    data = os.environ.get("DCKT_DATA")
    source, target, settings = real_corpora(Path(data)) if data else synthetic_corpora()

    for preset in PRESETS:
        out = OUT / preset
        command("dckt-train", "--source", source, "--target", target, "--preset", preset, *settings, "--out", out)
    evaluations = {preset: json.loads((OUT / preset / "evaluation.json").read_text("utf-8")) for preset in PRESETS}
    chosen = max(PRESETS, key=lambda preset: validation(evaluations[preset]))
    print(f"\n{chosen} has the highest MAP on validation, so it is exported:")
    command("dckt-export", OUT / chosen, "--out", BUNDLE)
    command("dckt", "index", BUNDLE, INDEX, "--pairs", target, "--split", "test")
    test = [pair for pair in read_pairs(target) if pair["split"] == "test"]
    command("dckt", "search", BUNDLE, INDEX, target / test[0]["image"], "-k", "5")
    command("dckt", "search", BUNDLE, INDEX, test[0]["text"].split("\n")[0], "--text", "-k", "5")

    figures = outcomes(evaluations, chosen)
    write_gallery(target, test, figures)
    print(f"MAP on {len(test)} test pairs, image to text / text to image:")
    for name, of in figures.items():
        print(f"  {name:<46} {of['image_to_text']:.3f} / {of['text_to_image']:.3f}")
    print(f"report: {REPORT} (and of the trainings: {', '.join(str(OUT / one / 'report.html') for one in PRESETS)})")
    print(f"took {time.monotonic() - started:.0f} s")


def synthetic_corpora() -> tuple[Path, Path, list[str]]:
    """Writes generated corpora; a trunk with random weights serves their simple pictures."""
    corpora = OUT / "corpora"
    command("dckt-train", "synthetic", corpora)
    settings = ["--trunk", "alexnet", "--weights", "random"]
    for change in ("image.side=128", "image.grid=3", "image.crop_share=1.0"):
        settings += ["--set", change]
    return corpora / "source", corpora / "target", settings


def real_corpora(data: Path) -> tuple[Path, Path, list[str]]:
    """Photographs with captions as the target, another collection with other labels as the source."""
    weights = data / "weights" / "mobilenet_v2_features.safetensors"
    return data / "caltech101", data / "pascal_sentences", ["--trunk", "mobilenet_v2", "--weights", str(weights)]


def command(*words: object) -> None:
    """Prints a command and runs it with the programs of this Python environment."""
    name, *rest = map(str, words)
    print("\n$", shlex.join([name, *rest]), flush=True)
    environment = {**os.environ, "DCKT_CACHE": str(OUT / "cache")}
    done = subprocess.run([str(Path(sys.executable).parent / name), *rest], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def read_pairs(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def validation(evaluation: dict[str, Any]) -> float:
    """MAP on validation of the round that a run kept, both directions' mean."""
    kept = evaluation["test"][evaluation["kept"]]["round"]
    return float(next(one["average"] for one in evaluation["validation"] if one["round"] == kept))


def outcomes(evaluations: dict[str, dict[str, Any]], chosen: str) -> dict[str, dict[str, Any]]:
    """Test figures by name, of each preset alone and with the source. Round 0 is the target without transfer."""
    found = {}
    for preset, evaluation in evaluations.items():
        test, kept = evaluation["test"], evaluation["kept"]
        found[f"{preset}, without transfer"] = test["model_t0"]
        found[f"{preset}, with transfer, round {test['last']['round']}"] = test["last"]
        if preset == chosen:
            found[f"{preset}, kept and exported: round {test[kept]['round']}"] = test[kept]
    return found


def write_gallery(corpus: Path, test: list[dict[str, str]], outcomes: dict[str, dict[str, Any]]) -> None:
    """Searches with some test pictures and texts, through the bundle and the index, and shows what they found."""
    pairs = {pair["id"]: pair for pair in test}
    queries = test[:: max(1, len(test) // QUERIES)][:QUERIES]

    def card(pair: dict[str, str], medium: str, note: str, right: bool | None = None) -> Card:
        image = thumbnail(corpus / pair["image"]) if medium == "image" else None
        return Card(image, pair["text"] if medium == "text" else "", f"{pair['label']} · {note}", right)

    galleries = []
    with Searcher.open(BUNDLE, INDEX) as searcher:
        for asked, found in (("image", "text"), ("text", "image")):
            rows = []
            for query in queries:
                given = {"image": corpus / query["image"]} if asked == "image" else {"text": query["text"]}
                hits = searcher.search(**given, k=SHOWN)
                results = tuple(
                    card(pairs[hit.id], found, f"{hit.score:.3f}", pairs[hit.id]["label"] == query["label"])
                    for hit in hits
                )
                rows.append(GalleryRow(card(query, asked, "query"), results))
            galleries.append(Gallery(f"{asked.capitalize()} in, {found}s out", tuple(rows)))
    ways = ("image_to_text", "text_to_image", "average")
    rows = [(name, *(f"{figures[way]:.3f}" for way in ways)) for name, figures in outcomes.items()]
    table = Table("MAP on the test split", ("target model", "image → text", "text → image", "average"), rows)
    write_report(REPORT, title="dckt demo", subtitle=str(corpus), sections=[table, *galleries])


if __name__ == "__main__":
    main()
