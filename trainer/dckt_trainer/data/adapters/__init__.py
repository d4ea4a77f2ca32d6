"""Published corpora as corpus folders of ours.

Each adapter is a module with a function ``read`` that understands the layout that a publisher ships and says what
it decided; what it hands over is checked and written here, the same way for all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias, get_args

from dckt.errors import ConfigError, CorpusError, ImageError
from dckt.files import atomic_folder
from dckt.preprocessing import decode_image, tokenize
from dckt_trainer.data.adapters import nus_wide, pascal_sentences, wikipedia, xmedianet
from dckt_trainer.data.adapters.records import Fault, Item, Reading
from dckt_trainer.data.corpus import SPLITS, OnBadPair, Progress, read_corpus

Format: TypeAlias = Literal["wikipedia", "nus-wide-10k", "pascal-sentences", "xmedianet"]
FORMATS: tuple[Format, ...] = get_args(Format)

__all__ = ["FORMATS", "Format", "Imported", "import_corpus"]


@dataclass(frozen=True)
class Imported:
    """What an import made; all but ``path`` is also in ``import.json`` beside the pairs.

    Attributes:
        path: the corpus folder.
        format: the publisher's layout.
        source: name of the publisher's folder.
        seed: what drew splits and pairs; None where the publisher's lists are taken as they are.
        pairs: how many pairs the corpus has.
        splits: how many of them each split has.
        labels: how many of them each label has.
        left_out: how many items the corpus lacks, by reason.
        decisions: what the publisher does not say and the adapter decided.
    """

    path: Path
    format: Format
    source: str
    seed: int | None
    pairs: int
    splits: Mapping[str, int]
    labels: Mapping[str, int]
    left_out: Mapping[str, int]
    decisions: tuple[str, ...]


def import_corpus(
    format: Format,  # noqa: A002 - what it is called on the command line, too
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    link: bool = True,
    on_bad_pair: OnBadPair = "raise",
    concepts: Sequence[str] | None = None,
    pairs_per_class: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Writes a published corpus, as its publisher ships it, as a corpus folder with ``pairs.jsonl``.

    The corpus appears whole or not at all. Every picture is decoded once, so that a training finds no bad one.

    Args:
        format: the publisher's layout, one of ``FORMATS``; the adapters' modules describe them.
        folder: the publisher's folder; it is only read.
        out: the corpus folder to write, outside ``folder``.
        seed: draws what the publisher does not fix; without effect on ``xmedianet``.
        link: hard-link the pictures where the file system allows it, so that they take no room; else copy them.
            A linked picture is the publisher's file itself: to change it in one place changes it in both.
        on_bad_pair: ``"raise"`` lists the mistakes of all pairs in one error; ``"skip"`` leaves bad pairs out and
            counts them by reason.
        concepts: for ``nus-wide-10k``, other classes than the published ten.
        pairs_per_class: for ``nus-wide-10k``, another number than 1,000.
        force: replace a corpus that is there already.
        progress: called with (pictures done, pictures in all).

    Raises:
        ConfigError: an argument with a value that is not offered or that belongs to another format.
        CorpusError: the folder is not of that layout, a pair is bad, nothing that a model could learn from is left,
            or the corpus cannot be written.
    """
    for name, value, offered in (("format", format, FORMATS), ("on_bad_pair", on_bad_pair, get_args(OnBadPair))):
        if value not in offered:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(offered)}")
    folder, out = Path(folder).resolve(), Path(out).absolute()
    _check_out(folder, out, force)
    try:
        reading = _read(format, folder, seed, concepts, pairs_per_class)
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be read ({error}); check the files") from error
    try:
        with atomic_folder(out, force=force) as building:
            faults = _take(reading.items, building / "images", link=link, progress=progress)
            if faults and on_bad_pair == "raise":
                raise CorpusError(
                    f"{folder}: {len(faults)} of {len(reading.items)} pairs cannot be used; mend them, or leave them "
                    "out with on_bad_pair='skip' (--on-bad-pair skip)",
                    [f"{item.place}: {fault.reason} ({fault.detail})" for item, fault in faults],
                )
            bad = {id(item) for item, _ in faults}
            items = [item for item in reading.items if id(item) not in bad]
            reasons = Counter(reading.left_out) + Counter(fault.reason for _, fault in faults)
            imported = Imported(
                path=out,
                format=format,
                source=folder.name,
                seed=None if format == "xmedianet" else seed,
                pairs=len(items),
                splits={split: sum(item.split == split for item in items) for split in SPLITS},
                labels=dict(sorted(Counter(item.label for item in items).items())),
                left_out=dict(sorted(reasons.items())),
                decisions=reading.decisions,
            )
            _write(building, items, imported)
            try:
                read_corpus(building, check_images="exists")
            except CorpusError as error:
                # The reader names the folder that is being built, which is gone when its message is read.
                said = str(error).partition("\n")[0].removeprefix(f"{building.resolve()}{os.sep}")
                raise CorpusError(f"{folder}: what can be used of it is no corpus: {said}", error.mistakes) from error
    except OSError as error:
        raise CorpusError(f"{out}: the corpus cannot be written ({error})") from error
    return imported


def _check_out(folder: Path, out: Path, force: bool) -> None:
    place = out.resolve()
    if place == folder or folder in place.parents or place in folder.parents:
        raise ConfigError(f"the corpus {out} and the publisher's folder {folder} overlap; write the corpus elsewhere")
    if os.path.lexists(out) and not force:
        raise CorpusError(f"{out}: exists already; give another folder, or replace it with force (--force)")
    if os.path.lexists(out) and not (out / "pairs.jsonl").is_file():
        raise CorpusError(f"{out}: exists and is no corpus, so it is not replaced; give another folder")


def _read(
    format: Format,  # noqa: A002
    folder: Path,
    seed: int,
    concepts: Sequence[str] | None,
    pairs_per_class: int | None,
) -> Reading:
    if format != "nus-wide-10k" and (concepts is not None or pairs_per_class is not None):
        raise ConfigError(f"concepts and pairs_per_class are for nus-wide-10k; leave them out for {format}")
    match format:
        case "wikipedia":
            return wikipedia.read(folder, seed=seed)
        case "pascal-sentences":
            return pascal_sentences.read(folder, seed=seed)
        case "xmedianet":
            return xmedianet.read(folder)
        case "nus-wide-10k":
            return nus_wide.read(
                folder,
                seed=seed,
                concepts=nus_wide.CONCEPTS if concepts is None else concepts,
                pairs_per_class=nus_wide.PAIRS_PER_CLASS if pairs_per_class is None else pairs_per_class,
            )


def _take(items: Sequence[Item], images: Path, *, link: bool, progress: Progress | None) -> list[tuple[Item, Fault]]:
    """Checks the pairs and puts the pictures of the good ones into the corpus. Returns the bad ones with the reason."""
    faults: dict[int, Fault] = {}
    ids: set[str] = set()
    good: dict[str, list[int]] = {}  # a picture in the corpus, and which items show it
    for number, item in enumerate(items):
        fault = item.fault or _fault(item)
        if not fault and item.id in ids:
            fault = Fault("another pair has the same id", item.id)
        if fault:
            faults[number] = fault
        else:
            ids.add(item.id)
            good.setdefault(item.stored, []).append(number)

    def place(stored: str) -> Fault | None:
        source = items[good[stored][0]].image
        try:
            decode_image(source)
        except ImageError as error:
            return Fault("picture cannot be decoded", str(error))
        _copy(source, images / stored, link)
        return None

    images.mkdir()
    # Pillow decodes without the interpreter's lock, so threads are enough.
    executor = ThreadPoolExecutor(os.cpu_count())
    try:
        for done, (stored, found) in enumerate(zip(good, executor.map(place, good), strict=True), start=1):
            if found:
                faults.update((number, found) for number in good[stored])
            if progress:
                progress(done, len(good))
    finally:
        executor.shutdown(cancel_futures=True)
    return [(items[number], faults[number]) for number in sorted(faults)]


def _fault(item: Item) -> Fault | None:
    """What is wrong with a pair by itself; the picture's content is looked at later."""
    stored = PurePosixPath(item.stored)
    if stored.is_absolute() or ".." in stored.parts or "\0" in item.stored:
        return Fault("the picture's path leaves the folder", item.stored)
    try:
        f"{item.id}{item.stored}{item.label}".encode()
    except UnicodeEncodeError:
        return Fault("the picture's name is not text", ascii(item.stored))
    if not item.image.is_file():
        return Fault("picture is missing", str(item.image))
    if not tokenize(item.text):
        return Fault("the text holds no word", repr(item.text[:60]))
    return None


def _copy(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            # A link to a symbolic link would break when the publisher's folder moves.
            os.link(source.resolve(), target)
        except FileExistsError:
            raise
        except OSError:
            pass  # another file system, or one without links
        else:
            return
    # Never over a file that is there: it may be a link to another picture of the publisher.
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer)


def _write(folder: Path, items: Sequence[Item], imported: Imported) -> None:
    rows = (
        {"id": i.id, "image": f"images/{i.stored}", "text": i.text, "label": i.label, "split": i.split} for i in items
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    about = {name: value for name, value in asdict(imported).items() if name != "path"}
    (folder / "import.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
