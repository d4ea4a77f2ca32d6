"""Progressive two-level transfer: Algorithm 1 of the paper.

In each round the source model scores how consistent every target pair is with it, some pairs are selected, and both
networks are trained together on the source and the selected pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dckt_trainer.config import Config
from dckt_trainer.evaluate import represent
from dckt_trainer.losses import joint_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, StepLog, inv_rate, optimize
from dckt_trainer.pairs import PairSet, PairStream
from dckt_trainer.seeds import numpy_generator, torch_generator
from dckt_trainer.selection import domain_consistency, select


@dataclass(frozen=True)
class JointData:
    """What the joint stage trains on.

    Attributes:
        source: the source's training pairs.
        target: the target's training pairs, as the target network reads them.
        target_for_source: the same pairs in the same order, as the source network reads them (its own Word CNN).
    """

    source: PairSet
    target: PairSet
    target_for_source: PairSet


@dataclass(frozen=True)
class RoundLog:
    """What one round did.

    Attributes:
        number: from 1.
        consistency: (Q,) AP^q of every target pair, 0 to 2.
        selected: places of the pairs that were trained on.
        steps: means of the loss terms.
        first_step: number of the round's first solver step.
    """

    number: int
    consistency: NDArray[np.float64]
    selected: NDArray[np.int64]
    steps: StepLog
    first_step: int


def transfer_round(
    number: int,
    source: DomainNetwork,
    target: DomainNetwork,
    data: JointData,
    optimizer: torch.optim.SGD,
    config: Config,
    *,
    first_step: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> RoundLog:
    """Scores, selects, and trains both networks in place for one round.

    The round's random numbers depend on the seed and its number alone, so a resumed run takes the same path.

    Args:
        number: the round r, from 1.
        source: Model_s after the round before.
        target: Model_t after the round before.
        data: the pairs of both domains.
        optimizer: over both networks; its momentum carries over from round to round.
        config: the run's configuration.
        first_step: solver steps taken in the rounds before.
        device: where the networks are.
        advance: told after each forward pass.
    """
    vectors = represent(source, data.target_for_source, device)
    labels = data.target.labels.numpy()
    consistency = domain_consistency(vectors["image"], vectors["text"], labels)
    settings = config.transfer
    draws = numpy_generator(config.seed, "selection", number)
    selected = select(settings.law, consistency, number, settings.alpha, draws)

    def stream(pairs: PairSet, places: NDArray[np.int64], name: str) -> PairStream:
        generator = torch_generator(config.seed, "order", name, number)
        return PairStream(pairs, places, settings.batch, generator, device)

    domains = {
        "source": Domain(source, stream(data.source, np.arange(len(data.source)), "source")),
        "target": Domain(target, stream(data.target, selected, "target")),
    }
    generator = torch_generator(config.seed, "mmd", number)
    log = optimize(
        domains,
        joint_terms(source.inputs, config.losses, config.mmd, generator),
        optimizer,
        passes=passes_of_round(len(data.source), config),
        accumulate=settings.accumulate,
        rate=lambda step: inv_rate(config.optimizer, step),
        first_step=first_step,
        stage=f"round {number}",
        advance=advance,
    )
    return RoundLog(number, consistency, selected, log, first_step)


def passes_of_round(source_pairs: int, config: Config) -> int:
    """Forward passes of a round: Ep passes over the source (P / Q times as many over a target of Q pairs)."""
    return math.ceil(source_pairs * config.transfer.source_epochs / config.transfer.batch)
