"""What a user gets for bad input at each door: our words, exit code 2, and nothing half written."""

import json
import shutil
import sqlite3

import pytest

from dckt.bundle import BUNDLE_VERSION


@pytest.fixture
def corpus(shop, tmp_path):
    """A copy of the target corpus to spoil."""
    return shutil.copytree(shop.target, tmp_path / "corpus")


def rewrite(corpus, change):
    path = corpus / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), encoding="utf-8")


def train(command, shop, quick, target, tmp_path, *more, fails=True):
    out = tmp_path / "run"
    done = command("dckt-train", "--source", shop.source, "--target", target, *quick, "--out", out, *more, fails=fails)
    assert out.exists() != fails
    return done.stderr


def test_every_mistake_of_a_manifest_is_listed_with_its_line(command, shop, quick, corpus, tmp_path):
    def spoil(rows):
        rows[0]["split"] = "validation"
        rows[1]["text"] = "  "
        rows[2]["image"] = "images/absent.png"
        rows[3]["id"] = rows[4]["id"]
        rows[5]["image"] = "images/broken.jpg"
        return rows

    (corpus / "images" / "broken.jpg").write_bytes(b"this is not a picture")
    rewrite(corpus, spoil)
    said = train(command, shop, quick, corpus, tmp_path)
    for words in ("line 1:", "validation", "line 2:", "line 3:", "absent.png", "line 5:", "line 6:", "broken.jpg"):
        assert words in said
    train(command, shop, quick, corpus, tmp_path, "--on-bad-pair", "skip", fails=False)


def test_a_class_with_one_pair_is_noted_and_trained(command, shop, quick, corpus, tmp_path):
    def lonely(rows):
        label = rows[0]["label"]
        train_rows = [row for row in rows if row["split"] == "train" and row["label"] == label]
        return [row for row in rows if row not in train_rows[1:]]

    rewrite(corpus, lonely)
    assert "single train pair" in train(command, shop, quick, corpus, tmp_path, fails=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--source", "absent"], "absent"),
        (["--trunk", "resnet999"], "torchvision has no such network"),
        (["--weights", "absent.safetensors"], "cannot be read"),
        (["--set", "transfer.alpha=7"], "at most 1"),
        (["--set", "network.depth=3"], "unknown key"),
        (["--preset", "tiny"], "neither a preset"),
        (["--device", "tpu"], "auto, cpu or cuda"),
        (["--on-bad-pair", "ignore"], "raise or skip"),
        (["--set", "text.vectors=absent.txt"], "file of word vectors"),
    ],
)
def test_settings(command, shop, quick, tmp_path, options, says):
    out = tmp_path / "run"
    done = command(
        "dckt-train", "--source", shop.source, "--target", shop.target, *quick, "--out", out, *options, fails=True
    )
    assert says in " ".join(done.stderr.split())


def test_runs_that_cannot_be_exported(command, shop, tmp_path):
    out = tmp_path / "new.dckt"
    assert "not a run folder" in command("dckt-export", tmp_path, "--out", out, fails=True).stderr
    half = shutil.copytree(shop.run, tmp_path / "half")
    facts = json.loads((half / "run.json").read_text(encoding="utf-8"))
    (half / "run.json").write_text(json.dumps({**facts, "state": "training"}), encoding="utf-8")
    assert "--resume" in command("dckt-export", half, "--out", out, fails=True).stderr
    assert "--force" in command("dckt-export", shop.run, "--out", shop.bundle, fails=True).stderr
    assert not out.exists()


def test_bundles_that_cannot_be_opened(command, shop, tmp_path):
    pair = shop.pairs()[0]

    def search(bundle):
        return command("dckt", "search", bundle, shop.index, shop.target / pair["image"], fails=True).stderr

    assert "absent.dckt" in search(tmp_path / "absent.dckt")
    newer = shutil.copytree(shop.bundle, tmp_path / "newer.dckt")
    manifest = json.loads((newer / "manifest.json").read_text(encoding="utf-8"))
    manifest["version"] = BUNDLE_VERSION + 1
    (newer / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "update it" in search(newer)
    corrupt = shutil.copytree(shop.bundle, tmp_path / "corrupt.dckt")
    graph = corrupt / "text.onnx"
    graph.write_bytes(graph.read_bytes()[:-7] + b"garbage")
    assert "text.onnx" in search(corrupt)


def test_an_index_of_another_model_is_refused(command, shop, quick, tmp_path):
    run, bundle = tmp_path / "run", tmp_path / "other.dckt"
    corpora = ["--source", shop.source, "--target", shop.target]
    command("dckt-train", *corpora, *quick, "--seed", "5", "--out", run)
    command("dckt-export", run, "--out", bundle)
    pair = shop.pairs()[0]
    said = command("dckt", "search", bundle, shop.index, shop.target / pair["image"], fails=True).stderr
    assert "model" in said
    assert "dckt index" in said
    adding = ("dckt", "index", bundle, shop.index, "--pairs", shop.target, "--split", "val")
    assert "model" in command(*adding, fails=True).stderr


def test_queries(command, shop, tmp_path):
    def search(*query, fails=True):
        return command("dckt", "search", shop.bundle, shop.index, *query, fails=fails)

    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0")
    assert "broken.jpg" in search(broken).stderr
    assert "no such file" in search(tmp_path / "absent.jpg").stderr
    assert "holds no word" in search(" !?", "--text").stderr
    assert "knows none of the words" in search("xyzzy qwrtp", "--text").stderr
    pair = shop.pairs()[0]
    assert "k is 0" in search(shop.target / pair["image"], "-k", "0").stderr
    assert "video" in search(shop.target / pair["image"], "--media", "video").stderr
    everything = json.loads(search(shop.target / pair["image"], "-k", "99999", "--json", fails=False).stdout)
    assert len(everything["hits"]) == len(shop.pairs())  # any k answers


def test_collections(command, shop, corpus, tmp_path):
    index = tmp_path / "new.index"

    def fill(*options):
        return command("dckt", "index", shop.bundle, index, *options, fails=True).stderr

    assert "absent" in fill("--images", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty" in fill("--images", tmp_path / "empty")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": "a", "text": "red"}\n{"id": "a", "text": "blue"}\n{"id": "b"}\n', encoding="utf-8")
    assert "3" in fill("--texts", texts)
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text('{"id": "a", "text": "xyzzy"}\n', encoding="utf-8")
    assert "xyzzy" in fill("--texts", unknown)
    (corpus / "images" / "broken.png").write_bytes(b"no")
    assert "broken.png" in fill("--images", corpus / "images")
    assert not index.exists()
    again = command("dckt", "index", shop.bundle, shop.index, "--pairs", shop.target, "--split", "test", fails=True)
    assert "--upsert" in again.stderr or "upsert" in again.stderr


def test_indexes_that_cannot_be_opened(command, shop, tmp_path):
    query = shop.target / shop.pairs()[0]["image"]

    def search(index, **options):
        return command("dckt", "search", shop.bundle, index, query, **options)

    assert "dckt index" in search(tmp_path / "absent.index", fails=True).stderr
    newer = shutil.copytree(shop.index, tmp_path / "newer.index")
    with sqlite3.connect(newer / "items.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    connection.close()
    assert "update dckt" in search(newer, fails=True).stderr
    damaged = shutil.copytree(shop.index, tmp_path / "damaged.index")
    for log in damaged.glob("items.sqlite-*"):
        log.unlink()
    (damaged / "items.sqlite").write_bytes(b"SQLite format 3\x00" + bytes(5000))
    assert "items.sqlite" in search(damaged, fails=True).stderr
