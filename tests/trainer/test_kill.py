"""Killed at any moment and gone on with, a training comes to the weights of one that was left alone, bit by bit."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from dckt_trainer.checkpoint import load_tensors
from dckt_trainer.runs import open_run

KILLS, OF_A_RUN = 20, 5
CHECKPOINTS = ("source-part", "target-part", "joint")  # within pretraining, and between rounds
LONGER = [
    "pretrain.source_epochs=60",
    "pretrain.target_epochs=60",
    "transfer.rounds=6",
    "transfer.stratified=true",
]
# A server that has everything loaded forks the trainings, so that each begins at once.
SERVER = multiprocessing.get_context("forkserver")


# As source text, because the process knows no test modules.
BEGIN = """
import torch
from dckt_trainer.config import load_config
from dckt_trainer.train import train
torch.set_num_threads(1)
train({source!r}, {target!r}, {out!r}, load_config("small", {settings!r}), cache={cache}, device="cpu")
"""
GO_ON = """
import torch
from dckt.errors import RunError
from dckt_trainer.train import resume
torch.set_num_threads(1)
try:
    resume({out!r}, cache={cache}, device="cpu")
except RunError as error:  # killed after the last word was written
    if "is complete" not in str(error):
        raise
"""


def killed_after(seconds, code):
    """Runs code in a process of its own and kills it; whether the kill came before its end."""
    process = SERVER.Process(target=exec, args=("from pathlib import PosixPath\n" + code,))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def killed_behind(checkpoint, code):
    """Runs code in a process of its own and kills it as soon as a checkpoint is there."""
    process = SERVER.Process(target=exec, args=("from pathlib import PosixPath\n" + code,))
    process.start()
    while not checkpoint.exists():
        assert process.exitcode is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_within_every_stage_and_at_twenty_random_moments(corpora, cache, small, tmp_path):
    SERVER.set_forkserver_preload(["dckt_trainer.train"])
    settings = [*small, *LONGER]
    given = {"source": str(corpora / "source"), "target": str(corpora / "target"), "settings": settings}
    given["cache"] = repr(cache)

    def code(template, out):
        return template.format(**given, out=str(out))

    killed_after(600, code(BEGIN, tmp_path / "whole"))  # starts the server and fills the cache
    started = time.perf_counter()
    killed_after(600, code(BEGIN, tmp_path / "timed"))
    length = time.perf_counter() - started
    moments = random.Random(7)
    out = tmp_path / "stages"
    for name in CHECKPOINTS:
        killed_behind(out / "checkpoints" / f"{name}.safetensors", code(GO_ON if out.exists() else BEGIN, out))
    killed_after(600, code(GO_ON, out))
    same(tmp_path / "whole", out)
    kills = runs = 0
    while kills < KILLS:
        out = tmp_path / f"run{runs}"
        runs += 1
        of_this = 0
        done = False
        while not done:
            work = code(GO_ON if (out / "run.json").exists() else BEGIN, out)
            # A machine that slows down would else kill one run for ever.
            seconds = moments.uniform(0, length * 0.7) if of_this < OF_A_RUN else 600
            done = not killed_after(seconds, work)
            of_this += not done
        kills += of_this
        same(tmp_path / "whole", out)
    print(f"{kills} kills over {runs} runs of {length:.1f} s")


def same(whole, killed):
    for domain in ("source", "target"):
        one, other = (load_tensors(run / domain / "network.safetensors") for run in (whole, killed))
        assert all(torch.equal(one[name], other[name]) for name in one | other)
    joint, again = (load_tensors(run / "checkpoints" / "joint.safetensors") for run in (whole, killed))
    assert all(torch.equal(joint[name], again[name]) for name in joint | again)  # momentum too
    for name in ("metrics", "selection"):
        assert open_run(whole).events(name) == open_run(killed).events(name)
    read = [json.loads((run / "evaluation.json").read_text(encoding="utf-8")) for run in (whole, killed)]
    assert read[0] == read[1]
    assert not [path for path in killed.rglob("*") if path.name.endswith((".partial", "-part.safetensors"))]
