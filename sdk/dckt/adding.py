"""Items on their way into an index: chosen, compared with what is there, encoded in batches, stored.

Shape letters: B items of a batch, D width of a representation.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dckt.errors import ConfigError, DcktError, ImageError, ItemError, TextError, UnknownItemError
from dckt.index import Index
from dckt.index.items import check_ids, dump_metadata, is_id
from dckt.index.vectors import unit_rows
from dckt.model import Model, Vectors

ON_ERROR = ("raise", "skip", "collect")
AHEAD = 2  # batches that are decoded while one is encoded, and so the most that are in memory

Progress: TypeAlias = Callable[[int, int | None], None]


class Failure(NamedTuple):
    """An item that was left out.

    Attributes:
        id: its id.
        error: why: with ``skip`` a text, with ``collect`` the error itself.
    """

    id: str
    error: str | DcktError


@dataclass(frozen=True)
class AddReport:
    """What became of items that were to be added.

    Attributes:
        added: how many were stored.
        failed: the others, with reasons.
        unchanged: how many were there with the same content and metadata, so that nothing was to be done.
    """

    added: int
    failed: tuple[Failure, ...] = ()
    unchanged: int = 0


class Row(NamedTuple):
    """One item to add."""

    id: str
    source: Any
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Items of one medium.

    Attributes:
        medium: ``image`` or ``text``.
        rows: all of them, or a stream that is read a batch at a time.
    """

    medium: str
    rows: Sequence[Row] | Iterator[Row]

    @property
    def total(self) -> int | None:
        """How many; None of a stream."""
        return len(self.rows) if isinstance(self.rows, Sequence) else None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How items are added; see :meth:`dckt.searcher.Searcher.add_images`."""

    batch_size: int
    on_error: str
    upsert: bool
    progress: Progress | None

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error is {self.on_error!r}; expected raise, skip or collect")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; expected at least 1")


@dataclass
class _Tally:
    added: int = 0
    unchanged: int = 0
    failed: list[Failure] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.added + self.unchanged + len(self.failed)


@dataclass(frozen=True)
class _Encoded:
    """Rows that are ready to be stored: vectors (B, D) of each representation, and a digest of each source."""

    rows: list[Row]
    vectors: Vectors
    digests: list[str]


def rows_of(
    medium: str,
    sources: Iterable[Any],
    ids: Iterable[str] | None,
    metadata: Iterable[Mapping[str, Any]] | None,
    id_of: Callable[[Any], str] | None = None,
) -> Part:
    """Sources with their ids and metadata: a sequence if the sources are one, else a stream.

    Args:
        medium: ``image`` or ``text``.
        sources: pictures or texts.
        ids: one for each; None makes them by ``id_of``.
        metadata: one for each; None stores nothing.
        id_of: the id of a source.

    Raises:
        ItemError: not one id and one mapping for each source; for a stream when that is noticed.
        ConfigError: there are no ids.
    """
    if isinstance(sources, str | bytes) or not isinstance(sources, Iterable):
        raise ItemError(f"expected a sequence of {medium} items and one id for each")
    if ids is None and id_of is None:
        raise ConfigError(f"{medium} items have no ids of their own; give ids")
    sized = hasattr(sources, "__len__") and hasattr(sources, "__getitem__")
    if sized:
        sources = list(sources)
    if ids is None and id_of is not None:
        ids = list(map(id_of, sources)) if sized else None
    stream = _stream(medium, sources, ids, metadata, id_of)
    return Part(medium, list(stream) if sized else stream)


def add(model: Model, index: Index, parts: Sequence[Part], options: Options) -> dict[str, AddReport]:
    """Encodes and stores items.

    With ``raise``, and no stream among the parts, nothing is stored before everything is encoded. Otherwise every
    batch is stored when it is encoded.

    Returns:
        A report for each part, by its medium.

    Raises:
        DcktError: see :meth:`dckt.searcher.Searcher.add_images`.
    """
    tallies = {part.medium: _Tally() for part in parts}
    # All that can be known without encoding is checked before anything is encoded.
    plans = [(part.medium, _batches(index, part, tallies[part.medium], options)) for part in parts]
    totals = [part.total for part in parts]
    total = None if None in totals else sum(size or 0 for size in totals)
    at_the_end = options.on_error == "raise" and total is not None
    waiting: dict[str, list[_Encoded]] = {medium: [] for medium in tallies}
    pool = ThreadPoolExecutor(model.workers)
    try:
        for medium, batches in plans:
            for encoded in _encoded(model, index, medium, batches, tallies[medium], options, pool):
                if at_the_end:
                    waiting[medium].append(encoded)
                else:
                    _store(index, medium, [encoded], options)
                tallies[medium].added += len(encoded.rows)
                if options.progress:
                    options.progress(sum(tally.done for tally in tallies.values()), total)
    finally:
        pool.shutdown(cancel_futures=True)
    for medium, of in waiting.items():
        _store(index, medium, of, options)
    return {medium: AddReport(tally.added, tuple(tally.failed), tally.unchanged) for medium, tally in tallies.items()}


# --- choosing -------------------------------------------------------------------------------------------------


def _stream(
    medium: str,
    sources: Iterable[Any],
    ids: Iterable[str] | None,
    metadata: Iterable[Mapping[str, Any]] | None,
    id_of: Callable[[Any], str] | None,
) -> Iterator[Row]:
    missing = object()
    names = None if ids is None else iter(ids)
    about = None if metadata is None else iter(metadata)
    for source in sources:
        name = next(names, missing) if names is not None else id_of(source)  # type: ignore[misc]
        facts = next(about, missing) if about is not None else {}
        if name is missing or facts is missing:
            raise ItemError(f"expected a sequence of {medium} items and one id for each, and metadata for each or none")
        yield Row(name, source, facts)  # type: ignore[arg-type]
    if (names is not None and next(names, missing) is not missing) or (
        about is not None and next(about, missing) is not missing
    ):
        raise ItemError(f"expected a sequence of {medium} items and one id for each, and metadata for each or none")


def _batches(index: Index, part: Part, tally: _Tally, options: Options) -> Iterable[list[Row]]:
    """Rows that can be stored, in batches; the others are reported, or refused. Of a sequence, before this returns."""
    size = options.batch_size
    if isinstance(part.rows, Sequence):
        chosen = _chosen(index, part.medium, part.rows, tally, options)
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]
    rows = part.rows
    some = iter(lambda: list(islice(rows, size)), [])
    return (_chosen(index, part.medium, batch, tally, options) for batch in some)


def _chosen(index: Index, medium: str, rows: Sequence[Row], tally: _Tally, options: Options) -> list[Row]:
    ids = [row.id for row in rows]
    refuses = options.on_error == "raise"
    if refuses:
        check_ids(ids)
        dump_metadata(ids, [row.metadata for row in rows])
    there = set() if options.upsert else index.existing(medium, [item for item in ids if is_id(item)])
    if there and refuses:
        raise ItemError(
            f"{len(there)} of {len(ids)} {medium} ids are in the index already, {min(there)!r} among them; choose "
            "others, leave them out with on_error='skip' (--on-error skip), or replace them with upsert=True "
            "(--upsert)"
        )
    chosen = []
    seen: set[str] = set()
    for row in rows:
        reason = _unusable(row, there, seen)
        if reason:
            name = row.id if is_id(row.id) else ascii(row.id)
            tally.failed.append(_failure(name, ItemError(reason), options))
        else:
            chosen.append(row)
            seen.add(row.id)
    return chosen


def _unusable(row: Row, there: set[str], seen: set[str]) -> str:
    """Why a row cannot be stored, or nothing."""
    if not is_id(row.id):
        return "the id is no text, empty or not Unicode"
    if row.id in there:
        return "the id is in the index already"
    if row.id in seen:
        return "the id was given more than once; the first one counts"
    try:
        dump_metadata([row.id], [row.metadata])
    except ItemError as error:
        return str(error)
    return ""


# --- encoding -------------------------------------------------------------------------------------------------


def _encoded(
    model: Model,
    index: Index,
    medium: str,
    batches: Iterable[list[Row]],
    tally: _Tally,
    options: Options,
    pool: Executor,
) -> Iterator[_Encoded]:
    """Encodes in batches; the next ones are decoded while one is encoded."""

    def submitted(batch: list[Row]) -> tuple[list[Row], list[Future[tuple[str, Any]]]]:
        known = index.contents(medium, [row.id for row in batch]) if options.upsert else {}
        return batch, [pool.submit(_prepare, model, medium, row.source, known.get(row.id)) for row in batch]

    ahead: deque[tuple[list[Row], list[Future[tuple[str, Any]]]]] = deque()
    rest = iter(batches)
    while True:
        ahead.extend(map(submitted, islice(rest, AHEAD - len(ahead))))
        if not ahead:
            return
        yield _encode(model, index, medium, *ahead.popleft(), tally, options)


def _prepare(model: Model, medium: str, source: Any, known: str | None) -> tuple[str, Any]:
    """The digest of a source, and what is to be encoded: nothing if the digest is the known one."""
    digest = model.digest(medium, source)
    return digest, None if digest == known else model.prepare(medium, source)


def _encode(
    model: Model,
    index: Index,
    medium: str,
    batch: list[Row],
    futures: list[Future[tuple[str, Any]]],
    tally: _Tally,
    options: Options,
) -> _Encoded:
    rows: list[Row] = []
    digests: list[str] = []
    prepared: list[Any] = []
    for row, future in zip(batch, futures, strict=True):
        try:
            digest, ready = future.result()
            if ready is None:
                if _same_metadata(index, medium, row):
                    tally.unchanged += 1
                    continue
                ready = model.prepare(medium, row.source)
        except (ImageError, TextError) as error:
            # An error about a file names it already, which is what its id is made of.
            name = "" if row.id in str(error) else f"{medium} {row.id!r}: "
            tally.failed.append(_failure(row.id, error, options, name))
        else:
            rows.append(row)
            digests.append(digest)
            prepared.append(ready)
    vectors = model.encode(medium, prepared)
    units: Vectors = {}
    faults: dict[int, str] = {}
    for representation, of in vectors.items():
        units[representation], found = unit_rows(of, dimension=of.shape[1])
        faults |= {place: f"{representation}: {reason}" for place, reason in found.items()}
    for place, reason in sorted(faults.items()):
        name = f"{medium} {rows[place].id!r}: "
        tally.failed.append(_failure(rows[place].id, ItemError(reason), options, name))
    kept = [place for place in range(len(rows)) if place not in faults]
    return _Encoded(
        [rows[place] for place in kept],
        {representation: of[kept] for representation, of in units.items()},
        [digests[place] for place in kept],
    )


def _same_metadata(index: Index, medium: str, row: Row) -> bool:
    with suppress(UnknownItemError):  # deleted just now
        return _canonical(index.get(row.id, medium).metadata) == _canonical(row.metadata)
    return False


def _canonical(metadata: Mapping[str, Any]) -> str:
    # Compared as JSON, for Python takes 1, 1.0 and True as equal.
    return json.dumps(dict(metadata), sort_keys=True)


def _failure(name: str, error: DcktError, options: Options, prefix: str = "") -> Failure:
    """What is reported about an item; or its error, raised."""
    if options.on_error == "raise":
        raise type(error)(f"{prefix}{error}") from error
    if options.on_error == "skip":
        return Failure(name, str(error))
    # Tracebacks hold on to everything that was in reach, such as the picture; the message says what the cause was.
    error.__cause__ = error.__context__ = None
    return Failure(name, error.with_traceback(None))


def _store(index: Index, medium: str, batches: Sequence[_Encoded], options: Options) -> None:
    rows = [row for batch in batches for row in batch.rows]
    if not rows:
        return
    main, *also = batches[0].vectors
    vectors = {name: np.concatenate([batch.vectors[name] for batch in batches]) for name in (main, *also)}
    index.add(
        medium,
        [row.id for row in rows],
        vectors[main],
        metadata=[row.metadata for row in rows],
        second=vectors[also[0]] if also else None,
        contents=[digest for batch in batches for digest in batch.digests],
        upsert=options.upsert,
    )
