"""The SQLite file of an index: its tables, its description, how it is opened, and how format 1 becomes format 2.

Format 1 had no ``content``, no second vectors, and no log of what changed. A change of the tables makes a new format;
every old one must open forever.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dckt.errors import IndexCorruptError, IndexFolderError, IndexVersionError

INDEX_VERSION = 2
FORMAT = "dckt-index"
ITEMS = "items.sqlite"
KINDS = ("auto", "exact", "hnsw")

BUSY_SECONDS = 30.0
_VECTORS = """
CREATE TABLE vectors (
    label INTEGER PRIMARY KEY AUTOINCREMENT,
    medium TEXT NOT NULL,
    digest BLOB NOT NULL,
    vector BLOB NOT NULL,
    UNIQUE (medium, digest)
);
CREATE TABLE items (
    medium TEXT NOT NULL,
    id TEXT NOT NULL,
    label INTEGER NOT NULL REFERENCES vectors (label),
    metadata TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    content TEXT,
    PRIMARY KEY (medium, id)
) WITHOUT ROWID;
CREATE INDEX items_by_label ON items (label);
"""
# What format 2 added. A commit is known by its number and a random token, because two copies of an index number their
# commits alike. A removal says that an item left a vector: it was deleted, or replaced.
# A row's checksum tells that it is a row of this index, and not that it is the newest: a page whose writing was lost
# shows older rows. So a medium has the number of its items and the total of their checksums, the newest commit a
# checksum of all media, and a removal the checksum of the item that went, by which the total follows from the log.
_LOG = """
CREATE INDEX items_by_sequence ON items (medium, sequence);
CREATE TABLE seconds (
    medium TEXT NOT NULL,
    id TEXT NOT NULL,
    vector BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    UNIQUE (medium, id)
);
CREATE TABLE media (medium TEXT PRIMARY KEY, items INTEGER NOT NULL, total INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE commits (sequence INTEGER PRIMARY KEY, token TEXT NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE removals (
    medium TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    id TEXT NOT NULL,
    label INTEGER NOT NULL,
    item_sequence INTEGER NOT NULL,
    item_checksum INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (medium, sequence, id)
) WITHOUT ROWID;
CREATE TABLE tuning (
    medium TEXT PRIMARY KEY, target REAL NOT NULL, graph TEXT, effort INTEGER, recall REAL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class IndexMeta:
    """What an index says about itself; fixed when it is created.

    Attributes:
        index_id: random, different for every index.
        model_id: of the model that made the vectors.
        representation: which output of that model they are.
        dimension: their width D.
        kind: how it searches: ``auto``, ``exact`` or ``hnsw``.
        created: when, ISO 8601 with time zone.
        second: name of a second representation that is kept for every item, or None.
        second_dimension: its width, or None.
    """

    index_id: str
    model_id: str
    representation: str
    dimension: int
    kind: str
    created: str
    second: str | None = None
    second_dimension: int | None = None

    @classmethod
    def new(
        cls, *, model_id: str, representation: str, dimension: int, kind: str, second: tuple[str, int] | None = None
    ) -> IndexMeta:
        """Of an index that is created now."""
        return cls(
            index_id=uuid.uuid4().hex,
            model_id=model_id,
            representation=representation,
            dimension=dimension,
            kind=kind,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            second=second[0] if second else None,
            second_dimension=second[1] if second else None,
        )


@dataclass(frozen=True)
class Head:
    """A commit: its number, and a token that no other history has."""

    sequence: int
    token: str


def create(path: Path, meta: IndexMeta) -> None:
    """Makes the file, with no items in it."""
    with errors_of(path):
        connection = connect(path, mode="rwc")
        try:
            connection.executescript(
                f"BEGIN; CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL); {_VECTORS} {_LOG}"
            )
            values = {"format": FORMAT, "version": INDEX_VERSION, **asdict(meta)}
            texts = {key: str(value) for key, value in values.items() if value is not None}
            connection.executemany(
                "INSERT INTO meta VALUES (?, ?)", [*texts.items(), ("checksum", _meta_checksum(texts))]
            )
            _first_commit(connection, 0, Checksums(meta.index_id))
            connection.execute("COMMIT")
        finally:
            connection.close()


def connect(path: Path, *, mode: str = "rw") -> sqlite3.Connection:
    """A connection that waits for others, and whose commits wait for the disk.

    Connections are handed between threads; the caller sees to it that only one uses each at a time.

    Args:
        path: the file.
        mode: ``rw``, ``rwc`` to create it, or ``immutable``, which reads a file that nobody changes.
    """
    options = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA foreign_keys = ON")
        if mode != "immutable":
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def read_meta(path: Path, connection: sqlite3.Connection) -> tuple[int, IndexMeta]:
    """The version of the file, and what the index says about itself.

    Raises:
        IndexVersionError: written in a newer format.
        IndexCorruptError: the description is damaged.
    """
    values: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
    if values.get("format") != FORMAT:
        raise corrupt(path, f"its format is {values.get('format')!r}, expected {FORMAT!r}")
    try:
        version = int(values["version"])
        if version > INDEX_VERSION:
            raise IndexVersionError(
                f"{path.parent}: was written in index format {version}, this dckt reads up to {INDEX_VERSION}; "
                "update dckt"
            )
        width = values.get("second_dimension")
        meta = IndexMeta(
            **{key: values[key] for key in ("index_id", "model_id", "representation", "kind", "created")},
            dimension=int(values["dimension"]),
            second=values.get("second"),
            second_dimension=None if width is None else int(width),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, IndexVersionError):
            raise
        raise corrupt(path, f"its description is not whole ({error!r})") from error
    sound = (meta.second is None) == (meta.second_dimension is None) and (meta.second_dimension or 1) >= 1
    if version < 1 or meta.kind not in KINDS or meta.dimension < 1 or not sound:
        raise corrupt(path, "its description holds values that no index has")
    if version > 1 and values.pop("checksum", None) != _meta_checksum(values):
        raise corrupt(path, "its description was altered")
    return version, meta


def upgrade(path: Path, connection: sqlite3.Connection) -> None:
    """Makes format 1 format 2, inside a transaction of the caller's."""
    sequence = connection.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()
    try:
        number = int(sequence[0])
    except (TypeError, ValueError) as error:
        raise corrupt(path, f"its description is not whole ({error!r})") from error
    checksums = Checksums(read_meta(path, connection)[1].index_id)
    _check_old_rows(path, connection)
    connection.create_function("item_checksum", 5, checksums.item, deterministic=True)
    connection.create_function("vector_digest", 1, checksums.digest, deterministic=True)
    connection.execute("ALTER TABLE items ADD COLUMN content TEXT")
    for statement in _LOG.split(";"):
        connection.execute(statement)
    connection.execute("UPDATE vectors SET digest = vector_digest(vector)")
    connection.execute("UPDATE items SET checksum = item_checksum(medium, id, label, metadata, sequence)")
    # Checksums have 32 bits, so this cannot overflow.
    connection.execute("INSERT INTO media SELECT medium, count(*), sum(checksum) FROM items GROUP BY medium")
    _first_commit(connection, number, checksums)
    connection.execute("DELETE FROM meta WHERE key = 'sequence'")
    connection.execute("UPDATE meta SET value = ? WHERE key = 'version'", (str(INDEX_VERSION),))
    values = dict(connection.execute("SELECT key, value FROM meta"))
    connection.execute("INSERT INTO meta VALUES ('checksum', ?)", (_meta_checksum(values),))


def _meta_checksum(values: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def new_token() -> str:
    """Random, for a commit."""
    return secrets.token_hex(8)


def added(total: int, more: int) -> int:
    """A total of checksums, which does not depend on their order, and fits into SQLite's integers."""
    return (total + more) % 2**63


class Checksums:
    """Of the rows of one index; a row of another one has others."""

    def __init__(self, index_id: str) -> None:
        self._name = index_id.encode()
        self._start = zlib.crc32(self._name)

    def digest(self, vector: bytes) -> bytes:
        """Of a vector; by it equal ones are found."""
        return hashlib.sha256(self._name + vector).digest()

    def item(self, medium: str, item: str, label: int, metadata: str, sequence: int, content: str | None = None) -> int:
        """Of a row of ``items``."""
        text = f"{medium}\0{item}\0{label}\0{metadata}\0{sequence}"
        return zlib.crc32((text if content is None else f"{text}\0{content}").encode(), self._start)

    def second(self, medium: str, item: str, sequence: int, vector: bytes) -> int:
        """Of a row of ``seconds``; the sequence is that of the item, so the vector of an older one does not fit."""
        return zlib.crc32(vector, zlib.crc32(f"{medium}\0{item}\0{sequence}\0".encode(), self._start))

    def removal(self, medium: str, sequence: int, item: str, label: int, item_sequence: int, item_checksum: int) -> int:
        """Of a row of ``removals``."""
        text = f"{medium}\0{sequence}\0{item}\0{label}\0{item_sequence}\0{item_checksum}"
        return zlib.crc32(text.encode(), self._start)

    def commit(self, head: Head, media: Iterable[tuple[str, int, int]]) -> int:
        """Of a row of ``commits``, with the rows of ``media`` as it left them."""
        rows = sorted(row for row in media if row[1])
        return zlib.crc32(repr((head.sequence, head.token, rows)).encode(), self._start)


def _first_commit(connection: sqlite3.Connection, sequence: int, checksums: Checksums) -> None:
    head = Head(sequence, new_token())
    media = connection.execute("SELECT medium, items, total FROM media").fetchall()
    connection.execute(
        "INSERT INTO commits VALUES (?, ?, ?)", (head.sequence, head.token, checksums.commit(head, media))
    )


def _check_old_rows(path: Path, connection: sqlite3.Connection) -> None:
    """Of format 1, before they get new checksums."""
    for medium, item, label, metadata, sequence, checksum in connection.execute(
        "SELECT medium, id, label, metadata, sequence, checksum FROM items"
    ):
        text = f"{medium}\0{item}\0{label}\0{metadata}\0{sequence}"
        if checksum != zlib.crc32(text.encode()):
            raise corrupt(path, f"the {medium} item {item!r} was altered")
    for label, key, vector in connection.execute("SELECT label, digest, vector FROM vectors"):
        if not isinstance(vector, bytes) or key != hashlib.sha256(vector).digest():
            raise corrupt(path, f"the vector with label {label} was altered")


def corrupt(path: Path, what: object) -> IndexCorruptError:
    """The error for damage, with the way out."""
    return IndexCorruptError(
        f"{path}: the index is damaged ({what}); restore it from a copy, or make it anew with: "
        f"dckt index BUNDLE {path.parent} --force ..."
    )


UNWRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
_DISK = {
    sqlite3.SQLITE_BUSY: "another process is writing to it; try again when that is done",
    sqlite3.SQLITE_LOCKED: "another process is writing to it; try again when that is done",
    sqlite3.SQLITE_FULL: "the disk is full; nothing of this call was stored",
    sqlite3.SQLITE_READONLY: "the folder or the file may not be written",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; may its folder be written?",
    sqlite3.SQLITE_IOERR: "the disk reports an error; nothing of this call was stored",
    sqlite3.SQLITE_PERM: "it may not be opened",
}


def error_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = error_code(error)
        if code in _DISK:
            raise IndexFolderError(f"{path}: {_DISK[code]} ({error})") from error
        if isinstance(error, sqlite3.ProgrammingError):
            raise IndexFolderError(f"{path.parent}: the index was closed; open it again") from error
        raise corrupt(path, error) from error
    except UnicodeDecodeError as error:
        raise corrupt(path, error) from error
