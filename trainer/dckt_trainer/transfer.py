"""Progressive two-level transfer: Algorithm 1 of the paper.

In each round the source model scores how consistent every target pair is with it, some pairs are selected, and both
networks are trained together on the source and the selected pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dckt_trainer import parallel
from dckt_trainer.config import Config
from dckt_trainer.evaluate import represent
from dckt_trainer.losses import joint_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, Solver, StepLog, inv_rate, optimize
from dckt_trainer.pairs import PairSet, PairStream
from dckt_trainer.progress import Advance
from dckt_trainer.seeds import numpy_generator, torch_generator
from dckt_trainer.selection import OnDemand, Selection, select


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
        selection: the scores of all target pairs, and those that were trained on.
        steps: means of the loss terms.
        first_step: number of the round's first solver step.
    """

    number: int
    selection: Selection
    steps: StepLog
    first_step: int


def transfer_round(
    number: int,
    source: DomainNetwork,
    target: DomainNetwork,
    data: JointData,
    optimizer: Solver,
    config: Config,
    *,
    first_step: int,
    device: torch.device,
    advance: Advance = lambda count, figures=None: None,
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
        advance: told after each step.
    """
    settings = config.transfer
    for network in (source, target):
        network.freeze_fronts(number <= config.text.cnn_frozen_rounds)
    # The first process's, for all: a last bit of difference between two devices could part their draws.
    selection = parallel.from_first(
        lambda: select(
            settings,
            number,
            represent(source, data.target_for_source, device),
            OnDemand(lambda: represent(target, data.target, device)),
            data.target.labels.numpy(),
            numpy_generator(config.seed, "selection", 1 if settings.draws == "frozen" else number),
        )
    )
    fixed = settings.order == "fixed"

    def stream(name: str, pairs: PairSet, places: NDArray[np.int64]) -> PairStream:
        name = name if fixed else f"{name}/{number}"
        return PairStream(pairs, places, settings.batch, config.seed, name, device, fixed=fixed)

    domains = {
        "source": Domain(source, stream("source", data.source, np.arange(len(data.source)))),
        "target": Domain(target, stream("target", data.target, selection.places)),
    }
    log = optimize(
        domains,
        joint_terms(source.inputs, config.losses, config.mmd, torch_generator(config.seed, "mmd", number)),
        optimizer,
        passes=passes_of_round(len(data.source), config),
        accumulate=settings.accumulate,
        rate=lambda step: inv_rate(config.optimizer, step),
        compute=config.compute,
        first_step=first_step,
        stage=f"round {number}",
        advance=advance,
    )
    return RoundLog(number, selection, log, first_step)


def passes_of_round(source_pairs: int, config: Config) -> int:
    """Forward passes of a round: Ep passes over the source (P / Q times as many over a target of Q pairs)."""
    return math.ceil(source_pairs * config.transfer.source_epochs / config.transfer.batch)
