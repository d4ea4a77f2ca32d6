"""The command line as a user meets it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import dckt
from dckt import cli
from dckt.commands import inspect
from dckt.errors import CorpusError, DcktError


@pytest.fixture
def pictures(colour_images):
    return colour_images["red"].parent


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [{"id": name, "text": f"a {name} bag", "shelf": 3} for name in ("red", "blue", "white")]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def filled(run, tiny_bundle, tmp_path, pictures, texts):
    path = tmp_path / "catalog.index"
    assert run("index", tiny_bundle, path, "--images", pictures, "--texts", texts)[0] == 0
    return path


def hits(output: str) -> list[str]:
    return [hit["id"] for hit in json.loads(output)["hits"]]


def test_index_then_search_then_inspect(run, tiny_bundle, filled, pictures):
    code, out, _ = run("search", tiny_bundle, filled, pictures / "red.png", "-k", 2)
    assert code == 0
    first = next(line for line in out.splitlines() if line.strip().startswith("1 "))
    assert "red" in first
    assert "text: a red bag, shelf: 3" in first
    assert "encode" in out
    code, out, _ = run("inspect", filled)
    assert code == 0
    for part in ("index", "unique vectors", "exact", dckt.Bundle.open(tiny_bundle).manifest.model_id):
        assert part in out


def test_the_summary_says_what_was_added(run, tiny_bundle, tmp_path, pictures, texts):
    code, _, err = run("index", tiny_bundle, tmp_path / "i", "--images", pictures, "--texts", texts)
    assert code == 0
    assert "added 3 texts and 6 images" in err
    assert "6 images (6 different vectors, exact search)" in err


def test_search_with_text_and_media_as_json(run, tiny_bundle, filled):
    code, out, _ = run("search", tiny_bundle, filled, "red", "--text", "-k", 1, "--json")
    assert code == 0
    [hit] = json.loads(out)["hits"]
    assert (hit["id"], hit["medium"]) == ("red.png", "image")
    assert 0.9 < hit["score"] <= 1
    assert hit["metadata"]["image"].endswith("red.png")
    both = run("search", tiny_bundle, filled, "red", "-t", "--json", "--media", "text", "--media", "image", "-k", 100)[
        1
    ]
    assert len(hits(both)) == 9
    assert hits(run("search", tiny_bundle, filled, "blue", "-t", "--json", "--media", "text", "-k", 1)[1]) == ["blue"]


def test_a_search_without_hits_says_so(run, tiny_bundle, tmp_path, texts):
    run("index", tiny_bundle, tmp_path / "i", "--texts", texts)
    code, out, _ = run("search", tiny_bundle, tmp_path / "i", "-t", "red")
    assert code == 0
    assert "no hits" in out


def test_pairs_and_split(run, tiny_bundle, tmp_path, pictures):
    corpus = pictures / "pairs.jsonl"
    rows = [
        {"id": name, "image": f"{name}.png", "text": name, "label": name, "split": split}
        for name, split in [("red", "test"), ("blue", "train")]
    ]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    try:
        assert run("index", tiny_bundle, tmp_path / "i", "--pairs", pictures, "--split", "test")[0] == 0
    finally:
        corpus.unlink()
    out = run("search", tiny_bundle, tmp_path / "i", "-t", "red", "--media", "text", "--media", "image", "--json")[1]
    assert hits(out) == ["red", "red"]
    assert json.loads(out)["hits"][0]["metadata"]["label"] == "red"


def test_adding_to_an_index(run, tiny_bundle, tmp_path, filled):
    more = tmp_path / "more.txt"
    more.write_text("green bag\n")
    assert run("index", tiny_bundle, filled, "--texts", more)[0] == 0
    code, _, err = run("index", tiny_bundle, filled, "--texts", more)
    assert code == 2
    assert "'1'" in err
    assert "--upsert" in err
    assert run("index", tiny_bundle, filled, "--texts", more, "--upsert")[0] == 0
    code, _, err = run("index", tiny_bundle, filled, "--texts", more, "--on-error", "skip")
    assert code == 0
    assert "left out: text '1': the id is in the index already" in err
    about = json.loads(run("inspect", filled, "--json")[1])
    assert about["media"]["text"]["items"] == 4


def test_force_makes_the_index_anew(run, tiny_bundle, tmp_path, filled):
    more = tmp_path / "more.txt"
    more.write_text("green bag\n")
    assert run("index", tiny_bundle, filled, "--texts", more, "--force", "--kind", "exact")[0] == 0
    about = json.loads(run("inspect", filled, "--json")[1])
    assert about["kind"] == "exact"
    assert {name: medium["items"] for name, medium in about["media"].items()} == {"text": 1}


def test_a_failed_force_keeps_the_old_index(run, tiny_bundle, tmp_path, filled):
    bad = tmp_path / "bad.txt"
    bad.write_text("green bag\nzebra\n")
    code, _, err = run("index", tiny_bundle, filled, "--texts", bad, "--force")
    assert code == 2
    assert "zebra" in err
    assert json.loads(run("inspect", filled, "--json")[1])["media"]["text"]["items"] == 3


def test_a_failed_first_run_leaves_nothing_and_skip_leaves_the_bad_one_out(run, tiny_bundle, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("green bag\nzebra\n")
    assert run("index", tiny_bundle, tmp_path / "i", "--texts", bad)[0] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["bad.txt"]
    code, _, err = run("index", tiny_bundle, tmp_path / "i", "--texts", bad, "--on-error", "skip")
    assert code == 0
    assert "left out: text '2'" in err
    assert "added 1 text;" in err


def test_kind_of_an_index_that_is_there(run, tiny_bundle, filled, texts):
    code, _, err = run("index", tiny_bundle, filled, "--texts", texts, "--kind", "hnsw")
    assert code == 2
    assert "keeps its kind" in err


def test_bad_lines_are_listed_with_their_lines(run, tiny_bundle, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"id": "a"}\nrubbish\n')
    code, _, err = run("index", tiny_bundle, tmp_path / "i", "--texts", file)
    assert code == 2
    assert "t.jsonl, line 1: text is missing" in err
    assert "t.jsonl, line 2: is not JSON" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["index", "B", "I"], "nothing to index"),
        (["index", "B", "I", "--texts", "T", "--split", "test"], "--split chooses among --pairs"),
        (["index", "B", "I", "--images", "missing"], "no such folder or file"),
        (["index", "B", "I", "--texts", "T", "--on-error", "ignore"], "on_error is 'ignore'"),
        (["index", "B", "I", "--texts", "T", "--kind", "faiss"], "auto, exact, hnsw"),
        (["index", "B", "I", "--texts", "T", "--batch-size", "0"], "batch_size is 0"),
        (["index", "B", "I", "--texts", "T", "--threads", "0"], "threads is 0"),
        (["index", "B", "I", "--texts", "T", "--device", "tpu"], "device is 'tpu'"),
        (["index", "B", "I", "--texts", "T", "--variant", "fast"], "variant 'fast' is not in this bundle"),
        (["search", "B", "I", "x.png"], "is no index"),
        (["search", "missing.dckt", "I", "x.png"], "missing.dckt"),
        (["inspect", "."], "neither a bundle"),
    ],
)
def test_errors_have_no_traceback_and_exit_with_2(run, tiny_bundle, tmp_path, texts, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    named = {"B": tiny_bundle, "T": texts}
    code, out, err = run(*(named.get(argument, argument) for argument in arguments))
    assert code == 2
    assert "\nerror: " in f"\n{err}"
    assert said in err
    assert "Traceback" not in out + err
    assert [file.name for file in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["search"], ["index", "--nonsense"]])
def test_wrong_usage_exits_with_2_and_without_a_traceback(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert "Usage" in out + err
    assert "Traceback" not in out + err


def test_ctrl_c_exits_with_130(run, tiny_bundle, filled, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dckt.searcher.Searcher.open", stop)
    code, out, err = run("search", tiny_bundle, filled, "-t", "red")
    assert code == 130
    assert "Traceback" not in out + err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def defect(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(inspect, "describe", defect)
    result = CliRunner().invoke(cli.app, ["inspect", "."])
    assert isinstance(result.exception, ZeroDivisionError)
    assert not issubclass(ZeroDivisionError, DcktError)
    assert issubclass(CorpusError, DcktError)


def test_inspect_a_bundle(run, tiny_bundle):
    about = json.loads(run("inspect", tiny_bundle, "--json")[1])
    assert about["what"] == "bundle"
    assert about["labels"] == ["blue", "green", "red", "white"]
    assert set(about["files"]) == {"image.onnx", "text.onnx", "vocabulary.txt"}
    out = run("inspect", tiny_bundle)[1]
    for part in (about["model_id"], "blue, green, red, white", "max tokens", "map / average"):
        assert part in out


FIGURES = {"cosine_min": 0.999912, "max_difference": 0.0012}
PARITY = {"fc9": {"media": {"image": FIGURES, "text": {**FIGURES, "cosine_min": 0.75}}}}
PARITY["fc9"]["directions"] = {"image_to_text": {"map_torch": 0.5, "map_exported": 0.501}}
MEASURED = {
    "test": {"pairs": 20},
    "variants": {
        "onnxruntime-fp32": {"bytes": 1796, "parity": PARITY, "latency": {"image": {"1": {"p50": 0.0125, "runs": 7}}}},
        "openvino-int8": {"parity": {}, "refused": ["fc9: MAP 0.5000 became 0.4000"]},
    },
}


def test_inspect_a_bundle_of_several_variants(run, bundle_with):
    path = bundle_with(["openvino-bf16", "onnxruntime-fp32", "onnxruntime-fp16"], measured=MEASURED).path
    about = json.loads(run("inspect", path, "--json")[1])
    assert about["format_version"] == 2
    assert about["measured"] == MEASURED
    assert [variant["name"] for variant in about["variants"]] == [
        "openvino-bf16",
        "onnxruntime-fp32",
        "onnxruntime-fp16",
    ]
    size = sum(about["files"][name]["size"] for name in ("image.fp16.onnx", "text.fp16.onnx"))
    assert about["precisions"]["fp16"] == {"share": 0.9, "bytes": size}
    graph = about["graphs"]["fp16"]["image"]
    assert graph["inputs"] == [{"name": "pixels", "dtype": "uint8", "shape": [None, 8, 8, 3]}]
    assert {port["name"]: port["shape"] for port in graph["outputs"]} == {"probability": [None, 4], "fc9": [None, 6]}
    assert about["engines"] == []
    out = run("inspect", path)[1]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "fp16 90.0% 1.8 kB 100.0%",
        "image.fp16.onnx 9 fp16, 1 fp32 686 B",
        "text.onnx tokens int64 (any, any) probability float32 (any, 4); fc9 float32 (any, 6)",
        "openvino-bf16 openvino fp32 bf16",
        "parity, fc9, media",
        "onnxruntime-fp32 image 0.999912 0.0012",
        "text 0.75 0.0012",
        "onnxruntime-fp32 0.5 0.501",
        "onnxruntime-fp32 0.0125 7",
        "openvino-int8 fc9: MAP 0.5000 became 0.4000",
        "test / pairs 20",
        f"image.onnx 686 B {about['files']['image.onnx']['sha256'][:16]}",
    ):
        assert line in lines
    start = lines.index("variants, fastest on a CPU first") + 2
    assert [line.split()[0] for line in lines[start : start + 3]] == [
        "openvino-bf16",
        "onnxruntime-fp32",
        "onnxruntime-fp16",
    ]
    assert "profile engines take batches of 1 to 32, and are fastest at 8" in lines


@pytest.mark.parametrize("measured", [{}, {"variants": 3}, {"variants": {"a": 1, "b": {"c": [1]}, "d": {"e": None}}}])
def test_inspect_takes_whatever_was_measured(run, bundle_with, measured):
    code, out, err = run("inspect", bundle_with(["onnxruntime-fp32"], measured=measured).path)
    assert (code, err) == (0, "")
    assert "onnxruntime-fp32" in out


def test_inspect_finds_engines(run, bundle_with):
    path = bundle_with(["onnxruntime-fp32"]).path
    for name, text in (("abc", "{}"), (".partial", "{}")):
        (path / "engines" / name).mkdir(parents=True)
        (path / "engines" / name / "engine.json").write_text(text)
    [engine] = json.loads(run("inspect", path, "--json")[1])["engines"]
    assert engine["name"] == "abc"
    assert "build it again" in engine["error"]
    assert "abc" in run("inspect", path)[1]


def test_inspect_a_bundle_of_format_1(run, tiny_bundle_copy):
    content = json.loads((tiny_bundle_copy / "manifest.json").read_text())
    for name in ("graphs", "variants", "profile", "checksum"):
        del content[name]
    content["version"] = 1
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (tiny_bundle_copy / "manifest.json").write_text(json.dumps(content))
    assert json.loads(run("inspect", tiny_bundle_copy, "--json")[1])["format_version"] == 1
    assert "not counted" in run("inspect", tiny_bundle_copy)[1]


def test_the_variant_that_searched_is_named(run, bundle_with, tmp_path, texts):
    bundle = bundle_with(["onnxruntime-fp32", "onnxruntime-int8"]).path
    arguments = ["--device", "cpu", "--variant", "onnxruntime-int8"]
    assert run("index", bundle, tmp_path / "i", "--texts", texts, *arguments)[0] == 0
    found = run("search", bundle, tmp_path / "i", "-t", "red", "--media", "text", "--json", *arguments)[1]
    assert json.loads(found)["provider"] == "onnxruntime-int8 on CPU"
    assert "onnxruntime-fp32 on CPU" in run("search", bundle, tmp_path / "i", "-t", "red", "--media", "text")[1]


def test_recall_of_a_graph_is_shown(run, tiny_bundle, tmp_path, pictures):
    run("index", tiny_bundle, tmp_path / "i", "--images", pictures, "--kind", "hnsw")
    about = json.loads(run("inspect", tmp_path / "i", "--json")[1])["media"]["image"]
    assert (about["search"], about["in_graph"], about["recall_at_10"]) == ("hnsw", 6, 1.0)
    assert "recall at 10" in run("inspect", tmp_path / "i")[1]


def test_what_comes_from_outside_cannot_steer_the_terminal(run, tiny_bundle, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"id": "[red]x[/red]\u001b[2J", "text": "red [bold]bag\u0007[/bold]"}))
    assert run("index", tiny_bundle, tmp_path / "i", "--texts", file)[0] == 0
    out = run("search", tiny_bundle, tmp_path / "i", "-t", "red", "--media", "text")[1]
    assert "[red]x[/red]" in out
    assert "[bold]bag" in out
    assert "\u001b[2J" not in out
    assert "\u0007" not in out


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"dckt {dckt.__version__}")


@pytest.mark.parametrize("command", [[], ["index"], ["search"], ["doctor"], ["export-items"]])
def test_help_loads_nothing_heavy(command):
    heavy = ("onnxruntime", "openvino", "hnswlib", "PIL", "torch", "numpy", "sqlite3", "packaging")
    code = (
        f"import sys; sys.argv = ['dckt', *{command}, '--help']\n"
        "from dckt.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print(sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_long_metadata_leaves_room_for_the_rest(run, monkeypatch, tiny_bundle, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"id": "handbag-0007", "text": "red " * 100, "note": "x" * 300}))
    run("index", tiny_bundle, tmp_path / "i", "--texts", file)
    monkeypatch.setenv("COLUMNS", "80")
    out = run("search", tiny_bundle, tmp_path / "i", "-t", "red", "--media", "text")[1]
    assert any(line.startswith("   1  1.0000  text    handbag-0007  text: red") for line in out.splitlines())


@pytest.mark.data
def test_odd_pictures_are_indexed_or_named(run, tiny_bundle, tmp_path, data_dir):
    folder = data_dir / "odd_images"
    expected = json.loads((folder / "expected.json").read_text())
    code, _, err = run("index", tiny_bundle, tmp_path / "i", "--images", folder, "--on-error", "skip")
    assert code == 0
    assert f"added {sum(about['valid'] for about in expected.values())} images" in err
    for name, about in expected.items():
        assert (f"left out: image '{name}'" in err) == (not about["valid"])
