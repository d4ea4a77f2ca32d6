"""The model bundle: the one folder that training exports and that everything else opens.

``NAME.dckt`` holds ``manifest.json``, ``image.onnx``, ``text.onnx`` and ``vocabulary.txt``, and whatever else
the graphs need, such as ``image.onnx.data``. Each graph has an output for each representation:
``probability`` (B, C), whose rows sum to 1, and ``fc9`` (B, D), both float32. ``image.onnx`` takes
``pixels``, uint8 (B, S, S, 3); ``text.onnx`` takes ``tokens``, int64 (B, L), padded at the end with 0. A medium
beside these two has a graph, too, such as ``audio.onnx``; it takes ``vectors``, float32 (B, F).

A *graph* is an ONNX file of one medium in one precision. The same graphs may be there in fp16 and int8 too
(``image.fp16.onnx``), with the same inputs and outputs. A *variant* is a way to serve: a runtime, the precision
of the graphs that it reads, and the precision that it computes in.

Nothing in a bundle is executed as code, and every byte is compared with its hash before a native library sees
it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from dckt.calibration import Calibration
from dckt.errors import BundleCorruptError, BundleError, BundleVersionError, ConfigError, TextError
from dckt.files import atomic_folder, atomic_write, sha256_file
from dckt.preprocessing import ImageSpec, TextSpec, Vocabulary
from dckt.preprocessing.text import BUILT_IN

BUNDLE_VERSION = 2
FORMAT = "dckt-bundle"
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.txt"
MEDIA: tuple[Literal["image"], Literal["text"]] = ("image", "text")  # those of every bundle; it may have more
PRECISIONS = ("fp32", "fp16", "int8")  # that a graph may be written in
LAYER_PRECISIONS = (*PRECISIONS, "int8 weights")
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
PROFILE = (1, 8, 32)

T = TypeVar("T")


def graph_file(medium: str, precision: str) -> str:
    """Name of a graph in a bundle; its external data, if it has any, has that name and ``.data``."""
    return f"{medium}.onnx" if precision == "fp32" else f"{medium}.{precision}.onnx"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the bundle must be: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One ONNX file.

    Attributes:
        file: its path in the bundle.
        layers: how many convolutions and matrix products compute in each precision, such as
            ``{"fp16": 17, "fp32": 1}``; empty where nobody counted. ``int8 weights`` are those that store their weights
            in int8 and compute in float.
    """

    file: str
    layers: Mapping[str, int]

    def __post_init__(self) -> None:
        if not set(self.layers) <= set(LAYER_PRECISIONS) or min(self.layers.values(), default=0) < 0:
            raise BundleError(f"layers are {dict(self.layers)}; expected counts of {', '.join(LAYER_PRECISIONS)}")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to serve the model.

    Attributes:
        name: runtime and precision, such as ``openvino-bf16``.
        runtime: one of :data:`RUNTIMES`.
        graph: precision of the graphs that it reads, one of :data:`PRECISIONS`.
        precision: what it computes in: that of the graphs, or ``bf16``, which OpenVINO makes of fp32 graphs.
    """

    name: str
    runtime: str
    graph: str
    precision: str

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise BundleError(f"variant {self.name!r}: runtime is {self.runtime!r}, expected {', '.join(RUNTIMES)}")
        converts = (self.runtime, self.graph, self.precision) == ("openvino", "fp32", "bf16")
        if self.graph not in PRECISIONS or (self.precision != self.graph and not converts):
            raise BundleError(
                f"variant {self.name!r}: {self.runtime} has no {self.precision!r} from graphs in {self.graph!r}"
            )
        if self.name != f"{self.runtime}-{self.precision}":
            raise BundleError(f"variant {self.name!r} is to be called {self.runtime}-{self.precision}")


DEFAULT_VARIANT = Variant(name="onnxruntime-fp32", runtime="onnxruntime", graph="fp32", precision="fp32")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says about itself.

    Attributes:
        model_id: hash of all that decides a vector: fp32 graphs, preprocessing, vocabulary and representation.
            Every variant of a bundle retrieves as its fp32 graphs do, so graphs in other precisions do not count,
            and an index fits them all. An index stores the id and refuses vectors of another.
        representation: the output that an index stores by default, a key of ``dimensions``.
        dimensions: width of each output of every graph.
        labels: class names, in the order of the columns of ``probability``.
        image: how a picture becomes pixels.
        text: how a text becomes tokens.
        files: every file of the bundle but the manifest, by its path inside the folder. Others in the folder, such
            as engines that were built later, are no part of the bundle.
        graphs: by the precision that they are written in, then by medium. ``fp32`` is always there, with at least
            ``image`` and ``text``, and each precision has the same media.
        variants: those that passed the gate; the fastest on a CPU, as measured where it was exported, comes first.
        profile: batch sizes min, opt and max that an engine is built for.
        produced_by: versions of what made the bundle.
        measured: parity and MAP figures taken on export.
        created: when, ISO 8601 with time zone.
        calibration: from which similarity on a hit fits, or None where nobody measured it. No part of the model id:
            measuring it anew changes no vector.
    """

    model_id: str
    representation: str
    dimensions: Mapping[str, int]
    labels: tuple[str, ...]
    image: ImageSpec
    text: TextSpec
    files: Mapping[str, FileEntry]
    graphs: Mapping[str, Mapping[str, Graph]]
    variants: tuple[Variant, ...]
    profile: tuple[int, int, int]
    produced_by: Mapping[str, str]
    measured: Mapping[str, Any]
    created: str
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _check_names(self.files)
        _check_graphs(self.graphs, self.files)
        _check_variants(self.variants, self.graphs)
        if not 1 <= self.profile[0] <= self.profile[1] <= self.profile[2]:
            raise BundleError(f"profile is {self.profile}; expected batch sizes 1 <= min <= opt <= max")
        if self.representation not in self.dimensions:
            raise BundleError(f"representation {self.representation!r} is none of {sorted(self.dimensions)}")
        if min(self.dimensions.values()) < 1:
            raise BundleError(f"dimensions are {dict(self.dimensions)}; each is at least 1")
        if len(set(self.labels)) != len(self.labels):
            raise BundleError("a label occurs twice")
        if self.calibration and self.calibration.representation != self.representation:
            raise BundleError(
                f"the calibration is of {self.calibration.representation}; this bundle's vectors are "
                f"{self.representation}"
            )
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

    @property
    def media(self) -> tuple[str, ...]:
        """What the model encodes: ``image``, ``text``, and any other."""
        return tuple(self.manifest.graphs["fp32"])

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

    def graph(self, medium: str, precision: str = "fp32") -> Path:
        """The ONNX file of a medium.

        Args:
            medium: ``image``, ``text``, or another that the bundle holds.
            precision: what the graph is written in.

        Raises:
            BundleError: there is no such graph.
        """
        try:
            return self.path / self.manifest.graphs[precision][medium].file
        except KeyError as error:
            there = ", ".join(f"{medium} {name}" for name, of in self.manifest.graphs.items() for medium in of)
            raise BundleError(f"{self.path}: has no graph {medium} {precision}, only {there}") from error


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
    graphs: Mapping[str, Mapping[str, Graph]] | None = None,
    variants: Sequence[Variant] | None = None,
    profile: tuple[int, int, int] = PROFILE,
    calibration: Calibration | None = None,
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
        dimensions: width of each output of every graph, by its name.
        produced_by: versions of what made the bundle, by package.
        measured: figures taken on export; anything that JSON holds.
        graphs: by precision and medium; None: ``image.onnx`` and ``text.onnx``, in fp32.
        variants: those that passed the gate, the fastest on a CPU first; None: fp32 on ONNX Runtime.
        profile: batch sizes min, opt and max that an engine is built for.
        calibration: similarities from which on a hit fits; :func:`with_calibration` changes it later.
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
            named = _fp32_graphs() if graphs is None else {name: dict(of) for name, of in graphs.items()}
            _check_graphs(named, files)  # before the model id is made of them
            manifest = Manifest(
                model_id=_model_id(_counted(entries, named), entries[VOCABULARY], image, text, representation),
                representation=representation,
                dimensions=dict(dimensions),
                labels=tuple(labels),
                image=image,
                text=text,
                files=entries,
                graphs=named,
                variants=(DEFAULT_VARIANT,) if variants is None else tuple(variants),
                profile=profile,
                produced_by=dict(produced_by),
                measured=dict(measured),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                calibration=calibration,
            )
            (folder / MANIFEST).write_text(_dump_manifest(manifest), encoding="utf-8")
            # What cannot be read back is not written.
            _ = Bundle.open(folder, verify=False).vocabulary
    except FileExistsError as error:
        raise BundleError(f"{destination}: exists already; choose another name, or replace it with force") from error
    except OSError as error:
        raise BundleError(f"{destination}: the bundle cannot be written ({error})") from error
    return Bundle.open(destination, verify=False)


def with_calibration(bundle: Bundle, calibration: Calibration) -> Bundle:
    """Stores a calibration in a bundle on the disk, in place of one that may be there.

    The manifest is replaced as a whole; a process that has the bundle open goes on with the old one. The model id
    stays, so every index of the model stays good.

    Args:
        bundle: which.
        calibration: of the bundle's representation.

    Returns:
        The bundle as it is now.

    Raises:
        BundleError: the calibration is of another representation, the bundle was replaced by another model's since it
            was opened, or the folder cannot be written.
    """
    present = _read_manifest(bundle.path)
    if present.model_id != bundle.manifest.model_id:
        raise BundleError(f"{bundle.path}: holds another model now; open it again, and calibrate that")
    manifest = _dump_manifest(replace(present, calibration=calibration))
    try:
        _parse_manifest(json.loads(manifest))  # what cannot be read back is not written
    except BundleError as error:
        raise BundleError(f"{bundle.path}: is of an old format that holds no calibration; export it again") from error
    try:
        atomic_write(bundle.path / MANIFEST, manifest)
    except OSError as error:
        raise BundleError(f"{bundle.path}: the calibration cannot be stored ({error})") from error
    return Bundle.open(bundle.path, verify=False)


# --- files --------------------------------------------------------------------------------------------------


def _check_names(names: Iterable[str]) -> None:
    """The vocabulary is there, and each name is a path inside the folder that means the same file on every system."""
    if VOCABULARY not in names:
        raise BundleError(f"a bundle needs {VOCABULARY}; it has {sorted(names)}")
    for name in names:
        parts = PurePosixPath(name).parts
        inside = parts and "/".join(parts) == name and ".." not in parts
        if not inside or not name.isprintable() or any(letter in name for letter in "\\:"):
            raise BundleError(f"{name!r} is no relative path inside a bundle")
        if name == MANIFEST:
            raise BundleError(f"{MANIFEST} is written by the bundle itself and cannot be one of its files")


def _check_graphs(graphs: Mapping[str, Mapping[str, Graph]], files: Iterable[str]) -> None:
    media = set(graphs.get("fp32", {}))
    if not set(MEDIA) <= media:
        raise BundleError(f"a bundle needs fp32 graphs of {', '.join(MEDIA)}; it has those of {sorted(media)}")
    if not set(graphs) <= set(PRECISIONS):
        raise BundleError(f"graphs are of {sorted(graphs)}; expected {', '.join(PRECISIONS)}")
    for precision, of in graphs.items():
        if set(of) != media:
            raise BundleError(
                f"{precision} graphs are of {sorted(of)}, fp32 graphs of {sorted(media)}; expected the same"
            )
    named = [graph.file for of in graphs.values() for graph in of.values()]
    missing = set(named) - set(files)
    if missing:
        raise BundleError(f"a bundle needs {sorted(missing)}; it has {sorted(files)}")
    if len(set(named)) < len(named) or VOCABULARY in named:
        raise BundleError(f"the graphs are {named}; expected a file for each")


def _check_variants(variants: Sequence[Variant], graphs: Iterable[str]) -> None:
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise BundleError(f"variants are {names}; expected at least one, and each once")
    for variant in variants:
        if variant.graph not in graphs:
            raise BundleError(f"variant {variant.name!r} needs {variant.graph} graphs; there are {sorted(graphs)}")


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


def _fp32_graphs() -> dict[str, dict[str, Graph]]:
    return {"fp32": {medium: Graph(file=graph_file(medium, "fp32"), layers={}) for medium in MEDIA}}


def _counted(files: Mapping[str, FileEntry], graphs: Mapping[str, Mapping[str, Graph]]) -> dict[str, FileEntry]:
    """The files that count as graphs for the model id: those in fp32, with their external data."""
    names = {name for graph in graphs["fp32"].values() for name in (graph.file, f"{graph.file}.data")}
    return {name: entry for name, entry in files.items() if name in names}


def _model_id(
    graphs: Mapping[str, FileEntry], vocabulary: FileEntry, image: ImageSpec, text: TextSpec, representation: str
) -> str:
    text_parts = asdict(text)
    if text.tokenizer == BUILT_IN:
        del text_parts["tokenizer"]  # so that older bundles, which name none, keep their ids
    return _canonical_hash(
        {
            "graphs": {name: entry.sha256 for name, entry in graphs.items()},
            "vocabulary": vocabulary.sha256,
            "image": asdict(image),
            "text": text_parts,
            "representation": representation,
        }
    )


def _dump_manifest(manifest: Manifest) -> str:
    try:
        content = {"format": FORMAT, "version": BUNDLE_VERSION, **asdict(manifest)}
        if manifest.calibration is None:
            del content["calibration"]
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
    version = content["version"] if type(content.get("version")) is int else None
    if version not in {1, BUNDLE_VERSION}:
        raise BundleError(f"version is {content.get('version')!r}, expected 1 or {BUNDLE_VERSION}")
    since_2 = set() if version == BUNDLE_VERSION else {"graphs", "variants", "profile"}
    optional = {"calibration"} - set(content)
    expected = {"format", "version", "checksum", *(field.name for field in fields(Manifest))}
    _fields(content, expected - since_2 - optional)
    rest = {key: value for key, value in content.items() if key != "checksum"}
    try:
        intact = content["checksum"] == _canonical_hash(rest)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"holds what JSON does not allow ({error})") from error
    if not intact:
        raise BundleError("was altered after it was written")
    files = _mapping(rest, "files", _file_entry)
    _check_names(files)
    graphs, variants, profile = _fp32_graphs(), [DEFAULT_VARIANT], PROFILE
    if version == 1:
        # It knew of no other files: each one beside the vocabulary belonged to a graph.
        counted = {name: entry for name, entry in files.items() if name != VOCABULARY}
    else:
        graphs = _mapping(rest, "graphs", _graphs_of)
        variants = [_variant(entry) for entry in _sequence(rest, "variants", dict)]
        smallest, usual, largest = _sequence(rest, "profile", int, length=3)
        profile = (smallest, usual, largest)
        _check_graphs(graphs, files)
        counted = _counted(files, graphs)
    manifest = Manifest(
        model_id=_typed(rest, "model_id", str),
        representation=_typed(rest, "representation", str),
        dimensions=_mapping(rest, "dimensions", lambda key, of: _typed(of, key, int)),
        labels=tuple(_sequence(rest, "labels", str)),
        image=_image_spec(_typed(rest, "image", dict)),
        text=_text_spec(_typed(rest, "text", dict)),
        files=files,
        graphs=graphs,
        variants=tuple(variants),
        profile=profile,
        produced_by=_mapping(rest, "produced_by", lambda key, of: _typed(of, key, str)),
        measured=_typed(rest, "measured", dict),
        created=_typed(rest, "created", str),
        calibration=None if optional else Calibration.from_json(_typed(rest, "calibration", dict)),
    )
    model_id = _model_id(counted, files[VOCABULARY], manifest.image, manifest.text, manifest.representation)
    if manifest.model_id != model_id:
        raise BundleError(f"model_id is {manifest.model_id!r}, its parts give {model_id!r}")
    return manifest


def _file_entry(name: str, of: Mapping[str, Any]) -> FileEntry:
    entry = _typed(of, name, dict)
    _fields(entry, {"sha256", "size"})
    return FileEntry(sha256=_typed(entry, "sha256", str), size=_typed(entry, "size", int))


def _graphs_of(precision: str, of: Mapping[str, Any]) -> dict[str, Graph]:
    return _mapping(of, precision, _graph)


def _graph(medium: str, of: Mapping[str, Any]) -> Graph:
    entry = _typed(of, medium, dict)
    _fields(entry, {field.name for field in fields(Graph)})
    layers = _mapping(entry, "layers", lambda key, counts: _typed(counts, key, int))
    return Graph(file=_typed(entry, "file", str), layers=layers)


def _variant(entry: Mapping[str, Any]) -> Variant:
    names = [field.name for field in fields(Variant)]
    _fields(entry, set(names))
    return Variant(**{name: _typed(entry, name, str) for name in names})


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
