"""dckt in an environment of its own, without PyTorch: it installs, imports fast, indexes and searches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import importlib.util, json, statistics, subprocess, sys
heavy = [name for name in ("torch", "torchvision", "onnx", "gensim", "matplotlib") if importlib.util.find_spec(name)]
timed = "import time; t = time.perf_counter(); import dckt; print(time.perf_counter() - t)"
whole = "import time; t = time.perf_counter(); from dckt import Searcher; print(time.perf_counter() - t)"
run = lambda code: float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
times, wholes = [run(timed) for _ in range(7)], [run(whole) for _ in range(7)]
from dckt import Searcher
bundle, index, red, text = sys.argv[1:]
with Searcher.create(bundle, index) as searcher:
    searcher.add_images([red])
    searcher.add_texts(["red", "green", "blue"], ids=["r", "g", "b"])
with Searcher.open(bundle, index) as searcher:
    found = [hit.id for hit in searcher.search(red, k=3)]
    back = [hit.id for hit in searcher.search(text=text, k=3)]
print(json.dumps({
    "heavy": heavy, "import": statistics.median(times), "searcher": statistics.median(wholes),
    "texts": found, "images": back, "torch": "torch" in sys.modules,
}))
"""


@pytest.mark.slow
def test_installs_imports_and_searches_without_pytorch(tmp_path, tiny_bundle, colour_images, capsys):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    before = size_of(venv)
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True)
    red = colour_images["red"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [python, "-c", CHECK, tiny_bundle, tmp_path / "catalog.index", red, "red"]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=clean, cwd=tmp_path)
    seen = json.loads(done.stdout)
    with capsys.disabled():
        print(
            f"\nenvironment without PyTorch: {(size_of(venv) - before) / 1e6:.0f} MB beside Python and pip; "
            f"import dckt {seen['import'] * 1e3:.0f} ms, from dckt import Searcher {seen['searcher'] * 1e3:.0f} ms "
            "(medians of 7 processes)"
        )
    assert seen["heavy"] == []
    assert not seen["torch"]
    assert seen["texts"][0] == "r"
    assert seen["images"] == [str(red)]
    for command in ("dckt", "dckt-train"):
        done = subprocess.run(
            [venv / "bin" / command, "--version"], capture_output=True, text=True, env=clean, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
    done = subprocess.run(
        [venv / "bin" / "dckt-train", "--source", "a", "--target", "b", "--out", "c"],
        capture_output=True,
        text=True,
        env=clean,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'dckt[train]'" in done.stderr


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
