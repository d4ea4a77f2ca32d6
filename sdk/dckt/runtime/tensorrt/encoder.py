"""An encoder that runs on a TensorRT engine."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dckt.errors import BundleCorruptError, ItemError, ProviderError
from dckt.runtime.checked import CheckedEncoder, Port, Signature
from dckt.runtime.tensorrt.build import make_log
from dckt.runtime.tensorrt.load import call, cuda_runtime, load, machine

if TYPE_CHECKING:
    import tensorrt as trt


class TensorRTEncoder(CheckedEncoder["_Engine"]):
    """Outputs of one engine; see :class:`dckt.runtime.Encoder`. Make it with :meth:`open`.

    Batches larger than the engine's largest are split, and smaller than its smallest are padded with copies of their
    last row, whose results are dropped. A length that the engine was not built for is an error.
    """

    @classmethod
    def open(cls, plan: Path, *, output: str, sha256: str, precision: str, also: Sequence[str] = ()) -> Self:
        """Loads an engine.

        Args:
            plan: the engine's file.
            output: name of the main output to compute, float32 (B, D).
            sha256: what the file must hash to. TensorRT trusts what it reads, so a damaged file never reaches it.
            precision: what the graph was written in, for the name of the variant.
            also: names of others to compute in the same pass.

        Raises:
            BundleCorruptError: the file is missing or damaged, or its inputs and outputs are others.
            MissingExtraError, ProviderError: see :func:`dckt.runtime.tensorrt.load.load`; or TensorRT refuses the
                engine.
        """
        try:
            data = plan.read_bytes()
        except OSError as error:
            raise BundleCorruptError(f"{plan}: cannot be read ({error}); build it again with dckt engine") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise BundleCorruptError(f"{plan}: is not the engine that was built; build it again with dckt engine")
        about = machine()
        keep, engine = _deserialize(data, plan)
        inputs, outputs = _ports(engine, plan)
        signature = Signature.of(plan, inputs, outputs, [output, *also])
        smallest, largest = _limits(engine, signature.input_name)
        return cls(
            _Engine(keep, engine, signature, outputs, smallest, largest),
            signature,
            variant=f"tensorrt-{precision}",
            provider=f"TensorRT {about.tensorrt} on {about.gpu}",
        )

    def close(self) -> None:
        """Frees the engine and all its memory, what a running call uses once that has ended. Twice is harmless."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _compute(self, session: _Engine, batch: NDArray[Any]) -> Sequence[NDArray[np.float32]]:
        session.check(batch)
        vectors = {output: np.empty((len(batch), width), np.float32) for output, width in self.dimensions.items()}
        step = session.largest[0]
        lane = session.take()
        try:
            for start in range(0, len(batch), step):
                rows = slice(start, start + step)
                lane.run(batch[rows], {output: of[rows] for output, of in vectors.items()})
        except BaseException:
            # After an error the state of its stream and context is unknown.
            lane.discard()
            raise
        session.give(lane)
        return list(vectors.values())


class _Engine:
    """An engine with the lanes that its calls run on; a call has a lane to itself.

    Attributes:
        smallest, largest: shapes of the input that the engine was built for.
    """

    def __init__(
        self,
        keep: object,
        engine: trt.ICudaEngine,
        signature: Signature,
        outputs: tuple[Port, ...],
        smallest: tuple[int, ...],
        largest: tuple[int, ...],
    ) -> None:
        self.smallest, self.largest = smallest, largest
        self._keep = keep
        self.signature, self.outputs = signature, outputs
        self.engine: trt.ICudaEngine | None = engine
        self.device: int = call(cuda_runtime().cudaGetDevice)
        self._lock = threading.Lock()
        self._idle: list[_Lane] = []

    def check(self, batch: NDArray[Any]) -> None:
        """Refuses a batch with an axis, other than the first, outside what the engine was built for."""
        for axis in range(1, batch.ndim):
            low, high = self.smallest[axis], self.largest[axis]
            if not low <= batch.shape[axis] <= high:
                raise ItemError(
                    f"{self.signature.input_name} is {batch.shape}; axis {axis} has {batch.shape[axis]}, "
                    f"and the engine was built for {low} to {high}; shorten it, or build the engine for that length"
                )

    def take(self) -> _Lane:
        """A lane for one call; :meth:`give` it back."""
        # The current device belongs to a thread, and any thread may call.
        call(cuda_runtime().cudaSetDevice, self.device)
        with self._lock:
            engine = self.engine
            if engine is None:
                raise ProviderError("the encoder is closed; open it again")
            if self._idle:
                return self._idle.pop()
        return _Lane(engine, self.signature, self.outputs, self.smallest, self.largest)

    def give(self, lane: _Lane) -> None:
        """Keeps a lane for the next call, or frees it if the engine was closed meanwhile."""
        with self._lock:
            if self.engine is not None:
                self._idle.append(lane)
                return
        lane.close()

    def close(self) -> None:
        """Frees what no call uses."""
        with self._lock:
            self.engine = None  # TensorRT frees it with its last context
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.close()


class _Lane:
    """A stream, an execution context and buffers for the largest batch, in GPU memory and page-locked beside it."""

    def __init__(
        self,
        engine: trt.ICudaEngine,
        signature: Signature,
        outputs: tuple[Port, ...],
        smallest: tuple[int, ...],
        largest: tuple[int, ...],
    ) -> None:
        self._cuda = cuda_runtime()
        self._signature = signature
        self._smallest = smallest[0]
        self._shape: tuple[int, ...] = ()
        # By output: its address in GPU memory, and where it is copied to.
        self._outputs: dict[str, tuple[int, NDArray[np.uint8]]] = {}
        with ExitStack() as stack:
            self._stream = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
            stack.callback(call, self._cuda.cudaStreamDestroy, self._stream)
            context = engine.create_execution_context()
            if context is None:
                raise ProviderError("TensorRT gives no execution context; is the GPU's memory full?")
            self._context: trt.IExecutionContext | None = context
            rows = largest[0]
            size = prod(largest) * signature.input_dtype.itemsize
            self._input = self._device_memory(stack, size)
            self._given = self._host_memory(stack, size)
            self._set_address(context, signature.input_name, self._input)
            for port in outputs:
                width = prod(size for size in port.shape[1:] if size is not None)
                memory = self._device_memory(stack, rows * width * 4)
                self._set_address(context, port.name, memory)
                if port.name in signature.dimensions:
                    self._outputs[port.name] = memory, self._host_memory(stack, rows * width * 4)
            self._resources = stack.pop_all()

    def run(self, rows: NDArray[Any], vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Computes ``rows``, at most the largest batch, into ``vectors``, (len(rows), width) for each output."""
        context = self._context
        if context is None:
            raise ProviderError("the encoder is closed; open it again")
        count = max(len(rows), self._smallest)
        shape = (count, *rows.shape[1:])
        given = self._given[: prod(shape) * rows.dtype.itemsize].view(rows.dtype).reshape(shape)
        given[: len(rows)] = rows
        given[len(rows) :] = rows[-1]
        if shape != self._shape:
            self._shape = ()
            if not context.set_input_shape(self._signature.input_name, shape):
                raise ProviderError(f"TensorRT refused {self._signature.input_name} {shape}")
            self._shape = shape
        cuda, stream = self._cuda, self._stream
        to_device, to_host = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(cuda.cudaMemcpyAsync, self._input, given.ctypes.data, given.nbytes, to_device, stream)
        if not context.execute_async_v3(int(stream)):
            raise ProviderError(f"TensorRT failed on a batch {shape}")
        taken = {}
        for output in vectors:
            address, memory = self._outputs[output]
            copied = memory[: count * self._signature.dimensions[output] * 4].view(np.float32)
            call(cuda.cudaMemcpyAsync, copied.ctypes.data, address, copied.nbytes, to_host, stream)
            taken[output] = copied.reshape(count, -1)
        call(cuda.cudaStreamSynchronize, stream)
        for output, copied in taken.items():
            vectors[output][:] = copied[: len(rows)]

    def close(self) -> None:
        """Frees all; nothing runs on it any more."""
        self._context = None
        self._given = np.zeros(0, np.uint8)  # a view of memory that goes now, as those of the outputs are
        self._outputs.clear()
        self._resources.close()

    def discard(self) -> None:
        """Frees what can be freed after an error, which is the one to report."""
        try:
            call(self._cuda.cudaStreamSynchronize, self._stream)  # nothing may still write to what goes
            self.close()
        except ProviderError:
            # A fault inside a kernel leaves the whole process without a usable GPU; its memory goes with the process.
            return

    def _device_memory(self, stack: ExitStack, size: int) -> int:
        address: int = call(self._cuda.cudaMalloc, size)
        stack.callback(call, self._cuda.cudaFree, address)
        return address

    def _host_memory(self, stack: ExitStack, size: int) -> NDArray[np.uint8]:
        # Page-locked, for only from there does a copy run beside other work.
        address: int = call(self._cuda.cudaHostAlloc, size, self._cuda.cudaHostAllocDefault)
        stack.callback(call, self._cuda.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def _set_address(self, context: trt.IExecutionContext, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise ProviderError(f"TensorRT refused the memory of {name!r}")


def _deserialize(data: bytes, plan: Path) -> tuple[object, trt.ICudaEngine]:
    """The engine, after what must outlive it."""
    load()
    import tensorrt as trt

    log = make_log()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ProviderError(
            f"{plan}: TensorRT {trt.__version__} refuses the engine; build it again with dckt engine\n  {log.explain()}"
        )
    return (log, runtime), engine


def _ports(engine: trt.ICudaEngine, plan: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The engine's inputs and outputs.

    Raises:
        BundleCorruptError: an output of another kind than every graph of ours has.
    """
    import tensorrt as trt

    names = {trt.DataType.UINT8: "uint8", trt.DataType.INT64: "int64", trt.DataType.FLOAT: "float32"}
    inputs: list[Port] = []
    outputs: list[Port] = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        dtype = engine.get_tensor_dtype(name)
        shape = tuple(None if size == -1 else size for size in _sizes(engine.get_tensor_shape(name)))
        port = Port(name, names.get(dtype, str(dtype)), shape)
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(port)
    for port in outputs:
        # Every output needs memory of a known size, wanted or not.
        if port.dtype != "float32" or None in port.shape[1:]:
            raise BundleCorruptError(
                f"{plan}: output {port.name!r} is {port.dtype} {port.shape}; expected float32 with a free batch alone"
            )
    return tuple(inputs), tuple(outputs)


def _limits(engine: trt.ICudaEngine, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    smallest, _, largest = engine.get_tensor_profile_shape(name, 0)
    return _sizes(smallest), _sizes(largest)


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))
