"""A synthetic pair of domains: pictures of patterned figures, and short texts about them.

It needs no download, so it serves demonstrations and tests. A picture shows one to four figures of one shape,
texture and colour over a cluttered background; its text says so in one of many ways. The class of a pair is a
combination of the three, from which single pictures deviate now and then. A pair of "yellow-checked-cross"::

    We see a triad of saltires, mostly lemon and gingham, beside a small verdigris mark.
    Chequered golden roods: three, ready to print.

With ``audio`` a pair also has a sound, of which there are only numbers: the energies in :data:`BANDS` bands, in
``vectors/audio.npy``. Every colour, texture and shape has a spectrum, and those of a picture add up.

The words of labels never stand in a text. Every value of an attribute has several other words, and it must be
learnt that they mean the same. Source and target have no label in common, but every shape, texture and colour of
the target occurs in the source: who knows from the source how they look and what they are called needs only few
pairs to learn the target's combinations. With ``unrelated`` they have no shape, texture or colour in common either,
nor any word for one, and there is nothing to learn from the source but how sentences are made.

Reproducible: the same arguments give the same texts, and with the same Pillow the same pixels, on every machine.
Geometry is in integers, each pair has its own stream of random numbers, and only ``random.Random.random`` is drawn
from, whose sequence Python promises to keep. A pair's stream is named by its class, split and place, so more pairs of
a class leave those that were there as they were.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from dckt.errors import ConfigError, CorpusError
from dckt.features import FOLDER
from dckt.files import atomic_folder

T = TypeVar("T")
Point: TypeAlias = tuple[int, int]
Colour: TypeAlias = tuple[int, int, int]

# The names make labels; texts use the other words only. Words for shapes: one figure, several.
SHAPES: Mapping[str, Sequence[str]] = {
    "circle": ("disc discs", "orb orbs", "roundel roundels", "ball balls", "coin coins"),
    "square": ("box boxes", "block blocks", "tile tiles", "quad quads", "cube cubes"),
    "triangle": ("wedge wedges", "pyramid pyramids", "delta deltas", "trigon trigons", "cone cones"),
    "star": ("sunburst sunbursts", "pentagram pentagrams", "asterisk asterisks", "spark sparks", "twinkle twinkles"),
    "cross": ("plus pluses", "crucifix crucifixes", "saltire saltires", "rood roods", "ankh ankhs"),
    "ring": ("hoop hoops", "donut donuts", "loop loops", "annulus annuli", "tyre tyres"),
    "crescent": ("sickle sickles", "moon moons", "lune lunes", "croissant croissants", "horn horns"),
    "arrow": ("pointer pointers", "dart darts", "cursor cursors", "signpost signposts", "bolt bolts"),
}
TEXTURES: Mapping[str, Sequence[str]] = {
    "plain": ("solid", "uniform", "unpatterned", "flat", "even"),
    "striped": ("banded", "lined", "barred", "streaked", "pinstripe"),
    "dotted": ("spotted", "polka", "freckled", "pebbled", "speckled"),
    "checked": ("tartan", "gingham", "plaid", "chequered", "chessboard"),
    "meshed": ("latticed", "gridded", "netted", "trellised", "woven"),
}
# Hue, saturation and brightness, in degrees and per cent.
COLOURS: Mapping[str, tuple[tuple[int, int, int], Sequence[str]]] = {
    "red": ((0, 85, 85), ("crimson", "scarlet", "ruby", "cherry", "vermilion")),
    "orange": ((28, 90, 95), ("tangerine", "amber", "apricot", "pumpkin", "copper")),
    "yellow": ((54, 85, 95), ("golden", "lemon", "canary", "mustard", "saffron")),
    "green": ((115, 75, 70), ("emerald", "mossy", "olive", "jade", "fern")),
    "cyan": ((178, 75, 80), ("turquoise", "aqua", "teal", "lagoon", "verdigris")),
    "blue": ((225, 80, 85), ("azure", "navy", "cobalt", "sapphire", "indigo")),
    "purple": ((275, 65, 70), ("violet", "lilac", "plum", "mauve", "amethyst")),
    "pink": ((325, 55, 98), ("rosy", "fuchsia", "salmon", "magenta", "blush")),
}
COUNTS: Mapping[int, Sequence[str]] = {
    1: ("one", "a single", "a lone", "just one"),
    2: ("two", "a pair of", "a couple of", "twin"),
    3: ("three", "a trio of", "a triad of", "triple"),
    4: ("four", "a quartet of", "a foursome of", "two pairs of"),
}
GENERAL = ("figure figures", "item items", "motif motifs")  # where the shape is not told
SENTENCES = (
    "{count} {adjectives} {noun}",
    "{count} {noun}, {both}",
    "{count} {noun} in {both}",
    "{both}: {count} {noun}",
    "we see {count} {noun}, mostly {both}",
    "here come {count} {adjectives} {noun}",
)
# What else a text says, about something else or about nothing in particular.
CLAUSES = (
    "beside a small {colour} mark",
    "next to another {shape} in {colour}",
    "on a {ground} ground with thin lines",
    "over a {ground} backdrop",
    "not the {colour} one",
    "from the {texture} series",
    "unlike the {texture} {shape} of last week",
    "sheet {number}",
    "catalogue entry {number}",
    "drawn on a rainy monday",
    "photographed at noon",
    "a sample from the old notebook",
    "for the autumn window",
    "slightly turned",
    "as ordered by the workshop",
    "with soft edges",
    "ready to print",
)
GROUNDS = ("pale", "misty", "dusky", "bright", "faded", "chalky")

Values: TypeAlias = tuple[Sequence[str], ...]  # colours, textures, shapes
ALL: Values = (list(COLOURS), list(TEXTURES), list(SHAPES))

CONSTANCY = 0.95  # how often an attribute of a picture is that of its class
SILENCE = 0.25  # how often a text leaves one attribute out
BANDS = 24  # numbers of a sound
NOISE = 1.0  # of a band, beside spectra from -1 to 1
SUPERSAMPLING = 2  # pictures are drawn so many times larger and averaged down


@dataclass(frozen=True)
class Look:
    """What a picture shows, or what a class typically shows."""

    colour: str
    texture: str
    shape: str

    @property
    def values(self) -> tuple[str, str, str]:
        """Colour, texture and shape."""
        return self.colour, self.texture, self.shape

    @property
    def label(self) -> str:
        """The name of a class."""
        return "-".join(self.values)


def write_synthetic(
    root: Path,
    *,
    seed: int = 0,
    source_classes: int = 40,
    source_pairs_per_class: int = 50,
    target_classes: int = 16,
    target_pairs_per_class: int = 5,
    val_pairs_per_class: int = 10,
    test_pairs_per_class: int = 20,
    side: int = 96,
    audio: bool = False,
    unrelated: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path]:
    """Writes the corpora ``root/source`` and ``root/target``, each whole or not at all.

    Args:
        root: folder of the two corpora; made where it is missing.
        seed: another seed, other classes, pictures and texts.
        source_classes: labels of the source.
        source_pairs_per_class: train pairs of each; a tenth as many, at least one, are added for val and for test.
        target_classes: labels of the target.
        target_pairs_per_class: train pairs of each.
        val_pairs_per_class: val pairs of each label of the target.
        test_pairs_per_class: test pairs of each label of the target.
        side: side of the square pictures, in pixels.
        audio: add sounds; pictures and texts stay as they are.
        unrelated: give source and target no shape, texture or colour in common.
        force: replace corpora that are there already.
        progress: called with (pairs written, pairs in all).

    Returns:
        The folders of source and target.

    Raises:
        ConfigError: a size out of its range, or more classes than there are combinations.
        CorpusError: one of the two folders exists already and ``force`` is not set, or it is no corpus, or it
            cannot be written.
    """
    tenth = max(1, source_pairs_per_class // 10)
    sizes = {
        "source": {"train": source_pairs_per_class, "val": tenth, "test": tenth},
        "target": {"train": target_pairs_per_class, "val": val_pairs_per_class, "test": test_pairs_per_class},
    }
    _check_sizes(source_classes, target_classes, sizes, side)
    values = dict(zip(sizes, _unrelated_values(seed) if unrelated else (ALL, ALL), strict=True))
    choose = partial(_choose_unrelated, values) if unrelated else _choose_classes
    classes = dict(zip(sizes, choose(seed, source_classes, target_classes), strict=True))
    plan = [
        (domain, number, look, split, place)
        for domain in sizes
        for number, look in enumerate(classes[domain])
        for split, size in sizes[domain].items()
        for place in range(size)
    ]
    folders = {domain: Path(root) / domain for domain in sizes}
    for folder in folders.values():
        if folder.exists() and not force:
            raise CorpusError(f"{folder}: exists already; give another folder, or replace it with force")
        if folder.exists() and not (folder / "pairs.jsonl").is_file():
            raise CorpusError(f"{folder}: exists and is no corpus, so it is not replaced; give another folder")
    rows: dict[str, list[dict[str, str]]] = {domain: [] for domain in sizes}
    sounds: dict[str, list[list[float]]] = {domain: [] for domain in sizes}
    try:
        with ExitStack() as stack:
            new = {domain: stack.enter_context(atomic_folder(f, force=force)) for domain, f in folders.items()}
            for folder in new.values():
                (folder / "images").mkdir()
            for done, (domain, number, look, split, place) in enumerate(plan, start=1):
                name = f"{seed}/{look.label}/{split}/{place}"
                shown, picture, text = _pair(_Stream(name), look, values[domain], side)
                key = f"{domain}-{number:03}-{split}-{place:04}"
                image = f"images/{key}.png"
                picture.save(new[domain] / image)
                rows[domain].append({"id": key, "image": image, "text": text, "label": look.label, "split": split})
                if audio:
                    sounds[domain].append(_sound(_Stream(f"{name}/audio"), shown))
                if progress:
                    progress(done, len(plan))
            for domain, folder in new.items():
                lines = "".join(json.dumps(row) + "\n" for row in rows[domain])
                (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
                if audio:
                    (folder / FOLDER).mkdir()
                    np.save(folder / FOLDER / "audio.npy", np.array(sounds[domain], np.float32))
    except OSError as error:
        raise CorpusError(f"{root}: the corpora cannot be written ({error})") from error
    return folders["source"], folders["target"]


class _Stream:
    """Named random numbers, the same on every machine and for every version of Python."""

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(f"dckt synthetic/{name}".encode()).digest()
        self._next = random.Random(int.from_bytes(digest, "big")).random  # noqa: S311 - no secret

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def uniform(self) -> float:
        """A number from -1 to 1."""
        return 2 * self._next() - 1

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._next() * (high - low + 1))

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self._next() * len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        keys = [self._next() for _ in values]
        return [values[place] for place in sorted(range(len(values)), key=keys.__getitem__)]


def _check_sizes(sources: int, targets: int, sizes: Mapping[str, Mapping[str, int]], side: int) -> None:
    combinations = len(COLOURS) * len(TEXTURES) * len(SHAPES)
    for name, value, low, high in (
        ("source_classes", sources, 2, combinations),
        ("target_classes", targets, 2, combinations),
        ("source_pairs_per_class", sizes["source"]["train"], 1, 10_000),
        ("target_pairs_per_class", sizes["target"]["train"], 1, 10_000),
        ("val_pairs_per_class", sizes["target"]["val"], 0, 10_000),
        ("test_pairs_per_class", sizes["target"]["test"], 0, 10_000),
        ("side", side, 32, 1024),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}; expected {low} to {high}")


def _choose_classes(seed: int, sources: int, targets: int) -> tuple[list[Look], list[Look]]:
    """Combinations that use all values about equally often; the target's values occur in the source."""
    free = _Stream(f"{seed}/classes").shuffled([Look(*values) for values in product(COLOURS, TEXTURES, SHAPES)])
    source = _balanced(free, sources)
    known = {value for look in source for value in look.values}
    unseen = [look for look in free if look not in source and known.issuperset(look.values)]
    if len(unseen) < targets:
        raise ConfigError(
            f"{sources} source classes leave {len(unseen)} other combinations of their colours, textures and "
            f"shapes; target_classes is {targets}; lower it, or change source_classes"
        )
    return source, _balanced(unseen, targets)


def _unrelated_values(seed: int) -> tuple[Values, Values]:
    """Five of eight values for the source, the others for the target."""
    stream = _Stream(f"{seed}/values")
    mixed = [(stream.shuffled(names), 5 * len(names) // 8) for names in ALL]
    return tuple(names[:count] for names, count in mixed), tuple(names[count:] for names, count in mixed)


def _choose_unrelated(
    values: Mapping[str, Values], seed: int, sources: int, targets: int
) -> tuple[list[Look], list[Look]]:
    """Combinations that use all values of their own domain about equally often."""
    found = []
    for domain, count in (("source", sources), ("target", targets)):
        free = _Stream(f"{seed}/classes").shuffled([Look(*each) for each in product(*values[domain])])
        if len(free) < count:
            raise ConfigError(
                f"{domain}_classes is {count}; expected at most {len(free)}, for of unrelated corpora the {domain} has "
                f"{' x '.join(str(len(each)) for each in values[domain])} colours, textures and shapes"
            )
        found.append(_balanced(free, count))
    return found[0], found[1]


def _balanced(looks: Sequence[Look], count: int) -> list[Look]:
    """So many looks, each time the first of those whose values were used least."""
    used: Counter[str] = Counter()
    left, chosen = list(looks), []
    for _ in range(count):
        look = min(left, key=lambda look: sum(used[value] for value in look.values))
        left.remove(look)
        chosen.append(look)
        used.update(look.values)
    return chosen


def _pair(stream: _Stream, typical: Look, names: Values, side: int) -> tuple[Look, Image.Image, str]:
    """One pair of the class, and what it shows: nothing but values of its domain."""
    look = Look(
        *(v if stream.chance(CONSTANCY) else stream.pick(n) for v, n in zip(typical.values, names, strict=True))
    )
    # Beside the figures stands a little something of another colour and shape.
    other = Look(*(stream.pick([v for v in n if v != own]) for own, n in zip(look.values, names, strict=True)))
    count = stream.pick(list(COUNTS))
    return look, _picture(stream, look, other, count, side), _text(stream, look, other, count)


def _sound(stream: _Stream, look: Look) -> list[float]:
    """The energies of a sound; like a text, it may keep silent about one attribute."""
    silent = stream.pick(look.values) if stream.chance(SILENCE) else ""
    spectra = [_spectrum(value) for value in look.values if value != silent]
    loudness = 10 * (1 + stream.uniform() / 2)
    return [loudness * (sum(bands) + NOISE * stream.uniform()) for bands in zip(*spectra, strict=True)]


def _spectrum(value: str) -> list[float]:
    """That of a colour, texture or shape, the same for every seed."""
    stream = _Stream(f"spectrum/{value}")
    return [stream.uniform() for _ in range(BANDS)]


def _text(stream: _Stream, look: Look, other: Look, count: int) -> str:
    """Two captions of a picture, a line each."""
    return "\n".join(_caption(stream, look, other, count) for _ in range(2))


def _caption(stream: _Stream, look: Look, other: Look, count: int) -> str:
    """A sentence about so many figures; it may keep silent about one attribute, and says other things too."""
    silent = stream.pick(["colour", "texture", "shape"]) if stream.chance(SILENCE) else ""
    adjectives = stream.shuffled(
        [
            *([] if silent == "colour" else [stream.pick(COLOURS[look.colour][1])]),
            *([] if silent == "texture" else [stream.pick(TEXTURES[look.texture])]),
        ]
    )
    noun = stream.pick(GENERAL if silent == "shape" else SHAPES[look.shape]).split()[count > 1]
    sentence = stream.pick(SENTENCES).format(
        count=stream.pick(COUNTS[count]), adjectives=" ".join(adjectives), both=" and ".join(adjectives), noun=noun
    )
    clauses = [
        clause.format(
            colour=stream.pick(COLOURS[other.colour][1]),
            texture=stream.pick(TEXTURES[other.texture]),
            shape=stream.pick(SHAPES[other.shape]).split()[0],
            ground=stream.pick(GROUNDS),
            number=stream.between(1, 99),
        )
        for clause in stream.shuffled(CLAUSES)[: stream.between(1, 2)]
    ]
    parts = [sentence, *clauses] if stream.chance(0.7) else [clauses[0], sentence, *clauses[1:]]
    return ", ".join(parts).capitalize() + "."


def _picture(stream: _Stream, look: Look, other: Look, count: int, side: int) -> Image.Image:
    """A square RGB picture of so many figures."""
    edge = side * SUPERSAMPLING
    canvas = _background(stream, edge)
    for _ in range(stream.between(1, 3)):
        centre = (stream.between(0, edge), stream.between(0, edge))
        _figure(
            stream,
            canvas,
            Look(other.colour, "plain", other.shape),
            centre,
            edge * stream.between(35, 60) // 1000,
        )
    quarters = [(x, y) for x in (270, 730) for y in (270, 730)]
    places = stream.shuffled(quarters)[:count] if count > 1 else [(500, 500)]
    reach, jitter = ((150, 205), 45) if count > 1 else ((230, 380), 110)
    for x, y in places:
        centre = (
            edge * (x + stream.between(-jitter, jitter)) // 1000,
            edge * (y + stream.between(-jitter, jitter)) // 1000,
        )
        _figure(stream, canvas, look, centre, edge * stream.between(*reach) // 1000)
    return canvas.reduce(SUPERSAMPLING)


def _background(stream: _Stream, edge: int) -> Image.Image:
    """A gradient of two muted colours with a few thin lines."""
    canvas = Image.new("RGB", (edge, edge))
    draw = ImageDraw.Draw(canvas)
    first, last = (_colour(stream.between(0, 359), stream.between(5, 30), stream.between(55, 98)) for _ in range(2))
    upright = stream.chance(0.5)
    for line in range(edge):
        blend = _mixed(first, last, 1000 * line // edge)
        draw.line([(line, 0), (line, edge)] if upright else [(0, line), (edge, line)], fill=blend)
    for _ in range(stream.between(2, 7)):
        ends = [(stream.between(0, edge), stream.between(0, edge)) for _ in range(2)]
        draw.line(
            ends,
            _colour(stream.between(0, 359), 40, stream.between(40, 90)),
            stream.between(1, edge // 60 + 1),
        )
    return canvas


def _figure(stream: _Stream, canvas: Image.Image, look: Look, centre: Point, radius: int) -> None:
    """Draws one figure, with a thin dark outline, onto the canvas."""
    hue, saturation, brightness = COLOURS[look.colour][0]
    colour = _colour(
        hue + stream.between(-9, 9), saturation + stream.between(-15, 10), brightness + stream.between(-15, 5)
    )
    ink = _mixed(colour, (255, 255, 255) if stream.chance(0.5) else (25, 20, 30), stream.between(600, 800))
    patch = _textured(stream, look.texture, radius, colour, ink)
    angle = stream.between(-25, 25)
    corner = (centre[0] - radius, centre[1] - radius)
    canvas.paste(_mixed(colour, (0, 0, 0), 600), corner, _mask(look.shape, radius, radius, angle))
    canvas.paste(patch, corner, _mask(look.shape, radius, radius * 92 // 100, angle))


def _textured(stream: _Stream, texture: str, radius: int, colour: Colour, ink: Colour) -> Image.Image:
    """A square of 2 * radius pixels a side with a pattern in ink."""
    patch = Image.new("RGB", (2 * radius, 2 * radius), colour)
    draw = ImageDraw.Draw(patch)
    period = max(4, radius * stream.between(32, 46) // 100)
    angle, shift = stream.between(0, 179), stream.between(0, period - 1)
    steps = range(-2 * radius - shift, 2 * radius, period)

    def bar(x: int, y: int, width: int, height: int) -> None:
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
        draw.polygon([_turned(corner, angle, (radius, radius)) for corner in corners], fill=ink)

    if texture == "striped":
        for x in steps:
            bar(x, -2 * radius, period // 2, 4 * radius)
    elif texture == "meshed":
        for x in steps:
            bar(x, -2 * radius, max(1, period // 5), 4 * radius)
            bar(-2 * radius, x, 4 * radius, max(1, period // 5))
    elif texture == "checked":
        for column, x in enumerate(steps):
            for row, y in enumerate(steps):
                if (row + column) % 2:
                    bar(x, y, period, period)
    elif texture == "dotted":
        dot = max(1, period * 3 // 10)
        for x, y in product(steps, steps):
            left, top = _turned((x, y), angle, (radius, radius))
            draw.ellipse((left - dot, top - dot, left + dot, top + dot), fill=ink)
    return patch


# Corners in thousandths of the radius, y downwards.
_OUTLINES: Mapping[str, Sequence[Point]] = {
    "square": ((-780, -780), (780, -780), (780, 780), (-780, 780)),
    "triangle": ((0, -980), (900, 700), (-900, 700)),
    "star": (
        (0, -1000),
        (235, -324),
        (951, -309),
        (380, 124),
        (588, 809),
        (0, 400),
        (-588, 809),
        (-380, 124),
        (-951, -309),
        (-235, -324),
    ),
    "cross": (
        (-320, -950),
        (320, -950),
        (320, -320),
        (950, -320),
        (950, 320),
        (320, 320),
        (320, 950),
        (-320, 950),
        (-320, 320),
        (-950, 320),
        (-950, -320),
        (-320, -320),
    ),
    "arrow": ((0, -1000), (800, -100), (300, -100), (300, 950), (-300, 950), (-300, -100), (-800, -100)),
}


def _mask(shape: str, half: int, radius: int, angle: int) -> Image.Image:
    """A figure of that radius in white on black, 2 * half pixels a side."""
    mask = Image.new("L", (2 * half, 2 * half))
    draw = ImageDraw.Draw(mask)

    def disc(x: int, y: int, share: int, fill: int) -> None:
        reach = radius * share // 1000
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)

    if shape in _OUTLINES:
        corners = [(radius * x // 1000, radius * y // 1000) for x, y in _OUTLINES[shape]]
        draw.polygon([_turned(corner, angle, (half, half)) for corner in corners], fill=255)
        return mask
    disc(half, half, 960, 255)
    if shape == "ring":
        disc(half, half, 500, 0)
    elif shape == "crescent":
        disc(*_turned((radius * 480 // 1000, 0), angle, (half, half)), 780, 0)
    return mask


def _turned(point: Point, angle: int, centre: Point) -> Point:
    """The point turned about (0, 0), in degrees, and moved to the centre."""
    # Rounded to thousandths, so that the last bit of a machine's cosine does not matter.
    cosine, sine = round(1000 * math.cos(math.radians(angle))), round(1000 * math.sin(math.radians(angle)))
    x, y = point
    return centre[0] + (x * cosine - y * sine) // 1000, centre[1] + (x * sine + y * cosine) // 1000


def _colour(hue: int, saturation: int, brightness: int) -> Colour:
    red, green, blue = ImageColor.getrgb(f"hsv({hue % 360},{min(saturation, 100)}%,{min(brightness, 100)}%)")[:3]
    return red, green, blue


def _mixed(first: Colour, last: Colour, share: int) -> Colour:
    """The first colour with so many thousandths of the last one."""
    red, green, blue = ((a * (1000 - share) + b * share) // 1000 for a, b in zip(first, last, strict=True))
    return red, green, blue
