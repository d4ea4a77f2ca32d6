"""`dckt-export` as a user meets it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from onnx import numpy_helper

from dckt.bundle import Bundle
from dckt_export import cli
from dckt_export import export as export_module
from dckt_export import graphs as graphs_module
from dckt_export import variants as variants_module


@pytest.fixture
def dckt_export(monkeypatch, capsys):
    """Runs the command; gives its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dckt-export", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.usefixtures("quick")
def test_a_table_of_parity(dckt_export, finished_run, tmp_path):
    code, out, err = dckt_export(finished_run, "--out", tmp_path / "b.dckt", "--seconds", 0)
    assert code == 0
    assert "Vectors beside PyTorch's, 30 val pairs of colours" in out
    assert "onnxruntime-fp32" in out
    assert out.count("image to text") == out.count("text to image") >= 2
    assert f"bundle: {tmp_path / 'b.dckt'}" in out
    assert "next:   dckt index" in out
    assert "comparing onnxruntime-fp32" in err  # progress is not mixed with results
    assert "Traceback" not in err
    model_id = Bundle.open(tmp_path / "b.dckt").manifest.model_id
    assert model_id[:12] in out


@pytest.mark.slow
def test_another_process_writes_the_same_model(dckt_export, finished_run, tmp_path):
    """The figures as JSON; and the model id does not depend on process, folder or hash seed."""
    code, out, err = dckt_export(finished_run, "--out", tmp_path / "here.dckt", "--json", "--limit", 20, "--seconds", 0)
    assert (code, err) == (0, "")
    here = json.loads(out)
    assert here["measured"]["pairs"]["count"] == 20
    assert here["bundle"] == str(tmp_path / "here.dckt")
    copy = shutil.copytree(finished_run, tmp_path / "moved")
    arguments = [str(copy), "--out", str(tmp_path / "there.dckt"), "--json", "--limit", "20", "--seconds", "0"]
    result = subprocess.run(
        [sys.executable, "-c", "from dckt_export.cli import main; main()", *arguments],
        env={**os.environ, "PYTHONHASHSEED": "12", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    there = json.loads(result.stdout)
    assert there["model_id"] == here["model_id"]
    for name in ("image.onnx", "text.onnx"):
        assert (tmp_path / "there.dckt" / name).read_bytes() == (tmp_path / "here.dckt" / name).read_bytes()


def test_every_flag_reaches_the_export(dckt_export, finished_run, corpus, tmp_path):
    elsewhere = shutil.copytree(corpus.root, tmp_path / "elsewhere")
    out = tmp_path / "b.dckt"
    out.mkdir()
    options = (
        "--representation",
        "fc9",
        "--pairs",
        elsewhere,
        "--split",
        "test",
        "--limit",
        4,
        "--opset",
        19,
        "--seconds",
        0,
    )
    assert dckt_export(finished_run, "--out", out, *options)[0] == 2
    assert dckt_export(finished_run, "--out", out, *options, "--force")[0] == 0
    manifest = Bundle.open(out).manifest
    assert manifest.representation == "fc9"
    assert manifest.measured["pairs"] == {"corpus": "elsewhere", "split": "test", "count": 4}
    assert manifest.produced_by["opset"] == "19"


@pytest.mark.usefixtures("quick")
def test_a_model_that_differs_is_refused(dckt_export, finished_run, tmp_path, temporary_folder, monkeypatch):
    real = graphs_module.onnx_from_encoder

    def spoilt(encoder, example, **options):
        graph = real(encoder, example, **options)
        (tensor,) = (each for each in graph.graph.initializer if each.name == "network.fc8.linear.weight")
        tensor.CopyFrom(numpy_helper.from_array(-np.asarray(numpy_helper.to_array(tensor)), tensor.name))
        return graph

    monkeypatch.setattr(graphs_module, "onnx_from_encoder", spoilt)
    code, out, err = dckt_export(finished_run, "--out", tmp_path / "b.dckt", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: onnxruntime-fp32 differs from the PyTorch model; no bundle was written:")
    assert "probability, image: cosine of 30 rows down to" in err
    assert "image to text: MAP" in err
    assert "Traceback" not in err
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["b.dckt.refused.html", "b.dckt.refused.json", "temporary"]
    assert list(temporary_folder.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_an_interrupt_ends_with_130(dckt_export, finished_run, tmp_path, temporary_folder, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(variants_module, "measure", interrupted)
    code, out, err = dckt_export(finished_run, "--out", tmp_path / "b.dckt", "--json")
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert list(temporary_folder.iterdir()) == []


def test_errors_are_one_message_and_exit_code_2(dckt_export, finished_run, tmp_path):
    for arguments, message in (
        ((tmp_path / "none", "--out", tmp_path / "b.dckt"), "error: "),
        ((finished_run, "--out", tmp_path / "b.dckt", "--pairs", tmp_path / "none"), "no such folder or file"),
        ((finished_run, "--out", tmp_path / "b.dckt", "--representation", "fc8"), "representation is 'fc8'"),
        ((finished_run,), "--out"),
        ((finished_run, "--out", tmp_path / "b.dckt", "--fp8"), "--fp8"),
        (
            (finished_run, "--out", tmp_path / "b.dckt", "--profile", "8,1,32"),
            "profile is 8,1,32; expected MIN",
        ),
        ((finished_run, "--out", tmp_path / "b.dckt", "--profile", "8"), "--profile is '8'; expected three"),
    ):
        code, out, err = dckt_export(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_examples_and_the_defaults_of_the_function(dckt_export):
    code, out, _ = dckt_export("--help")
    assert code == 0
    parts = (
        "dckt-export runs/shop --out shop.dckt",
        "--representation",
        "--pairs",
        "--opset",
        "--fp16",
        "--int8",
        "--tensorrt",
        "--thresholds",
        "--json",
        "target corpus",
    )
    for part in parts:
        assert part in out
    defaults = export_module.export_bundle.__kwdefaults__
    for name in ("split", "limit", "calibration", "seconds", "opset"):
        assert f"[default: {defaults[name]}]" in out


def test_help_does_not_load_pytorch():
    code = "import sys; sys.argv = ['dckt-export', '--help']; import dckt_export.cli as c\n" + (
        "try: c.main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert result.returncode == 0
