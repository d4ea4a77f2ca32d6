"""Photographs and captions, in part: real weights, real words, and the gate on what a real model retrieves."""

import json
import shutil
from collections import defaultdict

import pytest

from dckt import Bundle, Searcher
from dckt_trainer.runs import open_run

QUICK = (
    "text.cnn_epochs=15",
    "pretrain.source_epochs=20",
    "pretrain.target_epochs=150",
    "transfer.rounds=2",
    "network.width=128",
)


def part_of(corpus, out, classes, counts):
    """A small corpus: the first classes, and of each split the first pairs."""
    taken = defaultdict(int)
    rows = [json.loads(line) for line in (corpus / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})[:: max(1, len({row["label"] for row in rows}) // classes)][:classes]
    kept = []
    for row in rows:
        key = row["label"], row["split"]
        if row["label"] in labels and taken[key] < counts[row["split"]]:
            taken[key] += 1
            kept.append(row)
            (out / row["image"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(corpus / row["image"], out / row["image"])
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return out


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["mobilenet_v2", "squeezenet1_1"])
def test_the_main_job_on_real_pairs(command, data_dir, tmp_path, trunk):
    source = part_of(data_dir / "caltech101", tmp_path / "source", 12, {"train": 10, "val": 2, "test": 0})
    target = part_of(data_dir / "pascal_sentences", tmp_path / "target", 8, {"train": 25, "val": 5, "test": 5})
    run, bundle, index = tmp_path / "run", tmp_path / "pascal.dckt", tmp_path / "pascal.index"
    weights = data_dir / "weights" / f"{trunk}_features.safetensors"
    changes = [word for change in QUICK for word in ("--set", change)]
    corpora = ["--source", source, "--target", target, "--preset", "small"]
    command("dckt-train", *corpora, "--trunk", trunk, "--weights", weights, *changes, "--out", run)
    command("dckt-export", run, "--out", bundle)
    command("dckt", "index", bundle, index, "--pairs", target, "--split", "test")

    test = open_run(run).evaluation["test"]
    assert test["pairs"] == 40
    # Every class is one in eight, so a random order has MAP near .2; trained on real features it must be far above.
    assert max(test[key]["average"] for key in ("model_t0", "last")) > 0.4
    parity = Bundle.open(bundle).manifest.measured["variants"]["onnxruntime-fp32"]["parity"]
    for representation in parity.values():
        assert all(medium["cosine_min"] >= 0.9999 for medium in representation["media"].values())
        for way in representation["directions"].values():
            assert abs(way["map_torch"] - way["map_exported"]) < 5e-4
    rows = [json.loads(line) for line in (target / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    right = []
    with Searcher.open(bundle, index) as searcher:
        for row in (row for row in rows if row["split"] == "test"):
            hits = searcher.search(target / row["image"], k=5)
            assert {hit.medium for hit in hits} == {"text"}
            right += [hit.metadata["label"] == row["label"] for hit in hits]
    assert sum(right) / len(right) > 0.25  # twice chance
