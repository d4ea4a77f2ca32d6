"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A new folder that becomes ``destination`` when the block ends well, and is deleted when it does not.

    The folder that is yielded is a hidden sibling, so that the last step is one rename inside one filesystem.
    Every file in it reaches the disk before that step. With ``force`` an existing destination is moved aside,
    and deleted only after the new one has taken its place.

    Args:
        destination: where the folder is to appear. Missing parents are made.
        force: replace what is there already, whatever it is; check first that it is yours to replace.

    Raises:
        FileExistsError: there is something at ``destination`` and ``force`` is not set.
    """
    destination = Path(destination).absolute()
    _refuse_existing(destination, force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    building = _sibling(destination, "partial")
    building.mkdir()
    try:
        yield building
        _sync_tree(building)
        _refuse_existing(destination, force)
        _replace(building, destination)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a sibling path to write to; when the block ends well, that file is synced and takes the place of ``path``.

    A reader, or a power cut, meets the old content or the new, and nothing else.

    Args:
        path: the file; its folder exists.
    """
    path = Path(path).absolute()
    partial = _sibling(path, "partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes bytes, or text as UTF-8, by :func:`atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in lower-case hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{purpose}")


def _refuse_existing(destination: Path, force: bool) -> None:
    if os.path.lexists(destination) and not force:
        raise FileExistsError(f"{destination}: exists already")


def _replace(building: Path, destination: Path) -> None:
    aside = None
    if os.path.lexists(destination):
        aside = _sibling(destination, "replaced")
        destination.rename(aside)
    try:
        building.rename(destination)
    except BaseException:
        if aside:
            aside.rename(destination)
        raise
    _sync(destination.parent)
    if aside:
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
