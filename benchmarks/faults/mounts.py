"""Small and read-only filesystems that only this process sees; they end with it.

As root a mount namespace is enough. Others get one through a user namespace, where the system allows that.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000
NOBODY = 65534


def enter_namespace() -> None:
    """From here on, mounts of this process are its own. It must not have threads.

    Raises:
        OSError: the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call("unshare", _CLONE_NEWNS)
    else:
        _call("unshare", _CLONE_NEWNS | _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    _mount(None, Path("/"), None, _MS_REC | _MS_PRIVATE)


def mount_small(folder: Path, size: int) -> None:
    """Puts an empty filesystem of ``size`` bytes at a folder."""
    _mount("tmpfs", folder, "tmpfs", 0, f"size={size}")


def mount_read_only(folder: Path) -> None:
    """Nothing below the folder can be written from here on."""
    _mount(str(folder), folder, None, _MS_BIND)
    _mount(None, folder, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def become_nobody() -> None:
    """Gives up root, for whom permissions mean nothing."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _mount(source: str | None, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, str(target), kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
