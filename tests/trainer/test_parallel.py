"""Several processes are one: losses, gradients and statistics of two equal those of one with the same batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dckt.errors import ConfigError
from dckt_trainer import parallel, transfer
from dckt_trainer.checkpoint import load_tensors
from dckt_trainer.runs import open_run

# The same steps, whoever takes them; the first process writes what came out.
STEPS = """
import sys
import numpy as np, torch
from dckt_trainer import parallel
from dckt_trainer.config import ComputeConfig, LossConfig, MmdConfig, OptimizerConfig
from dckt_trainer.losses import joint_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream

torch.set_num_threads(1)
INPUTS = {"image": 9, "text": 7}
cpu = torch.device("cpu")
with parallel.processes(cpu):
    domains = {}
    for place, (name, classes) in enumerate((("source", 6), ("target", 3))):
        generator = torch.Generator().manual_seed(place)
        features = {m: torch.randn(40, size, generator=generator, dtype=torch.float64) for m, size in INPUTS.items()}
        torch.manual_seed(place)
        network = DomainNetwork(INPUTS, 12, classes).double()
        pairs = PairSet(features, torch.arange(40) % classes, tuple(map(str, range(40))))
        domains[name] = Domain(network, PairStream(pairs, np.arange(40), 8, 0, name, cpu))
    draws = torch.Generator().manual_seed(3)
    terms = joint_terms(tuple(INPUTS), LossConfig(), MmdConfig(estimator=sys.argv[2]), draws)
    optimizer = sgd([domain.network for domain in domains.values()], OptimizerConfig())
    log = optimize(domains, terms, optimizer, passes=12, accumulate=3, rate=lambda step: 0.05, stage="test")
    result = {f"{name}.{key}": v for name, d in domains.items() for key, v in d.network.state_dict().items()}
    for name, domain in domains.items():
        result |= {f"gradient.{name}.{key}": p.grad for key, p in domain.network.named_parameters()}
    result |= {f"loss.{name}": torch.tensor(value, dtype=torch.float64) for name, value in log.terms.items()}
    torch.save(result, f"{sys.argv[1]}.{parallel.rank()}")
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launched(count, command, **kwargs):
    """Starts processes as torchrun does, and waits for them; it fails when one does."""
    port = free_port()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(n), "LOCAL_RANK": str(n)}, **kwargs)
        for n in range(count)
    ]
    assert [process.wait(300) for process in started] == [0] * count


@pytest.mark.parametrize("estimator", ["quadratic", "quadruple"])
def test_two_processes_give_the_numbers_of_one(tmp_path, estimator):
    script = tmp_path / "steps.py"
    script.write_text(STEPS, encoding="utf-8")
    subprocess.run([sys.executable, script, tmp_path / "one", estimator], check=True)
    launched(2, [sys.executable, str(script), str(tmp_path / "two"), estimator])
    alone, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert alone.keys() == first.keys()
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=1e-10, rtol=1e-8, msg=name)
        assert torch.equal(first[name], second[name]), name  # bit by bit: the two never drift apart


def test_alone_everything_is_the_identity():
    rows = torch.randn(4, 3, requires_grad=True)
    assert parallel.total(rows) is rows
    assert parallel.rows_of_all(rows) is rows
    assert parallel.own_rows(7) == slice(0, 7)
    assert (parallel.rank(), parallel.size()) == (0, 1)
    with parallel.processes(torch.device("cpu")), parallel.first_alone():
        parallel.wait()


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch of 64 pairs .* 3 processes"):
        parallel.own_rows(64)


def test_each_process_has_its_own_gpu(monkeypatch):
    assert parallel.local_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallel.local_device("cuda") == torch.device("cuda", 1)
    assert parallel.local_device("cpu") == torch.device("cpu")


FIRST_ALONE = """
import sys, time
from pathlib import Path
import torch
from dckt_trainer import parallel
done = Path(sys.argv[1])
with parallel.processes(torch.device("cpu")), parallel.first_alone():
    if parallel.rank():
        assert done.exists()
    else:
        time.sleep(1)
        done.touch()
"""


def test_the_others_wait_for_what_the_first_prepares(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(FIRST_ALONE, encoding="utf-8")
    launched(2, [sys.executable, str(script), str(tmp_path / "done")])
    assert Path(tmp_path / "done").exists()


def test_a_whole_training_by_two_processes_comes_to_the_same(corpora, cache, small, run_training, tmp_path):
    alone = run_training(tmp_path / "alone", "compute.threads=1")
    command = [sys.executable, "-m", "dckt_trainer", "--device", "cpu", "--preset", "small", "--json"]
    command += ["--source", str(corpora / "source"), "--target", str(corpora / "target"), "--cache", str(cache)]
    command += [part for change in (*small, "compute.threads=1") for part in ("--set", change)]
    launched(2, [*command, "--out", str(tmp_path / "two")], stdout=subprocess.DEVNULL)
    two = open_run(tmp_path / "two")
    assert two.complete
    chosen = [[event["selected"] for event in run.events("selection")] for run in (alone, two)]
    assert chosen[0] == chosen[1]
    for one, other in zip(alone.events("metrics"), two.events("metrics"), strict=True):
        assert one["stage"] == other["stage"]
        # In float32 rounding grows from step to step; the test in float64 above is the exact one.
        assert other.get("terms", {}) == pytest.approx(one.get("terms", {}), rel=0.02, abs=0.02)
    for domain in ("source", "target"):
        assert near(*(load_tensors(run.path / domain / "network.safetensors") for run in (alone, two)))


def near(one, other):
    """Whether all matrices agree to 3 percent of their norm; another seed's do not agree at all."""
    return (
        all((other[name] - value).norm() < 0.03 * value.norm() for name, value in one.items() if value.ndim == 2)
        and one.keys() == other.keys()
    )


def test_two_processes_can_go_on_with_what_one_began(corpora, cache, small, run_training, tmp_path, monkeypatch):
    whole = run_training(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(transfer, "inv_rate", stop_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        run_training(stopped)
    launched(
        2,
        [
            sys.executable,
            "-m",
            "dckt_trainer",
            "--resume",
            str(stopped),
            "--cache",
            str(cache),
            "--device",
            "cpu",
            "--json",
        ],
        stdout=subprocess.DEVNULL,
    )
    assert open_run(stopped).complete
    stages = [event["stage"] for event in open_run(stopped).events("metrics")]
    assert stages == [event["stage"] for event in whole.events("metrics")]
    for domain in ("source", "target"):
        assert near(*(load_tensors(run / domain / "network.safetensors") for run in (whole.path, stopped)))


BAD_NEWS = """
import sys
import torch
from dckt.errors import ConfigError, TrainingError
from dckt_trainer import parallel
with parallel.processes(torch.device("cpu")):
    try:
        with parallel.first_alone():
            if not parallel.rank():
                raise ConfigError("no such corpus")
    except TrainingError as error:
        assert parallel.rank() and "no such corpus" in str(error)
    except ConfigError:
        assert not parallel.rank()
    assert parallel.from_first(lambda: parallel.rank()) == 0
"""


def test_what_stops_the_first_process_is_told_to_the_others(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(BAD_NEWS, encoding="utf-8")
    launched(2, [sys.executable, str(script)])


def stop_in_round_two(config, step):
    if step >= 4:  # a round has four steps
        raise KeyboardInterrupt
    return config.lr
