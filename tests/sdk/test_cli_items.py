"""Filters, thresholds, the second stage, and what takes items out of an index, as a user meets them."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest

from dckt.index import Index


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    colours = [("red", "A", 5), ("blue", "A", 50), ("white", "B", 7.5), ("green", "B", None)]
    rows = [{"id": name, "text": f"a {name} bag", "shop": shop, "price": price} for name, shop, price in colours]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def filled(run, tiny_bundle, tmp_path, colour_images, texts):
    path = tmp_path / "catalog.index"
    code, _, err = run(
        "index", tiny_bundle, path, "--images", colour_images["red"].parent, "--texts", texts, "--second-stage"
    )
    assert code == 0, err
    return path


@pytest.fixture
def corpus(tmp_path, colour_images):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for number, (name, picture) in enumerate(colour_images.items()):
        (folder / f"{name}.png").write_bytes(picture.read_bytes())
        rows.append({"id": str(number), "image": f"{name}.png", "text": f"a {name} bag", "label": name, "split": "val"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def hits(output: str) -> list[str]:
    return [hit["id"] for hit in json.loads(output)["hits"]]


def ids(path, medium: str) -> list[str]:
    with Index.open(path) as index:
        return list(index.ids(medium))


# --- search -------------------------------------------------------------------------------------------------------


def test_a_filter(run, tiny_bundle, filled, colour_images):
    arguments = ["search", tiny_bundle, filled, colour_images["red"], "--json", "--where"]
    assert sorted(hits(run(*arguments, '{"shop": "A"}')[1])) == ["blue", "red"]
    assert hits(run(*arguments, '{"shop": "A", "price": {"lt": 20}}')[1]) == ["red"]
    assert hits(run(*arguments, '{"price": null}')[1]) == ["green"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("shop=A", "which is not JSON"),
        ("[1]", "expected a JSON object"),
        ('"x"', "expected a JSON object"),
        ("[" * 100_000, "which is not JSON"),
        ('{"shop": {"like": "A"}}', "'like'"),
    ],
)
@pytest.mark.parametrize("command", ["search", "delete", "export-items"])
def test_a_filter_that_is_none(run, tiny_bundle, filled, command, where, said):
    before = [tiny_bundle] if command == "search" else []
    code, out, err = run(command, *before, filled, *(["-t", "red"] if before else []), "--where", where)
    assert code == 2
    assert said in err
    assert "Traceback" not in out + err
    assert len(ids(filled, "text")) == 4


def test_hits_below_a_similarity_are_left_out(run, tiny_bundle, filled, colour_images):
    every = json.loads(run("search", tiny_bundle, filled, colour_images["red"], "--json")[1])["hits"]
    assert len(every) == 4
    floor = every[0]["score"]
    found = json.loads(run("search", tiny_bundle, filled, colour_images["red"], "--json", "--min-score", floor)[1])
    assert [hit["score"] for hit in found["hits"]] == [hit["score"] for hit in every if hit["score"] >= floor]
    out = run("search", tiny_bundle, filled, colour_images["red"], "--min-score", 1, "--where", '{"shop": "B"}')[1]
    assert "no hits" in out


def test_calibrate_then_search(run, tiny_bundle_copy, filled, corpus, colour_images):
    arguments = ["search", tiny_bundle_copy, filled, colour_images["red"], "--calibrated", "--json"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "dckt calibrate" in err
    code, out, _ = run("calibrate", tiny_bundle_copy, "--pairs", corpus, "--dry-run", "--json")
    assert code == 0
    tried = json.loads(out)
    assert not tried["stored"]
    assert tried["pairs"] == {"corpus": "corpus", "split": "val", "count": 6}
    assert set(tried["ranking"]) == {"probability", "fc9", "probability then fc9"}
    assert run(*arguments)[0] == 2  # nothing was stored
    code, out, err = run("calibrate", tiny_bundle_copy, "--pairs", corpus)
    assert code == 0
    assert "image to text" in out
    assert "probability then fc9" in out
    assert "stored in" in err
    code, out, _ = run(*arguments)
    assert code == 0
    assert hits(out)[0] == "red"
    assert len(hits(out)) < 4
    code, _, err = run(*arguments, "--min-score", 0.5)
    assert code == 2
    assert "give one of them" in err


def test_calibrate_refuses_pairs_without_labels(run, tiny_bundle_copy, corpus):
    rows = [json.loads(line) for line in (corpus / "pairs.jsonl").read_text().splitlines()]
    del rows[2]["label"]
    (corpus / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run("calibrate", tiny_bundle_copy, "--pairs", corpus, "--split", "all")
    assert code == 2
    assert "1 of 6 pairs have no label, '2' among them" in err
    assert run("calibrate", tiny_bundle_copy, "--pairs", corpus, "--split", "test")[0] == 2
    assert run("calibrate", tiny_bundle_copy, "--pairs", corpus, "--batch-size", 0)[0] == 2


def test_the_second_stage(run, tiny_bundle, filled, colour_images, tmp_path, texts):
    arguments = [colour_images["red"], "--reorder", 4, "-k", 2, "--json"]
    code, out, _ = run("search", tiny_bundle, filled, *arguments)
    assert code == 0
    assert "reorder" in json.loads(out)["timings"]
    assert hits(out)[0] == "red"
    assert run("index", tiny_bundle, tmp_path / "plain", "--texts", texts)[0] == 0
    code, _, err = run("search", tiny_bundle, tmp_path / "plain", *arguments)
    assert code == 2
    assert "second" in err
    code, _, err = run("index", tiny_bundle, tmp_path / "plain", "--texts", texts, "--second-stage")
    assert code == 2
    assert "keeps its second-stage" in err


def test_several_queries(run, tiny_bundle, filled, colour_images):
    pictures = [colour_images["red"], colour_images["blue"]]
    code, out, _ = run("search", tiny_bundle, filled, *pictures, "-k", 1, "--json")
    assert code == 0
    found = json.loads(out)
    assert [one["query"] for one in found] == list(map(str, pictures))
    assert [one["hits"][0]["id"] for one in found] == ["red", "blue"]
    lines = run("search", tiny_bundle, filled, *pictures, "-k", 1)[1].splitlines()
    assert [line for line in lines if line.endswith(".png")] == list(map(str, pictures))


def test_the_path_of_a_picture_is_shown_whole(run, monkeypatch, tiny_bundle, filled, colour_images):
    monkeypatch.setenv("COLUMNS", "60")
    out = run("search", tiny_bundle, filled, "-t", "red", "-k", 1)[1]
    shown = "".join(out.split())
    assert str(colour_images["red"]) in shown


def test_a_page_of_hits(run, tiny_bundle, filled, colour_images, tmp_path):
    page = tmp_path / "found.html"
    arguments = ["--media", "image", "--media", "text", "--html", page]
    code, out, _ = run("search", tiny_bundle, filled, colour_images["red"], "-k", 3, *arguments)
    assert code == 0
    assert "red" in out
    content = page.read_text()
    assert content.count("data:image/jpeg;base64,") >= 2  # the query, and the picture that is like it
    assert "a red bag" in content
    assert "<script" not in content
    assert not re.search(r'(src|href)="(?!data:|#)', content)


def test_a_page_says_what_it_cannot_show(run, tiny_bundle, tmp_path, colour_images):
    gone = tmp_path / "pictures" / "red.png"
    gone.parent.mkdir()
    gone.write_bytes(colour_images["red"].read_bytes())
    run("index", tiny_bundle, tmp_path / "i", "--images", gone.parent)
    gone.unlink()
    page = tmp_path / "found.html"
    assert run("search", tiny_bundle, tmp_path / "i", "-t", "<b>red", "--html", page)[0] == 0
    assert "there is no such file" in page.read_text()
    assert "<b>red" not in page.read_text()
    code, _, err = run("search", tiny_bundle, tmp_path / "i", "-t", "red", "--html", tmp_path / "no" / "page.html")
    assert code == 2
    assert "page cannot be written" in err


# --- index --------------------------------------------------------------------------------------------------------


def test_what_did_not_change_is_not_encoded_again(run, tiny_bundle, filled, texts):
    code, _, err = run("index", tiny_bundle, filled, "--texts", texts, "--upsert")
    assert code == 0
    assert "added 0 texts, 4 unchanged" in err
    code, out, _ = run("index", tiny_bundle, filled, "--texts", texts, "--upsert", "--json")
    assert json.loads(out)["reports"] == {"text": {"added": 0, "unchanged": 4, "failed": []}}


def test_the_kind_of_an_error_is_collected(run, tiny_bundle, filled, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("green bag\nzebra\n")
    code, out, _ = run("index", tiny_bundle, filled, "--texts", bad, "--on-error", "collect", "--json")
    assert code == 0
    [failed] = json.loads(out)["reports"]["text"]["failed"]
    assert (failed["id"], failed["kind"]) == ("2", "TextError")
    assert "zebra" in failed["error"]
    bad.write_text("zebra\n")
    err = run("index", tiny_bundle, tmp_path / "new", "--texts", bad, "--on-error", "collect")[2]
    assert "left out: text '1' (TextError)" in err
    assert "added 0 texts" in err


# --- delete, compact, tune ----------------------------------------------------------------------------------------


def test_delete_by_id(run, filled, tmp_path):
    code, out, _ = run("delete", filled, "--ids", "red", "--ids", "nothing", "--json")
    assert code == 0
    about = json.loads(out)
    assert (about["deleted"], about["missing"]) == ({"text": 1}, ["nothing"])
    assert ids(filled, "text") == ["blue", "green", "white"]
    file = tmp_path / "gone.txt"
    file.write_text("blue\r\n\nred.png\n")
    code, _, err = run("delete", filled, "--ids-file", file, "--medium", "image")
    assert code == 0
    assert "deleted 1 of medium image" in err
    assert "not there: blue" in err
    assert ids(filled, "text") == ["blue", "green", "white"]
    assert "red.png" not in ids(filled, "image")


def test_delete_by_filter(run, filled):
    arguments = ["delete", filled, "--where", '{"shop": "A"}']
    code, _, err = run(*arguments, "--dry-run")
    assert code == 0
    assert "would delete 2 of medium text" in err
    assert len(ids(filled, "text")) == 4
    assert run(*arguments)[0] == 0
    assert ids(filled, "text") == ["green", "white"]
    assert "deleted nothing" in run(*arguments)[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --ids"),
        (["--ids", "red", "--where", "{}"], "give --ids"),
        (["--where", "{}"], "which every item meets"),
        (["--ids-file", "missing.txt"], "missing.txt"),
    ],
)
def test_delete_without_saying_what(run, filled, arguments, said):
    code, _, err = run("delete", filled, *arguments)
    assert code == 2
    assert said in err
    assert len(ids(filled, "text")) == 4


def test_what_ids_hold_cannot_steer_the_terminal(run, filled):
    err = run("delete", filled, "--ids", "[red]x\u001b[2J")[2]
    assert "[red]x" in err
    assert "\u001b[2J" not in err


def test_compact(run, filled):
    run("delete", filled, "--ids", "red")
    code, out, _ = run("compact", filled, "--json")
    assert code == 0
    about = json.loads(out)
    assert 0 < about["bytes_after"] <= about["bytes_before"]
    assert "became" in run("compact", filled)[2]
    assert ids(filled, "text") == ["blue", "green", "white"]


def test_tune(run, tiny_bundle, tmp_path, colour_images):
    path = tmp_path / "i"
    run("index", tiny_bundle, path, "--images", colour_images["red"].parent, "--kind", "hnsw")
    queries = tmp_path / "queries.npy"
    np.save(queries, np.random.default_rng(0).random((8, 4), dtype=np.float32))
    code, out, _ = run("tune", path, "--recall", 0.95, "--queries", queries, "--json")
    assert code == 0
    about = json.loads(out)
    assert about["recall"] == 0.95
    assert set(about["media"]) == {"image"}
    code, out, _ = run("tune", path)
    assert code == 0
    assert "image" in out


@pytest.mark.parametrize("recall", [0, 1.5, "nan"])
def test_a_recall_that_is_none(run, filled, recall):
    code, _, err = run("tune", filled, "--recall", recall)
    assert code == 2
    assert "recall" in err


def test_queries_that_are_none(run, filled, tmp_path):
    code, _, err = run("tune", filled, "--queries", tmp_path / "missing.npy")
    assert code == 2
    assert "missing.npy" in err
    file = tmp_path / "q.npy"
    file.write_bytes(b"rubbish")
    assert run("tune", filled, "--queries", file)[0] == 2
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    code, _, err = run("tune", filled, "--queries", file)
    assert code == 2
    assert "q.npy" in err
    np.save(file, np.zeros((3, 9), dtype=np.float32))
    assert run("tune", filled, "--queries", file)[0] == 2


# --- export-items -------------------------------------------------------------------------------------------------


def test_items_as_json_lines(run, filled, tmp_path):
    code, out, err = run("export-items", filled, "--medium", "text")
    assert code == 0
    assert "4 items" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["id"] for row in rows] == ["blue", "green", "red", "white"]
    assert rows[2]["metadata"] == {"text": "a red bag", "shop": "A", "price": 5}
    file = tmp_path / "out.jsonl"
    vectors = tmp_path / "vectors.npy"
    code, out, _ = run("export-items", filled, "--out", file, "--vectors", vectors)
    assert (code, out) == (0, "")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    matrix = np.load(vectors)
    assert (matrix.shape, matrix.dtype) == ((10, 4), np.float32)
    with Index.open(filled) as index:
        for row, vector in zip(rows, matrix, strict=True):
            assert (index.vector(row["id"], row["medium"]) == vector).all()


def test_items_as_csv(run, filled):
    code, out, _ = run("export-items", filled, "--format", "csv", "--where", '{"shop": "B"}')
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert rows[0] == {"id": "green", "medium": "text", "price": "null", "shop": "B", "text": "a green bag"}
    assert [row["price"] for row in rows] == ["null", "7.5"]
    assert run("export-items", filled, "--format", "csv", "--where", '{"shop": "Z"}')[1] == "id,medium\n"


def test_texts_of_an_export_can_be_indexed_again(run, tiny_bundle, filled, tmp_path):
    file = tmp_path / "again.csv"
    assert run("export-items", filled, "--format", "csv", "--medium", "text", "--out", file)[0] == 0
    assert run("index", tiny_bundle, tmp_path / "again.index", "--texts", file)[0] == 0
    assert ids(tmp_path / "again.index", "text") == ["blue", "green", "red", "white"]
    # Its texts came with a column medium now, which a second export cannot write twice.
    code, _, err = run("export-items", tmp_path / "again.index", "--format", "csv", "--out", tmp_path / "third.csv")
    assert code == 2
    assert "'medium'" in err
    assert not (tmp_path / "third.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "xml"], "expected jsonl or csv"),
        (["--vectors", "x.txt"], "ends with .npy"),
        (["--out", "no/such/folder.jsonl"], "cannot be written"),
    ],
)
def test_an_export_that_cannot_be(run, filled, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    code, _, err = run("export-items", filled, *arguments)
    assert code == 2
    assert said in err
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_half_a_character_does_not_stop_an_export(run, tiny_bundle, tmp_path):
    path = tmp_path / "i"
    with Index.create(path, model_id="m", representation="r", dimension=2) as index:
        index.add("text", ["a"], np.eye(2, dtype=np.float32)[:1], metadata=[{"note": "x\ud800"}])
    for form in ("csv", "jsonl"):
        code, _, err = run("export-items", path, "--format", form, "--out", tmp_path / f"out.{form}")
        assert code == 0, err
        assert "ud800" in (tmp_path / f"out.{form}").read_text(encoding="utf-8")


# --- all of them --------------------------------------------------------------------------------------------------

COMMANDS = ("index", "search", "inspect", "doctor", "tune", "calibrate", "export-items", "delete", "compact", "engine")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"dckt {command} " in out
    assert "Examples" in out


def test_every_command_is_tried():
    from dckt.cli import app

    assert {command.name for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", ["tune", "delete", "compact", "export-items"])
def test_an_index_that_is_not_there(run, tmp_path, command):
    more = ["--ids", "a"] if command == "delete" else []
    code, out, err = run(command, tmp_path / "none.index", *more)
    assert code == 2
    assert "is no index" in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())
