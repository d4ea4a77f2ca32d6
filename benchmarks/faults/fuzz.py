"""Random input, by hypothesis: nothing but our exceptions, and SQL is data.

Each property is a function that hypothesis calls with examples; ``PROPERTIES`` names them. With atheris installed, the
same properties are driven by coverage: see :func:`by_coverage`.
"""

from __future__ import annotations

import atexit
import io
import json
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from dckt.bundle import MANIFEST, Bundle
from dckt.errors import DcktError, ImageError
from dckt.index import Index
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary, image_array
from dckt.searcher import Searcher
from faults import samples
from faults.damage import resign
from faults.truth import Stored, Truth, wrong_hits

SPEC = ImageSpec(side=8)
MANY_PIXELS = (20_000, 30_000, 65_535, 2**31 - 1)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")

_AT_EXIT = ExitStack()  # what is made once for all examples, and is closed and deleted in the end
atexit.register(_AT_EXIT.close)


def _scratch() -> Path:
    return Path(_AT_EXIT.enter_context(tempfile.TemporaryDirectory(prefix="dckt-fuzz-")))


# --- images ---

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from(
    [(1, 1), (20_000, 1), (1, 20_000), (20_000, 3)]
)
modes = st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "YCbCr"])


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A whole file of any format, mode and size, with any EXIF orientation."""
    size, mode, form = draw(sizes), draw(modes), draw(st.sampled_from(FORMATS))
    image = Image.new(mode, size)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(0, 9))
    try:
        image.save(file, form, **({"exif": exif} if form in {"JPEG", "PNG", "WEBP"} else {}))
    except (OSError, ValueError):  # the format does not hold this mode or size
        file = io.BytesIO()
        image.convert("RGB").resize((min(size[0], 16_000), min(size[1], 16_000))).save(file, form)
    return file.getvalue()


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A file with some bytes changed, cut out or put in."""
    content = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.integers(0, 3))
        if how == 0:
            del content[place:]
        elif how == 1:
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=8))
        elif how == 2:
            del content[place : place + draw(st.integers(1, 100))]
        elif content:
            content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def bomb(form: str, width: int, height: int) -> bytes:
    """A few bytes whose header claims a picture of this size."""
    if form == "PNG":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
        chunks = b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )
        return b"\x89PNG\r\n\x1a\n" + chunks
    if form == "GIF":
        frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width & 0xFFFF, height & 0xFFFF, 0)
        screen = struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0x80, 0, 0)
        return b"GIF89a" + screen + bytes(6) + frame + b"\x02\x02\x44\x01\x00;"
    size = struct.pack("<IiiHHIIiiII", 40, width & 0x7FFFFFFF, height & 0x7FFFFFFF, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + size


def whole_picture(content: bytes) -> None:
    """Every whole picture is read, whatever its size and mode."""
    pixels = image_array(content, SPEC)
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8


def any_bytes_as_picture(content: bytes) -> None:
    """Pixels or an ImageError; Pillow's warnings do not come through."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = image_array(content, SPEC)
        except ImageError:
            return
    assert pixels.shape == (8, 8, 3)


def claimed_size(form: str, width: int, height: int) -> None:
    """A file that claims too much is refused before its pixels take memory."""
    content = bomb(form, width, height)
    with warnings.catch_warnings(record=True) as said:
        try:
            image_array(content, SPEC)
        except ImageError:
            assert not said, "a warning came before our error"
            return
    if form == "GIF":
        width, height = width & 0xFFFF, height & 0xFFFF
    assert width * height <= SPEC.max_pixels


def any_array_as_picture(shape: Sequence[int], dtype: str) -> None:
    """Pixels or an ImageError."""
    with suppress(ImageError):
        assert image_array(np.zeros(shape, dtype), SPEC).shape == (8, 8, 3)


# --- texts ---


@lru_cache
def _vocabulary() -> Vocabulary:
    return Vocabulary.of(samples.WORDS)


def any_text(text: str) -> None:
    """Tokens that the graph knows, or our error."""
    try:
        tokens = _vocabulary().encode(text, TextSpec(max_tokens=8))
    except DcktError:
        return
    assert 1 <= len(tokens) <= 8
    assert all(0 < token < len(_vocabulary().words) for token in tokens)


def any_vocabulary(content: bytes) -> None:
    """A vocabulary that can be used, or our error."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "vocabulary.txt")
        file.write_bytes(content)
        with suppress(DcktError):
            vocabulary = Vocabulary.load(file)
            assert Vocabulary.of(vocabulary.words[1:]).dumps().encode() is not None


# --- bundles ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@lru_cache
def _bundle() -> Path:
    folder = _scratch()
    samples.tiny_bundle(folder / "whole.dckt", 0)
    return folder / "whole.dckt"


@contextmanager
def _restored(file: Path) -> Iterator[None]:
    before = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(before)


def any_manifest(content: bytes) -> None:
    """A bundle or our error, from any bytes as the manifest."""
    file = _bundle() / MANIFEST
    with _restored(file), suppress(DcktError):
        file.write_bytes(content)
        Bundle.open(_bundle())


def forged_manifest(path: Sequence[int], value: Any) -> None:
    """A bundle or our error, from a manifest with one other value and a checksum that fits."""
    file = _bundle() / MANIFEST
    with _restored(file):
        content = json.loads(file.read_bytes())
        inner = content
        for step in path:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = keys[step % len(keys)]
            if not isinstance(inner[key], dict | list) or not inner[key]:
                break
            inner = inner[key]
        else:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = keys[0]
        inner[key] = value
        with suppress(DcktError):
            file.write_text(resign(content), encoding="utf-8")
            opened = Bundle.open(_bundle()).manifest
            assert opened.representation in opened.dimensions


# --- indexes ---

nasty = st.sampled_from(
    [
        "'; DROP TABLE items; --",
        '"',
        "%",
        "_",
        "a\0b",
        "\n",
        "*",
        "?",
        ":label",
        "$.x",
        "1' OR '1'='1",
        "x\u202ey",
        "𝄞",
        "a.b",
    ]
)
texts = nasty | st.text(min_size=1, max_size=12)
values = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts
)
metadata = st.dictionaries(
    texts, values | st.lists(values, max_size=3) | st.dictionaries(texts, values, max_size=2), max_size=3
)


@lru_cache
def _index() -> Index:
    folder = _scratch()
    index = _AT_EXIT.enter_context(samples.create(folder / "index", kind="exact"))
    for medium in ("text", "image"):
        new = {
            item: Stored(vector, about)
            for (item, about), vector in zip(_stored(medium), samples.queries(34), strict=True)
        }
        samples.add(index, Truth({}), medium, new)
    return index


@lru_cache
def _stored(medium: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The items of the index, some with values of odd types."""
    odd: list[Mapping[str, Any]] = [
        {"price": None, "shop": True},
        {"price": "5", "tags": {"row": 5.0}},
        {"price": True, "tags": [1, 2]},
        {"shop": {"deep": "A"}, "$.x": 1, "'": "'; DROP TABLE items; --"},
    ]
    plain = [(item, stored.metadata) for item, stored in samples.items(medium, 30, 1).items()]
    return plain + [(f"odd {place}", about) for place, about in enumerate(odd)]


def items_are_data(items: Mapping[str, Mapping[str, Any]]) -> None:
    """What is stored under any id with any metadata comes back, alone, and can be deleted; or it is our error."""
    index, medium = _index(), "fuzz"
    generator = np.random.default_rng(len(items))
    new = {
        item: Stored(generator.normal(size=samples.WIDTH).astype(np.float32), about) for item, about in items.items()
    }
    if not new:
        return
    before = index.count()
    try:
        truth = samples.add(index, Truth({}), medium, new)
    except DcktError:
        assert index.count() == before
        return
    assert list(index.ids(medium)) == sorted(new)
    query = samples.queries(1)
    everything = index.search(query, 1000, media=[medium])[0]
    wrong = wrong_hits(everything, truth, query[0], 1000, lambda *_: True)
    assert wrong is None, wrong
    for item in new:
        assert index.get(item, medium).metadata == new[item].metadata
    index.delete(medium, list(new))
    assert index.count() == before


operators = st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge", "in", "exists", "like", "$gt", "; --", ""])
keys = st.sampled_from(["shop", "price", "tags", "tags.row", "and", "or", "not", "tags.", ".", "a..b"]) | texts
likely = st.dictionaries(
    st.sampled_from(["shop", "price", "tags.row", "tags", "'", "$.x"]),
    st.sampled_from(["A", "B", 5, 5.0, True, None, "5", "'; DROP TABLE items; --"])
    | st.dictionaries(
        st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]), st.integers(0, 40) | st.just("A"), max_size=2
    )
    | st.builds(lambda value: {"in": value}, st.lists(st.sampled_from([1, "A", None, 5.0]), max_size=3))
    | st.builds(lambda value: {"exists": value}, st.booleans()),
    min_size=1,
    max_size=2,
)
filters = st.recursive(
    likely
    | st.dictionaries(
        keys, values | st.dictionaries(operators, values | st.lists(values, max_size=3), max_size=2), max_size=3
    ),
    lambda inner: (
        st.fixed_dictionaries({"or": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"and": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"not": inner})
    ),
    max_leaves=4,
)


def matches(where: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether metadata pass a filter that the index took, word by word after its documentation."""
    for key, wanted in where.items():
        if key in {"and", "or"}:
            inner = [matches(one, about) for one in wanted]
            passes = all(inner) if key == "and" else any(inner)
        elif key == "not":
            passes = not matches(wanted, about)
        else:
            conditions = wanted if isinstance(wanted, dict) else {"eq": wanted}
            passes = all(_holds(operator, other, *_value(key, about)) for operator, other in conditions.items())
        if not passes:
            return False
    return True


def _value(key: str, about: Any) -> tuple[bool, Any]:
    for step in key.split("."):
        if not isinstance(about, dict) or step not in about:
            return False, None
        about = about[step]
    return True, about


def _holds(operator: str, other: Any, there: bool, value: Any) -> bool:
    def same(one: Any, two: Any) -> bool:
        return _kind(one) == _kind(two) and bool(one == two)

    if operator == "exists":
        return there is other
    if operator == "in":
        return there and any(same(value, one) for one in other)
    if operator in {"eq", "ne"}:
        return (there and same(value, other)) is (operator == "eq")
    if not there or _kind(value) != _kind(other) or _kind(value) not in {"number", "str"}:
        return False
    return bool({"lt": value < other, "le": value <= other, "gt": value > other, "ge": value >= other}[operator])


def _kind(value: Any) -> str:
    return "number" if type(value) in {int, float} else type(value).__name__


def any_filter(where: Any) -> None:
    """The items that pass it, by a slow reading of the documentation, or our error; the index stays as it was."""
    index = _index()
    before = index.count()
    try:
        hits = index.search(samples.queries(1), 1000, where=where)[0]
        counted = index.count(where=where)
    except DcktError:
        assert index.count() == before
        return
    expected = {
        (medium, item)
        for medium in ("text", "image")
        for item, about in _stored(medium)
        if not where or matches(where, about)
    }
    assert {(hit.medium, hit.id) for hit in hits} == expected
    assert counted == len(expected)
    assert index.count() == before


def any_query(rows: Any, k: Any) -> None:
    """Hits or our error, from any array and any k."""
    with suppress(DcktError):
        for hits in _index().search(rows, k):
            assert len(hits) == min(k, 68)
            assert all(-1.000001 <= hit.score <= 1.000001 for hit in hits)


numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, 3e38])
rows = st.lists(st.lists(numbers, min_size=samples.WIDTH, max_size=samples.WIDTH), min_size=1, max_size=3).map(
    lambda lists: np.array(lists, dtype=np.float32)
)
arrays = rows | st.builds(
    np.zeros, st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(["f4", "f8", "i4", "?", "U3", "O"])
)

# --- the searcher ---


@lru_cache
def _searcher() -> Searcher:
    folder = _scratch()
    samples.tiny_bundle(folder / "model.dckt", 0)
    opened = Searcher.create(folder / "model.dckt", folder / "index", device="cpu", threads=1)
    searcher = _AT_EXIT.enter_context(opened)
    searcher.add_texts(
        samples.WORDS, ids=samples.WORDS, metadata=[{"price": place} for place in range(len(samples.WORDS))]
    )
    return searcher


def any_search(source: bytes | str, k: int, media: Any, where: Any, min_score: Any, reorder: int) -> None:
    """Hits that obey, or our error, from any query and setting."""
    query: dict[str, Any] = {"text": source} if isinstance(source, str) else {"image": source}
    with suppress(DcktError):
        result = _searcher().search(**query, k=k, media=media, where=where, min_score=min_score, reorder=reorder)
        assert len(result) <= k
        assert [hit.score for hit in result] == sorted((hit.score for hit in result), reverse=True)
        assert min_score is None or all(hit.score >= min_score for hit in result if isinstance(min_score, float))


def any_pictures(content: Mapping[str, tuple[bytes, Any]], on_error: str, upsert: bool) -> None:
    """What is reported as added is there, nothing else, and all of it can be deleted; or it is our error."""
    searcher = _searcher()
    before = searcher.count("image")
    try:
        report = searcher.add_images(
            [source for source, _ in content.values()],
            ids=list(content),
            metadata=[about for _, about in content.values()],
            on_error=on_error,
            upsert=upsert,
        )
    except DcktError:
        assert searcher.count("image") == before
        return
    there = searcher.index.existing("image", list(content))
    assert report.added == len(there) == searcher.count("image")
    assert len(there) + len(report.failed) == len(content)
    if there:
        searcher.delete(sorted(there), "image")


PROPERTIES: Mapping[str, Callable[..., None]] = {
    "whole pictures": given(pictures())(whole_picture),
    "damaged pictures": given(damaged(pictures()))(any_bytes_as_picture),
    "bytes as pictures": given(st.binary(max_size=300))(any_bytes_as_picture),
    "claimed sizes": given(
        st.sampled_from(["PNG", "GIF", "BMP"]), *[st.sampled_from(MANY_PIXELS) | st.integers(1, 70_000)] * 2
    )(claimed_size),
    "arrays as pictures": given(
        st.lists(st.integers(0, 9), max_size=4), st.sampled_from(["u1", "f4", "i8", "?", "U2", "c8"])
    )(any_array_as_picture),
    "texts": given(st.text(max_size=200) | st.lists(st.sampled_from(samples.WORDS)).map(" ".join))(any_text),
    "vocabularies": given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))(any_vocabulary),
    "manifests": given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))(
        any_manifest
    ),
    "forged manifests": given(st.lists(st.integers(0, 20), min_size=1, max_size=5), json_values)(forged_manifest),
    "ids and metadata": given(st.dictionaries(texts, metadata, max_size=4))(items_are_data),
    "filters": given(filters | json_values)(any_filter),
    "searches": given(
        st.text(max_size=30) | st.sampled_from(samples.WORDS) | pictures() | st.binary(max_size=50),
        st.integers(-1, 20) | st.just(10**12),
        st.none() | texts | st.lists(st.sampled_from(["image", "text", "audio"]), max_size=3),
        st.none() | filters,
        st.none() | st.floats() | st.sampled_from(["calibrated", "high"]),
        st.integers(-1, 5),
    )(any_search),
    "pictures that are added": given(
        st.dictionaries(texts, st.tuples(pictures() | damaged(pictures()), metadata), max_size=4),
        st.sampled_from(["raise", "skip", "collect", "ignore"]),
        st.booleans(),
    )(any_pictures),
    "queries": given(arrays, st.integers(-2, 100) | st.sampled_from([10**9, 2**70, 1.5, None, "3", True]))(any_query),
}


def run(name: str, *, examples: int, seed: int = 0) -> None:
    """Tries a property with so many examples; the same ones for the same seed.

    Raises:
        Exception: what the property raised, for the smallest example that makes it do so.
    """
    from hypothesis import seed as seeded

    chosen = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seeded(seed)(chosen(PROPERTIES[name]))()


def by_coverage(name: str, *, runs: int) -> None:
    """Tries a property with inputs that reach new code, by atheris. Ends the process."""
    import sys

    import atheris  # type: ignore[import-untyped, unused-ignore]

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-runs={runs}"], PROPERTIES[name].hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()
