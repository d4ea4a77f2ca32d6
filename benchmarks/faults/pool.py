"""Cases run by a few child processes, each case under a time limit; a crash or a hang is the case's, not ours."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

_CONTEXT = multiprocessing.get_context("spawn")  # a fork would inherit the threads of what runs the cases
_START_SECONDS = 120.0

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """How a case ended.

    Attributes:
        case: its number.
        how: ``returned``, ``raised``, ``crash`` or ``hang``.
        value: what the work returned; otherwise a text about the end.
    """

    case: int
    how: str
    value: Any


class _Worker:
    def __init__(self, work: Callable[[int], Any], memory: int) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(work, theirs, memory), daemon=False)
        self.process.start()
        theirs.close()
        self.case: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    def give(self, case: int, seconds: float) -> None:
        self.case, self.deadline = case, time.monotonic() + seconds
        self.pipe.send(case)

    def stop(self, *, kill: bool) -> int | None:
        if kill:
            self.process.kill()
        else:
            self.pipe.send(None)
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


def run_cases(
    work: Callable[[int], Any], cases: Iterable[int], *, workers: int, seconds: float, memory: int = 8 * 2**30
) -> Iterator[Finished]:
    """Runs ``work(case)`` for every case, in the order in which they end.

    Args:
        work: a function that pickle can name, or a partial of one.
        cases: their numbers.
        workers: how many child processes; each goes on with the next case until one of its cases kills it.
        seconds: that a case may take; then its process is killed and the case counts as a hang.
        memory: bytes of address space of a child, so that a size read from a damaged file cannot take the machine.
    """
    waiting = iter(cases)
    running: list[_Worker] = []
    try:
        case = next(waiting, None)
        while case is not None or any(worker.case is not None for worker in running):
            while case is not None and len(running) < workers:
                running.append(_Worker(work, memory))
                running[-1].give(case, seconds + _START_SECONDS)
                case = next(waiting, None)
            busy = [worker for worker in running if worker.case is not None]
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.pipe for worker in busy], timeout=max(patience, 0))
            for worker in busy:
                done = worker.case
                assert done is not None
                if worker.pipe in ready:
                    try:
                        how, value = worker.pipe.recv()
                    except (EOFError, ConnectionResetError):
                        running.remove(worker)
                        yield Finished(done, "crash", _exit(worker.stop(kill=True)))
                        continue
                    yield Finished(done, how, value)
                elif time.monotonic() > worker.deadline:
                    running.remove(worker)
                    worker.stop(kill=True)
                    yield Finished(done, "hang", f"took more than {seconds:g} s")
                    continue
                else:
                    continue
                worker.case = None
                if case is not None:
                    worker.give(case, seconds)
                    case = next(waiting, None)
    finally:
        for worker in running:
            worker.stop(kill=worker.case is not None)


def _serve(work: Callable[[int], Any], pipe: Connection, memory: int) -> None:
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while (case := pipe.recv()) is not None:
        try:
            answer = ("returned", work(case))
        except BaseException as error:  # noqa: BLE001 - the parent is to hear of anything
            answer = ("raised", f"{type(error).__name__}: {error}")
        pipe.send(answer)


def forked(work: Callable[[], T]) -> T:
    """The value of ``work()`` in a fork of this process, which is then gone with all that it did to itself.

    Call it in a process without threads, such as a worker of :func:`run_cases`.

    Raises:
        AssertionError: the work raised, or its process died.
    """
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    child = os.fork()
    if not child:
        try:
            theirs.send((True, work()))
        except BaseException as error:  # noqa: BLE001 - the parent is to hear of anything
            theirs.send((False, f"{type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    theirs.close()
    try:
        well, value = ours.recv()
    except EOFError:
        well, value = False, "died"
    ours.close()
    _, status = os.waitpid(child, 0)
    if not well:
        raise AssertionError(f"in a fork: {value} ({_exit(os.waitstatus_to_exitcode(status))})")
    return value  # type: ignore[no-any-return]


def _exit(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
