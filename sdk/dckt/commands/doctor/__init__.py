"""``dckt doctor``: what is found, what is needed, what to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dckt.commands.options import AsJson
from dckt.console import clean, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from dckt.commands.doctor.finding import Finding

EXAMPLES = """
Examples:

  dckt doctor

  dckt doctor shop.dckt

  dckt doctor shop.dckt catalog.index --json
"""
_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor_command(
    bundle: Annotated[
        Path | None, typer.Argument(help="Model bundle to examine; an index alone may stand here, too.")
    ] = None,
    index: Annotated[Path | None, typer.Argument(help="Index to examine, and whether the bundle fits it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Says what is found on this machine, what is needed, and what to run.

    The exit code is 0, or 1 if there is a problem: something that was asked for, or that everything needs, does not
    work. Nothing is changed but this: an index whose graph is missing or damaged gets a new one when it is opened.
    """
    found = examine(bundle, index)
    findings = list(found) if as_json else _shown(found)
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        print_json({"healthy": not problems, "findings": [asdict(finding) for finding in findings]})
    if problems:
        raise typer.Exit(1)


def examine(bundle: Path | None = None, index: Path | None = None) -> Iterator[Finding]:
    """Looks at this machine, and at a bundle and an index where they are given.

    Args:
        bundle: a model bundle; or an index, if ``index`` is None.
        index: an index.

    Yields:
        Findings, one by one, as soon as each is known.
    """
    import tempfile

    from dckt.commands.doctor.finding import Finding
    from dckt.commands.doctor.machine import folder_finding, package_findings, processor_findings, python_findings
    from dckt.commands.doctor.runtimes import onnxruntime_answer, runtime_findings

    yield from python_findings()
    yield from processor_findings()
    yield folder_finding("disk", "working folder", Path.cwd())
    yield folder_finding("disk", "temporary files", Path(tempfile.gettempdir()))
    answer = onnxruntime_answer()
    devices = 0 if isinstance(answer, Finding) else answer["devices"]
    sound = True
    for finding in (*package_findings(gpu=devices > 0), *runtime_findings(answer)):
        sound = sound and finding.state != "problem"
        yield finding
    if bundle is None and index is None:
        return
    if not sound:
        # What was found above would end this process, too.
        yield Finding("files", "bundle and index", "problem", "not examined", "first mend what is above")
        return
    yield from _files(bundle, index, devices)


def _files(bundle: Path | None, index: Path | None, devices: int) -> Iterator[Finding]:
    from dckt.bundle import Bundle
    from dckt.commands.doctor.artifacts import bundle_findings, index_findings, read_bundle
    from dckt.index.store import ITEMS

    if bundle is not None and index is None and (bundle / ITEMS).is_file():
        bundle, index = None, bundle
    opened = None if bundle is None else read_bundle(bundle)
    if isinstance(opened, Bundle):
        yield from bundle_findings(opened, devices=devices)
    elif opened is not None:
        yield opened
    if index is not None:
        yield from index_findings(index, opened if isinstance(opened, Bundle) else None)


def _shown(found: Iterator[Finding]) -> list[Finding]:
    from rich.console import Console

    console = Console(highlight=False)
    findings = []
    area = ""
    with console.status("examining"):
        for finding in found:
            findings.append(finding)
            if finding.area != area:
                area = finding.area
                console.print(f"\n{area}", style="bold")
            _show(console, finding)
    counts = {state: sum(finding.state == state for finding in findings) for state in _COLOURS}
    console.print(f"\n{counts['ok']} ok, {counts['note']} to note, {counts['problem']} problems")
    return findings


def _show(console: Console, finding: Finding) -> None:
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2))
    row.add_column(width=8, no_wrap=True)
    row.add_column(width=24, overflow="fold")
    row.add_column(overflow="fold")
    about = Text("\n").join(map(clean, finding.found.splitlines()))
    if finding.do:
        about.append("\n").append("do: ", "bold").append_text(clean(finding.do))
    row.add_row(Text(finding.state, _COLOURS[finding.state]), clean(finding.name), about)
    console.print(row)
