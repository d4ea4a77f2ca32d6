"""The examples in the docs run, in order, on a small bundle and a small collection.

A fence whose info string ends with ``no-run`` is left out, and the table below says how many there are of those.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOT_RUN = {"docs/search.md": 1, "docs/operations.md": 1, "docs/more-media.md": 0, "README.md": 0}
PROGRAMS = {"dckt": "dckt.cli", "dckt-train": "dckt_trainer.cli", "dckt-export": "dckt_export.cli"}
LANGUAGES = ("python", "sh")
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced example: its language, whether it can run, its code, and the line of its first line."""

    language: str
    runs: bool
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The examples of a Markdown text."""
    found = []
    for fence in _FENCE.finditer(text):
        language, *marks = fence["info"].split() or [""]
        if language in LANGUAGES:
            assert marks in ([], ["no-run"]), f"unknown mark {marks} of a fence"
            found.append(Block(language, not marks, fence["code"], text.count("\n", 0, fence.start("code")) + 1))
    return found


@pytest.fixture
def collection(tmp_path, tiny_bundle, colour_images, monkeypatch):
    """A folder with what the docs speak of: the model, pictures, texts, a labelled corpus; and programs to run."""
    folder = tmp_path / "work"
    (folder / "photos").mkdir(parents=True)
    shutil.copytree(tiny_bundle, folder / "mine.dckt")
    for number, picture in enumerate(colour_images.values(), start=1):
        with Image.open(picture) as image:
            image.save(folder / "photos" / f"{number}.jpg")
    shutil.copy(folder / "photos" / "1.jpg", folder / "photo.jpg")
    rows = [
        {"id": f"bag-{17 + place}", "text": f"a {colour} bag", "shop": "AB"[place % 2], "price": 12.5 + place}
        for place, colour in enumerate(("red", "blue", "white", "green"))
    ]
    write_lines(folder / "descriptions.jsonl", rows)
    corpus = folder / "corpus"
    corpus.mkdir()
    pairs = []
    for colour, picture in colour_images.items():
        shutil.copy(picture, corpus / f"{colour}.png")
        pairs.append({"image": f"{colour}.png", "text": f"a {colour} bag", "label": colour, "split": "val"})
    write_lines(corpus / "pairs.jsonl", [{"id": str(number), **pair} for number, pair in enumerate(pairs)])
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in PROGRAMS.items():
        program = programs / name
        program.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DCKT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


def write_lines(path: Path, rows: list[Mapping[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run_block(block: Block, names: dict[str, object], document: str) -> None:
    """Python blocks of a document share their names, as a reader reads them."""
    if block.language == "sh":
        done = subprocess.run(["sh", "-eu", "-c", block.code], capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            pytest.fail(f"{document}, line {block.line}:\n{block.code}\n{done.stdout}{done.stderr}", pytrace=False)
    else:
        # Line numbers of a traceback are those of the document.
        exec(compile("\n" * (block.line - 1) + block.code, ROOT / document, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("document", NOT_RUN)
def test_examples_run(document, collection, capsys):
    found = blocks((ROOT / document).read_text(encoding="utf-8"))
    running = [block for block in found if block.runs]
    assert running
    assert len(found) - len(running) == NOT_RUN[document]
    if document != "docs/search.md":  # they speak of the index that the guide to searching makes
        subprocess.run(
            ["dckt", "index", "mine.dckt", "catalog.index", "--images", "photos", "--texts", "descriptions.jsonl"],
            check=True,
            capture_output=True,
        )
    names: dict[str, object] = {"__name__": "__example__"}
    for block in running:
        run_block(block, names, document)
    with capsys.disabled():
        print(f"\n{document}: {len(running)} examples ran, {NOT_RUN[document]} are marked as not to run")


def test_every_fence_is_found():
    text = "```python\na = 1\n```\nx\n```sh no-run\nb\n```\n```text\nc\n```\n"
    assert blocks(text) == [Block("python", True, "a = 1\n", 2), Block("sh", False, "b\n", 6)]
    with pytest.raises(AssertionError, match="unknown mark"):
        blocks("```sh norun\nb\n```\n")


def test_an_example_that_fails_is_named(collection):
    with pytest.raises(pytest.fail.Exception, match=r"README\.md, line 7:\nfalse"):
        run_block(Block("sh", True, "false\ntrue\n", 7), {}, "README.md")
    with pytest.raises(ZeroDivisionError):
        run_block(Block("python", True, "1 / 0", 7), {}, "README.md")
