"""What can become of the files of a folder. Each function damages one folder in one way, decided by a random generator.

Nothing here knows what the files mean: only that SQLite files begin with a magic text, that its log and shared memory
are called ``-wal`` and ``-shm``, and that a JSON file may carry a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

PAGE = 4096
_SQLITE = b"SQLite format 3\0"
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class Damage:
    """What was done.

    Attributes:
        kind: name of the kind.
        detail: which file and where.
        stale: what is left may be whole and older, or another folder's; nothing in the folder could tell.
    """

    kind: str
    detail: str
    stale: bool = False


@dataclass(frozen=True)
class Subject:
    """What is damaged: a folder, how chance falls, and other folders whose files may come into this one."""

    folder: Path
    random: Random
    donors: Sequence[Path]


Damager: TypeAlias = Callable[[Subject], Damage]


def files_of(folder: Path) -> list[Path]:
    """Every regular file, at any depth, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _some_file(at: Subject, least: int = 0) -> Path:
    return at.random.choice([file for file in files_of(at.folder) if file.stat().st_size >= least])


def _is_log(file: Path) -> bool:
    return file.name.endswith(("-wal", "-shm"))


def _rewrite(file: Path, content: bytes | bytearray, kind: str, detail: str) -> Damage:
    file.write_bytes(content)
    # SQLite takes a damaged end of its log for a torn write and goes back to the last commit that is whole.
    return Damage(kind, f"{file.name}: {detail}", stale=_is_log(file))


def truncate(at: Subject) -> Damage:
    """The end is missing, at any byte or at a page's border."""
    file = _some_file(at, least=1)
    size = at.random.randrange(file.stat().st_size)
    if at.random.random() < 0.4:
        size -= size % PAGE
    return _rewrite(file, file.read_bytes()[:size], "truncated", f"to {size} bytes")


def flip(at: Subject) -> Damage:
    """One to three bits anywhere."""
    file = _some_file(at, least=1)
    content = bytearray(file.read_bytes())
    bits = [at.random.randrange(8 * len(content)) for _ in range(at.random.choice((1, 1, 1, 2, 3)))]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    return _rewrite(file, content, "bits flipped", f"bits {bits}")


def flip_header(at: Subject) -> Damage:
    """One bit of the first 128 bytes, or of the first bytes of a page."""
    file = _some_file(at, least=1)
    content = bytearray(file.read_bytes())
    start = 0
    if at.random.random() < 0.5:
        start = PAGE * at.random.randrange(len(content) // PAGE + 1)
    place = min(start + at.random.randrange(128), len(content) - 1)
    content[place] ^= 1 << at.random.randrange(8)
    return _rewrite(file, content, "bit flipped in a header", f"byte {place}")


def noise(at: Subject) -> Damage:
    """A block of random bytes."""
    file = _some_file(at, least=1)
    content = bytearray(file.read_bytes())
    start = at.random.randrange(len(content))
    size = min(at.random.choice((1, 4, 16, 512, PAGE)), len(content) - start)
    content[start : start + size] = at.random.randbytes(size)
    return _rewrite(file, content, "random block", f"{size} bytes at {start}")


def zero_page(at: Subject) -> Damage:
    """A block that reads as zeros."""
    file = _some_file(at, least=1)
    content = bytearray(file.read_bytes())
    size = at.random.choice((512, PAGE))
    start = size * at.random.randrange(-(-len(content) // size))
    part = len(content[start : start + size])
    content[start : start + size] = bytes(part)
    return _rewrite(file, content, "zeroed page", f"{part} bytes at {start}")


def move_page(at: Subject) -> Damage:
    """A page written to another page's place."""
    file = _some_file(at, least=1)
    content = bytearray(file.read_bytes())
    pages = -(-len(content) // PAGE)
    here, there = at.random.randrange(pages), at.random.randrange(pages)
    page = content[PAGE * here : PAGE * (here + 1)]
    content[PAGE * there : PAGE * there + len(page)] = page
    return _rewrite(file, content, "misplaced page", f"page {here} over page {there}")


def stale_page(at: Subject) -> Damage:
    """A page as it was in another state, or is in another folder: a write that was lost."""
    file, donor = _same_name(at)
    content, source = bytearray(file.read_bytes()), donor.read_bytes()
    page = at.random.randrange(max(1, min(len(content), len(source)) // PAGE))
    content[PAGE * page : PAGE * (page + 1)] = source[PAGE * page : PAGE * (page + 1)]
    # With a file of one page all of it is replaced.
    whole = bytes(content) == source
    return Damage(
        "stale page", f"{file.name}: page {page} of {donor.parent.name}", whole or _rewrite(file, content, "", "").stale
    )


def append(at: Subject) -> Damage:
    """Bytes behind the end."""
    file = _some_file(at)
    size = at.random.choice((1, 100, PAGE))
    more = at.random.choice((bytes(size), at.random.randbytes(size)))
    return _rewrite(file, file.read_bytes() + more, "bytes appended", f"{size}")


def swap_file(at: Subject) -> Damage:
    """A file of another folder, or of another state of the same one."""
    file, donor = _same_name(at)
    shutil.copyfile(donor, file)
    return Damage("file of another folder", f"{file.name} of {donor.parent.name}", stale=True)


def mix_files(at: Subject) -> Damage:
    """Two files of the folder in each other's place."""
    files = files_of(at.folder)
    first, second = at.random.sample(files, 2) if len(files) > 1 else (files[0], files[0])
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    return Damage("files mixed up", f"{first.name} and {second.name}", stale=_is_log(first) or _is_log(second))


def remove(at: Subject) -> Damage:
    """A file is missing."""
    file = _some_file(at)
    file.unlink()
    return Damage("file missing", file.name, stale=_is_log(file))


def empty(at: Subject) -> Damage:
    """A file holds nothing."""
    return _rewrite(_some_file(at), b"", "empty file", "")


def extra(at: Subject) -> Damage:
    """A file that does not belong there."""
    file = _some_file(at)
    names = (f".{file.name}.partial", f"{file.name}.bak", f"x{file.name}", f"{file.name}-journal", "notes.txt", "0")
    added = at.folder / at.random.choice(names)
    added.write_bytes(at.random.choice((file.read_bytes(), at.random.randbytes(1000), b"")))
    # A rollback journal that looks hot is played back into the database: SQLite does as it is told.
    return Damage("extra file", added.name)


def not_a_file(at: Subject) -> Damage:
    """A folder, or a link that leads nowhere, in the place of a file."""
    file = _some_file(at)
    file.unlink()
    if at.random.random() < 0.5:
        file.mkdir()
        return Damage("folder instead of a file", file.name, stale=_is_log(file))
    file.symlink_to(at.random.choice(("nowhere", file.name)))
    return Damage("dead link instead of a file", file.name, stale=_is_log(file))


def forge_json(at: Subject) -> Damage:
    """A JSON file says something else, and its checksum fits."""
    files = [file for file in files_of(at.folder) if file.suffix == ".json" and _parsed(file) is not None]
    if not files:
        return flip(at)
    file = at.random.choice(files)
    content = _parsed(file)
    assert content is not None
    sign = _signer(content)
    content.pop(_CHECKSUM, None)
    if "version" in content and at.random.random() < 0.3:
        content["version"] = at.random.choice((0, -1, 3, 99, 10**30, "2", 2.0, None, True, []))
        detail = f"version {content['version']!r}"
    else:
        detail = _change_leaf(content, at.random)
    if sign:
        content[_CHECKSUM] = sign(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return Damage("forged JSON", f"{file.name}: {detail}")


def forge_version(at: Subject) -> Damage:
    """A SQLite file whose table of settings says something else."""
    return _forge_sqlite(at, "forged setting", settings=True)


def forge_row(at: Subject) -> Damage:
    """A SQLite file that is whole, with one value, or one row, that is not what was written."""
    return _forge_sqlite(at, "forged row", settings=False)


COMMON: Mapping[Damager, int] = {
    truncate: 12,
    flip: 16,
    flip_header: 12,
    noise: 10,
    zero_page: 10,
    move_page: 5,
    stale_page: 6,
    append: 4,
    swap_file: 6,
    mix_files: 3,
    remove: 5,
    empty: 4,
    extra: 3,
    not_a_file: 2,
    forge_json: 8,
}
OLD_INDEX: Mapping[Damager, int] = {**COMMON, forge_version: 5}
INDEX: Mapping[Damager, int] = {**OLD_INDEX, forge_row: 8}


def apply(folder: Path, random: Random, donors: Sequence[Path], kinds: Mapping[Damager, int]) -> Damage:
    """Damages a folder in one way, or sometimes in two."""
    times = random.choice((1, 1, 1, 1, 2))
    done: list[Damage] = []
    at = Subject(folder, random, donors)
    for _ in range(times):
        if not files_of(folder):
            break
        done.append(random.choices(list(kinds), list(kinds.values()))[0](at))
    return Damage(
        done[0].kind if len(done) == 1 else "two at once",
        "; ".join(f"{one.kind}, {one.detail}" for one in done),
        any(one.stale for one in done),
    )


def _same_name(at: Subject) -> tuple[Path, Path]:
    pairs = [
        (at.folder / file.relative_to(donor), file)
        for donor in at.donors
        for file in files_of(donor)
        if (at.folder / file.relative_to(donor)).is_file()
    ]
    if pairs:
        return at.random.choice(pairs)
    file = _some_file(at)
    return file, at.random.choice(files_of(at.random.choice(at.donors)))


def _parsed(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_SIGNERS: tuple[Callable[[Any], str], ...] = (
    lambda content: _sha256(json.dumps(content, sort_keys=True)),
    lambda content: _sha256(json.dumps(content, sort_keys=True, separators=(",", ":"))),
)


def _signer(content: Mapping[str, Any]) -> Callable[[Any], str] | None:
    rest = {key: value for key, value in content.items() if key != _CHECKSUM}
    return next((sign for sign in _SIGNERS if content.get(_CHECKSUM) == sign(rest)), None)


def resign(content: Mapping[str, Any]) -> str:
    """The JSON of a mapping, with the checksum that fits it where it has one."""
    rest = {key: value for key, value in content.items() if key != _CHECKSUM}
    return json.dumps({**rest, _CHECKSUM: _SIGNERS[1](rest)} if _CHECKSUM in content else rest)


_ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    1e308,
    0.5,
    "",
    "x",
    "../../etc/passwd",
    [],
    {},
    [1],
    {"a": 1},
)


def _change_leaf(content: Any, random: Random) -> str:
    """Changes one value somewhere inside, removes it, or adds one beside it."""
    path = []
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = random.choice(keys)
        path.append(str(key))
        inner = content[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.85:
            content = inner
            continue
        break
    how = random.random()
    if how < 0.15:
        del content[key]
        return f"{'.'.join(path)} removed"
    if how < 0.25 and isinstance(content, dict):
        content["more"] = random.choice(_ODD)
        return f"{'.'.join(path[:-1])} has more"
    if how < 0.5 and type(inner) in {int, float}:
        content[key] = random.choice((inner + 1, inner - 1, -inner, inner * 2, 0))
    else:
        content[key] = random.choice(_ODD)
    return f"{'.'.join(path)} is {content[key]!r}"


def _forge_sqlite(at: Subject, kind: str, *, settings: bool) -> Damage:
    files = [file for file in files_of(at.folder) if file.read_bytes()[: len(_SQLITE)] == _SQLITE]
    if not files:
        return flip(at)
    file = at.random.choice(files)
    try:
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            detail = _forge(connection, at.random, settings=settings)
    except sqlite3.Error as error:  # the first of two damages came before
        detail = str(error)
    return Damage(kind, f"{file.name}: {detail}")


def _forge(connection: sqlite3.Connection, random: Random, *, settings: bool) -> str:
    tables = []
    for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')]
        rows = connection.execute(f'SELECT * FROM "{name}"').fetchall()
        if rows and not name.startswith("sqlite_") and (len(columns) == 2 and columns[0] == "key") == settings:
            tables.append((name, columns, rows))
    if not tables:
        return "no such table"
    name, columns, rows = random.choice(tables)
    row = random.choice(rows)
    if settings and random.random() < 0.3:
        row = next((row for row in rows if row[0] == "version"), row)
    where = " AND ".join(f'"{column}" IS ?' for column in columns)
    how = random.random()
    if how < 0.2:
        connection.execute(f'DELETE FROM "{name}" WHERE {where}', row)
        return f"{name}: a row deleted"
    place = 1 if settings else random.randrange(len(columns))
    value = _other_value(row[place], random)
    if how < 0.4:
        value = random.choice(rows)[place]
    try:
        connection.execute(f'UPDATE "{name}" SET "{columns[place]}" = ? WHERE {where}', (value, *row))
    except sqlite3.IntegrityError as error:
        return f"{name}: refused ({error})"
    return f"{name}.{columns[place]}: {ascii(row[place])[:40]} became {ascii(value)[:40]}"


def _other_value(value: Any, random: Random) -> Any:
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, 0, 2**40, str(value)))
    if isinstance(value, bytes) and value:
        content = bytearray(value)
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        return random.choice((bytes(content), value[:-1], b""))
    if isinstance(value, str):
        number = value.lstrip("-").isdigit()
        return random.choice((str(int(value) + 1), "99", "0", "-1", "x") if number else (value + "x", value[:-1], "é"))
    return random.choice((0, "x", b"x"))
