"""From a picture or a text to the items that belong to it: encoders, index and metadata together.

Shape letters: B batch, D width of the representation.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from dckt.bundle import Bundle
from dckt.collect import ON_ERROR, Collection
from dckt.errors import (
    ConfigError,
    ImageError,
    IndexFolderError,
    ItemError,
    TextError,
)
from dckt.files import atomic_folder
from dckt.index import Hit, Index
from dckt.index.items import check_ids, dump_metadata, is_id
from dckt.index.store import ITEMS
from dckt.index.vectors import Float32Array, unit_rows
from dckt.preprocessing import ImageSource, image_array, image_batch, token_batch, tokenizer
from dckt.runtime import Encoder
from dckt.runtime.choice import open_encoders

__all__ = ["AddReport", "Hit", "SearchResult", "Searcher"]

MEDIA: tuple[Literal["image"], Literal["text"]] = ("image", "text")
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class SearchResult(Sequence[Hit]):
    """The hits of one query, best first: a sequence of :class:`Hit`.

    Attributes:
        hits: score descending, ties by id ascending.
        query_medium: ``image`` or ``text``.
        timings: seconds spent in ``preprocess``, ``encode`` and ``search``; of the whole batch, for a batch.
    """

    hits: tuple[Hit, ...]
    query_medium: str
    timings: Mapping[str, float] = field(compare=False)

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, place: int | slice) -> Hit | tuple[Hit, ...]:
        """A hit by rank, 0 is the best; a slice gives a tuple."""
        return self.hits[place]

    def __len__(self) -> int:
        return len(self.hits)

    def by_medium(self) -> dict[str, tuple[Hit, ...]]:
        """The hits of each medium, best first."""
        media = sorted({hit.medium for hit in self.hits})
        return {medium: tuple(hit for hit in self.hits if hit.medium == medium) for medium in media}


@dataclass(frozen=True)
class AddReport:
    """What became of items that were to be added.

    Attributes:
        added: how many are in the index now.
        failed: id and reason of each of the others.
    """

    added: int
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Batch:
    """Items on their way into the index: ids and (B, D) vectors of the good ones, id and reason of the others."""

    ids: list[str]
    vectors: Float32Array
    metadata: list[Mapping[str, Any]]
    failed: list[tuple[str, str]]


class Searcher:
    """A model and an index that it filled: add pictures and texts, search with either. Safe to use from many threads.

    Scores are cosine similarities of the model's representations: higher is better, ties go by id ascending. See
    :class:`dckt.index.Index` for what is stored, and for when a search is exact. Use :meth:`open` or :meth:`create`,
    and close it, or use it in a ``with`` block.

    Attributes:
        bundle: the model.
        index: what is searched.
    """

    def __init__(self, bundle: Bundle, index: Index, encoders: Mapping[str, Encoder], *, threads: int | None) -> None:
        self.bundle = bundle
        self.index = index
        self._encoders = encoders
        self._decoders = threads or os.cpu_count() or 1

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        index: str | Path,
        *,
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
    ) -> Self:
        """Opens a model and an index that it filled.

        Args:
            bundle: folder that ``dckt-export`` wrote.
            index: folder that :meth:`create` or ``dckt index`` wrote; with which variant does not matter.
            variant: how the model is served, such as ``openvino-bf16``, or an error; ``auto``, the fastest of the
                bundle's variants that can run here. :attr:`providers` says which it is.
            device: where the model runs: ``cpu``; ``cuda``, or an error; ``auto``, CUDA if it attaches.
            threads: of the model on the CPU, of decoding pictures, and of building a graph; None takes every core.

        Raises:
            BundleError: the bundle is missing, damaged, or newer than this version.
            IndexFolderError: the index is missing, damaged, or newer than this version.
            ModelMismatchError: the index was filled by another model.
            ConfigError: the bundle names a tokenizer that is neither registered nor installed.
            MissingExtraError: the variant's runtime is not installed.
            ProviderError: the device does not attach, or cannot run the variant.
        """
        model = _model(bundle)
        manifest = model.manifest
        opened = Index.open(index, model_id=manifest.model_id, representation=manifest.representation, threads=threads)
        return cls._with_encoders(model, opened, variant, device, threads)

    @classmethod
    def create(
        cls,
        bundle: str | Path,
        index: str | Path,
        *,
        kind: str = "auto",
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
    ) -> Self:
        """Makes an index with no items in it, for the representation that the bundle names.

        Args:
            bundle: folder that ``dckt-export`` wrote.
            index: folder to make; an empty one may be there.
            kind: ``exact``, ``hnsw``, or ``auto``; see :meth:`dckt.index.Index.create`.
            variant: see :meth:`open`.
            device: see :meth:`open`.
            threads: see :meth:`open`.

        Raises:
            BundleError: see :meth:`open`.
            IndexFolderError: there is something at ``index`` already, or it cannot be written.
            ConfigError: the bundle names a tokenizer that is neither registered nor installed.
            MissingExtraError: see :meth:`open`.
            ProviderError: see :meth:`open`.
        """
        model = _model(bundle)
        manifest = model.manifest
        made = Index.create(
            index,
            model_id=manifest.model_id,
            representation=manifest.representation,
            dimension=manifest.dimensions[manifest.representation],
            kind=kind,
            threads=threads,
        )
        return cls._with_encoders(model, made, variant, device, threads)

    @classmethod
    @contextmanager
    def replacing(
        cls,
        bundle: str | Path,
        index: str | Path,
        *,
        kind: str = "auto",
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
    ) -> Iterator[Self]:
        """A new index that takes the place of another when the block ends well.

        Until then, and if the block fails, the one that is there stays as it is. This is how a collection is indexed
        again with a new model.

        Args:
            bundle: folder that ``dckt-export`` wrote.
            index: folder of the index to replace; there need not be one.
            kind: see :meth:`create`.
            variant: see :meth:`open`.
            device: see :meth:`open`.
            threads: see :meth:`open`.

        Raises:
            IndexFolderError: what is at ``index`` is no index and no empty folder.
        """
        index = Path(index)
        if index.exists() and not (index / ITEMS).is_file() and (not index.is_dir() or any(index.iterdir())):
            raise IndexFolderError(f"{index}: is no index, so it is not replaced; choose another name")
        escaped: BaseException | None = None
        try:
            with (
                atomic_folder(index, force=True) as folder,
                cls.create(bundle, folder, kind=kind, variant=variant, device=device, threads=threads) as searcher,
            ):
                try:
                    yield searcher
                except BaseException as error:
                    escaped = error
                    raise
        except OSError as error:
            if error is escaped:  # the caller's own
                raise
            raise IndexFolderError(f"{index}: the index cannot be written ({error})") from error

    @classmethod
    def _with_encoders(cls, bundle: Bundle, index: Index, variant: str, device: str, threads: int | None) -> Self:
        with ExitStack() as opened:
            opened.enter_context(index)
            encoders = open_encoders(bundle, variant=variant, device=device, threads=threads)
            for encoder in encoders.values():
                opened.enter_context(encoder)
            _ = bundle.vocabulary  # so that the first search does not have to read it
            searcher = cls(bundle, index, encoders, threads=threads)
            opened.pop_all()
        return searcher

    def close(self) -> None:
        """Closes the model and the index. Nothing is lost without it."""
        for encoder in self._encoders.values():
            encoder.close()
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def providers(self) -> dict[str, str]:
        """The variant that serves each medium, and what it really runs on, such as ``openvino-bf16 on CPU``."""
        return {
            medium: f"{encoder.variant} on {encoder.provider.removesuffix('ExecutionProvider')}"
            for medium, encoder in self._encoders.items()
        }

    # --- adding ---

    def add_images(
        self,
        images: Sequence[ImageSource],
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        on_error: str = "raise",
        upsert: bool = False,
        progress: Progress | None = None,
    ) -> AddReport:
        """Encodes and stores pictures.

        Args:
            images: paths, file contents, Pillow images or uint8 arrays (H, W, 3); paths need the least memory.
            ids: one for each; None takes the paths, as they are given, with ``/``.
            metadata: one mapping for each, of anything that JSON holds.
            batch_size: how many are encoded at once.
            on_error: ``raise`` refuses all when one cannot be stored. ``skip`` leaves that one out and reports it; what
                is done is on the disk after every batch, so an interrupted call can be repeated, and skips what is
                there before it is encoded again.
            upsert: replace items with the same id, instead of refusing them.
            progress: called with (pictures done, pictures in all).

        Raises:
            ImageError: a picture cannot be decoded.
            ItemError: an id is in the index already or given twice, or the model gives no usable vector.
            ConfigError: an argument with a value that is not offered.
        """
        return self._add(
            [("image", images, _image_ids(images) if ids is None else ids, metadata)],
            batch_size,
            on_error,
            upsert,
            progress,
        )["image"]

    def add_texts(
        self,
        texts: Sequence[str],
        *,
        ids: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        on_error: str = "raise",
        upsert: bool = False,
        progress: Progress | None = None,
    ) -> AddReport:
        """Encodes and stores texts. The text itself is only stored when metadata holds it.

        Args:
            texts: each with at least one word that the model knows.
            ids: one for each.
            metadata: see :meth:`add_images`.
            batch_size: see :meth:`add_images`.
            on_error: see :meth:`add_images`.
            upsert: see :meth:`add_images`.
            progress: called with (texts done, texts in all).

        Raises:
            TextError: the model knows no word of a text.
            ItemError: see :meth:`add_images`.
            ConfigError: an argument with a value that is not offered.
        """
        return self._add([("text", texts, ids, metadata)], batch_size, on_error, upsert, progress)["text"]

    def add_collection(
        self,
        collection: Collection,
        *,
        batch_size: int = 32,
        on_error: str = "raise",
        upsert: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, AddReport]:
        """Encodes and stores what :mod:`dckt.collect` read; with ``raise`` nothing is stored before all is encoded.

        Args:
            collection: pictures and texts.
            batch_size: see :meth:`add_images`.
            on_error: see :meth:`add_images`.
            upsert: see :meth:`add_images`.
            progress: called with (items done, items in all).

        Returns:
            A report for each medium that the collection holds.

        Raises:
            DcktError: see :meth:`add_images` and :meth:`add_texts`.
        """
        # Texts go first: they are quick, so their mistakes show before the pictures are encoded.
        parts = [
            (medium, [item.source for item in items], [item.id for item in items], [item.metadata for item in items])
            for medium, items in (("text", collection.texts), ("image", collection.images))
            if items
        ]
        return self._add(parts, batch_size, on_error, upsert, progress)

    def _add(
        self,
        parts: Sequence[tuple[str, Sequence[Any], Sequence[str], Sequence[Mapping[str, Any]] | None]],
        batch_size: int,
        on_error: str,
        upsert: bool,
        progress: Progress | None,
    ) -> dict[str, AddReport]:
        if on_error not in ON_ERROR:
            raise ConfigError(f"on_error is {on_error!r}; expected raise or skip")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        skip = on_error == "skip"
        failed: dict[str, list[tuple[str, str]]] = {}
        plans = []
        # All that can be known without encoding is checked before anything is encoded.
        for medium, sources, ids, metadata in parts:
            if isinstance(sources, str | bytes) or len(sources) != len(ids):
                raise ItemError(f"expected a sequence of {medium} items and one id for each")
            failed[medium] = []
            dump_metadata(ids, metadata)
            chosen = self._choose(medium, ids, failed[medium], skip=skip, upsert=upsert)
            plans.append((medium, sources, ids, metadata or [{}] * len(ids), chosen))

        total = done = sum(len(ids) for _, _, ids, _ in parts)
        done -= sum(len(chosen) for *_, chosen in plans)
        added = dict.fromkeys(failed, 0)
        waiting: list[tuple[str, _Batch]] = []
        for medium, sources, ids, metadata, chosen in plans:
            for batch in self._encode_items(medium, sources, ids, metadata, chosen, batch_size, skip=skip):
                failed[medium] += batch.failed
                added[medium] += len(batch.ids)
                if skip:
                    self._store(medium, [batch], upsert=upsert)
                else:
                    waiting.append((medium, batch))
                done += len(batch.ids) + len(batch.failed)
                if progress:
                    progress(done, total)
        for medium in failed:
            self._store(medium, [batch for name, batch in waiting if name == medium], upsert=upsert)
        return {medium: AddReport(added[medium], tuple(failed[medium])) for medium in failed}

    def _choose(
        self, medium: str, ids: Sequence[str], failed: list[tuple[str, str]], *, skip: bool, upsert: bool
    ) -> list[int]:
        """Places of the items whose ids can be stored; the others are reported, or refused."""
        if not skip:
            check_ids(ids)
        there = set() if upsert else self.index.existing(medium, [item for item in ids if is_id(item)])
        if there and not skip:
            raise ItemError(
                f"{len(there)} of {len(ids)} {medium} ids are in the index already, {min(there)!r} among them; choose "
                "others, leave them out with on_error='skip' (--on-error skip), or replace them with upsert=True "
                "(--upsert)"
            )
        chosen = []
        seen: set[str] = set()
        for place, item in enumerate(ids):
            if not is_id(item):
                failed.append((ascii(item), "the id is no text, empty or not Unicode"))
            elif item in there:
                failed.append((item, "the id is in the index already"))
            elif item in seen:
                failed.append((item, "the id was given more than once; the first one counts"))
            else:
                chosen.append(place)
                seen.add(item)
        return chosen

    def _store(self, medium: str, batches: Sequence[_Batch], *, upsert: bool) -> None:
        ids = [item for batch in batches for item in batch.ids]
        if ids:
            self.index.add(
                medium,
                ids,
                np.concatenate([batch.vectors for batch in batches]),
                metadata=[value for batch in batches for value in batch.metadata],
                upsert=upsert,
            )

    def _encode_items(
        self,
        medium: str,
        sources: Sequence[Any],
        ids: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        chosen: Sequence[int],
        batch_size: int,
        *,
        skip: bool,
    ) -> Iterator[_Batch]:
        """Encodes in batches; the next batch is decoded while one is encoded."""
        parts = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
        pool = ThreadPoolExecutor(self._decoders)
        try:
            ahead: deque[list[Future[Any]]] = deque()
            for number, part in enumerate(parts):
                while len(ahead) < min(2, len(parts) - number):
                    coming = parts[number + len(ahead)]
                    ahead.append([pool.submit(self._prepare, medium, sources[place]) for place in coming])
                good, prepared, failed = [], [], []
                for place, future in zip(part, ahead.popleft(), strict=True):
                    try:
                        prepared.append(future.result())
                        good.append(place)
                    except (ImageError, TextError) as error:
                        if not skip:
                            # An error about a file names it already, which is what its id is made of.
                            name = "" if ids[place] in str(error) else f"{medium} {ids[place]!r}: "
                            raise type(error)(f"{name}{error}") from error
                        failed.append((ids[place], str(error)))
                vectors, faults = unit_rows(self._run(medium, prepared), dimension=self.index.dimension)
                if faults and not skip:
                    row, reason = next(iter(faults.items()))
                    raise ItemError(f"{medium} {ids[good[row]]!r}: {reason}")
                failed += [(ids[good[row]], reason) for row, reason in faults.items()]
                kept = [row for row in range(len(good)) if row not in faults]
                yield _Batch(
                    ids=[ids[good[row]] for row in kept],
                    vectors=vectors[kept],
                    metadata=[metadata[good[row]] for row in kept],
                    failed=failed,
                )
        finally:
            pool.shutdown(cancel_futures=True)

    # --- searching ---

    def search(
        self,
        image: ImageSource | None = None,
        *,
        text: str | None = None,
        k: int = 10,
        media: str | Sequence[str] | None = None,
    ) -> SearchResult:
        """The items that belong to a picture or to a text.

        Args:
            image: a path, the content of a file, a Pillow image, or an array (H, W, 3) of uint8.
            text: instead of an image; with at least one word that the model knows.
            k: how many hits; more than there are items gives all.
            media: which media to find; None means every medium but the query's own, so a picture finds texts.

        Raises:
            ImageError: the picture cannot be decoded.
            TextError: the model knows no word of the text.
            ItemError: the model gives no usable vector for the query.
            ConfigError: not one of image and text, k is below 1, or there is no such medium.
        """
        if (image is None) == (text is None):
            raise ConfigError("a search takes an image or a text, one of them")
        if text is not None:
            return self.search_batch(texts=[text], k=k, media=media)[0]
        return self.search_batch([image], k=k, media=media)[0]  # type: ignore[list-item]

    def search_batch(
        self,
        images: Sequence[ImageSource] | None = None,
        *,
        texts: Sequence[str] | None = None,
        k: int = 10,
        media: str | Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> tuple[SearchResult, ...]:
        """As :meth:`search`, for several pictures or several texts: a result for each, in their order.

        Args:
            images: pictures.
            texts: instead of images.
            k: see :meth:`search`.
            media: see :meth:`search`.
            batch_size: how many are encoded at once.

        Raises:
            DcktError: see :meth:`search`; one bad query refuses all.
        """
        if (images is None) == (texts is None):
            raise ConfigError("a search takes images or texts, one of them")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        medium = "image" if texts is None else "text"
        queries: Sequence[Any] = (images if texts is None else texts) or ()
        if isinstance(queries, str | bytes):
            raise ConfigError(f"expected a sequence of {medium} queries, not a single one; use search for that")
        wanted = self._wanted(media, medium)
        results: list[SearchResult] = []
        for start in range(0, len(queries), batch_size):
            part = queries[start : start + batch_size]
            began = time.perf_counter()
            prepared = [self._prepare(medium, query) for query in part]
            ready = time.perf_counter()
            vectors = self._run(medium, prepared)
            encoded = time.perf_counter()
            found = self.index.search(vectors, k, media=wanted)
            timings = {
                "preprocess": ready - began,
                "encode": encoded - ready,
                "search": time.perf_counter() - encoded,
            }
            results.extend(SearchResult(tuple(hits), medium, timings) for hits in found)
        return tuple(results)

    def similar(self, item: str, medium: str, *, k: int = 10, media: str | Sequence[str] | None = None) -> SearchResult:
        """The items nearest to one of the index, without that one itself.

        Args:
            item: its id.
            medium: its medium.
            k: how many hits.
            media: which media to find; None means all of them, the item's own too.

        Raises:
            UnknownItemError: the index does not hold the item.
            ConfigError: k is below 1, or there is no such medium.
        """
        if k < 1:
            raise ConfigError(f"k is {k}; expected at least 1")
        wanted = self._wanted(media, None)
        began = time.perf_counter()
        vector = self.index.vector(item, medium)
        hits = self.index.search(vector[None], k + 1, media=wanted)[0]
        others = [hit for hit in hits if (hit.id, hit.medium) != (item, medium)]
        return SearchResult(tuple(others[:k]), medium, {"search": time.perf_counter() - began})

    def _wanted(self, media: str | Sequence[str] | None, query_medium: str | None) -> list[str]:
        known = sorted({*MEDIA, *self.index.media})
        if media is None:
            return [name for name in known if name != query_medium]
        names = [media] if isinstance(media, str) else list(media)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ConfigError(f"media is {media!r}; expected one or several of {', '.join(known)}")
        return names

    def _prepare(self, medium: str, source: Any) -> Any:
        """A picture as pixels (S, S, 3), or a text as token ids."""
        manifest = self.bundle.manifest
        if medium == "image":
            return image_array(source, manifest.image)
        if not isinstance(source, str):
            raise TextError(f"a text is a {type(source).__name__}; expected str")
        return self.bundle.vocabulary.encode(source, manifest.text)

    def _run(self, medium: str, prepared: Sequence[Any]) -> NDArray[np.float32]:
        batch: NDArray[Any]
        if medium == "text":
            batch = token_batch(prepared)
        else:
            batch = np.stack(prepared) if prepared else image_batch([], self.bundle.manifest.image)
        return self._encoders[medium].run(batch)


def _model(path: str | Path) -> Bundle:
    """A bundle whose tokenizer is there: before an index is made, and not only when the first text comes."""
    bundle = Bundle.open(path)
    try:
        tokenizer(bundle.manifest.text.tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return bundle


def _image_ids(images: Sequence[ImageSource]) -> list[str]:
    bad = next((image for image in images if not isinstance(image, str | os.PathLike)), None)
    if bad is not None:
        raise ConfigError(f"a picture is a {type(bad).__name__}, which gives no id; give ids for all pictures")
    return [Path(image).as_posix() for image in images]  # type: ignore[arg-type]
