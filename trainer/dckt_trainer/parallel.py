"""Several processes on one training: what each adds to the others, with gradients through it.

Started by ``torchrun``, every process draws the same batches and takes its share of the rows of each. Statistics of
batch normalisation, MMD and all other terms are those of the whole batch, so the losses are those of one process. With
one process every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dckt.errors import ConfigError, TrainingError

# One process may prepare features for hours while the others wait for it.
PATIENCE = timedelta(days=7)
T = TypeVar("T")


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_device(kind: str) -> torch.device:
    """This process's own device of a kind: with several GPUs on a machine, each process has one."""
    if kind == "cuda" and launched():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Joins the processes that ``torchrun`` started, NCCL on GPUs and gloo on CPUs; alone it does nothing."""
    if not launched() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Returns when every process has come here."""
    if size() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block while the others wait; then they do, and find what it left on disk."""
    if size() == 1:
        yield
        return
    if rank():
        if failure := _told():
            raise TrainingError(f"the first process failed: {failure}")
        yield
        return
    try:
        yield
    except BaseException as error:
        _told(str(error) or type(error).__name__)
        raise
    _told("")


def _told(text: str | None = None) -> str:
    """What the first process says to the others."""
    box = [text]
    dist.broadcast_object_list(box)
    return box[0] or ""


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all."""
    if size() == 1:
        return make()
    box = [None if rank() else make()]
    dist.broadcast_object_list(box)
    return cast(T, box[0])


def own_rows(batch: int) -> slice:
    """The rows of a batch that this process computes.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    if batch % size():
        raise ConfigError(
            f"a batch of {batch} pairs cannot be shared out evenly to {size()} processes; change the batch"
        )
    share = batch // size()
    return slice(rank() * share, (rank() + 1) * share)


def total(value: Tensor) -> Tensor:
    """Sum over all processes, with gradient."""
    return _Total.apply(value) if size() > 1 else value


def rows_of_all(rows: Tensor) -> Tensor:
    """Every process's rows (b, ...), in the order of their numbers: (processes * b, ...), with gradient.

    Every process then computes the same loss of all rows, so a process's gradient is the part that belongs to its own.
    """
    return _Rows.apply(rows) if size() > 1 else rows


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Sums each parameter's gradient over all processes, each of which has that of its own rows."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        del context
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        del context
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.count = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0][rank() * context.count : (rank() + 1) * context.count]
