"""An advice in words, as a table, and as plain values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from dckt.errors import ConfigError
from dckt_trainer.advice.judgement import Advice, Figures, Interval, LeftOut
from dckt_trainer.markdown import markdown_table

FEW_PAIRS = 50  # of validation; with fewer the words say so
COLUMNS = ("MAP", "95 %", "less the advised", "took")
NOTE = (
    "MAP on validation, the mean of all directions; * is advised. Differences are pair by pair, with their 95 % "
    "interval. The first candidate's time includes the image features that were not cached yet."
)

_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def paragraphs(advice: Advice) -> list[str]:
    """The advice in words, most important first; the command is not among them."""
    told = [_choice(advice), _comparison(advice), _source(advice), _caution(advice), _rest(advice)]
    return [each for each in told if each]


def rows(advice: Advice) -> list[tuple[str, ...]]:
    """The table, in the order of :data:`COLUMNS` behind the title."""
    chosen = advice.verdict.chosen
    return [
        (
            each.candidate.title + (" *" if each is chosen else ""),
            f"{each.map.mean:.3f}",
            f"{max(each.map.low, 0):.3f}-{min(each.map.high, 1):.3f}",
            "–" if each is chosen else _signed(each.less(chosen)),
            duration(each.seconds),
        )
        for each in advice.figures
    ]


def markdown(advice: Advice) -> str:
    """The advice as a page."""
    trained = f"{advice.pairs['train']} training and {advice.pairs['val']} validation pairs of {advice.classes} classes"
    return "\n\n".join(
        [
            "# Advice",
            f"{advice.target}: {trained}. Source: {advice.source or 'none'}.",
            *paragraphs(advice),
            f"Train and test it with:\n\n    {shlex.join(advice.command)}",
            markdown_table(("", *COLUMNS), rows(advice)),
            NOTE + "\n",
        ]
    )


def record(advice: Advice) -> dict[str, Any]:
    """The advice as plain values, for JSON."""
    verdict = advice.verdict
    against = advice.with_and_without
    return {
        "format": "dckt-advice",
        "version": 1,
        "advised": verdict.chosen.candidate.key,
        "level_with": [each.candidate.key for each in verdict.level],
        "command": advice.command,
        "text": paragraphs(advice),
        "source": advice.source,
        "target": advice.target,
        "pairs": dict(advice.pairs),
        "classes": advice.classes,
        "settings": list(advice.changes),
        "seeds": advice.seeds,
        "budget_seconds": advice.budget,
        "spent_seconds": round(advice.spent, 1),
        "test_pairs_read": False,
        "candidates": [_record(advice, each) for each in advice.figures],
        "source_brings": against
        and {
            "with": against[0].candidate.key,
            "without": against[1].candidate.key,
            **vars(against[0].less(against[1])),
        },
        "left_out": [
            {
                "candidate": each.trial.candidates[-1].key,
                "why": each.why,
                "estimated_seconds": each.seconds,
                "remaining_seconds": each.remaining,
                "detail": each.detail,
            }
            for each in advice.left_out
        ],
    }


def sentence(left: LeftOut) -> str:
    """What to tell of a trial that shows nothing."""
    title = left.trial.candidates[-1].title
    if left.why == "memory":
        return f"{title}: left out, for {left.detail}."
    if left.why == "failed":
        return f"{title}: failed ({left.detail})."
    about = "" if left.seconds is None else f"about {duration(left.seconds)}"
    if left.why == "time":
        return f"{title}: left out, for it would take {about}, and {duration(left.remaining)} were left."
    return f"{title}: stopped when the budget was over; it was expected to take {about}."


def duration(seconds: float) -> str:
    """A time in words.

    >>> [duration(each) for each in (0.4, 59.6, 750, 3900)]
    ['under 1 s', '1 min', '12.5 min', '1 h 5 min']
    """
    if seconds < 1:
        return "under 1 s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.1f}".removesuffix(".0") + " min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


def seconds_of(text: str) -> float:
    """A time as users write it, in seconds.

    >>> seconds_of("1h30m")
    5400.0

    Raises:
        ConfigError: it is no time, or none at all.
    """
    found = _PARTS.fullmatch(text.strip().lower())
    total = (
        sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )
    if not total:
        raise ConfigError(f"--budget is {text!r}; expected a time with its unit, such as 90s, 20m or 1h30m")
    return total


def _choice(advice: Advice) -> str:
    chosen = advice.verdict.chosen
    words, found = chosen.candidate.words, chosen.map
    if advice.source is None:
        words = words.removesuffix(" without the source")
    count = advice.pairs["val"]
    return (
        f"Use {words}. On {count} validation pairs its MAP is {found.mean:.3f} "
        f"(95 % interval {max(found.low, 0):.3f} to {min(found.high, 1):.3f})."
    )


def _comparison(advice: Advice) -> str:
    verdict = advice.verdict
    chosen = verdict.chosen
    if not (verdict.level or verdict.behind):
        return (
            "Nothing else was trained that could be advised, so this says how good it is and not that it is the best."
        )
    told = []
    if verdict.level:
        listed = _listed([f"{each.candidate.title}, at {_told(each.less(chosen))}" for each in verdict.level])
        told.append(
            f"Level with it: {listed}. Validation cannot tell them apart, so take the "
            f"{'cheapest' if len(verdict.level) > 1 else 'cheaper'}, which it is."
        )
    if verdict.behind:
        first, *rest = verdict.behind
        ahead = chosen.less(first)
        told.append(f"It is clearly ahead of {first.candidate.title}, by {_told(ahead)}.")
        if rest:
            told.append(f"Further behind: {_listed([each.candidate.title for each in rest])}.")
    return " ".join(told)


def _source(advice: Advice) -> str:
    if advice.source is None:
        return (
            "No source was given, so what one would bring is not known: try a large labelled collection with --source."
        )
    compared = advice.with_and_without
    chosen = advice.verdict.chosen
    if compared is None:
        which = "without" if chosen.candidate.source else "with"
        return f"What the source brings is not known, for nothing {which} it was trained."
    taken, alone = compared
    gain = taken.less(alone)
    if taken is chosen:
        if gain.above:
            return f"The source brings {_told(gain)}, over the best without it, {alone.candidate.title}."
        return (
            f"Whether the source helps is not clear: over the best without it, {alone.candidate.title}, "
            f"the difference is {_told(gain)}."
        )
    best = f"the best with it, {taken.candidate.title}, is at {_told(gain)} from what is advised"
    if gain.below:
        return f"The source does not help: {best}."
    if gain.above:  # within a hair of the rule by which the run itself decides, or with seeds that disagree
        return f"The source may help: {best}, but `modern` itself asks for two standard errors and leaves it out."
    return f"The source does not help clearly: {best}."


def _caution(advice: Advice) -> str:
    found, chosen, count = advice.figures, advice.verdict.chosen, advice.pairs["val"]
    gaps = [each.less(chosen) for each in found if each is not chosen]
    what = "Settings and candidate" if gaps else "Its settings"
    told = [
        f"{what} were chosen on these same pairs, so expect somewhat less on new ones. The test pairs were not read."
    ]
    if gaps:
        half = max(gap.high - gap.low for gap in gaps) / 2
        told.append(f"With {count} validation pairs, a difference of less than about {half:.3f} may be chance.")
    if count < FEW_PAIRS:
        told.append("So few pairs decide little: more of them would tell more than more candidates.")
    if advice.seeds == 1 and any(each.candidate.preset != "modern" for each in found):
        told.append(
            "Each network was trained once, so the intervals lack what another seed changes; "
            "--seeds 3 with another --out tells it."
        )
    return " ".join(told)


def _rest(advice: Advice) -> str:
    if not advice.left_out:
        return ""
    told = [sentence(each) for each in advice.left_out]
    if any(each.why in ("time", "stopped") for each in advice.left_out):
        told.append("The same command with a larger --budget goes on with what was left out.")
    return " ".join(told)


def _signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _told(found: Interval) -> str:
    return f"{found.mean:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f})"


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _record(advice: Advice, each: Figures) -> dict[str, Any]:
    candidate, chosen = each.candidate, advice.verdict.chosen
    return {
        "key": candidate.key,
        "title": candidate.title,
        "preset": candidate.preset,
        "settings": list(candidate.changes),
        "source": candidate.source,
        "offered": each.offered,
        "validation_map": vars(each.map) | {"by_seed": each.per_pair.mean(1).tolist()},
        "less_the_advised": None if each is chosen else vars(each.less(chosen)),
        "seconds": round(each.seconds, 1),
    }
