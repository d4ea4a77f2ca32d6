"""From an ONNX graph to a TensorRT engine.

Networks are strongly typed: a layer computes in the type that the graph gives it, and no builder flag makes fp16 of
fp32. That is the only way of TensorRT 11, and 10 can do it too.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt

from dckt.errors import BundleError, ConfigError, ProviderError
from dckt.files import atomic_write
from dckt.runtime.tensorrt.inspect import engine_information, layer_precisions
from dckt.runtime.tensorrt.load import call, cuda_runtime, load

if TYPE_CHECKING:
    import tensorrt as trt

Profile = tuple[int, int, int]
# Told the phase, the steps done in it, and its steps in all; from a thread of TensorRT's.
Progress = Callable[[str, int, int], None]

PROFILE: Profile = (1, 8, 32)
LENGTHS: Profile = (1, 32, 300)
_HEADER = 64  # hexadecimal digits of a SHA-256


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine that was written.

    Attributes:
        plan: its file.
        sha256: of that file.
        layers: convolution and matrix layers by the precision that they compute in.
        seconds: how long the build took.
        warnings: what TensorRT warned of, each once.
    """

    plan: Path
    sha256: str
    layers: dict[str, int]
    seconds: float
    warnings: tuple[str, ...]


def engine_from_onnx(
    graph: Path,
    plan: Path,
    *,
    profile: Profile = PROFILE,
    length_profile: Profile = LENGTHS,
    hardware_compatible: bool = False,
    workspace: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Builds an engine for the GPU of this machine.

    Args:
        graph: ONNX file with one input whose first axis, the batch, is free; of an int64 input the second axis, the
            length, too. External data lies beside it.
        plan: file to write, whole or not at all; its folder exists.
        profile: smallest, most usual and largest batch.
        length_profile: the same of the length; it has an effect on int64 inputs alone.
        hardware_compatible: an engine that also runs on other GPUs of compute capability 8.0 or newer, at some cost
            of speed.
        workspace: bytes of GPU memory that a layer may use for itself; None is all of it.
        timing_cache: file of measured kernels that builds share, made if missing: the second build is faster.
        progress: told how far the build is.

    Raises:
        ConfigError: a profile that does not rise, or a workspace below 1.
        BundleError: TensorRT cannot parse the graph, or cannot build it.
        OSError: the plan or the timing cache cannot be written.
        MissingExtraError, ProviderError: see :func:`dckt.runtime.tensorrt.load.load`.
        KeyboardInterrupt: Ctrl-C; the build stops after the step that it is in.
    """
    for name, sizes in (("profile", profile), ("length_profile", length_profile)):
        check_profile(sizes, name)
    if workspace is not None and workspace < 1:
        raise ConfigError(f"workspace is {workspace} bytes; expected at least 1, or None")
    load()
    import tensorrt as trt

    log = make_log()
    began = time.perf_counter()
    builder = trt.Builder(log)
    parser, network = _parse(builder, graph, log)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows no types
    # TensorFloat-32 would give an fp32 engine other vectors than the CPU, and one index serves both.
    config.clear_flag(trt.BuilderFlag.TF32)
    if hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    name, shape = _add_profile(builder, network, config, profile, length_profile, graph)
    # Both must outlive the build, which only holds their addresses.
    monitor, cache = _make_monitor(progress), _attach_cache(config, timing_cache, log)
    config.progress_monitor = monitor
    memory = _build_apart(builder, network, config, monitor)
    del parser  # which owns the network's weights, so not before
    if memory is None:
        raise BundleError(f"{graph}: TensorRT {trt.__version__} builds no engine of it\n  " + log.explain())
    if cache is not None and timing_cache is not None:
        _keep_cache(config, cache, timing_cache)
    data = _bytes(memory)
    seconds = time.perf_counter() - began
    runtime = trt.Runtime(log)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BundleError(f"{graph}: TensorRT cannot read the engine that it built\n  " + log.explain())
    layers = layer_precisions(engine_information(engine, name, shape))
    atomic_write(plan, data)
    return BuiltEngine(
        plan=plan,
        sha256=hashlib.sha256(data).hexdigest(),
        layers=layers,
        seconds=round(seconds, 1),
        warnings=tuple(dict.fromkeys(log.warnings)),
    )


def check_profile(sizes: Sequence[int], name: str = "profile") -> None:
    """Refuses sizes that are not 1 <= MIN <= OPT <= MAX.

    Raises:
        ConfigError: see above.
    """
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise ConfigError(f"{name} is {','.join(map(str, sizes))}; expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX")


def make_log() -> Any:
    """A ``trt.ILogger`` that keeps errors and warnings, ``errors`` and ``warnings``, and prints nothing."""
    load()
    import tensorrt as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # Any where TensorRT is not installed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg)

        def explain(self) -> str:
            return "\n  ".join(dict.fromkeys(self.errors or self.warnings)) or "it gave no reason"

    return Log()


def _make_monitor(progress: Progress | None) -> Any:
    """A ``trt.IProgressMonitor`` that passes steps on, and stops the build once ``stop`` is set."""
    load()
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # Any where TensorRT is not installed
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stop = threading.Event()
            self.failure: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(
            self,
            phase_name: str,
            parent_phase: str | None,  # noqa: ARG002 - the interface's
            num_steps: SupportsInt,
        ) -> None:
            self._steps[phase_name] = int(num_steps)
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.pop(phase_name, 0))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            self._tell(phase_name, int(step) + 1)
            return not self.stop.is_set()

        def _tell(self, phase: str, done: int) -> None:
            if progress is None:
                return
            try:
                progress(phase, done, max(done, self._steps.get(phase, done)))
            # It must not travel through TensorRT's own frames; it is raised when the build has ended.
            except BaseException as error:  # noqa: BLE001
                self.failure = error
                self.stop.set()

    return Monitor()


def _build_apart(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, monitor: Any
) -> trt.IHostMemory | None:
    """Builds in a thread of its own: Python sees Ctrl-C only in the main thread, and only between its own steps."""
    result: list[trt.IHostMemory | None] = []
    failures: list[BaseException] = []
    cuda = cuda_runtime()
    device = call(cuda.cudaGetDevice)

    def build() -> None:
        try:
            call(cuda.cudaSetDevice, device)  # the current device belongs to a thread
            result.append(builder.build_serialized_network(network, config))
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=build, name="dckt-engine")
    thread.start()
    interrupted = False
    while thread.is_alive():
        try:
            thread.join(0.2)
        except KeyboardInterrupt:
            interrupted = True
            monitor.stop.set()
    if interrupted:
        raise KeyboardInterrupt
    if monitor.failure is not None:
        raise monitor.failure
    if failures:
        raise failures[0]
    return result[0]


def _parse(builder: trt.Builder, graph: Path, log: Any) -> tuple[trt.OnnxParser, trt.INetworkDefinition]:
    import tensorrt as trt

    # 11 ignores the flag, for it knows nothing else; the bindings of both have it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        lines = []
        for number in range(parser.num_errors):
            error: trt.ParserError = parser.get_error(number)
            lines.append(f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
        raise BundleError(
            f"{graph}: TensorRT {trt.__version__} cannot parse it\n  " + ("\n  ".join(lines) or log.explain())
        )
    return parser, network


def _add_profile(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    batches: Profile,
    lengths: Profile,
    graph: Path,
) -> tuple[str, tuple[int, ...]]:
    """Gives the free axes their sizes; returns the input's name and its most usual shape."""
    import tensorrt as trt

    if network.num_inputs != 1:
        raise BundleError(f"{graph}: has {network.num_inputs} inputs, expected one; export the model again")
    given = network.get_input(0)
    shape = tuple(given.shape[axis] for axis in range(len(given.shape)))
    free = {0: batches}
    if given.dtype == trt.DataType.INT64:
        free[1] = lengths
    if {axis for axis, size in enumerate(shape) if size == -1} != set(free):
        raise BundleError(
            f"{graph}: input {given.name!r} is {shape}; expected -1 on the axes {sorted(free)} alone; "
            "export the model again"
        )
    smallest, usual, largest = (
        tuple(free[axis][which] if axis in free else size for axis, size in enumerate(shape)) for which in range(3)
    )
    profile = builder.create_optimization_profile()
    profile.set_shape(given.name, trt.Dims(smallest), trt.Dims(usual), trt.Dims(largest))
    if config.add_optimization_profile(profile) < 0:
        raise BundleError(f"{graph}: TensorRT refuses the sizes {smallest}, {usual}, {largest} of {given.name!r}")
    return given.name, usual


# --- timing cache -------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time. The lock is a file of its own, since the other is replaced, not written over."""
    import fcntl

    with path.with_name(f"{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def read_timings(path: Path) -> bytes:
    """The serialised cache, or nothing if there is none, or if it is damaged: it only saves time."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    digest, data = content[:_HEADER], content[_HEADER:]
    return data if hashlib.sha256(data).hexdigest().encode() == digest else b""


def write_timings(path: Path, data: bytes) -> None:
    """Writes what :func:`read_timings` reads: a SHA-256 in front, for TensorRT does not expect damage."""
    atomic_write(path, hashlib.sha256(data).hexdigest().encode() + data)


def _attach_cache(config: trt.IBuilderConfig, path: Path | None, log: Any) -> trt.ITimingCache | None:
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        data = read_timings(path)
    for content in (data, b""):
        cache = config.create_timing_cache(content)
        # False: a cache of another GPU or another TensorRT is refused, not trusted.
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        log.warnings.append(f"{path}: is a timing cache of another GPU or TensorRT; a new one is begun")
    raise ProviderError(f"TensorRT accepts no timing cache\n  {log.explain()}")


def _keep_cache(config: trt.IBuilderConfig, cache: trt.ITimingCache, path: Path) -> None:
    """Adds what other builds have written meanwhile, and writes both."""
    with locked(path):
        theirs = config.create_timing_cache(read_timings(path))
        if theirs is not None:
            cache.combine(theirs, False)  # False if another version wrote it; then ours replaces it
        write_timings(path, _bytes(cache.serialize()))


def _bytes(memory: Any) -> bytes:
    """The content of a ``trt.IHostMemory``, by the buffer protocol, which type checkers do not see."""
    return bytes(memory)
