"""Tensors on disk: safetensors with a checksum of its own.

Never a pickle, so nothing runs when a file is read; and safetensors alone would not notice a flipped bit in a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dckt.errors import RunError
from dckt.files import atomic_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors and text metadata, atomically: the file is either whole or not there."""
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    notes = {**(metadata or {}), "sha256": _digest(held)}
    with atomic_file(path) as partial:  # by name, for bytes would hold all of it in memory a second time
        save_file(held, partial, notes)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads tensors, on the CPU.

    Raises:
        RunError: the file is missing or damaged.
    """
    return load_with_metadata(path)[0]


def load_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read ({error}); restore it from a copy or train again") from error
    if metadata.pop("sha256", None) != _digest(tensors):
        raise RunError(f"{path}: is damaged, its checksum is not its content's; restore it or train again")
    return tensors, metadata


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Loads a module's state that was read from ``path``.

    Raises:
        RunError: tensors are missing, too many, or of other shapes.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:  # PyTorch says first whose state it is, then a line for each tensor
        raise unfit_error(path, str(error).splitlines()[-1].strip()[:200]) from error


def unfit_error(path: Path, why: str) -> RunError:
    """The error for a whole file that is not of this run, for example one that was copied in from another."""
    return RunError(f"{path}: does not fit the configuration of its run ({why}); restore it or train again")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().data if value.numel() else b"")
    return digest.hexdigest()
