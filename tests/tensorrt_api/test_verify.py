"""The program that proves engines on a machine with TensorRT: all of it there, and here what needs none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dckt.bundle import Bundle, Graph, graph_file, write_bundle
from dckt.errors import CorpusError, DcktError
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.tensorrt.cache import Engine, Plan, find_engines, graph_hashes
from dckt.runtime.tensorrt.engines import choose_graph
from dckt.runtime.tensorrt.load import Machine, load, machine

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu" / "verify_tensorrt.py"


def why_not() -> str:
    try:
        load()
    except DcktError as error:
        return " ".join(str(error).split("\n  ")[:2])
    return ""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_tensorrt", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, colour_images: dict[str, Path]) -> Path:
    """Each of six colours four times, labelled by itself."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"id": f"{name}{number}", "image": str(path), "text": f"a picture of {name}", "label": name, "split": "val"}
        for number in range(4)
        for name, path in colour_images.items()
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def small_bundle(exported: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SqueezeNet and a Word CNN with random weights, in fp32, fp16 and int8."""
    folder = tmp_path_factory.mktemp("small") / "small.dckt"
    model, graphs = exported["squeezenet1_1"].model, exported["squeezenet1_1"].graphs
    files = {f"{name}.onnx": graph.SerializeToString() for name, graph in graphs.items()}
    media = ("image", "text")
    write_bundle(
        folder,
        files={**files, "vocabulary.txt": model.vocabulary.dumps().encode()},
        image=model.trunk.spec,
        text=model.text,
        labels=model.labels,
        representation="fc9",
        dimensions={"probability": 5, "fc9": 16},
        produced_by={},
        measured={},
        graphs={
            precision: {medium: Graph(file=graph_file(medium, precision), layers={}) for medium in media}
            for precision in ("fp32", "fp16", "int8")
        },
    )
    return folder


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=f"needs TensorRT and a GPU: {why_not()}")
@pytest.mark.parametrize("options", [(), ("--hardware-compatible", "--graphs", "fp16")])
def test_engines_of_a_bundle_pass(small_bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    common = ("--seconds", "0.1", "--profile", "2,4,8", "--cache", str(tmp_path))
    finished = run(str(small_bundle), *common, *options)
    assert finished.returncode == 0, finished.stderr
    assert "| tensorrt-fp16 | image |" in finished.stdout
    assert "| tensorrt-fp16 | text |" in finished.stdout
    found = find_engines(Bundle.open(small_bundle), machine(), cache=tmp_path)
    assert [engine.precision for engine in found.fitting] == ["fp16", *(["int8", "fp32"] if not options else [])]
    assert not found.others


@pytest.mark.slow
def test_auto_takes_fp16_where_the_bundle_has_it(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    assert choose_graph(bundle, "auto") == "fp16"
    assert choose_graph(bundle, "fp32") == "fp32"
    half, whole = graph_hashes(bundle, "fp16"), graph_hashes(bundle, "fp32")
    assert set(half) == set(whole) == {"image", "text"}
    assert not set(half.values()) & set(whole.values())


@pytest.mark.skipif(not why_not(), reason="what it does without TensorRT; here it is")
def test_says_what_is_missing(tiny_bundle: Path) -> None:
    finished = run(str(tiny_bundle))
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "needed: an NVIDIA driver" in finished.stderr


def test_help_has_examples() -> None:
    finished = run("--help")
    assert finished.returncode == 0
    assert "verify_tensorrt.py shop.dckt --pairs corpus/" in finished.stdout


def test_reads_labelled_pairs(program: ModuleType, tiny_bundle: Path, corpus: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    parser = program.argument_parser()
    inputs, labels = program.real_pairs(bundle, parser.parse_args(["x", "--pairs", str(corpus), "--limit", "12"]))
    assert inputs["image"].shape == (12, 8, 8, 3)
    assert (len(inputs["text"]), len(labels), set(labels)) == (12, 12, {"red", "blue", "black"})
    bare = [{"id": "1", "image": str(next(corpus.parent.rglob("*.png"))), "text": "red"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(bare[0]))
    with pytest.raises(CorpusError, match="MAP needs a label"):
        program.real_pairs(bundle, parser.parse_args(["x", "--pairs", str(tmp_path)]))


@pytest.mark.parametrize(("spoilt", "failures"), [("", 0), ("vectors", 3)])
def test_comparison_finds_other_vectors(
    program: ModuleType, tiny_bundle: Path, corpus: Path, capsys: pytest.CaptureFixture[str], spoilt: str, failures: int
) -> None:
    """The comparison itself, with ONNX Runtime where an engine would be."""
    bundle = Bundle.open(tiny_bundle)
    inputs, labels = program.real_pairs(bundle, program.argument_parser().parse_args(["x", "--pairs", str(corpus)]))
    reference = program.vectors(inputs, lambda medium: OnnxEncoder.open(bundle.graph(medium), output="probability"))
    made = {medium: rows.copy() for medium, rows in reference.items()}
    if spoilt:
        made["image"] = np.roll(made["image"], 1, axis=0)
    plan = Plan(file="p", sha256="", size=1, layers={"fp32": 2}, build_seconds=3, min_cosine={})
    about = Machine(gpu="", compute_capability="", tensorrt="", driver="", runtime="")
    engine = Engine(
        folder=tiny_bundle, precision="fp32", graphs={}, machine=about, profile=(1, 8, 32), length_profile=(1, 2, 3),
        hardware_compatible=False, plans={"image": plan, "text": plan},
    )  # fmt: skip
    table = program.Table()
    found = list(program.compare(engine, made, labels, reference, table))
    assert len(found) == failures, found
    table.show()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| variant | medium | layers | build s | cosine min | MAP change | batch 1 |")
    assert printed[2].startswith("| tensorrt-fp32 | image | 2 fp32 | 3 |")
    assert ("| 1.000000 | +0.00000 |" in printed[2]) == (not spoilt)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=540
    )
