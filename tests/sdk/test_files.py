from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from dckt.files import atomic_folder, atomic_write, sha256_file


def build(destination: Path, content: str, *, error: BaseException | None = None, force: bool = False) -> None:
    with atomic_folder(destination, force=force) as folder:
        (folder / "x").write_text(content)
        if error:
            raise error


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
        assert folder.parent == tmp_path / "a"
        assert folder.name.startswith(".")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "sub" / "x").read_text() == "x"
    assert listing(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        build(tmp_path / "new", "x", error=error)
    assert listing(tmp_path) == []


def test_existing_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").write_text("old")
    with pytest.raises(FileExistsError, match="old"), atomic_folder(tmp_path / "old"):
        pytest.fail("the block must not run")
    assert (tmp_path / "old" / "x").read_text() == "old"


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    building = atomic_folder(tmp_path / "new")
    building.__enter__()
    build(tmp_path / "new", "theirs")
    with pytest.raises(FileExistsError):
        building.__exit__(None, None, None)
    assert (tmp_path / "new" / "x").read_text() == "theirs"
    assert listing(tmp_path) == ["new"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_force_replaces(tmp_path: Path, kind: str) -> None:
    old, elsewhere = tmp_path / "old", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    if kind == "folder":
        old.mkdir()
        (old / "gone").write_text("gone")
    elif kind == "file":
        old.write_text("gone")
    else:
        old.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
    with atomic_folder(old, force=True) as folder:
        (folder / "x").write_text("new")
    assert listing(old) == ["x"]
    assert listing(elsewhere) == ["kept"]
    assert listing(tmp_path) == ["elsewhere", "old"]


def test_failure_with_force_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").write_text("old")
    with pytest.raises(ValueError, match="no"):
        build(tmp_path / "old", "new", error=ValueError("no"), force=True)
    assert (tmp_path / "old" / "x").read_text() == "old"
    assert listing(tmp_path) == ["old"]


def test_old_comes_back_when_the_last_rename_fails(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").write_text("old")
    with pytest.raises(OSError, match="No such file"), atomic_folder(tmp_path / "old", force=True) as folder:
        vanish_before_rename(folder)
    assert (tmp_path / "old" / "x").read_text() == "old"
    assert listing(tmp_path) == ["old"]


def vanish_before_rename(folder: Path) -> None:
    shutil.rmtree(folder)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "new"):
            pass
        atomic_write(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
    assert set(synced[:3]) == {folder.name, "sub", "x"}
    assert synced[3:] == [tmp_path.name]


def test_write_replaces_whole(tmp_path: Path) -> None:
    atomic_write(tmp_path / "x", "né")
    assert (tmp_path / "x").read_bytes() == "né".encode()
    atomic_write(tmp_path / "x", b"\0new")
    assert (tmp_path / "x").read_bytes() == b"\0new"
    assert listing(tmp_path) == ["x"]


def test_failed_write_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "x", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert listing(tmp_path) == ["x"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(bytes(range(256)) * 5000)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()
