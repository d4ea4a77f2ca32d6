"""The model bundle: the one folder that training exports and that everything else opens.

``NAME.dckt`` holds ``manifest.json``, ``image.onnx``, ``text.onnx`` and ``vocabulary.txt``, and whatever else
the graphs need, such as ``image.onnx.data``. Both graphs have an output for each representation:
``probability`` (B, C), whose rows sum to 1, and ``fc9`` (B, D), both float32. ``image.onnx`` takes
``pixels``, uint8 (B, S, S, 3); ``text.onnx`` takes ``tokens``, int64 (B, L), padded at the end with 0.

Nothing in a bundle is executed as code, and every byte is compared with its hash before a native library sees
it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from dckt.errors import BundleCorruptError, BundleError, BundleVersionError, ConfigError, TextError
from dckt.files import atomic_folder, sha256_file
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary
from dckt.preprocessing.text import BUILT_IN

BUNDLE_VERSION = 1
FORMAT = "dckt-bundle"
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.txt"
GRAPHS: Mapping[str, str] = {"image": "image.onnx", "text": "text.onnx"}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the bundle must be: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says about itself.

    Attributes:
        model_id: hash of all that decides a vector: graphs, preprocessing, vocabulary and representation. The
            same model under another folder name has the same id; an index stores it and refuses vectors of
            another.
        representation: the output that an index stores by default, a key of ``dimensions``.
        dimensions: width of each output of both graphs.
        labels: class names, in the order of the columns of ``probability``.
        image: how a picture becomes pixels.
        text: how a text becomes tokens.
        files: every file of the bundle but the manifest, by its path inside the folder.
        produced_by: versions of what made the bundle.
        measured: parity and MAP figures taken on export.
        created: when, ISO 8601 with time zone.
    """

    model_id: str
    representation: str
    dimensions: Mapping[str, int]
    labels: tuple[str, ...]
    image: ImageSpec
    text: TextSpec
    files: Mapping[str, FileEntry]
    produced_by: Mapping[str, str]
    measured: Mapping[str, Any]
    created: str

    def __post_init__(self) -> None:
        _check_names(self.files)
        if self.representation not in self.dimensions:
            raise BundleError(f"representation {self.representation!r} is none of {sorted(self.dimensions)}")
        if min(self.dimensions.values()) < 1:
            raise BundleError(f"dimensions are {dict(self.dimensions)}; each is at least 1")
        if len(set(self.labels)) != len(self.labels):
            raise BundleError("a label occurs twice")
        if self.dimensions.get("probability", len(self.labels)) != len(self.labels):
            raise BundleError(
                f"{len(self.labels)} labels for a probability of {self.dimensions['probability']} columns"
            )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: what it says about itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Opens a bundle after checking all of it.

        Args:
            path: the folder.
            verify: compare every file with its SHA-256. Without it only presence and size are compared, which
                saves reading a large bundle twice when something else vouches for its content.

        Raises:
            BundleError: there is no such folder, or it is no bundle.
            BundleVersionError: written in a newer format than this version reads.
            BundleCorruptError: a file is missing, altered or unreadable, or the manifest is not what it
                should be.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, entry in manifest.files.items():
            _check_file(path / name, entry, verify=verify)
        return cls(path, manifest)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words that the text graph knows.

        Raises:
            BundleCorruptError: the file is no vocabulary.
        """
        try:
            return Vocabulary.load(self.path / VOCABULARY)
        except TextError as error:
            raise BundleCorruptError(f"{error}; export the model again") from error

    def graph(self, medium: Literal["image", "text"]) -> Path:
        """The ONNX file of a medium."""
        return self.path / GRAPHS[medium]


def write_bundle(
    destination: str | Path,
    *,
    files: Mapping[str, Path | bytes],
    image: ImageSpec,
    text: TextSpec,
    labels: Sequence[str],
    representation: str,
    dimensions: Mapping[str, int],
    produced_by: Mapping[str, str],
    measured: Mapping[str, Any],
    force: bool = False,
) -> Bundle:
    """Writes a bundle, whole or not at all.

    Args:
        destination: the folder to make, by custom ``NAME.dckt``.
        files: content by name inside the bundle: a file to copy, or bytes. ``image.onnx``, ``text.onnx`` and
            ``vocabulary.txt`` must be among them; a graph's external data goes beside it under the name that
            it refers to.
        image: how a picture becomes pixels.
        text: how a text becomes tokens.
        labels: class names, in the order of the columns of ``probability``.
        representation: the output that an index stores by default, a key of ``dimensions``.
        dimensions: width of each output of both graphs, by its name.
        produced_by: versions of what made the bundle, by package.
        measured: figures taken on export; anything that JSON holds.
        force: replace a bundle that is there already. Nothing but a bundle or an empty folder is ever
            replaced.

    Raises:
        BundleError: ``destination`` exists, the parts do not fit together, or the disk refuses them.
    """
    destination = Path(destination)
    if force and not _replaceable(destination):
        raise BundleError(f"{destination}: is no bundle, so it is not replaced; choose another name")
    try:
        with atomic_folder(destination, force=force) as folder:
            _check_names(files)
            for name, content in files.items():
                _place(content, folder / name)
            entries = {name: _entry(folder / name) for name in sorted(files)}
            manifest = Manifest(
                model_id=_model_id(entries, image, text, representation),
                representation=representation,
                dimensions=dict(dimensions),
                labels=tuple(labels),
                image=image,
                text=text,
                files=entries,
                produced_by=dict(produced_by),
                measured=dict(measured),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            (folder / MANIFEST).write_text(_dump_manifest(manifest), encoding="utf-8")
            # What cannot be read back is not written.
            _ = Bundle.open(folder, verify=False).vocabulary
    except FileExistsError as error:
        raise BundleError(f"{destination}: exists already; choose another name, or replace it with force") from error
    except OSError as error:
        raise BundleError(f"{destination}: the bundle cannot be written ({error})") from error
    return Bundle.open(destination, verify=False)


# --- files --------------------------------------------------------------------------------------------------


def _check_names(names: Iterable[str]) -> None:
    """All that a bundle needs, each a path that stays inside the folder and means the same file on every system."""
    missing = {VOCABULARY, *GRAPHS.values()} - set(names)
    if missing:
        raise BundleError(f"a bundle needs {sorted(missing)}; it has {sorted(names)}")
    for name in names:
        parts = PurePosixPath(name).parts
        inside = parts and "/".join(parts) == name and ".." not in parts
        if not inside or not name.isprintable() or any(letter in name for letter in "\\:"):
            raise BundleError(f"{name!r} is no relative path inside a bundle")
        if name == MANIFEST:
            raise BundleError(f"{MANIFEST} is written by the bundle itself and cannot be one of its files")


def _place(content: Path | bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        shutil.copyfile(content, target)


def _replaceable(destination: Path) -> bool:
    if not destination.exists():
        return True
    # A bundle may be damaged and still be replaced; a manifest.json alone may be anybody's.
    bundle = all((destination / name).is_file() for name in (MANIFEST, VOCABULARY))
    return bundle or (destination.is_dir() and not any(destination.iterdir()))


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_file(path), size=path.stat().st_size)


def _check_file(path: Path, entry: FileEntry, *, verify: bool) -> None:
    try:
        if not path.is_file():
            raise BundleCorruptError(f"{path}: is missing; copy or export the bundle again")
        size = path.stat().st_size
        if size != entry.size:
            raise BundleCorruptError(
                f"{path}: has {size:,} bytes, expected {entry.size:,}; copy or export the bundle again"
            )
        if verify and sha256_file(path) != entry.sha256:
            raise BundleCorruptError(f"{path}: the content is not what was exported; copy or export the bundle again")
    except OSError as error:
        raise BundleCorruptError(f"{path}: cannot be read ({error})") from error


# --- manifest -----------------------------------------------------------------------------------------------


def _canonical_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _model_id(files: Mapping[str, FileEntry], image: ImageSpec, text: TextSpec, representation: str) -> str:
    text_parts = asdict(text)
    if text.tokenizer == BUILT_IN:
        del text_parts["tokenizer"]  # so that older bundles, which name none, keep their ids
    return _canonical_hash(
        {
            # External data belongs to its graph, so every file beside the vocabulary counts as graph.
            "graphs": {name: entry.sha256 for name, entry in files.items() if name != VOCABULARY},
            "vocabulary": files[VOCABULARY].sha256,
            "image": asdict(image),
            "text": text_parts,
            "representation": representation,
        }
    )


def _dump_manifest(manifest: Manifest) -> str:
    try:
        content = {"format": FORMAT, "version": BUNDLE_VERSION, **asdict(manifest)}
        content = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: keys are text, tuples lists
        # Hashes protect the files; this one protects what the manifest says beside them.
        return json.dumps({**content, "checksum": _canonical_hash(content)}, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"produced_by and measured must be JSON, with finite numbers ({error})") from error


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{path}: is no bundle, for it holds no {MANIFEST}; dckt-export writes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleCorruptError(f"{file}: cannot be read as JSON ({error}); copy the bundle again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{file}: is not the manifest of a bundle; its format is not {FORMAT!r}")
    version = content.get("version")
    if type(version) is int and version > BUNDLE_VERSION:
        raise BundleVersionError(
            f"{path}: written in bundle format {version}; this dckt reads up to {BUNDLE_VERSION}, update it"
        )
    try:
        return _parse_manifest(content)
    except (ConfigError, BundleError) as error:
        raise BundleCorruptError(f"{file}: {error}; copy or export the bundle again") from error


def _parse_manifest(content: Mapping[str, Any]) -> Manifest:
    _fields(content, {"format", "version", "checksum", *(field.name for field in fields(Manifest))})
    if _typed(content, "version", int) != BUNDLE_VERSION:
        raise BundleError(f"version is {content['version']}, expected {BUNDLE_VERSION}")
    rest = {key: value for key, value in content.items() if key != "checksum"}
    try:
        intact = content["checksum"] == _canonical_hash(rest)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"holds what JSON does not allow ({error})") from error
    if not intact:
        raise BundleError("was altered after it was written")
    manifest = Manifest(
        model_id=_typed(rest, "model_id", str),
        representation=_typed(rest, "representation", str),
        dimensions=_mapping(rest, "dimensions", lambda key, of: _typed(of, key, int)),
        labels=tuple(_sequence(rest, "labels", str)),
        image=_image_spec(_typed(rest, "image", dict)),
        text=_text_spec(_typed(rest, "text", dict)),
        files=_mapping(rest, "files", _file_entry),
        produced_by=_mapping(rest, "produced_by", lambda key, of: _typed(of, key, str)),
        measured=_typed(rest, "measured", dict),
        created=_typed(rest, "created", str),
    )
    model_id = _model_id(manifest.files, manifest.image, manifest.text, manifest.representation)
    if manifest.model_id != model_id:
        raise BundleError(f"model_id is {manifest.model_id!r}, its parts give {model_id!r}")
    return manifest


def _file_entry(name: str, of: Mapping[str, Any]) -> FileEntry:
    entry = _typed(of, name, dict)
    _fields(entry, {"sha256", "size"})
    return FileEntry(sha256=_typed(entry, "sha256", str), size=_typed(entry, "size", int))


def _image_spec(content: dict[str, Any]) -> ImageSpec:
    _fields(content, {field.name for field in fields(ImageSpec)})
    red, green, blue = _sequence(content, "mean", float, length=3)
    red_std, green_std, blue_std = _sequence(content, "std", float, length=3)
    return ImageSpec(
        side=_typed(content, "side", int),
        crop_share=_typed(content, "crop_share", float),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        max_pixels=_typed(content, "max_pixels", int),
    )


def _text_spec(content: dict[str, Any]) -> TextSpec:
    content = {"tokenizer": BUILT_IN, **content}  # older bundles name none
    _fields(content, {field.name for field in fields(TextSpec)})
    return TextSpec(max_tokens=_typed(content, "max_tokens", int), tokenizer=_typed(content, "tokenizer", str))


def _fields(found: Mapping[str, Any], expected: set[str]) -> None:
    if set(found) != expected:
        raise BundleError(f"holds the fields {sorted(found)}, expected {sorted(expected)}")


def _typed(of: Mapping[str, Any], key: str, kind: type[T]) -> T:
    # type() and not isinstance(), because True is an int in Python and not in JSON.
    if type(of[key]) is not kind:
        raise BundleError(f"{key} is {of[key]!r}, expected {kind.__name__}")
    return of[key]  # type: ignore[no-any-return]


def _sequence(of: Mapping[str, Any], key: str, kind: type[T], *, length: int | None = None) -> list[T]:
    values = _typed(of, key, list)
    if any(type(value) is not kind for value in values) or length not in {None, len(values)}:
        raise BundleError(f"{key} is {values!r}, expected {length or 'any number'} of {kind.__name__}")
    return values


def _mapping(of: Mapping[str, Any], key: str, read: Callable[[str, Mapping[str, Any]], T]) -> dict[str, T]:
    content = _typed(of, key, dict)
    return {name: read(name, content) for name in content}
