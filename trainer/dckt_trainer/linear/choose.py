"""Whether to take the source in: only if validation says so, and says it clearly.

Without labels validation sees how partners find each other, which a source helps little even where it helps the search
by meaning much. So there it can object, no more: the source is left out if it does clearly harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dckt_trainer.linear.fit import Fitted, fit_linear, steps
from dckt_trainer.linear.unlabelled import fit_unlabelled
from dckt_trainer.pairs import PairSet
from dckt_trainer.progress import Reporter

# Of the difference on validation. Of two models that are equally good, the one that was chosen from more candidates
# looks better there, so to be ahead by any amount would not do.
STANDARD_ERRORS = 2.0


def fit_both(
    pairs: Mapping[str, PairSet], classes: int, reporter: Reporter, *, labelled: bool = True
) -> tuple[Fitted, ...]:
    """The best model of the target alone, and with a source the best one that takes it in.

    Args:
        pairs: ``target.train``, ``target.val``; with a source ``source.train``, and the same with ``.by_source``.
        classes: of the target; without labels so many clusters.
        reporter: told how far the work is.
        labelled: whether the target's labels are known.
    """
    fit = fit_linear if labelled else fit_unlabelled
    with reporter.task("correlations, target", steps(source=False, labelled=labelled)) as advance:
        found = [fit(pairs["target.train"], pairs["target.val"], classes, advance=advance)]
    if "source.train" in pairs:
        train, validation = (pairs[f"target.{part}.by_source"] for part in ("train", "val"))
        with reporter.task("correlations, source and target", steps(source=True, labelled=labelled)) as advance:
            found.append(fit(train, validation, classes, source=pairs["source.train"], advance=advance))
    return tuple(found)


def transfer_helps(found: Sequence[Fitted], reporter: Reporter, *, labelled: bool = True) -> bool:
    """Whether the model with the source is to be kept; says why.

    Args:
        found: the models of :func:`fit_both`.
        reporter: told the reason.
        labelled: whether the target's labels are known.
    """
    if len(found) < 2:
        return False
    alone, together = found
    gain, error = together.ahead_of(alone)
    if labelled:
        helps, figure, why = gain > STANDARD_ERRORS * error, "MAP", "does not help clearly"
    else:
        helps, figure, why = gain >= -STANDARD_ERRORS * error, "mean reciprocal rank of the partner", "does clear harm"
    reporter.say(
        f"validation {figure} {alone.per_pair.mean():.3f} without the source, {together.per_pair.mean():.3f} with it "
        f"(difference {gain:+.3f}, standard error {error:.3f}): the source is "
        + ("taken in" if helps else f"left out, for it {why}")
    )
    return helps
