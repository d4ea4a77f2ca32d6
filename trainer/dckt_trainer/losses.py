"""The loss terms of DCKT, as data.

A term is a name, a weight and a pure function of the two domains' activations, so an ablation is a weight of zero and
a new term is one more entry. Its value is the mean over the G batches that are folded into a pass. Shape letters: B
pairs a batch, G batches, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from dckt_trainer.config import LossConfig, MmdConfig
from dckt_trainer.mmd import mmd
from dckt_trainer.network import Activations


@dataclass(frozen=True)
class Batch:
    """One domain's activations, and the pairs that they belong to.

    Attributes:
        activations: of B pairs in each of G batches.
        labels: (B, G) class numbers.
    """

    activations: Activations
    labels: Tensor


@dataclass(frozen=True)
class Term:
    """A weighted term of the total loss.

    Attributes:
        name: ``kind/place``, as it is logged.
        weight: what its value is multiplied by.
        value: the unweighted value, a scalar, of a mapping with the domains ``source`` and ``target``.
    """

    name: str
    weight: float
    value: Callable[[dict[str, Batch]], Tensor]


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of (..., C) logits against (...) labels (eq. 9 and 10)."""
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten())


def contrastive_loss(first: Tensor, second: Tensor, same: Tensor, margin: float = 1.0) -> Tensor:
    """Caffe's contrastive loss, ``1 / (2 B) * sum [y d^2 + (1 - y) max(margin - d, 0)^2]`` with ``d = |a - b|``.

    DCKT has pairs alone, y = 1, which is :func:`pair_loss`; other methods of the field push strangers apart.

    Args:
        first: (B, D).
        second: (B, D).
        same: (B,) y: 1 where the rows belong together, else 0.
        margin: strangers farther apart than this are left alone.
    """
    squares = (first - second).square().sum(-1)
    gaps = (margin - squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()).clamp_min(0)
    return (same * squares + (1 - same) * gaps.square()).sum() / (2 * len(first))


def pair_loss(first: Tensor, second: Tensor) -> Tensor:
    """``1 / (2 B) * sum |first_n - second_n|^2`` of two (B, ..., D) activations (eq. 4 to 7), a mean over batches.

    The paper adds the distances up; the mean form, with the released weight, is what trains.
    """
    apart = first - second
    return apart.square().sum() / (2 * apart[..., 0].numel())


def pretraining_terms(domain: str, media: Iterable[str], weights: LossConfig) -> list[Term]:
    """Terms of one domain by itself: cross entropy of each medium at weight 1, and the pair loss."""
    pair = weights.pair_source if domain == "source" else weights.pair_target
    return _without_zeros([*_semantic(domain, media, 1.0), *_pair(domain, media, pair)])


def joint_terms(
    media: Iterable[str], weights: LossConfig, config: MmdConfig, generator: torch.Generator | None = None
) -> list[Term]:
    """All terms of the joint stage: the total loss of the paper with weights.

    Args:
        media: names of the media.
        weights: one weight a kind of term.
        config: how the MMD terms are estimated.
        generator: where the estimators ``quadruple`` and ``linear`` draw from.
    """
    media = tuple(media)

    def distance(name: str, weight: float, of: Callable[[Activations], Tensor]) -> Term:
        def value(batches: dict[str, Batch]) -> Tensor:
            source, target = of(batches["source"].activations), of(batches["target"].activations)
            return mmd(source, target, config, generator)

        return Term(f"mmd/{name}", weight, value)

    terms = [
        *_semantic("source", media, weights.semantic_source),
        *_semantic("target", media, weights.semantic_target),
        *_pair("source", media, weights.pair_source),
        *_pair("target", media, weights.pair_target),
    ]
    for medium in media:  # media level, eq. 2 and 3
        terms.append(distance(f"{medium}.fc6", weights.mmd_fc6, lambda a, m=medium: a.fc6[m]))  # type: ignore[misc]
        terms.append(distance(f"{medium}.fc7", weights.mmd_fc7, lambda a, m=medium: a.fc7[m]))  # type: ignore[misc]
    terms.append(distance("common.fc8", weights.mmd_fc8, lambda a: a.fc8))  # correlation level, eq. 8
    terms.append(distance("common.fc9", weights.mmd_fc9, lambda a: a.fc9))
    return _without_zeros(terms)


def _semantic(domain: str, media: Iterable[str], weight: float) -> list[Term]:
    def term(medium: str) -> Term:
        return Term(
            f"semantic/{domain}.{medium}",
            weight,
            lambda batches: semantic_loss(batches[domain].activations.logits[medium], batches[domain].labels),
        )

    return [term(medium) for medium in media]


def _pair(domain: str, media: Iterable[str], weight: float) -> list[Term]:
    """A term for each layer and every two media: eq. 4 to 7 have one, for image and text.

    What two items of a pair have in common is that they occur together, which is true of any two of them.
    """

    def term(layer: str, first: str, second: str) -> Term:
        def value(batches: dict[str, Batch]) -> Tensor:
            activations = getattr(batches[domain].activations, layer)
            return pair_loss(activations[first], activations[second])

        return Term(f"pair/{domain}.{layer}.{first}-{second}", weight, value)

    return [term(layer, *two) for layer in ("fc6", "fc7") for two in combinations(media, 2)]


def _without_zeros(terms: Iterable[Term]) -> list[Term]:
    return [term for term in terms if term.weight > 0]
