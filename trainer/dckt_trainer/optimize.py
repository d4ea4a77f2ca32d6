"""One loop for every stage that trains networks on loss terms.

The pretraining of a domain and a round of transfer differ in their networks, streams and terms, not in the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dckt.errors import TrainingError
from dckt_trainer.config import OptimizerConfig
from dckt_trainer.losses import Batch, Term
from dckt_trainer.network import DomainNetwork
from dckt_trainer.pairs import PairStream


@dataclass(frozen=True)
class Domain:
    """A network and the pairs that it is trained on."""

    network: DomainNetwork
    stream: PairStream


@dataclass(frozen=True)
class StepLog:
    """Means over the forward passes of a stage, a pass over the data, or a round.

    Attributes:
        terms: unweighted value by term.
        weighted: the same times the term's weight.
        total: sum of ``weighted``.
        steps: solver steps taken.
    """

    terms: Mapping[str, float]
    weighted: Mapping[str, float]
    total: float
    steps: int


def sgd(networks: Sequence[nn.Module], config: OptimizerConfig) -> torch.optim.SGD:
    """SGD with momentum, fused: one pass over memory a step.

    Biases, and the scale of the text's normalisation, have their own rate and no decay.
    """
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:  # one that no term reaches makes steps too, so that each has its momentum
        parameter.grad = torch.zeros_like(parameter)
    weights, biases = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": biases, "weight_decay": 0.0, "factor": config.bias_lr_factor},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def set_rate(optimizer: torch.optim.SGD, rate: float) -> None:
    """Sets the learning rate of weights; the biases' follows by their factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def inv_rate(config: OptimizerConfig, step: int) -> float:
    """Caffe's ``inv`` policy: ``lr * (1 + inv_gamma * step) ** -inv_power``, step counted from 0."""
    return float(config.lr * (1 + config.inv_gamma * step) ** -config.inv_power)


def optimize(
    domains: Mapping[str, Domain],
    terms: Sequence[Term],
    optimizer: torch.optim.SGD,
    *,
    passes: int,
    accumulate: int,
    rate: Callable[[int], float],
    first_step: int = 0,
    stage: str,
    advance: Callable[[int], None] = lambda count: None,
) -> StepLog:
    """Runs forward passes; after each ``accumulate`` of them the mean gradient makes one step.

    A last group of fewer passes makes a step too, with the mean of what it has.

    Args:
        domains: by the names that the terms use.
        terms: what is minimised, weighted and added.
        optimizer: over the networks of all domains.
        passes: forward passes, one batch of each domain a pass.
        accumulate: passes a step.
        rate: learning rate of a step's number.
        first_step: number of the first step.
        stage: named in errors.
        advance: told after each pass.

    Raises:
        TrainingError: a term is not finite; the message names it, the stage and the step.
    """
    sums: dict[str, Tensor] = {}
    step = first_step
    for domain in domains.values():
        domain.network.train()
    for start in range(0, passes, accumulate):
        group = min(accumulate, passes - start)
        optimizer.zero_grad(set_to_none=False)
        for _ in range(group):
            batches = {}
            for name, domain in domains.items():
                features, labels = domain.stream.draw()
                batches[name] = Batch(domain.network(features), labels)
            values = {term.name: term.value(batches) for term in terms}
            total = torch.stack([term.weight * values[term.name] for term in terms]).sum()
            if not torch.isfinite(total):
                raise _not_finite(values, stage, step)
            torch.autograd.backward(total / group)
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu()
            advance(1)
        set_rate(optimizer, rate(step))
        optimizer.step()
        step += 1
    for name, domain in domains.items():
        if not all(torch.isfinite(parameter).all() for parameter in domain.network.parameters()):
            raise TrainingError(f"{stage}, step {step - 1}: weights of the {name} are not finite; lower optimizer.lr")
    means = {name: float(value) / passes for name, value in sums.items()}
    weighted = {term.name: term.weight * means[term.name] for term in terms if term.name in means}
    return StepLog(means, weighted, sum(weighted.values()), step - first_step)


def _not_finite(values: Mapping[str, Tensor], stage: str, step: int) -> TrainingError:
    bad = [name for name, value in values.items() if not torch.isfinite(value)]
    return TrainingError(
        f"{stage}, step {step}: {', '.join(bad) or 'the total loss'} is not finite; "
        "lower optimizer.lr or that term's weight in [losses]"
    )
