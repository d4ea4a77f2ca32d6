"""Whether to take the source in: only if validation says so, and says it clearly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dckt_trainer.linear.fit import Fitted, fit_linear, steps
from dckt_trainer.pairs import PairSet
from dckt_trainer.progress import Reporter

# Of the difference on validation. Of two models that are equally good, the one that was chosen from more candidates
# looks better there, so to be ahead by any amount would not do.
STANDARD_ERRORS = 2.0


def fit_both(pairs: Mapping[str, PairSet], classes: int, reporter: Reporter) -> tuple[Fitted, ...]:
    """The best model of the target alone, and with a source the best one that takes it in.

    Args:
        pairs: ``target.train``, ``target.val``; with a source ``source.train``, and the same with ``.by_source``.
        classes: of the target.
        reporter: told how far the work is.
    """
    with reporter.task("correlations, target", steps(source=False)) as advance:
        found = [fit_linear(pairs["target.train"], pairs["target.val"], classes, advance=advance)]
    if "source.train" in pairs:
        train, validation = (pairs[f"target.{part}.by_source"] for part in ("train", "val"))
        with reporter.task("correlations, source and target", steps(source=True)) as advance:
            found.append(fit_linear(train, validation, classes, source=pairs["source.train"], advance=advance))
    return tuple(found)


def transfer_helps(found: Sequence[Fitted], reporter: Reporter) -> bool:
    """Whether the model with the source is to be kept; says why."""
    if len(found) < 2:
        return False
    alone, together = found
    gain, error = together.ahead_of(alone)
    helps = gain > STANDARD_ERRORS * error
    reporter.say(
        f"validation MAP {alone.per_pair.mean():.3f} without the source, {together.per_pair.mean():.3f} with it "
        f"(difference {gain:+.3f}, standard error {error:.3f}): the source is "
        + ("taken in" if helps else "left out, for it does not help clearly")
    )
    return helps
