"""What can be known of a machine without loading a native library: Python, packages, processor, disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dckt.commands.doctor.finding import Finding
from dckt.console import size

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Extras that serve; the others train, export, or work on dckt itself.
SERVING = ("openvino", "gpu", "tensorrt")
_GPU_EXTRAS = ("gpu", "tensorrt")
_NOT_SHOWN = ("dev", "serve")
_SAME_FILES = ("onnxruntime", "onnxruntime-gpu")
_KEEP_ONE = (
    "keep one: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime (CPU) "
    "or onnxruntime-gpu (NVIDIA GPU)"
)
# What makes a model fast, by the names that Linux gives it on x86 and on ARM.
_FEATURES: Mapping[str, frozenset[str]] = {
    "AVX2": frozenset({"avx2"}),
    "AVX-512": frozenset({"avx512f"}),
    "VNNI": frozenset({"avx512_vnni", "avx_vnni"}),
    "AMX": frozenset({"amx_tile"}),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "NEON dot product": frozenset({"asimddp"}),
    "i8mm": frozenset({"i8mm"}),
}
# Two connections that write or fold the log at the same moment can damage the file; fixed by SQLite in March 2026.
_WAL_RESET_FIXED = (3, 51, 3)
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.glusterfs", "lustre", "afs"})
_LITTLE = 2**30


def python_findings() -> Iterator[Finding]:
    """Python, the system, and SQLite."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        yield Finding("python", "Python", "ok", f"{python} on {system}")
    else:
        yield Finding("python", "Python", "note", f"{python} on {system}", "dckt is tested on Linux alone")
    yield sqlite_finding(sqlite3.sqlite_version_info)


def sqlite_finding(version: tuple[int, ...]) -> Finding:
    """Whether this SQLite keeps an index safe."""
    if version >= _WAL_RESET_FIXED:
        return Finding("python", "SQLite", "ok", _dotted(version))
    return Finding(
        "python",
        "SQLite",
        "note",
        f"{_dotted(version)}; before {_dotted(_WAL_RESET_FIXED)} two processes that write at the same moment can, "
        "very rarely, damage a file, unless your system's vendor corrected it",
        "let one process write to an index; or use a Python that is linked with a newer SQLite",
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def package_findings(*, gpu: bool) -> Iterator[Finding]:
    """The packages that dckt needs, then those of its extras.

    Args:
        gpu: whether this machine has a CUDA device, without which some extras are of no use.
    """
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # it comes with ONNX Runtime
        yield Finding("packages", "packaging", "problem", "is not installed", "pip install packaging")
        return
    try:
        required = [Requirement(text) for text in metadata.requires("dckt") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("packages", "dckt", "note", "runs from a source tree", "pip install . installs what it needs")
        return
    yield Finding("packages", "dckt", "ok", metadata.version("dckt"))
    yield from wheel_findings()
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _needed(requirement)
    for extra in metadata.metadata("dckt").get_all("Provides-Extra") or ():
        if extra not in _NOT_SHOWN:
            yield _extra(extra, required, gpu=gpu)


def wheel_findings() -> Iterator[Finding]:
    """Both wheels of ONNX Runtime install the same files, and the one that was installed last wins."""
    there = [f"{name} {version}" for name in _SAME_FILES if (version := _version(name))]
    if len(there) > 1:
        yield Finding(
            "packages",
            "onnxruntime",
            "problem",
            f"{' and '.join(there)} are installed side by side, and overwrite each other's files",
            _KEEP_ONE,
        )


def _needed(requirement: Requirement) -> Finding:
    name = requirement.name
    version = _version(name)
    if version is None and name == "onnxruntime":  # the wheel for GPUs brings the same module
        name, version = "onnxruntime-gpu", _version("onnxruntime-gpu")
    if version is None:
        return Finding(
            "packages", requirement.name, "problem", "is not installed", f"pip install '{_plain(requirement)}'"
        )
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{version}; expected {requirement.specifier}"
        return Finding("packages", name, "problem", found, f"pip install '{_plain(requirement)}'")
    return Finding("packages", name, "ok", version)


def _extra(extra: str, required: list[Requirement], *, gpu: bool) -> Finding:
    own = [
        requirement
        for requirement in required
        if requirement.name != "dckt"
        and requirement.marker is not None
        and not requirement.marker.evaluate({"extra": ""})
        and requirement.marker.evaluate({"extra": extra})
    ]
    versions = {requirement.name: _version(requirement.name) for requirement in own}
    missing = [name for name, version in versions.items() if version is None]
    wrong = [
        f"{requirement.name} {version}, expected {requirement.specifier}"
        for requirement in own
        if (version := versions[requirement.name]) and not requirement.specifier.contains(version, prereleases=True)
    ]
    name, install = f"extra {extra}", f"pip install 'dckt[{extra}]'"
    if wrong:
        return Finding("packages", name, "note", "; ".join(wrong), install)
    if not missing:
        return Finding("packages", name, "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    if extra in _GPU_EXTRAS and not gpu:
        return Finding("packages", name, "ok", f"not installed ({', '.join(missing)}); there is no GPU to use it")
    what = "" if extra in SERVING else "; not needed to search"
    return Finding("packages", name, "note", f"not installed: {', '.join(missing)}{what}", install)


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- processor and memory -----------------------------------------------------------------------------------------


def processor_findings() -> Iterator[Finding]:
    """The processor's features, and the threads and the memory that this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        yield Finding("processor", "features", "note", f"/proc/cpuinfo cannot be read ({error})")
    else:
        yield features_finding(text)
    yield threads_finding(os.cpu_count() or 1, _usable(), _quota())
    memory = _memory()
    if memory:
        yield Finding("processor", "memory", "ok", memory)


def features_finding(cpuinfo: str) -> Finding:
    """What a processor can do for a model, from the text of ``/proc/cpuinfo``."""
    fields: dict[str, str] = dict(re.findall(r"^([^\t:\n]+?)[ \t]*:[ \t]*(.*)$", cpuinfo, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    has = [name for name, names in _FEATURES.items() if names & flags]
    model = fields.get("model name", platform.machine())
    found = f"{model}: {', '.join(has) or 'none of ' + ', '.join(_FEATURES)}"
    if "bf16" in has:
        do = "" if _version("openvino") else "pip install 'dckt[openvino]': openvino-bf16 is the fastest variant here"
        return Finding("processor", "features", "note" if do else "ok", found, do)
    lacks = "no bf16, so no openvino-bf16"
    if not {"VNNI", "NEON dot product"} & set(has):
        lacks += "; no VNNI, so int8 saves space and hardly time"
    return Finding("processor", "features", "note", f"{found}; {lacks}")


def threads_finding(cores: int, usable: int, quota: float | None) -> Finding:
    """How many threads are of use.

    Args:
        cores: of the machine.
        usable: those that this process may run on.
        quota: processors' time that its container gives it, or None.
    """
    found = f"{cores} cores"
    if usable < cores:
        found += f", {usable} of them for this process"
    if quota is not None:
        found += f", time for {quota:g} of them (container)"
    threads = min(usable, max(1, round(quota)) if quota is not None else usable)
    if limit := os.environ.get("OMP_NUM_THREADS"):
        found += f"; OMP_NUM_THREADS is {limit}"
    if threads == cores:
        return Finding("processor", "threads", "ok", found)
    return Finding("processor", "threads", "note", found, f"--threads {threads}, in Python threads={threads}")


def _usable() -> int:
    # Not everywhere.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float | None:
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> str:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    kib = {name: int(value) for name, value in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE)}
    if len(kib) < 2:
        return ""
    return f"{size(1024 * kib['MemAvailable'])} free of {size(1024 * kib['MemTotal'])}"


# --- disk ---------------------------------------------------------------------------------------------------------


def folder_finding(area: str, name: str, folder: Path, *, needed: int = _LITTLE) -> Finding:
    """Free space of a folder, and whether it can be written.

    Args:
        area: of the finding.
        name: what the folder is for.
        folder: it is there.
        needed: bytes below which the free space is worth a note.
    """
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror or error})"
        return Finding(area, name, "note", found, "if it is to be changed, check its owner, its mode, and the disk")
    kind = _file_system(folder)
    if kind in _NETWORK:
        found = f"{folder} is on a network file system ({kind}), where SQLite cannot promise what it does on a disk"
        return Finding(area, name, "note", found, "keep an index on a disk of the machine that searches it")
    if free < needed:
        return Finding(
            area, name, "note", f"{folder}: {size(free)} free, of which {size(needed)} may be needed", "make room"
        )
    return Finding(area, name, "ok", f"{folder}: can be written, {size(free)} free")


def _file_system(folder: Path) -> str:
    """Kind of the file system that holds a folder; empty where that is not known."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    real = folder.resolve()
    # A blank in a path is written as \\040.
    over = [(Path(fields[1].replace("\\040", " ")), fields[2]) for fields in mounts]
    holding = [(len(place.parts), kind) for place, kind in over if real.is_relative_to(place)]
    return max(holding, key=lambda one: one[0])[1] if holding else ""
