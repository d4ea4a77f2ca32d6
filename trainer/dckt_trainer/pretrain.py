"""Separate pretraining of one domain: where progressive transfer safely starts from (section 4 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from dckt_trainer.config import Config
from dckt_trainer.losses import pretraining_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, Solver, StepLog, optimize
from dckt_trainer.pairs import PairSet, PairStream
from dckt_trainer.progress import Advance

PARTS = 10  # a log line and a checkpoint after each


def pretrain(
    network: DomainNetwork,
    optimizer: Solver,
    pairs: PairSet,
    config: Config,
    *,
    domain: str,
    epochs: int,
    device: torch.device,
    first_pass: int = 0,
    advance: Advance = lambda count, figures=None: None,
    after: Callable[[int, StepLog], None] = lambda passes, log: None,
) -> DomainNetwork:
    """Trains one domain's network by itself, in place, at a constant rate.

    Args:
        network: on ``device``.
        optimizer: over it.
        pairs: the domain's training pairs.
        config: batch, accumulation, optimiser and the weight of the pair loss.
        domain: ``source`` or ``target``; names the terms and the stream of random numbers.
        epochs: passes over the pairs.
        device: where batches go.
        first_pass: forward passes done before, as ``after`` was told; the path is that of a training in one go.
        advance: told after each step.
        after: told the forward passes done so far, and the means since the call before, after each tenth.
    """
    settings = config.pretrain
    stream = PairStream(
        pairs,
        np.arange(len(pairs)),
        settings.batch,
        config.seed,
        f"pretrain/{domain}",
        device,
        fixed=config.transfer.order == "fixed",
        drawn=first_pass,
    )
    passes = passes_for(len(pairs), epochs, settings.batch)
    # Cut at whole steps, so that accumulation groups are the same however often means are reported.
    steps = math.ceil(passes / settings.accumulate)
    share = max(1, math.ceil(steps / PARTS)) * settings.accumulate
    for start in range(first_pass, passes, share):
        log = optimize(
            {domain: Domain(network, stream)},
            pretraining_terms(domain, network.inputs, config.losses),
            optimizer,
            passes=min(share, passes - start),
            accumulate=settings.accumulate,
            rate=lambda step: config.optimizer.lr,
            compute=config.compute,
            first_step=start // settings.accumulate,
            stage=f"pretraining of the {domain}",
            advance=advance,
        )
        after(min(start + share, passes), log)
    return network


def passes_for(pairs: int, epochs: int, batch: int) -> int:
    """Forward passes that draw each pair ``epochs`` times on average."""
    return math.ceil(pairs * epochs / batch)
