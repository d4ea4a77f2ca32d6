"""The TensorRT encoder on a CUDA runtime that is played in host memory: what is copied where, padding, splitting."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dckt.errors import ProviderError
from dckt.runtime.checked import Port, Signature
from dckt.runtime.tensorrt import encoder as module
from dckt.runtime.tensorrt.encoder import TensorRTEncoder, _Engine

OK = SimpleNamespace(value=0)
INPUT = Port("x", "float32", (None, 3))
OUTPUTS = (
    Port("fc9", "float32", (None, 4)),
    Port("unused", "float32", (None, 5)),
    Port("probability", "float32", (None, 2)),
)
FC9 = np.arange(12, dtype=np.float32).reshape(3, 4)
PROBABILITY = np.array([[1, 0], [0, 1], [1, 1]], np.float32)


class Cuda:
    """Memory by address; copies at once."""

    cudaStreamNonBlocking = cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}

    def cudaGetDevice(self) -> Any:
        return OK, 0

    def cudaSetDevice(self, device: int) -> Any:
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return OK, 7

    def cudaStreamDestroy(self, stream: int) -> Any:
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (OK,)

    def cudaMalloc(self, size: int) -> Any:
        buffer = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> Any:
        del self.memory[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: str, stream: int) -> Any:
        device = to if kind == "up" else source
        assert size <= len(self.memory[device])
        ctypes.memmove(to, source, size)
        return (OK,)


class Context:
    """Computes ``x @ FC9`` and ``x @ PROBABILITY`` where it is told to."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shapes: list[tuple[int, ...]] = []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes.append(shape)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        rows = self.shapes[-1][0]
        x = self.at("x", rows, 3)
        self.at("fc9", rows, 4)[:] = x @ FC9
        self.at("probability", rows, 2)[:] = x @ PROBABILITY
        return True

    def at(self, name: str, rows: int, width: int) -> np.ndarray:
        memory = (ctypes.c_float * (rows * width)).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).reshape(rows, width)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    played = Cuda()
    monkeypatch.setattr(module, "cuda_runtime", lambda: played)
    return played


def opened(wanted: list[str], contexts: list[Context]) -> TensorRTEncoder:
    def context() -> Context:
        contexts.append(Context())
        return contexts[-1]

    signature = Signature.of(Path("x.plan"), [INPUT], OUTPUTS, wanted)
    engine: Any = SimpleNamespace(create_execution_context=context)
    session = _Engine(None, engine, signature, OUTPUTS, (2, 3), (4, 3))
    return TensorRTEncoder(session, signature, variant="tensorrt-fp32", provider="played")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("wanted", [["fc9"], ["probability"], ["probability", "fc9"], ["fc9", "probability"]])
def test_every_wanted_output_of_every_batch(cuda: Cuda, wanted: list[str], rows: int) -> None:
    batch = np.random.default_rng(rows).normal(size=(rows, 3)).astype(np.float32)
    contexts: list[Context] = []
    encoder = opened(wanted, contexts)
    found = encoder.run_all(batch)
    assert list(found) == wanted
    for output, weights in (("fc9", FC9), ("probability", PROBABILITY)):
        if output in wanted:
            np.testing.assert_allclose(found[output], batch @ weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(encoder.run(batch), found[wanted[0]])
    assert len(contexts) == 1, "a lane is used again"
    assert all(2 <= shape[0] <= 4 for shape in contexts[0].shapes), "padded and split"
    kept = {output: vectors.copy() for output, vectors in found.items()}
    encoder.run_all(-batch)
    for output, vectors in kept.items():
        np.testing.assert_array_equal(found[output], vectors)


def test_closing_frees_everything(cuda: Cuda) -> None:
    encoder = opened(["fc9", "probability"], [])
    encoder.run_all(np.ones((3, 3), np.float32))
    assert cuda.memory
    encoder.close()
    assert not cuda.memory
    with pytest.raises(ProviderError, match="closed"):
        encoder.run(np.ones((3, 3), np.float32))


def test_an_error_frees_its_lane(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[Context] = []
    encoder = opened(["fc9"], contexts)
    monkeypatch.setattr(Context, "execute_async_v3", lambda *_: False)
    with pytest.raises(ProviderError, match="TensorRT failed on a batch"):
        encoder.run(np.ones((3, 3), np.float32))
    assert not cuda.memory
    monkeypatch.undo()
    monkeypatch.setattr(module, "cuda_runtime", lambda: cuda)
    assert encoder.run(np.ones((3, 3), np.float32)).shape == (3, 4)
    assert len(contexts) == 2
