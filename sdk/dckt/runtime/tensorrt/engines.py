"""All engines of a bundle: built, proved against ONNX Runtime, and kept, or nothing."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dckt.bundle import Bundle
from dckt.errors import BundleError, ConfigError, ParityError
from dckt.files import atomic_folder
from dckt.runtime import Encoder
from dckt.runtime.onnx import OnnxEncoder
from dckt.runtime.tensorrt.build import BuiltEngine, Profile, Progress, check_profile, engine_from_onnx
from dckt.runtime.tensorrt.cache import (
    ENGINE,
    Engine,
    Plan,
    dump_engine,
    engine_key,
    engines_folder,
    graph_hashes,
    misfit,
    read_engine,
)
from dckt.runtime.tensorrt.encoder import TensorRTEncoder
from dckt.runtime.tensorrt.inspect import check_layers
from dckt.runtime.tensorrt.load import Machine, machine

# Smallest cosine, over generated inputs, of an engine's vector and that of the float32 graph on the CPU.
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99}
# What ``auto`` builds: the first that the bundle has. int8 is faster, and costs more of the ranking.
PREFERRED = ("fp16", "fp32")
SEED = 20
ROWS = 16
USUAL_LENGTH = 32


def build_engines(
    bundle: Bundle,
    *,
    graph: str = "auto",
    profile: Profile | None = None,
    hardware_compatible: bool = False,
    workspace: int | None = None,
    cache: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Builds the engines of all media for the GPU of this machine.

    Each must compute in what it is called, by :func:`dckt.runtime.tensorrt.inspect.check_layers`, and give the vectors
    of the float32 graph, by :func:`self_check`. If one does not, none is kept.

    Args:
        bundle: an opened bundle.
        graph: precision of the graphs to build from, one that the bundle has; ``"auto"``: fp16 if it has it, else fp32.
        profile: batch sizes min, opt and max; None is the bundle's.
        hardware_compatible: run on other GPUs of compute capability 8.0 or newer, too.
        workspace: bytes of GPU memory that a layer may use for itself while it runs; None is all of it.
        cache: folder for engines; None is the bundle's own.
        force: build again what is there already.
        progress: told how far a build is.

    Returns:
        The engines; those that are there already, if there are and they fit.

    Raises:
        ConfigError: a precision that the bundle does not have, or a profile that does not rise.
        MissingExtraError, ProviderError: see :func:`dckt.runtime.tensorrt.load.load`.
        BundleError: a graph that TensorRT does not build, or builds in another precision; or the folder cannot be
            written.
        ParityError: an engine gives other vectors.
    """
    precision = choose_graph(bundle, graph)
    batches = bundle.manifest.profile if profile is None else profile
    check_profile(batches)
    lengths = length_profile(bundle)
    here = machine()
    graphs = graph_hashes(bundle, precision)
    key = engine_key(graphs, here, profile=batches, length_profile=lengths, hardware_compatible=hardware_compatible)
    folder = engines_folder(bundle.path, cache) / key
    if not force and (found := _there(folder, bundle, here)):
        return found
    try:
        with atomic_folder(folder, force=True) as building:
            plans = {}
            for medium in graphs:
                built = engine_from_onnx(
                    bundle.graph(medium, precision),
                    building / f"{medium}.plan",
                    profile=batches,
                    length_profile=lengths,
                    hardware_compatible=hardware_compatible,
                    workspace=workspace,
                    timing_cache=folder.parent / timings_file(here),
                    progress=_named(progress, medium),
                )
                check_layers(built.layers, precision, f"the {medium} engine")
                cosines = self_check(bundle, medium, precision, built, rows=batches[2] + 1)
                plans[medium] = Plan(
                    file=built.plan.name,
                    sha256=built.sha256,
                    size=built.plan.stat().st_size,
                    layers=built.layers,
                    build_seconds=built.seconds,
                    min_cosine=cosines,
                    warnings=built.warnings,
                )
            engine = Engine(
                folder=building,
                precision=precision,
                graphs=graphs,
                machine=here,
                profile=batches,
                length_profile=lengths,
                hardware_compatible=hardware_compatible,
                plans=plans,
            )
            (building / ENGINE).write_text(dump_engine(engine), encoding="utf-8")
    except OSError as error:
        raise BundleError(
            f"{folder}: the engines cannot be written ({error}); name a folder for them with --cache"
        ) from error
    return replace(engine, folder=folder)


def choose_graph(bundle: Bundle, graph: str) -> str:
    """The precision that a name of ``build_engines`` stands for.

    Raises:
        ConfigError: the bundle has no such graphs, or no engine is built from them.
    """
    there = [precision for precision in MIN_COSINE if precision in bundle.manifest.graphs]
    if graph == "auto":
        return next(precision for precision in PREFERRED if precision in there)
    if graph not in there:
        raise ConfigError(f"graph is {graph!r}; {bundle.path} has {', '.join(there)}; export it with that precision")
    return graph


def length_profile(bundle: Bundle) -> Profile:
    """Lengths of a text that an engine is built for: from one word to as many as the model reads."""
    longest = bundle.manifest.text.max_tokens
    return 1, min(USUAL_LENGTH, longest), longest


def timings_file(machine: Machine) -> str:
    """Name of the timing cache, one for each TensorRT and GPU: neither can use the measurements of another."""
    return re.sub(r"[^\w.]+", "-", f"timing-{machine.tensorrt}-{machine.gpu}") + ".cache"


def self_check(bundle: Bundle, medium: str, precision: str, built: BuiltEngine, *, rows: int) -> dict[str, float]:
    """Runs generated inputs through an engine and through ONNX Runtime on the CPU with the float32 graph.

    Args:
        bundle: the engine's bundle.
        medium: the engine's medium.
        precision: of the graph that it was built from; decides how near it must come.
        built: the engine.
        rows: of the batch; more than the engine's largest, so that splitting is proved, too.

    Returns:
        The smallest cosine by output.

    Raises:
        ParityError: one is below :data:`MIN_COSINE`.
    """
    cosines = {}
    with ExitStack() as stack:
        for output in bundle.manifest.dimensions:
            reference = stack.enter_context(OnnxEncoder.open(bundle.graph(medium), output=output, device="cpu"))
            engine = stack.enter_context(
                TensorRTEncoder.open(built.plan, output=output, sha256=built.sha256, precision=precision)
            )
            batch = generated_batch(reference, bundle, rows)
            # The CPU is slow, and the engine has more rows only so that it must split them.
            expected = np.resize(reference.run(batch[:ROWS]), (len(batch), reference.dimension))
            cosines[output] = min_cosine(engine.run(batch), expected)
    if min(cosines.values()) < MIN_COSINE[precision]:
        found = ", ".join(f"{output} {cosine:.6f}" for output, cosine in cosines.items())
        raise ParityError(
            f"the {medium} engine gives other vectors than its float32 graph on the CPU: smallest cosine {found}, "
            f"expected {MIN_COSINE[precision]} for {precision}; nothing was kept; choose another --graph"
        )
    return cosines


def generated_batch(encoder: Encoder, bundle: Bundle, rows: int) -> NDArray[Any]:
    """Noise that an encoder takes, always the same: at most :data:`ROWS` different rows, over and over.

    Pixels are uniform. Texts are random words of the vocabulary, from as many as the model reads down to one,
    padded with 0. Vectors are normal.
    """
    chance = np.random.default_rng(SEED)
    count = min(rows, ROWS)
    sizes = tuple(size for size in encoder.input_shape[1:] if size is not None)
    if encoder.input_dtype == np.uint8:
        batch: NDArray[Any] = chance.integers(0, 256, (count, *sizes), np.uint8)
    elif encoder.input_dtype == np.int64:
        longest = bundle.manifest.text.max_tokens
        batch = chance.integers(1, len(bundle.vocabulary), (count, longest), np.int64)
        lengths = np.linspace(longest, 1, count).astype(np.int64)
        batch[np.arange(longest) >= lengths[:, None]] = 0
    else:
        batch = chance.standard_normal((count, *sizes), np.float32)
    return np.resize(batch, (rows, *batch.shape[1:]))


def min_cosine(given: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The smallest cosine of two rows, (N, D) both, in float64."""
    one, other = given.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    if not norms.all():
        return -1.0  # a vector of zeros points nowhere
    return float(((one * other).sum(axis=1) / norms).min())


def _there(folder: Path, bundle: Bundle, here: Machine) -> Engine | None:
    try:
        engine = read_engine(folder)
    except BundleError:
        return None
    whole = all(
        engine.path(medium).is_file() and engine.path(medium).stat().st_size == plan.size
        for medium, plan in engine.plans.items()
    )
    return engine if whole and not misfit(engine, bundle, here) else None


def _named(progress: Progress | None, medium: str) -> Progress | None:
    if progress is None:
        return None
    tell = progress
    return lambda phase, done, total: tell(f"{medium}: {phase}", done, total)
