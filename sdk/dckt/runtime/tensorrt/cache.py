"""Engines on disk: which there are, and which of them fit this machine.

An engine is bound to its graphs, the GPU, TensorRT and CUDA. ``BUNDLE/engines/KEY/``, or ``DIR/KEY/`` where a bundle
cannot be written to, holds one plan for each medium and ``engine.json``, which says all of that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dckt.bundle import Bundle
from dckt.errors import BundleCorruptError, BundleError
from dckt.runtime.tensorrt.build import Profile, check_profile
from dckt.runtime.tensorrt.load import Machine

ENGINES = "engines"
ENGINES_VARIABLE = "DCKT_ENGINES"
ENGINE = "engine.json"
FORMAT = "dckt-engine"
VERSION = 1
# Compute capability from which a hardware-compatible engine runs on GPUs other than its own.
COMPATIBLE_FROM = (8, 0)
# Which engine serves if there are several: int8 costs some of the ranking, fp32 much of the speed.
BEST_FIRST = ("fp16", "int8", "fp32")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One medium's engine.

    Attributes:
        file: its name in the folder.
        sha256: of that file.
        size: its bytes.
        layers: convolution and matrix layers by the precision that they compute in.
        build_seconds: how long the build took.
        min_cosine: smallest cosine to ONNX Runtime on the float32 graph, by output, over generated inputs.
        warnings: what TensorRT warned of while it built.
    """

    file: str
    sha256: str
    size: int
    layers: Mapping[str, int]
    build_seconds: float
    min_cosine: Mapping[str, float]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engines of one precision of a bundle.

    Attributes:
        folder: where they are.
        precision: of the graphs that they were built from.
        graphs: hash of each medium's graph, with its external data.
        machine: what they were built on.
        profile: batch sizes min, opt and max.
        length_profile: lengths of a text, likewise.
        hardware_compatible: whether they run on other GPUs, too.
        plans: by medium.
    """

    folder: Path
    precision: str
    graphs: Mapping[str, str]
    machine: Machine
    profile: Profile
    length_profile: Profile
    hardware_compatible: bool
    plans: Mapping[str, Plan]

    def path(self, medium: str) -> Path:
        """The plan of a medium."""
        return self.folder / self.plans[medium].file


@dataclass(frozen=True)
class Found:
    """Engines of a bundle.

    Attributes:
        fitting: those that run here, the best first.
        others: the folder's name and why it does not fit, for each of the rest.
    """

    fitting: tuple[Engine, ...]
    others: tuple[tuple[str, str], ...]


def engine_key(
    graphs: Mapping[str, str],
    machine: Machine,
    *,
    profile: Profile,
    length_profile: Profile,
    hardware_compatible: bool,
) -> str:
    """The name of the folder of an engine: 32 hexadecimal digits, others if anything that decides it is.

    Args:
        graphs: hash of each medium's graph, see :func:`graph_hashes`.
        machine: what it is built on.
        profile: batch sizes min, opt and max.
        length_profile: lengths of a text, likewise.
        hardware_compatible: whether it is to run on other GPUs, too.
    """
    decides = {
        "graphs": dict(graphs),
        "machine": asdict(machine),
        "profile": list(profile),
        "length_profile": list(length_profile),
        "hardware_compatible": hardware_compatible,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def graph_hashes(bundle: Bundle, precision: str) -> dict[str, str]:
    """The SHA-256 of each medium's graph of a precision; of a graph with external data, that of both files' hashes."""
    hashes = {}
    for medium in bundle.manifest.graphs[precision]:
        file = bundle.graph(medium, precision).relative_to(bundle.path).as_posix()
        parts = [bundle.manifest.files[name].sha256 for name in (file, f"{file}.data") if name in bundle.manifest.files]
        hashes[medium] = parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
    return hashes


def engines_folder(bundle: Path, cache: Path | None = None) -> Path:
    """The folder that holds the engines of a bundle: the given one, else $DCKT_ENGINES, else the bundle's own.

    Engines of several bundles may share a folder: their names and files say what they were built from.
    """
    return cache or Path(os.environ.get(ENGINES_VARIABLE) or bundle / ENGINES)


def find_engines(bundle: Bundle, machine: Machine, *, cache: Path | None = None) -> Found:
    """The engines of a bundle, split into those that fit this machine and the rest.

    Whether a plan is what was written is seen when it is opened, by its SHA-256.

    Args:
        bundle: the bundle.
        machine: this machine, see :func:`dckt.runtime.tensorrt.load.machine`.
        cache: folder of engines; None is $DCKT_ENGINES, or the bundle's own.
    """
    fitting: list[Engine] = []
    others: list[tuple[str, str]] = []
    folder = engines_folder(bundle.path, cache)
    for file in sorted(folder.glob(f"*/{ENGINE}")):
        if file.parent.name.startswith("."):
            continue  # a build that is under way, or was killed
        try:
            engine = read_engine(file.parent)
        except BundleError as error:
            others.append((file.parent.name, str(error)))
            continue
        if reason := misfit(engine, bundle, machine):
            others.append((file.parent.name, reason))
        else:
            fitting.append(engine)
    fitting.sort(key=lambda engine: BEST_FIRST.index(engine.precision))
    return Found(tuple(fitting), tuple(others))


def misfit(engine: Engine, bundle: Bundle, machine: Machine) -> str:
    """Why an engine does not run here, what it was built for beside what is here; empty if it does."""
    if engine.precision not in BEST_FIRST or engine.precision not in bundle.manifest.graphs:
        return f"built from {engine.precision} graphs, which the bundle does not have"
    if dict(engine.graphs) != graph_hashes(bundle, engine.precision):
        return f"built from other {engine.precision} graphs than the bundle's"
    built, reasons = engine.machine, []
    if built.tensorrt != machine.tensorrt:
        reasons.append(f"TensorRT {built.tensorrt}, here is {machine.tensorrt}")
    if (built.driver, built.runtime) != (machine.driver, machine.runtime):
        reasons.append(
            f"CUDA {built.runtime} with a driver for {built.driver}, here is {machine.runtime} with {machine.driver}"
        )
    same = (built.gpu, built.compute_capability) == (machine.gpu, machine.compute_capability)
    if not same and not (engine.hardware_compatible and _compatible(machine.compute_capability)):
        reasons.append(
            f"{built.gpu} ({built.compute_capability}), here is {machine.gpu} ({machine.compute_capability})"
        )
    return "built for " + "; and for ".join(reasons) if reasons else ""


def dump_engine(engine: Engine) -> str:
    """The content of ``engine.json``."""
    content = {"format": FORMAT, "version": VERSION, **asdict(engine)}
    del content["folder"]  # where it lies is no property of it
    return json.dumps(content, indent=1) + "\n"


def read_engine(folder: Path) -> Engine:
    """Reads ``engine.json``.

    Raises:
        BundleCorruptError: it is missing, unreadable, or not what :func:`dump_engine` writes.
        BundleError: a newer version wrote it.
    """
    file = folder / ENGINE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if content["version"] > VERSION:
            raise BundleError(f"{file}: written by a newer dckt; update it, or build the engine again")
        engine = Engine(
            folder=folder,
            precision=str(content["precision"]),
            graphs={str(medium): str(digest) for medium, digest in content["graphs"].items()},
            machine=Machine(**{field.name: str(content["machine"][field.name]) for field in fields(Machine)}),
            profile=_profile(content["profile"]),
            length_profile=_profile(content["length_profile"]),
            hardware_compatible=bool(content["hardware_compatible"]),
            plans={str(medium): _plan(plan) for medium, plan in content["plans"].items()},
        )
        if set(engine.plans) != set(engine.graphs):
            raise ValueError(f"plans for {sorted(engine.plans)}, graphs of {sorted(engine.graphs)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleCorruptError(f"{file}: is no description of an engine ({error}); build it again") from error
    return engine


def _plan(content: Mapping[str, Any]) -> Plan:
    file = str(content["file"])
    if Path(file).name != file:
        raise ValueError(f"{file!r} is no name of a file")
    return Plan(
        file=file,
        sha256=str(content["sha256"]),
        size=int(content["size"]),
        layers={str(kind): int(count) for kind, count in content["layers"].items()},
        build_seconds=float(content["build_seconds"]),
        min_cosine={str(output): float(cosine) for output, cosine in content["min_cosine"].items()},
        warnings=tuple(map(str, content["warnings"])),
    )


def _profile(sizes: list[int]) -> Profile:
    smallest, usual, largest = map(int, sizes)
    profile = (smallest, usual, largest)
    check_profile(profile)
    return profile


def _compatible(compute_capability: str) -> bool:
    major, _, minor = compute_capability.partition(".")
    return (int(major), int(minor)) >= COMPATIBLE_FROM
