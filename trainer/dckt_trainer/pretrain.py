"""Separate pretraining of one domain: where progressive transfer safely starts from (section 4 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from dckt_trainer.config import Config
from dckt_trainer.losses import pretraining_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, StepLog, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream
from dckt_trainer.seeds import torch_generator


def pretrain(
    network: DomainNetwork,
    pairs: PairSet,
    config: Config,
    *,
    domain: str,
    epochs: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
    on_epochs: Callable[[int, StepLog], None] = lambda epoch, log: None,
) -> DomainNetwork:
    """Trains one domain's network by itself, in place, at a constant rate.

    Args:
        network: on ``device``.
        pairs: the domain's training pairs.
        config: batch, accumulation, optimiser and the weight of the pair loss.
        domain: ``source`` or ``target``; names the terms and the stream of random numbers.
        epochs: passes over the pairs.
        device: where batches go.
        advance: told after each forward pass.
        on_epochs: told the means of each tenth of the training.
    """
    terms = pretraining_terms(domain, network.inputs, config.losses)
    generator = torch_generator(config.seed, "pretrain", domain)
    places = np.arange(len(pairs))
    stream = PairStream(pairs, places, config.pretrain.batch, generator, device)
    optimizer = sgd([network], config.optimizer)
    passes = passes_for(len(pairs), epochs, config.pretrain.batch)
    # Cut at whole steps, so that accumulation groups are the same however often means are reported.
    steps = math.ceil(passes / config.pretrain.accumulate)
    share = max(1, math.ceil(steps / 10)) * config.pretrain.accumulate
    for start in range(0, passes, share):
        log = optimize(
            {domain: Domain(network, stream)},
            terms,
            optimizer,
            passes=min(share, passes - start),
            accumulate=config.pretrain.accumulate,
            rate=lambda step: config.optimizer.lr,
            first_step=start // config.pretrain.accumulate,
            stage=f"pretraining of the {domain}",
            advance=advance,
        )
        on_epochs(min(start + share, passes) * config.pretrain.batch // len(pairs), log)
    return network


def passes_for(pairs: int, epochs: int, batch: int) -> int:
    """Forward passes that draw each pair ``epochs`` times on average."""
    return math.ceil(pairs * epochs / batch)
