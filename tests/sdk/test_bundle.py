from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dckt.bundle import (
    BUNDLE_VERSION,
    DEFAULT_VARIANT,
    Bundle,
    Graph,
    Variant,
    graph_file,
    with_calibration,
    write_bundle,
)
from dckt.calibration import Calibration, Threshold
from dckt.errors import BundleCorruptError, BundleError, BundleVersionError, ConfigError
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary

VOCABULARY = Vocabulary.of(["red", "bag"])
FILES: dict[str, Path | bytes] = {
    "image.onnx": b"image graph",
    "text.onnx": b"text graph",
    "vocabulary.txt": VOCABULARY.dumps().encode(),
}


def write(destination: Path, **changes: Any) -> Bundle:
    arguments: dict[str, Any] = {
        "files": FILES,
        "image": ImageSpec(side=8),
        "text": TextSpec(),
        "labels": ["bag", "shoe"],
        "representation": "probability",
        "dimensions": {"probability": 2, "fc9": 6},
        "produced_by": {"dckt": "0.1.0"},
        "measured": {"parity": {"cosine": 0.9999}},
    }
    return write_bundle(destination, **{**arguments, **changes})


FP32 = {medium: Graph(file=f"{medium}.onnx", layers={"fp32": 9}) for medium in ("image", "text")}
FP16 = {medium: Graph(file=f"{medium}.fp16.onnx", layers={"fp16": 8, "fp32": 1}) for medium in ("image", "text")}
FP16_FILES: dict[str, Path | bytes] = {"image.fp16.onnx": b"half image", "text.fp16.onnx": b"half text"}
BF16_VARIANT = Variant(name="openvino-bf16", runtime="openvino", graph="fp32", precision="bf16")
FP16_VARIANT = Variant(name="onnxruntime-fp16", runtime="onnxruntime", graph="fp16", precision="fp16")


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def resign(folder: Path, content: dict[str, Any]) -> None:
    """Writes a manifest whose checksum is right, whatever else it says."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    signed = {**rest, "checksum": hashlib.sha256(canonical.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(signed))


# --- writing and reading ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"external data")
    written = write(tmp_path / "shop.dckt", files={**FILES, "image.onnx.data": source})
    bundle = Bundle.open(tmp_path / "shop.dckt")
    assert bundle == written
    assert bundle.path == tmp_path / "shop.dckt"
    manifest = bundle.manifest
    assert manifest.labels == ("bag", "shoe")
    assert manifest.representation == "probability"
    assert manifest.dimensions == {"probability": 2, "fc9": 6}
    assert manifest.image == ImageSpec(side=8)
    assert manifest.text == TextSpec()
    assert manifest.produced_by == {"dckt": "0.1.0"}
    assert manifest.measured == {"parity": {"cosine": 0.9999}}
    assert manifest.files["image.onnx.data"].size == len(b"external data")
    assert manifest.files["image.onnx"].sha256 == hashlib.sha256(b"image graph").hexdigest()
    assert manifest.created.endswith("+00:00")
    assert bundle.vocabulary == VOCABULARY
    assert bundle.graph("image").read_bytes() == b"image graph"
    assert bundle.graph("text").read_bytes() == b"text graph"
    assert sorted(path.name for path in bundle.path.iterdir()) == sorted(["manifest.json", *FILES, "image.onnx.data"])


def test_a_path_may_be_text(tiny_bundle: Path) -> None:
    assert Bundle.open(str(tiny_bundle)) == Bundle.open(tiny_bundle)


def test_moved_or_renamed_it_is_the_same_model(tmp_path: Path) -> None:
    model_id = write(tmp_path / "a.dckt").manifest.model_id
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.dckt").rename(tmp_path / "elsewhere" / "b.dckt")
    moved = Bundle.open(tmp_path / "elsewhere" / "b.dckt")
    assert moved.manifest.model_id == model_id
    assert moved.vocabulary == VOCABULARY


@pytest.mark.parametrize(
    "change",
    [
        {"files": {**FILES, "image.onnx": b"image grapH"}},
        {"files": {**FILES, "text.onnx": b"text grapH"}},
        {"files": {**FILES, "image.onnx.data": b"weights"}},
        {"files": {**FILES, "vocabulary.txt": Vocabulary.of(["bag", "red"]).dumps().encode()}},
        {"image": ImageSpec(side=9)},
        {"image": ImageSpec(side=8, crop_share=1)},
        {"image": ImageSpec(side=8, mean=(0, 0, 0))},
        {"image": ImageSpec(side=8, std=(1, 1, 1))},
        {"image": ImageSpec(side=8, max_pixels=100)},
        {"text": TextSpec(max_tokens=5)},
        {"text": TextSpec(tokenizer="syllables")},
        {"representation": "fc9"},
    ],
    ids=str,
)
def test_all_that_decides_a_vector_decides_the_model_id(tmp_path: Path, change: dict[str, Any]) -> None:
    assert write(tmp_path / "a").manifest.model_id != write(tmp_path / "b", **change).manifest.model_id


def test_what_does_not_decide_a_vector_does_not(tmp_path: Path) -> None:
    change = {"labels": ["x", "y"], "produced_by": {}, "measured": {}}
    assert write(tmp_path / "a").manifest.model_id == write(tmp_path / "b", **change).manifest.model_id


def test_numbers_of_another_type_give_the_same_model_id(tmp_path: Path) -> None:
    a = write(tmp_path / "a", image=ImageSpec(mean=(0, 0, 0), crop_share=1))
    b = write(tmp_path / "b", image=ImageSpec(mean=(0.0, 0.0, 0.0), crop_share=1.0))
    assert a.manifest.model_id == b.manifest.model_id == Bundle.open(tmp_path / "a").manifest.model_id


def test_measured_is_kept_as_json_keeps_it(tmp_path: Path) -> None:
    measured = {9: (1, 2), 10: None, "né": "\ud800"}
    write(tmp_path / "a", measured=measured)
    assert Bundle.open(tmp_path / "a").manifest.measured == {"9": [1, 2], "10": None, "né": "\ud800"}


# --- graphs and variants ------------------------------------------------------------------------------------------


def test_by_default_a_bundle_has_fp32_graphs_on_onnx_runtime(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a").manifest
    assert manifest.graphs == {"fp32": {name: Graph(file=f"{name}.onnx", layers={}) for name in ("image", "text")}}
    assert manifest.variants == (DEFAULT_VARIANT,)
    assert DEFAULT_VARIANT.name == "onnxruntime-fp32"
    assert manifest.profile == (1, 8, 32)


def test_graphs_in_several_precisions(tmp_path: Path) -> None:
    variants = [BF16_VARIANT, DEFAULT_VARIANT, FP16_VARIANT]
    written = write(
        tmp_path / "a",
        files={**FILES, **FP16_FILES, "text.fp16.onnx.data": b"weights", "report.html": b"<html>"},
        graphs={"fp32": FP32, "fp16": FP16},
        variants=variants,
        profile=(2, 4, 4),
    )
    bundle = Bundle.open(tmp_path / "a")
    assert bundle == written
    assert bundle.manifest.graphs == {"fp32": FP32, "fp16": FP16}
    assert bundle.manifest.variants == tuple(variants), "in their order"
    assert bundle.manifest.profile == (2, 4, 4)
    assert bundle.graph("image", "fp16").read_bytes() == b"half image"
    assert bundle.graph("text").read_bytes() == b"text graph"
    assert set(bundle.manifest.files) == {*FILES, *FP16_FILES, "text.fp16.onnx.data", "report.html"}
    for medium, precision in (("image", "int8"), ("audio", "fp32")):
        with pytest.raises(BundleError, match=f"no graph {medium} {precision}, only image fp32, .*text fp16"):
            bundle.graph(medium, precision)


def test_another_medium(tmp_path: Path) -> None:
    files = {**FILES, "audio.onnx": b"audio graph"}
    graphs = {"fp32": {**FP32, "audio": Graph(file="audio.onnx", layers={"fp32": 1})}}
    bundle = write(tmp_path / "a", files=files, graphs=graphs)
    assert bundle.graph("audio").read_bytes() == b"audio graph"
    assert bundle.manifest.model_id != write(tmp_path / "b").manifest.model_id


@pytest.mark.parametrize(
    ("medium", "precision", "name"),
    [("image", "fp32", "image.onnx"), ("image", "fp16", "image.fp16.onnx"), ("text", "int8", "text.int8.onnx")],
)
def test_names_of_graphs(medium: str, precision: str, name: str) -> None:
    assert graph_file(medium, precision) == name


def test_other_precisions_and_files_keep_the_model_id(tmp_path: Path) -> None:
    """So an index fits every variant of a bundle, and a bundle that was exported again with more of them."""
    plain = write(tmp_path / "plain", files={**FILES, "image.onnx.data": b"weights"})
    files = {**FILES, **FP16_FILES, "image.onnx.data": b"weights", "image.fp16.onnx.data": b"x", "report.html": b"y"}
    more = write(
        tmp_path / "more",
        files=files,
        graphs={"fp16": FP16, "fp32": FP32},
        variants=[FP16_VARIANT, DEFAULT_VARIANT],
        profile=(1, 1, 1),
    )
    assert more.manifest.model_id == plain.manifest.model_id
    assert Bundle.open(more.path).manifest.model_id == plain.manifest.model_id


def version_1(folder: Path) -> dict[str, Any]:
    """Turns a bundle into one of format 1, as it was written then."""
    content = manifest_of(folder)
    for name in ("graphs", "variants", "profile"):
        del content[name]
    content["version"] = 1
    graphs = {name: entry["sha256"] for name, entry in content["files"].items() if name != "vocabulary.txt"}
    parts = {
        "graphs": graphs,
        "vocabulary": content["files"]["vocabulary.txt"]["sha256"],
        "image": content["image"],
        "text": {"max_tokens": content["text"]["max_tokens"]},
        "representation": content["representation"],
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    content["model_id"] = hashlib.sha256(canonical.encode()).hexdigest()
    resign(folder, content)
    return content


def test_format_1_still_opens_and_keeps_its_model_id(tmp_path: Path) -> None:
    files = {**FILES, "image.onnx.data": b"weights"}
    present = write(tmp_path / "a", files=files)
    old = version_1(present.path)
    bundle = Bundle.open(present.path)
    assert bundle.manifest == present.manifest
    assert bundle.manifest.model_id == old["model_id"]
    assert bundle.graph("image").read_bytes() == b"image graph"


def test_format_1_counted_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", files={**FILES, "weights.bin": b"of a graph, under a name of its own"}).path
    old = version_1(folder)
    assert Bundle.open(folder).manifest.model_id == old["model_id"]


@pytest.mark.parametrize("field", ["graphs", "variants", "profile"])
def test_format_1_has_no_fields_of_format_2(tmp_path: Path, field: str) -> None:
    folder = write(tmp_path / "a").path
    newer = manifest_of(folder)
    resign(folder, {**version_1(folder), field: newer[field]})
    with pytest.raises(BundleCorruptError, match="holds the fields"):
        Bundle.open(folder)


GRAPH = {"file": "image.onnx", "layers": {}}
ENTRY = {"name": "onnxruntime-fp32", "runtime": "onnxruntime", "graph": "fp32", "precision": "fp32"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("graphs", [], "expected dict"),
        ("graphs", {}, "needs fp32 graphs"),
        ("graphs", {"fp32": {"image": GRAPH}}, "needs fp32 graphs of image, text"),
        ("graphs", {"fp32": {"image": GRAPH, "text": GRAPH}}, "a file for each"),
        ("graphs", {"fp32": {"image": GRAPH, "text": {**GRAPH, "file": "vocabulary.txt"}}}, "a file for each"),
        ("graphs", {"fp32": {"image": GRAPH, "text": {**GRAPH, "file": "nowhere.onnx"}}}, r"needs \['nowhere\.onnx'\]"),
        ("graphs", {"fp32": {"image": GRAPH, "text": {"file": "text.onnx"}}}, "holds the fields"),
        ("graphs", {"fp32": {"image": GRAPH, "text": {"file": 1, "layers": {}}}}, "expected str"),
        ("graphs", {"fp32": {"image": GRAPH, "text": "text.onnx"}}, "expected dict"),
        ("graphs", {"fp32": {"image": {**GRAPH, "layers": {"fp32": "2"}}}}, "expected int"),
        ("graphs", {"fp32": {"image": {**GRAPH, "layers": {"fp32": -1}}}}, "layers are"),
        ("graphs", {"fp32": {"image": {**GRAPH, "layers": {"fp64": 1}}}}, "layers are"),
        ("variants", {}, "expected list"),
        ("variants", [], "at least one"),
        ("variants", [ENTRY, ENTRY], "each once"),
        ("variants", ["onnxruntime-fp32"], "expected"),
        ("variants", [{**ENTRY, "speed": 1}], "holds the fields"),
        ("variants", [{**ENTRY, "name": None}], "expected str"),
        ("variants", [{**ENTRY, "name": "fast"}], "is to be called onnxruntime-fp32"),
        ("variants", [{**ENTRY, "runtime": "torch"}], "runtime is 'torch', expected onnxruntime, openvino, tensorrt"),
        ("variants", [{**ENTRY, "precision": "bf16"}], "onnxruntime has no 'bf16' from graphs in 'fp32'"),
        ("variants", [{**ENTRY, "graph": "bf16", "precision": "bf16"}], "no 'bf16' from graphs in 'bf16'"),
        (
            "variants",
            [{**ENTRY, "graph": "fp16", "precision": "fp16", "name": "onnxruntime-fp16"}],
            "needs fp16 graphs",
        ),
        ("profile", [1, 8], "expected 3 of int"),
        ("profile", [1, 8.0, 32], "expected 3 of int"),
        ("profile", [True, 8, 32], "expected 3 of int"),
        ("profile", [0, 8, 32], "1 <= min <= opt <= max"),
        ("profile", [8, 1, 32], "1 <= min <= opt <= max"),
        ("profile", [1, 32, 8], "1 <= min <= opt <= max"),
    ],
    ids=str,
)
def test_wrong_graphs_and_variants(tiny_bundle_copy: Path, field: str, value: object, message: str) -> None:
    resign(tiny_bundle_copy, {**manifest_of(tiny_bundle_copy), field: value})
    with pytest.raises(BundleCorruptError, match=rf"manifest\.json: .*{message}"):
        Bundle.open(tiny_bundle_copy)


# --- refusing to write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"image.onnx": b"", "text.onnx": b""}}, r"vocabulary\.txt"),
        ({"files": {**FILES, "../x": b""}}, "no relative path"),
        ({"files": {**FILES, "manifest.json": b"{}"}}, "written by the bundle itself"),
        ({"files": {**FILES, "image.onnx": Path("/nowhere/image.onnx")}}, "cannot be written"),
        ({"files": {**FILES, "vocabulary.txt": b"red\n"}}, "a vocabulary starts with"),
        ({"files": {**FILES, "vocabulary.txt": b"\xff"}}, "cannot be read"),
        ({"representation": "fc8"}, "'fc8' is none of"),
        ({"dimensions": {"probability": 3}}, "2 labels for a probability of 3 columns"),
        ({"dimensions": {"probability": 2, "fc9": 0}}, "at least 1"),
        ({"labels": ["bag", "bag"]}, "twice"),
        ({"labels": [1, 2]}, "labels"),
        ({"measured": {"map": float("nan")}}, "finite"),
        ({"measured": {"map": {1, 2}}}, "must be JSON"),
        ({"produced_by": {"dckt": 1}}, "expected str"),
        ({"graphs": {"fp16": FP16}}, "needs fp32 graphs"),
        ({"graphs": {"fp32": FP32, "bf16": FP16}}, "expected fp32, fp16, int8"),
        ({"graphs": {"fp32": FP32, "fp16": FP16}}, r"needs \['image\.fp16\.onnx', 'text\.fp16\.onnx'\]"),
        ({"graphs": {"fp32": FP32, "fp16": {"image": FP16["image"]}}}, r"fp16 graphs are of \['image'\]"),
        (
            {"graphs": {"fp32": {**FP32, "audio": FP16["text"]}, "fp16": FP32}},
            r"fp16 graphs are of \['image', 'text'\]",
        ),
        ({"variants": [FP16_VARIANT]}, "'onnxruntime-fp16' needs fp16 graphs"),
        ({"variants": []}, "at least one"),
        ({"profile": (2, 1, 3)}, "min <= opt <= max"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        write(tmp_path / "new", **change)
    assert list(tmp_path.iterdir()) == []


def test_existing_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a").manifest
    with pytest.raises(BundleError, match="exists already"):
        write(tmp_path / "a", representation="fc9")
    assert Bundle.open(tmp_path / "a").manifest == first
    write(tmp_path / "a", representation="fc9", force=True)
    assert Bundle.open(tmp_path / "a").manifest.representation == "fc9"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_force_replaces_bundles_and_empty_folders_only(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", force=True)
    damaged = write(tmp_path / "damaged").path
    (damaged / "manifest.json").write_text("{")
    write(damaged, force=True)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for mine in ("web", "file"):
        with pytest.raises(BundleError, match="is no bundle"):
            write(tmp_path / mine, force=True)
    assert (tmp_path / "web" / "manifest.json").read_text() == "{}"
    assert (tmp_path / "file").read_text() == "mine"


def test_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BundleError, match="No space left"):
        write(tmp_path / "a", files={**FILES, "image.onnx": tmp_path / "x"})
    assert list(tmp_path.iterdir()) == []


# --- refusing to open ---------------------------------------------------------------------------------------------


def test_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("[]")
    for name in ("missing", "file", ".", "other", "list"):
        with pytest.raises(BundleError) as caught:
            Bundle.open(tmp_path / name)
        assert type(caught.value) is BundleError


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "vocabulary.txt"])
def test_damaged_file(tiny_bundle_copy: Path, name: str) -> None:
    file = tiny_bundle_copy / name
    whole = file.read_bytes()
    generator = random.Random(name)
    for _ in range(40):
        place = generator.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        for damaged in (whole[:place], bytes(flipped), whole + b"\0"):
            file.write_bytes(damaged)
            with pytest.raises(BundleCorruptError, match=name):
                Bundle.open(tiny_bundle_copy)
    file.unlink()
    with pytest.raises(BundleCorruptError, match="is missing"):
        Bundle.open(tiny_bundle_copy)
    file.mkdir()
    with pytest.raises(BundleCorruptError, match="is missing"):
        Bundle.open(tiny_bundle_copy)
    file.rmdir()
    file.write_bytes(whole)
    Bundle.open(tiny_bundle_copy)


def test_without_verifying_only_presence_and_size_count(tiny_bundle_copy: Path) -> None:
    graph = tiny_bundle_copy / "image.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Bundle.open(tiny_bundle_copy, verify=False)
    graph.write_bytes(whole[:-1])
    with pytest.raises(BundleCorruptError, match="bytes, expected"):
        Bundle.open(tiny_bundle_copy, verify=False)


def test_damaged_manifest_never_says_something_else(tiny_bundle_copy: Path) -> None:
    """Each damage is an error of ours, or, as in white space, changes nothing."""
    file = tiny_bundle_copy / "manifest.json"
    whole, before = file.read_bytes(), Bundle.open(tiny_bundle_copy).manifest
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        place = generator.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(whole[:place] if generator.random() < 0.2 else damaged)
        try:
            after = Bundle.open(tiny_bundle_copy).manifest
        except BundleError:
            refused += 1
        else:
            assert after == before
    assert refused > 200


@pytest.mark.parametrize(
    "text", ["", "{", "nul", '{"format": "dckt-bundle"', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\ufeff{}"]
)
def test_broken_json(tiny_bundle_copy: Path, text: str) -> None:
    (tiny_bundle_copy / "manifest.json").write_text(text)
    with pytest.raises(BundleCorruptError, match="JSON"):
        Bundle.open(tiny_bundle_copy)


def test_not_utf8(tiny_bundle_copy: Path) -> None:
    (tiny_bundle_copy / "manifest.json").write_bytes(b'{"format": "\xff"}')
    with pytest.raises(BundleCorruptError, match="JSON"):
        Bundle.open(tiny_bundle_copy)


def test_newer_version_is_another_error(tiny_bundle_copy: Path) -> None:
    content = manifest_of(tiny_bundle_copy)
    newer = {**content, "version": BUNDLE_VERSION + 1, "something": "new"}
    (tiny_bundle_copy / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(BundleVersionError, match=f"format {BUNDLE_VERSION + 1}.*up to {BUNDLE_VERSION}"):
        Bundle.open(tiny_bundle_copy)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, 2.5, "2", None])
def test_version_that_never_was(tiny_bundle_copy: Path, version: object) -> None:
    resign(tiny_bundle_copy, {**manifest_of(tiny_bundle_copy), "version": version})
    with pytest.raises(BundleCorruptError, match="version"):
        Bundle.open(tiny_bundle_copy)


def test_resigned_manifest_opens(tiny_bundle_copy: Path) -> None:
    """The helper of the tests below signs as the writer does."""
    resign(tiny_bundle_copy, {**manifest_of(tiny_bundle_copy), "created": "now"})
    assert Bundle.open(tiny_bundle_copy).manifest.created == "now"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", 7),
        ("model_id", "0" * 64),
        ("representation", None),
        ("representation", "fc8"),
        ("representation", "fc9"),
        ("dimensions", []),
        ("dimensions", {}),
        ("dimensions", {"probability": "4", "fc9": 6}),
        ("dimensions", {"probability": True, "fc9": 6}),
        ("dimensions", {"probability": 4, "fc9": 0}),
        ("dimensions", {"probability": 5, "fc9": 6}),
        ("labels", "blue"),
        ("labels", [1, 2, 3, 4]),
        ("labels", ["a", "a", "b", "c"]),
        ("image", None),
        ("image", {}),
        ("text", {"max_tokens": 16.0}),
        ("text", {"max_tokens": 0}),
        ("text", {"max_tokens": 16, "language": "en"}),
        ("text", {"tokenizer": "words"}),
        ("text", {"max_tokens": 16, "tokenizer": None}),
        ("text", {"max_tokens": 16, "tokenizer": "other"}),
        ("files", {}),
        ("files", []),
        ("produced_by", {"x": 1}),
        ("measured", []),
        ("created", 20260101),
        ("unheard-of", 1),
    ],
    ids=str,
)
def test_wrong_field(tiny_bundle_copy: Path, field: str, value: object) -> None:
    resign(tiny_bundle_copy, {**manifest_of(tiny_bundle_copy), field: value})
    with pytest.raises(BundleCorruptError, match=r"manifest\.json"):
        Bundle.open(tiny_bundle_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("side", 0),
        ("side", "8"),
        ("side", 8.0),
        ("crop_share", 1),
        ("crop_share", 2.0),
        ("mean", [0.0, 0.0]),
        ("mean", [0, 0, 0]),
        ("mean", "000"),
        ("std", [1.0, 1.0, 0.0]),
        ("max_pixels", 10**12),
        ("new", 1),
    ],
    ids=str,
)
def test_wrong_preprocessing(tiny_bundle_copy: Path, field: str, value: object) -> None:
    content = manifest_of(tiny_bundle_copy)
    content["image"][field] = value
    resign(tiny_bundle_copy, content)
    with pytest.raises(BundleCorruptError, match=r"manifest\.json"):
        Bundle.open(tiny_bundle_copy)


def test_a_manifest_from_before_tokenizers_means_the_built_in_one(tiny_bundle_copy: Path) -> None:
    content = manifest_of(tiny_bundle_copy)
    assert content["text"].pop("tokenizer") == "words"
    resign(tiny_bundle_copy, content)
    manifest = Bundle.open(tiny_bundle_copy).manifest
    assert manifest.text == TextSpec(max_tokens=16, tokenizer="words")
    parts = {name: content[name] for name in ("image", "text", "representation")}
    graphs = {name: content["files"][name]["sha256"] for name in ("image.onnx", "text.onnx")}
    parts |= {"graphs": graphs, "vocabulary": content["files"]["vocabulary.txt"]["sha256"]}
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    assert manifest.model_id == hashlib.sha256(canonical.encode()).hexdigest(), "its index still belongs to it"


def test_a_bundle_opens_without_its_tokenizer(tmp_path: Path) -> None:
    """It can be inspected and copied where the tokenizer is not installed; encoding a text needs it."""
    write(tmp_path / "a", text=TextSpec(tokenizer="not.here:either"))
    bundle = Bundle.open(tmp_path / "a")
    assert bundle.manifest.text.tokenizer == "not.here:either"
    with pytest.raises(ConfigError, match=r"no tokenizer 'not\.here:either' \(there are: words.*register_tokenizer"):
        bundle.vocabulary.encode("red", bundle.manifest.text)


@pytest.mark.parametrize("field", ["format", "version", "checksum", "labels", "files"])
def test_missing_field(tiny_bundle_copy: Path, field: str) -> None:
    content = manifest_of(tiny_bundle_copy)
    del content[field]
    (tiny_bundle_copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(tiny_bundle_copy)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/../../outside", "./x", "a//b", "", ".", "..", "a\\b", "C:x", "a\0b", "\ud800"],
)
def test_file_outside_the_folder(tiny_bundle_copy: Path, name: str) -> None:
    outside = tiny_bundle_copy.parent / "outside"
    outside.write_bytes(b"x")
    content = manifest_of(tiny_bundle_copy)
    content["files"][name] = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    resign(tiny_bundle_copy, content)
    with pytest.raises(BundleCorruptError, match="no relative path"):
        Bundle.open(tiny_bundle_copy)


@pytest.mark.parametrize("entry", [None, {}, {"sha256": "x"}, {"sha256": 1, "size": 1}, {"sha256": "x", "size": "1"}])
def test_wrong_file_entry(tiny_bundle_copy: Path, entry: object) -> None:
    content = manifest_of(tiny_bundle_copy)
    content["files"]["image.onnx"] = entry
    resign(tiny_bundle_copy, content)
    with pytest.raises(BundleCorruptError):
        Bundle.open(tiny_bundle_copy)


def test_other_files_in_the_folder_are_left_alone(tiny_bundle_copy: Path) -> None:
    (tiny_bundle_copy / "README.md").write_text("ours")
    Bundle.open(tiny_bundle_copy)


def test_opening_reads_nothing_but_json_and_bytes(tiny_bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle full of traps opens without running, unpickling or importing any of them."""
    trap = b"cos\nsystem\n(S'touch pwned'\ntR."
    for name in ("__init__.py", "manifest.py", "image.onnx.pkl", "sitecustomize.py"):
        (tiny_bundle_copy / name).write_bytes(trap)
    content = manifest_of(tiny_bundle_copy)
    content["measured"] = {"__class__": "os.system", "py/object": "__import__('os').system"}
    resign(tiny_bundle_copy, content)
    monkeypatch.chdir(tiny_bundle_copy)

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("code was loaded from the bundle")

    for module, name in (("pickle", "loads"), ("pickle", "load"), ("builtins", "exec"), ("builtins", "eval")):
        monkeypatch.setattr(f"{module}.{name}", forbidden)
    assert len(Bundle.open(tiny_bundle_copy).vocabulary) == 12
    assert not (tiny_bundle_copy / "pwned").exists()


@pytest.mark.parametrize("damage", [lambda text: text[6:], lambda text: text + "\nred\n", lambda text: "\n" + text])
def test_vocabulary_that_hashes_right_and_is_none(tiny_bundle_copy: Path, damage: Callable[[str], str]) -> None:
    """A tool other than ours wrote it."""
    file = tiny_bundle_copy / "vocabulary.txt"
    file.write_text(damage(file.read_text()))
    content = manifest_of(tiny_bundle_copy)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    content["files"]["vocabulary.txt"] = {"sha256": sha256, "size": file.stat().st_size}
    parts = {
        "graphs": {name: content["files"][name]["sha256"] for name in ("image.onnx", "text.onnx")},
        "vocabulary": sha256,
        **{name: content[name] for name in ("image", "representation")},
        "text": {"max_tokens": 16},  # the built-in tokenizer is not counted, so that older bundles keep their ids
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    content["model_id"] = hashlib.sha256(canonical.encode()).hexdigest()
    resign(tiny_bundle_copy, content)
    bundle = Bundle.open(tiny_bundle_copy)
    with pytest.raises(BundleCorruptError, match="vocabulary"):
        _ = bundle.vocabulary


# --- calibration ---


def calibration(representation: str = "probability") -> Calibration:
    best = Threshold(similarity=0.5, precision=1.0, recall=0.5, f1=0.6, answered=0.7, mistaken=0.1)
    return Calibration(
        representation=representation,
        pairs={"corpus": "shop", "count": 12},
        thresholds={"image_to_text": {"best_f1": best}},
        ranking={},
        candidates=12,
    )


def test_a_calibration_is_stored_later(tiny_bundle_copy: Path) -> None:
    before = Bundle.open(tiny_bundle_copy)
    assert before.manifest.calibration is None
    assert "calibration" not in json.loads((tiny_bundle_copy / "manifest.json").read_text())
    after = with_calibration(before, calibration())
    assert after.manifest == replace(before.manifest, calibration=calibration())
    assert Bundle.open(tiny_bundle_copy) == after
    assert after.manifest.model_id == before.manifest.model_id
    newer = replace(calibration(), candidates=5)
    assert with_calibration(before, newer).manifest.calibration == newer, "in place of the one that is there"
    assert not [file for file in tiny_bundle_copy.iterdir() if "partial" in file.name]


def test_a_calibration_is_written_with_the_bundle(bundle_with: Callable[..., Bundle]) -> None:
    assert bundle_with(["onnxruntime-fp32"], calibration=calibration()).manifest.calibration == calibration()


def test_a_calibration_of_another_representation(tiny_bundle_copy: Path) -> None:
    before = (tiny_bundle_copy / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="the calibration is of fc9"):
        with_calibration(Bundle.open(tiny_bundle_copy), calibration("fc9"))
    assert (tiny_bundle_copy / "manifest.json").read_bytes() == before


def test_a_calibration_of_a_bundle_that_was_replaced(tiny_bundle_copy: Path) -> None:
    opened = Bundle.open(tiny_bundle_copy)
    stale = Bundle(opened.path, replace(opened.manifest, model_id="another"))
    with pytest.raises(BundleError, match="holds another model now"):
        with_calibration(stale, calibration())


def test_a_calibration_of_a_first_format_bundle(tiny_bundle_copy: Path) -> None:
    resign(tiny_bundle_copy, version_1(tiny_bundle_copy))
    before = Bundle.open(tiny_bundle_copy)
    assert with_calibration(before, calibration()).manifest == replace(before.manifest, calibration=calibration())


def test_a_calibration_that_cannot_be_stored(tiny_bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dckt.bundle.atomic_write", full)
    with pytest.raises(BundleError, match=r"cannot be stored .*No space"):
        with_calibration(Bundle.open(tiny_bundle_copy), calibration())
    with pytest.raises(BundleError, match="finite"):
        with_calibration(Bundle.open(tiny_bundle_copy), replace(calibration(), pairs={"x": float("nan")}))


@pytest.mark.parametrize("value", [None, [], {}, {"representation": "probability"}])
def test_a_calibration_that_is_none_of_ours(tiny_bundle_copy: Path, value: object) -> None:
    resign(tiny_bundle_copy, {**manifest_of(tiny_bundle_copy), "calibration": value})
    with pytest.raises(BundleCorruptError, match="calibration"):
        Bundle.open(tiny_bundle_copy)


def test_a_first_format_bundle_that_the_second_cannot_describe(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", files={**FILES, "weights.bin": b"of a graph, under a name of its own"}).path
    version_1(folder)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=r"old format .* export it again"):
        with_calibration(Bundle.open(folder), calibration())
    assert (folder / "manifest.json").read_bytes() == before
