"""One loop for every stage that trains networks on loss terms.

The pretraining of a domain and a round of transfer differ in their networks, streams and terms, not in the loop. A
solver step averages the gradients of several forward passes, each with its own statistics and its own MMD; they are
folded into one product a layer, which reads the weights once (see :mod:`dckt_trainer.layers`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dckt.errors import TrainingError
from dckt_trainer import parallel
from dckt_trainer.config import ComputeConfig, OptimizerConfig
from dckt_trainer.losses import Batch, Term
from dckt_trainer.network import Activations, DomainNetwork
from dckt_trainer.pairs import Draw, PairStream
from dckt_trainer.progress import Advance

LOW = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_SCALE = 2.0**12  # of the loss in float16
NAMED = 5  # pairs in an error


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
        skipped: of these, steps that overflowed in float16 and were left out.
    """

    terms: Mapping[str, float]
    weighted: Mapping[str, float]
    total: float
    steps: int
    skipped: int = 0


class Solver(torch.optim.SGD):
    """SGD that carries the scale of the loss with it, which float16 needs and a checkpoint keeps."""

    scaler: torch.amp.GradScaler | None = None

    def scale_for(self, low: torch.dtype | None) -> torch.amp.GradScaler:
        """The scale as it stands; it does nothing but in float16."""
        if self.scaler is None:
            kind = self.param_groups[0]["params"][0].device.type
            self.scaler = torch.amp.GradScaler(kind, init_scale=FIRST_SCALE, enabled=low == torch.float16)
        return self.scaler


def sgd(networks: Sequence[DomainNetwork], config: OptimizerConfig, front_factor: float = 1.0) -> Solver:
    """SGD with momentum, fused: one pass over memory a step.

    Biases, and the scale of the text's normalisation, have their own rate and no decay. Fronts learn ``front_factor``
    times as fast.
    """
    groups: list[dict[str, Any]] = []
    for prefix, factor in (("", 1.0), ("fronts.", front_factor)):
        named = [
            (name, parameter)
            for network in networks
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and name.startswith("fronts.") == bool(prefix)
        ]
        weights, biases = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]
        shared = {"form": config.form, "momentum": config.momentum, "kept": config.momentum}
        groups += [
            {"params": weights, "weight_decay": config.weight_decay, "factor": factor, **shared},
            {"params": biases, "weight_decay": 0.0, "factor": factor * config.bias_lr_factor, **shared},
        ]
    groups = [group for group in groups if group["params"]]
    for group in groups:  # a parameter that no term reaches makes steps too, so that each has its momentum
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    solver = Solver(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:  # else a first step that float16 skips would leave it as memory happened to be
        for group in groups:
            for parameter in group["params"]:
                solver.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return solver


def set_rate(optimizer: torch.optim.SGD, rate: float, before: float) -> None:
    """Sets the learning rate of weights; the biases' follows by their factor.

    Caffe keeps the rate inside the velocity, ``v <- m v + rate * g; w <- w - v``. With PyTorch's ``u = v / rate``
    that is ``u <- m * (before / rate) * u + g``: its momentum times the ratio of the rates.

    Args:
        optimizer: made by :func:`sgd`.
        rate: of this step.
        before: the rate of the step before.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
        if group["form"] == "caffe":
            group["momentum"] = group["kept"] * before / rate


def inv_rate(config: OptimizerConfig, step: int) -> float:
    """Caffe's ``inv`` policy: ``lr * (1 + inv_gamma * step) ** -inv_power``, step counted from 0."""
    return float(config.lr * (1 + config.inv_gamma * step) ** -config.inv_power)


def optimize(
    domains: Mapping[str, Domain],
    terms: Sequence[Term],
    optimizer: Solver,
    *,
    passes: int,
    accumulate: int,
    rate: Callable[[int], float],
    compute: ComputeConfig | None = None,
    first_step: int = 0,
    stage: str,
    advance: Advance = lambda count, figures=None: None,
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
        compute: precision and folding.
        first_step: number of the first step.
        stage: named in errors.
        advance: told after each step how many passes it had, and the means of its terms by kind.

    Raises:
        TrainingError: a term is not finite; the message names it, the stage, the step, the layer and the pairs. Or
            every step overflowed in float16.
    """
    compute = compute or ComputeConfig()
    low = LOW[compute.precision]
    scaler = optimizer.scale_for(low)
    skipped = 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    forwards: dict[str, Callable[[Mapping[str, Tensor]], Activations]] = {}
    for name, domain in domains.items():
        domain.network.train()
        domain.network.use_precision(low)
        forwards[name] = _compiled(domain.network) if compute.compile else domain.network
    sums = torch.zeros(len(terms), dtype=torch.float64)
    step = first_step
    for start in range(0, passes, accumulate):
        group = min(accumulate, passes - start)
        of_step = torch.zeros(len(terms), dtype=torch.float64)
        for domain in domains.values():
            domain.network.forget_gradients()
        for folded in _folds(group, compute.fold):
            draws = {name: domain.stream.draw(folded) for name, domain in domains.items()}
            batches = {name: _batch(forwards[name], draw) for name, draw in draws.items()}
            values = torch.stack([term.value(batches) for term in terms])
            total = sum((term.weight * value for term, value in zip(terms, values, strict=True)), values.new_zeros(()))
            if not torch.isfinite(total):
                raise _not_finite(terms, values, batches, draws, domains, f"{stage}, step {step}")
            torch.autograd.backward(scaler.scale(total * (folded / group)))
            of_step += folded * values.detach().cpu().double()
        for domain in domains.values():
            domain.network.settle_gradients()
        parallel.add_gradients(parameters)
        set_rate(optimizer, rate(step), rate(max(step - 1, 0)))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale  # this step overflowed in float16, and was left out
        step += 1
        sums += of_step
        advance(group, _by_kind(terms, of_step / group))
    if skipped and skipped == step - first_step:
        raise TrainingError(f"{stage}: every step overflowed in float16; use compute.precision bfloat16 or float32")
    _check_weights(domains, f"{stage}, step {step - 1}")
    means = dict(zip([term.name for term in terms], (sums / max(passes, 1)).tolist(), strict=True))
    weighted = {term.name: term.weight * means[term.name] for term in terms}
    return StepLog(means, weighted, sum(weighted.values()), step - first_step, skipped)


def _compiled(network: DomainNetwork) -> Callable[[Mapping[str, Tensor]], Activations]:
    compiled = torch.compile(network)

    def forward(features: Mapping[str, Tensor]) -> Activations:
        with warnings.catch_warnings():  # the compiler looks at gradients of what has none, and warns of itself
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            activations: Activations = compiled(features)
            return activations

    return forward


def _folds(passes: int, most: int) -> list[int]:
    """So many passes at once, no more than ``most`` (0: all): 10 with 4 are 4, 4, 2."""
    most = most or passes
    return [min(most, passes - start) for start in range(0, passes, most)]


def _batch(forward: Callable[[Mapping[str, Tensor]], Activations], draw: Draw) -> Batch:
    activations = forward(draw.features)
    if parallel.size() > 1:
        activations = activations.map(parallel.rows_of_all)
    return Batch(activations, draw.labels)


def _by_kind(terms: Sequence[Term], values: Tensor) -> dict[str, float]:
    """The weighted terms of a step, added up by kind, and the loss: what a person watches."""
    figures = {"loss": 0.0}
    for term, value in zip(terms, values.tolist(), strict=True):
        kind = term.name.partition("/")[0]
        figures["loss"] += term.weight * value
        figures[kind] = figures.get(kind, 0.0) + term.weight * value
    return figures


def _not_finite(
    terms: Sequence[Term],
    values: Tensor,
    batches: Mapping[str, Batch],
    draws: Mapping[str, Draw],
    domains: Mapping[str, Domain],
    where: str,
) -> TrainingError:
    """Says which terms broke, and the first layer, with the pairs of its rows, from which on numbers are not finite."""
    bad = [term.name for term, value in zip(terms, values, strict=True) if not torch.isfinite(value)]
    found = ""
    for name, batch in batches.items():
        draw = draws[name]
        inputs = [(f"{medium} features", rows) for medium, rows in draw.features.items() if rows.is_floating_point()]
        for layer, rows in (*inputs, *batch.activations.named()):
            broken = ~torch.isfinite(rows.detach()).all(-1)  # (rows, G); stacked media have B rows each
            if broken.any():
                whole = len(rows) >= len(draw.places)  # features are this process's own rows only
                places = draw.places if whole else draw.places[parallel.own_rows(len(draw.places))]
                places = places.repeat(len(rows) // len(places), 1)
                ids = [domains[name].stream.pairs.ids[place] for place in sorted(set(places[broken.cpu()].tolist()))]
                more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
                found = f"; first in {layer} of the {name}, pairs {', '.join(ids[:NAMED])}{more}"
                break
        if found:
            break
    return TrainingError(
        f"{where}: {', '.join(bad) or 'the total loss'} is not finite{found}; "
        "lower optimizer.lr or that term's weight in [losses], or look at those pairs"
    )


def _check_weights(domains: Mapping[str, Domain], where: str) -> None:
    for name, domain in domains.items():
        for parameter_name, parameter in domain.network.named_parameters():
            if not torch.isfinite(parameter.sum()):  # the sum of finite weights is far below what float32 holds
                raise TrainingError(
                    f"{where}: weights of the {name} are not finite, first {parameter_name}; lower optimizer.lr"
                )
