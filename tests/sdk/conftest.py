"""Fixtures of the SDK's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dckt import cli
from dckt.bundle import Bundle, Graph, Variant, graph_file, write_bundle
from dckt.errors import DcktError
from dckt.runtime.openvino import has_bf16


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``dckt`` with arguments; gives exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dckt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(str(ended.value.code)), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def openvino() -> None:
    """A test that asks for it is skipped, loudly, where OpenVINO is missing."""
    try:
        has_bf16()
    except DcktError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bf16(openvino: None) -> None:
    """Likewise, where the CPU does not compute in bf16."""
    if not has_bf16():
        pytest.skip("this CPU does not compute in bf16, says OpenVINO")


def variant(name: str) -> Variant:
    """A variant by its name."""
    runtime, precision = name.split("-")
    return Variant(name=name, runtime=runtime, graph="fp32" if precision == "bf16" else precision, precision=precision)


@pytest.fixture
def bundle_with(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """Makes tiny bundles with the variants that are named; their graphs of all precisions hold the same."""

    def make(names: Sequence[str], **changes: object) -> Bundle:
        variants = [variant(name) for name in names]
        precisions = dict.fromkeys(["fp32", *(one.graph for one in variants)])
        original = Bundle.open(tiny_bundle)
        manifest = original.manifest
        graphs = {
            precision: {
                medium: Graph(file=graph_file(medium, precision), layers={precision: 9, "fp32": 1})
                for medium in ("image", "text")
            }
            for precision in precisions
        }
        files: dict[str, Path | bytes] = {
            graph.file: original.graph(medium) for of in graphs.values() for medium, graph in of.items()
        }
        arguments: dict[str, object] = {
            "files": {**files, "vocabulary.txt": tiny_bundle / "vocabulary.txt"},
            "graphs": graphs,
            "variants": variants,
            "measured": {},
            "produced_by": {},
            **{name: getattr(manifest, name) for name in ("image", "text", "labels", "representation", "dimensions")},
        }
        return write_bundle(tmp_path / "variants.dckt", **{**arguments, **changes})  # type: ignore[arg-type]

    return make
