"""``dckt engine``: builds TensorRT engines of a bundle for the GPU of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dckt.errors import ConfigError

if TYPE_CHECKING:
    from dckt.runtime.tensorrt.build import Profile, Progress
    from dckt.runtime.tensorrt.cache import Engine

# In a help text a blank line keeps the line break that rich would otherwise join.
EXAMPLES = """
Examples:

  dckt engine shop.dckt

  dckt engine shop.dckt --graph int8 --profile 1,16,64

  dckt engine /readonly/shop.dckt --cache /var/cache/dckt --hardware-compatible
"""


def engine_command(
    bundle: Annotated[Path, typer.Argument(help="Model bundle, as dckt-export writes it.")],
    graph: Annotated[
        str, typer.Option(help="Graphs to build from: fp16, int8, fp32, or auto: fp16 if the bundle has it, else fp32.")
    ] = "auto",
    profile: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes MIN,OPT,MAX; fastest at OPT. Unless given, the bundle's.", metavar="MIN,OPT,MAX"
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Run on other GPUs (Ampere or newer), too; it is slower.")
    ] = False,
    workspace: Annotated[
        int | None, typer.Option(help="MiB of GPU memory that a layer may work in. Unless given, all of it.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the engines, if the bundle may not be written. Serving looks where $DCKT_ENGINES says, "
            "else in the bundle.",
            metavar="DIR",
            envvar="DCKT_ENGINES",
            show_envvar=True,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Builds TensorRT engines for the GPU of this machine, and keeps them if they give the model's vectors.

    It takes minutes; the second build is faster. Engines fit one kind of GPU, one TensorRT and one CUDA: build them
    where they are to serve.
    """
    from dckt.bundle import Bundle
    from dckt.runtime.tensorrt.engines import build_engines
    from dckt.runtime.tensorrt.load import load

    sizes = None if profile is None else parse_profile(profile)
    load()  # before a large bundle is read: what is missing here is missing for every bundle
    opened = Bundle.open(bundle)
    with _shown() as progress:
        engine = build_engines(
            opened,
            graph=graph,
            profile=sizes,
            hardware_compatible=hardware_compatible,
            workspace=None if workspace is None else workspace << 20,
            cache=cache,
            force=force,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(engine), "folder": str(engine.folder)}, indent=1))
    else:
        _show(engine)


def parse_profile(text: str) -> Profile:
    """``"1,8,32"`` as numbers.

    Raises:
        ConfigError: not three whole numbers that rise from 1.
    """
    from dckt.runtime.tensorrt.build import check_profile

    try:
        smallest, usual, largest = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"profile is {text!r}; expected MIN,OPT,MAX such as 1,8,32") from error
    profile = (smallest, usual, largest)
    check_profile(profile)
    return profile


@contextmanager
def _shown() -> Iterator[Progress]:
    """A bar for each phase of a build, while it lasts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()  # TensorRT may tell of its steps from several threads
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bars:

        def show(phase: str, done: int, total: int) -> None:
            with lock:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done, total=total)

        yield show


def _show(engine: Engine) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("medium", "layers", "MB", "build s", "smallest cosine"):
        table.add_column(column, justify="left" if column in {"medium", "layers"} else "right")
    for medium, plan in engine.plans.items():
        row: list[Any] = [
            medium,
            ", ".join(f"{count} {kind}" for kind, count in plan.layers.items()),
            f"{plan.size / 1e6:.1f}",
            f"{plan.build_seconds:.0f}",
            f"{min(plan.min_cosine.values()):.6f}",
        ]
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    if count := sum(len(plan.warnings) for plan in engine.plans.values()):
        console.print(f"TensorRT gave {count} warnings; they are in engine.json", style="yellow")
    about = engine.machine
    console.print(
        f"{engine.folder}: {engine.precision} for {about.gpu}, TensorRT {about.tensorrt}, CUDA {about.runtime}",
        markup=False,
        soft_wrap=True,
    )
