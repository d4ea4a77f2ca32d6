"""dckt doctor: what it finds, what it says to do, and how it ends."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from dckt.commands.doctor import artifacts, machine, probes, runtimes
from dckt.commands.doctor.finding import Finding
from dckt.commands.doctor.probes import ProbeError, ask
from dckt.index import Index

HNSWLIB = "builds and searches a graph"
XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8 avx512_bf16
power management:

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8 avx512_bf16
"""
OLD = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i5-4570\nflags\t\t: fpu sse4_2 avx avx2\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm bf16\n"


def examined(run, *arguments) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    code, out, _ = run("doctor", *arguments, "--json")
    about = json.loads(out)
    assert about["healthy"] == (code == 0)
    found = {(one["area"], one["name"]): one for one in about["findings"]}
    assert {one["state"] for one in about["findings"]} <= {"ok", "note", "problem"}
    assert all(one["found"] for one in about["findings"])
    assert all(one["do"] for one in about["findings"] if one["state"] == "problem")
    return code, found


@pytest.fixture
def filled(run, tiny_bundle, tmp_path, colour_images):
    path = tmp_path / "catalog.index"
    assert run("index", tiny_bundle, path, "--images", colour_images["red"].parent)[0] == 0
    return path


def test_a_machine_alone(run):
    code, out, _ = run("doctor")
    assert code == 0
    for part in ("Python", "SQLite", "features", "threads", "working folder", "numpy", "onnxruntime", "TensorRT"):
        assert part in out
    assert "0 problems" in out
    assert HNSWLIB in out
    assert "CPU attached" in out


def test_a_bundle_and_its_index(run, tiny_bundle, filled):
    code, found = examined(run, tiny_bundle, filled)
    assert code == 0
    assert "every hash is right" in found["bundle", "files"]["found"]
    assert found["bundle", "variant onnxruntime-fp32"]["found"] == "runs, on CPU"
    assert found["bundle", "auto"]["found"] == "takes onnxruntime-fp32 on CPU"
    assert found["index", "items"]["found"].startswith("6 items")
    assert found["index", "model"]["found"] == "filled by this bundle's model"
    assert "exact search" in found["index", "image"]["found"]


def test_what_does_not_run_here_is_a_note_and_what_auto_takes_is_said(run, bundle_with):
    bundle = bundle_with(["onnxruntime-int8", "onnxruntime-fp32"])
    graph = bundle.path / bundle.manifest.graphs["int8"]["text"].file
    assert artifacts._variant(bundle, "onnxruntime-int8").state == "ok"
    graph.write_bytes(bytes(graph.stat().st_size))
    finding = artifacts._variant(bundle, "onnxruntime-int8")
    assert (finding.state, finding.name) == ("note", "variant onnxruntime-int8")
    assert "does not run here" in finding.found
    assert artifacts._variant(bundle, "onnxruntime-fp32").state == "ok"
    # The first that the manifest names is the one that auto takes, and it is broken.
    assert artifacts._variant(bundle, "auto").state == "problem"


def test_a_damaged_bundle_and_a_damaged_index(run, tiny_bundle_copy, filled):
    (tiny_bundle_copy / "image.onnx").write_bytes(b"x")
    content = bytearray((filled / "items.sqlite").read_bytes())
    content[len(content) // 2 :] = os.urandom(len(content) - len(content) // 2)
    (filled / "items.sqlite").write_bytes(content)
    code, found = examined(run, tiny_bundle_copy, filled)
    assert code == 1
    assert found["bundle", "files"]["state"] == "problem"
    assert "image.onnx" in found["bundle", "files"]["found"]
    assert found["index", "items"]["state"] == "problem"
    assert "--force" in found["index", "items"]["do"]


def test_an_index_of_another_model(tiny_bundle, tmp_path):
    Index.create(tmp_path / "its.index", model_id="another", representation="probability", dimension=4).close()
    bundle = artifacts.read_bundle(tiny_bundle)
    found = {one.name: one for one in artifacts.index_findings(tmp_path / "its.index", bundle)}
    assert found["model"].state == "problem"
    assert "another" in found["model"].found
    assert "--force" in found["model"].do
    found = {one.name: one for one in artifacts.index_findings(tmp_path / "its.index", None)}
    assert found["model"].state == "ok"


def test_an_index_may_stand_alone(run, filled):
    code, found = examined(run, filled)
    assert code == 0
    assert ("index", "items") in found
    assert ("bundle", "files") not in found


def test_what_is_not_there_is_a_problem(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "ask", lambda name, *_: ANSWERS[name])
    code, found = examined(run, tmp_path / "none.dckt", tmp_path / "none.index")
    assert code == 1
    assert found["bundle", "files"]["state"] == found["index", "items"]["state"] == "problem"
    assert not list(tmp_path.iterdir())


def test_files_are_not_opened_with_a_library_that_ends_the_process(run, tiny_bundle, filled, monkeypatch):
    def broken(name, *_):
        if name == "hnswlib":
            raise ProbeError("ended its process by SIGILL")
        return ANSWERS[name]

    monkeypatch.setattr(runtimes, "ask", broken)
    code, found = examined(run, tiny_bundle, filled)
    assert code == 1
    assert "HNSWLIB_NO_NATIVE=1" in found["runtimes", "hnswlib"]["do"]
    assert found["files", "bundle and index"]["state"] == "problem"
    assert not {"bundle", "index"} & {area for area, _ in found}


def test_an_old_index_is_not_changed(tmp_path, tiny_bundle, run, filled):
    with sqlite3.connect(filled / "items.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '0' WHERE key = 'version'")
    connection.close()
    before = (filled / "items.sqlite").read_bytes()
    found = list(artifacts.index_findings(filled, None))
    assert [one.name for one in found] == ["folder", "format"]
    assert found[1].state == "note"
    assert "format 0" in found[1].found
    assert (filled / "items.sqlite").read_bytes() == before


# --- the machine --------------------------------------------------------------------------------------------------


def test_both_wheels_of_onnxruntime(monkeypatch):
    versions = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr(machine, "_version", versions.get)
    [finding] = machine.wheel_findings()
    assert finding.state == "problem"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.do
    del versions["onnxruntime"]
    assert not list(machine.wheel_findings())


def packages(monkeypatch, versions: Mapping[str, str], *, gpu: bool = False) -> dict[str, Finding]:
    required = ["numpy<3,>=2.0", "onnxruntime<2,>=1.20", 'openvino>=2026.4; extra == "openvino"']
    required += ['onnxruntime-gpu>=1.20; extra == "gpu"', 'dckt[openvino]; extra == "all"']
    monkeypatch.setattr(machine, "_version", versions.get)
    about = SimpleNamespace(get_all=lambda _: ["openvino", "gpu", "dev"])
    monkeypatch.setattr(machine.metadata, "requires", lambda _: required)
    monkeypatch.setattr(machine.metadata, "metadata", lambda _: about)
    return {one.name: one for one in machine.package_findings(gpu=gpu)}


def test_packages_that_are_missing_or_too_old(monkeypatch):
    found = packages(monkeypatch, {"numpy": "1.26.4"}, gpu=True)
    assert found["numpy"].state == "problem"
    assert found["numpy"].do == "pip install 'numpy<3,>=2.0'"
    assert found["onnxruntime"].state == "problem"
    assert found["extra openvino"] == Finding(
        "packages", "extra openvino", "note", "not installed: openvino", "pip install 'dckt[openvino]'"
    )
    assert found["extra gpu"].state == "note"
    assert "extra dev" not in found


def test_packages_that_are_there(monkeypatch):
    versions = {"numpy": "2.4.0", "onnxruntime-gpu": "1.31.0", "openvino": "2025.1.0"}
    found = packages(monkeypatch, versions)
    assert found["numpy"].state == found["onnxruntime-gpu"].state == found["extra gpu"].state == "ok"
    assert "onnxruntime" not in found  # the other wheel brings the module
    assert "expected >=2026.4" in found["extra openvino"].found
    without = packages(monkeypatch, {"numpy": "2.4.0", "onnxruntime": "1.31.0"})
    assert without["extra gpu"].state == "ok"
    assert "there is no GPU" in without["extra gpu"].found


@pytest.mark.parametrize(
    ("cpuinfo", "openvino", "state", "said"),
    [
        (XEON, "2026.4", "ok", "Platinum 8481C: AVX2, AVX-512, VNNI, AMX, bf16"),
        (XEON, None, "note", "AMX"),
        (ARM, "2026.4", "ok", "bf16, NEON dot product, i8mm"),
        (OLD, "2026.4", "note", "i5-4570: AVX2; no bf16, so no openvino-bf16; no VNNI"),
        ("", None, "note", "none of AVX2"),
    ],
)
def test_features_of_a_processor(monkeypatch, cpuinfo, openvino, state, said):
    monkeypatch.setattr(machine, "_version", lambda _: openvino)
    finding = machine.features_finding(cpuinfo)
    assert finding.state == state
    assert said in finding.found
    assert ("dckt[openvino]" in finding.do) == (cpuinfo == XEON and openvino is None)


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.threads_finding(8, 8, None) == Finding("processor", "threads", "ok", "8 cores")
    limited = machine.threads_finding(8, 4, 2.5)
    assert limited.state == "note"
    assert "4 of them for this process, time for 2.5 of them (container)" in limited.found
    assert limited.do.startswith("--threads 2")
    assert machine.threads_finding(8, 8, 0.5).do.startswith("--threads 1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS is 3" in machine.threads_finding(8, 8, None).found


def test_sqlite_whose_log_can_be_damaged():
    assert machine.sqlite_finding((3, 51, 3)).state == machine.sqlite_finding((3, 53, 0)).state == "ok"
    old = machine.sqlite_finding((3, 40, 1))
    assert old.state == "note"
    assert old.found.startswith("3.40.1; before 3.51.3")


def test_folders(tmp_path, monkeypatch):
    assert machine.folder_finding("disk", "here", tmp_path, needed=0).state == "ok"
    assert not list(tmp_path.iterdir())
    full = machine.folder_finding("disk", "here", tmp_path, needed=2**80)
    assert (full.state, full.do) == ("note", "make room")
    gone = machine.folder_finding("disk", "here", tmp_path / "gone")
    assert gone.state == "note"
    assert "cannot be written" in gone.found
    monkeypatch.setattr(machine, "_file_system", lambda _: "nfs4")
    assert "network" in machine.folder_finding("disk", "here", tmp_path).found


def test_file_system_of_a_folder():
    assert machine._file_system(Path("/proc")) == "proc"


# --- native libraries ---------------------------------------------------------------------------------------------

ANSWERS = {
    "hnswlib": {"right": True},
    "onnxruntime": {"compiled": ["CPUExecutionProvider"], "attached": ["CPUExecutionProvider"], "reason": ""},
    "openvino": {"precisions": ["fp32"], "refused": {"bf16": "needs a CPU with BF16"}},
    "tensorrt": {"tensorrt": "10.16", "gpu": "H100", "compute_capability": "9.0", "runtime": "13.0", "driver": "13.0"},
}
ANSWERS["onnxruntime"]["devices"] = 0


def test_the_smallest_graph_is_what_it_says():
    from onnx import TensorProto, helper

    def value(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])

    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    assert model.SerializeToString() == probes._GRAPH


def test_probes_answer():
    answer = ask("onnxruntime")
    assert "CPUExecutionProvider" in answer["attached"]
    assert ask("hnswlib") == {"right": True}
    with pytest.raises(ProbeError, match="KeyError: 'nonsense'"):
        ask("nonsense")


def test_a_library_that_ends_its_process_does_not_end_the_examination(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -ILL $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(probes.sys, "executable", str(program))
    finding = runtimes._hnswlib()
    assert (finding.state, finding.found) == ("problem", "ended its process by SIGILL")
    assert "HNSWLIB_NO_NATIVE=1" in finding.do
    program.write_text("#!/bin/sh\necho mistake >&2\nexit 3\n")
    with pytest.raises(ProbeError, match="exit code 3: mistake"):
        ask("hnswlib")


CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("devices", "compiled", "attached", "state", "said", "do"),
    [
        (0, CUDA[1:], CUDA[1:], "ok", "no device", ""),
        (0, CUDA, CUDA[1:], "ok", "no device", ""),
        (1, CUDA, CUDA, "ok", "runs on it", ""),
        (1, CUDA, CUDA[1:], "problem", "does not attach (libcudnn.so.9)", "onnxruntime-gpu[cuda,cudnn]"),
        (1, CUDA[1:], CUDA[1:], "note", "cannot use them", "onnxruntime-gpu[cuda,cudnn]"),
    ],
)
def test_compiled_in_is_not_attached(devices, compiled, attached, state, said, do):
    answer = {"devices": devices, "compiled": compiled, "attached": attached, "reason": "libcudnn.so.9"}
    found = {one.name: one for one in runtimes.onnxruntime_findings(answer)}
    assert found["ONNX Runtime"].state == "ok"
    assert found["CUDA"].state == state
    assert said in found["CUDA"].found
    assert do in found["CUDA"].do


def test_a_runtime_whose_cpu_does_not_attach_is_a_problem():
    answer = {"devices": 0, "compiled": ["AzureExecutionProvider"], "attached": [], "reason": "broken"}
    found = next(iter(runtimes.onnxruntime_findings(answer)))
    assert found.state == "problem"
    assert "Azure" in found.found


def test_tensorrt_is_not_touched_without_a_device(monkeypatch):
    asked = []

    def record(name, *_):
        asked.append(name)
        return ANSWERS[name]

    monkeypatch.setattr(runtimes, "ask", record)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda _: object())
    assert "installed, and not asked" in runtimes._tensorrt(0).found
    assert asked == []
    assert "10.16 on H100" in runtimes._tensorrt(1).found
    assert asked == ["tensorrt"]
    assert "not in bf16: needs a CPU with BF16" in runtimes._openvino().found


@pytest.mark.parametrize(
    ("search", "recall", "in_graph", "state", "do"),
    [
        ("exact", None, 0, "ok", ""),
        ("hnsw", 0.999, 1000, "ok", ""),
        ("hnsw", 0.97, 1000, "ok", ""),  # it is used, so it reaches what was asked of it
        ("exact", 0.97, 0, "note", "for speed, ask for less: dckt tune i"),
        ("hnsw", 0.999, 800, "note", "dckt compact i"),
    ],
)
def test_state_of_a_graph(search, recall, in_graph, state, do):
    about = SimpleNamespace(
        items=2000, unique_vectors=1000, search=search, in_graph=in_graph, ef=64, recall_at_10=recall
    )
    finding = artifacts.medium_finding("image", about, "i")
    assert finding.state == state
    assert finding.do.startswith(do)
