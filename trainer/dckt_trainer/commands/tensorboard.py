"""`dckt-train tensorboard`: the curves of a run, finished or not, as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example:\n\n  dckt-train tensorboard runs/mine && tensorboard --logdir runs"


def tensorboard_command(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Writes the curves of a run into its folder, for TensorBoard; a training does so by itself with --tensorboard."""
    # PyTorch takes seconds to load.
    from dckt_trainer.runs import open_run
    from dckt_trainer.tensorboard import export

    typer.echo(export(open_run(folder)))
