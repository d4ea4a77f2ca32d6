"""From a picture, a text, or an item of another medium to the items that belong to it: encoders and index together.

Shape letters: B batch, N vectors, F features of an item, D width of the representation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from numpy.typing import ArrayLike

from dckt.adding import AddReport, Failure, Options, Part, Progress, Row, add, rows_of
from dckt.batching import Batcher, Batching
from dckt.bundle import Bundle
from dckt.collect import Collection, Item
from dckt.errors import ConfigError, IndexFolderError, ItemError, UnknownItemError
from dckt.features import checked_rows
from dckt.files import atomic_folder
from dckt.finding import Found, Question, SearchResult, find, find_shared, floors
from dckt.index import Hit, Index
from dckt.index.items import shown
from dckt.index.store import ITEMS
from dckt.model import Model, open_bundle
from dckt.preprocessing import ImageLimits, ImageSource

__all__ = ["AddReport", "Batching", "Failure", "Hit", "ImageLimits", "SearchResult", "Searcher"]

MinScore = float | Literal["calibrated"] | None
Media = str | Sequence[str] | None
Where = Mapping[str, Any] | None

_Asked = tuple[Any, Question]  # what Model.prepare gave, and what is asked with it


class Searcher:
    """A model and an index that it filled: add pictures and texts, search with either. Safe to use from many threads.

    A model may have more media than these, such as audio; their items are rows of numbers, here called features.

    Scores are cosine similarities of the model's representations: higher is better, ties go by id ascending, then by
    medium. See :class:`dckt.index.Index` for what is stored, and for when a search is exact. Use :meth:`open` or
    :meth:`create`, and close it, or use it in a ``with`` block.

    Attributes:
        bundle: where the model comes from.
        index: what is searched.
        model: what encodes.
    """

    def __init__(self, model: Model, index: Index, *, batching: Batching | None = None) -> None:
        self.bundle = model.bundle
        self.model = model
        self.index = index
        self._batchers: Mapping[str, Batcher[_Asked, Callable[[], Found]]] = MappingProxyType(
            {medium: Batcher(partial(self._share, medium), batching) for medium in model.encoders} if batching else {}
        )

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        index: str | Path,
        *,
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        batching: Batching | None = None,
        limits: ImageLimits | None = None,
    ) -> Self:
        """Opens a model and an index that it filled. The model is run once, so that the first search is not slower.

        Args:
            bundle: folder that ``dckt-export`` wrote.
            index: folder that :meth:`create` or ``dckt index`` wrote; with which variant does not matter.
            variant: how the model is served, such as ``openvino-bf16``, or an error; ``auto``, the fastest of the
                bundle's variants that can run here. :attr:`providers` says which it is.
            device: where the model runs: ``cpu``; ``cuda``, or an error; ``auto``, CUDA if it attaches.
            threads: of the model on the CPU, of decoding pictures, and of building a graph; None takes every core.
            batching: how concurrent callers of :meth:`search` share calls of the model and of the index; None: each has
                its own.
            limits: of bytes and pixels of pictures; None takes the defaults.

        Raises:
            BundleError: the bundle is missing, damaged, or newer than this version.
            IndexFolderError: the index is missing, damaged, or newer than this version.
            ModelMismatchError: the index was filled by another model.
            ConfigError: the bundle names a tokenizer that is neither registered nor installed.
            MissingExtraError: the variant's runtime is not installed.
            ProviderError: the device does not attach, or cannot run the variant.
        """
        opened = open_bundle(bundle)
        manifest = opened.manifest
        found = Index.open(index, model_id=manifest.model_id, representation=manifest.representation, threads=threads)
        return cls._with_model(
            opened, found, variant=variant, device=device, threads=threads, batching=batching, limits=limits
        )

    @classmethod
    def create(
        cls,
        bundle: str | Path,
        index: str | Path,
        *,
        kind: str = "auto",
        second_stage: bool = False,
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        batching: Batching | None = None,
        limits: ImageLimits | None = None,
    ) -> Self:
        """Makes an index with no items in it, for the representation that the bundle names.

        Args:
            bundle: folder that ``dckt-export`` wrote.
            index: folder to make; an empty one may be there.
            kind: ``exact``, ``hnsw``, or ``auto``; see :meth:`dckt.index.Index.create`.
            second_stage: keep the bundle's other representation for every item as well, for ``reorder`` of
                :meth:`search`.
            variant: see :meth:`open`.
            device: see :meth:`open`.
            threads: see :meth:`open`.
            batching: see :meth:`open`.
            limits: see :meth:`open`.

        Raises:
            BundleError: see :meth:`open`.
            IndexFolderError: there is something at ``index`` already, or it cannot be written.
            ConfigError: the bundle names a tokenizer that is neither registered nor installed, or has one
                representation only.
            MissingExtraError: see :meth:`open`.
            ProviderError: see :meth:`open`.
        """
        opened = open_bundle(bundle)
        manifest = opened.manifest
        made = Index.create(
            index,
            model_id=manifest.model_id,
            representation=manifest.representation,
            dimension=manifest.dimensions[manifest.representation],
            kind=kind,
            second=_second(opened) if second_stage else None,
            threads=threads,
        )
        return cls._with_model(
            opened, made, variant=variant, device=device, threads=threads, batching=batching, limits=limits
        )

    @classmethod
    @contextmanager
    def replacing(
        cls,
        bundle: str | Path,
        index: str | Path,
        *,
        kind: str = "auto",
        second_stage: bool = False,
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        limits: ImageLimits | None = None,
    ) -> Iterator[Self]:
        """A new index that takes the place of another when the block ends well.

        Until then, and if the block fails, the one that is there stays as it is. This is how a collection is indexed
        again with a new model.

        Args:
            bundle: folder that ``dckt-export`` wrote.
            index: folder of the index to replace; there need not be one.
            kind: see :meth:`create`.
            second_stage: see :meth:`create`.
            variant: see :meth:`open`.
            device: see :meth:`open`.
            threads: see :meth:`open`.
            limits: see :meth:`open`.

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
                cls.create(
                    bundle,
                    folder,
                    kind=kind,
                    second_stage=second_stage,
                    variant=variant,
                    device=device,
                    threads=threads,
                    limits=limits,
                ) as searcher,
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
    def _with_model(cls, bundle: Bundle, index: Index, *, batching: Batching | None = None, **options: Any) -> Self:
        second = index.meta.second
        with ExitStack() as opened:
            opened.enter_context(index)
            model = Model.open(bundle, also=[second] if second else [], **options)
            opened.pop_all()
        return cls(model, index, batching=batching)

    def close(self) -> None:
        """Closes the model and the index. Nothing is lost without it; callers that wait for others get an error."""
        for batcher in self._batchers.values():
            batcher.close()
        self.model.close()
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
        return self.model.providers

    # --- changing ---

    def add_images(
        self,
        images: Iterable[ImageSource],
        *,
        ids: Iterable[str] | None = None,
        metadata: Iterable[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        on_error: str = "raise",
        upsert: bool = False,
        progress: Progress | None = None,
    ) -> AddReport:
        """Encodes and stores pictures.

        A sequence is checked as a whole before anything is encoded. Anything else that can be iterated is read a batch
        at a time, in bounded memory.

        Args:
            images: paths, file contents, Pillow images or uint8 arrays (H, W, 3); paths need the least memory.
            ids: one for each; None takes the paths, as they are given, with ``/``.
            metadata: one mapping for each, of anything that JSON holds.
            batch_size: how many are encoded at once.
            on_error: ``raise`` refuses all of a sequence when one cannot be stored; of a stream, the batches before
                stay. ``skip`` leaves that one out and reports the reason, ``collect`` the error itself; what is done
                is on the disk after every batch, so an interrupted call can be repeated, and leaves out what is there
                before it is encoded again.
            upsert: replace items with the same id, instead of refusing them. What is there with the same content and
                metadata is left as it is, and not encoded.
            progress: called with (pictures done, pictures in all, None for a stream).

        Raises:
            ImageError: a picture cannot be decoded.
            ItemError: an id is in the index already or given twice, or the model gives no usable vector.
            ConfigError: an argument with a value that is not offered.
        """
        options = Options(batch_size=batch_size, on_error=on_error, upsert=upsert, progress=progress)
        return self._add(rows_of("image", images, ids, metadata, _path_id), options)

    def add_texts(
        self,
        texts: Iterable[str],
        *,
        ids: Iterable[str],
        metadata: Iterable[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        on_error: str = "raise",
        upsert: bool = False,
        progress: Progress | None = None,
    ) -> AddReport:
        """Encodes and stores texts. The text itself is only stored when metadata holds it.

        Args:
            texts: each with at least one word that the model knows; a sequence or a stream, as in :meth:`add_images`.
            ids: one for each.
            metadata: see :meth:`add_images`.
            batch_size: see :meth:`add_images`.
            on_error: see :meth:`add_images`.
            upsert: see :meth:`add_images`.
            progress: called with (texts done, texts in all, None for a stream).

        Raises:
            TextError: the model knows no word of a text.
            ItemError: see :meth:`add_images`.
            ConfigError: an argument with a value that is not offered.
        """
        options = Options(batch_size=batch_size, on_error=on_error, upsert=upsert, progress=progress)
        return self._add(rows_of("text", texts, ids, metadata), options)

    def add_features(
        self,
        features: ArrayLike,
        *,
        ids: Iterable[str],
        medium: str,
        metadata: Iterable[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        on_error: str = "raise",
        upsert: bool = False,
        progress: Progress | None = None,
    ) -> AddReport:
        """Encodes and stores items of a medium beside pictures and texts, such as audio.

        Args:
            features: (N, F) numbers, as the model was trained on; :meth:`add_vectors` takes what a model gave.
            ids: N.
            medium: of all of them.
            metadata: N mappings; None stores empty ones.
            batch_size: see :meth:`add_images`.
            on_error: see :meth:`add_images`.
            upsert: see :meth:`add_images`.
            progress: called with (items done, items in all).

        Raises:
            ItemError: not rows of F numbers, one that is not finite, or see :meth:`add_images`.
            ConfigError: the model has no such medium, or an argument with a value that is not offered.
        """
        options = Options(batch_size=batch_size, on_error=on_error, upsert=upsert, progress=progress)
        rows, bad = checked_rows(features, self.model.width(medium), medium)
        return self._add(rows_of(medium, rows, ids, metadata), options, bad)

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
            collection: pictures, texts, and features of other media.
            batch_size: see :meth:`add_images`.
            on_error: see :meth:`add_images`.
            upsert: see :meth:`add_images`.
            progress: called with (items done, items in all).

        Returns:
            A report for each medium that the collection holds.

        Raises:
            DcktError: see :meth:`add_images`, :meth:`add_texts` and :meth:`add_features`.
        """
        for medium, rows in collection.features.items():  # which are finite, as they were read
            checked_rows([item.source for item in rows], self.model.width(medium), medium)
        # Texts go first: they are quick, so their mistakes show before the pictures are encoded.
        media: dict[str, Sequence[Item[Any]]] = {
            "text": collection.texts,
            **collection.features,
            "image": collection.images,
        }
        parts = [
            Part(medium, [Row(item.id, item.source, item.metadata) for item in items])
            for medium, items in media.items()
            if items
        ]
        options = Options(batch_size=batch_size, on_error=on_error, upsert=upsert, progress=progress)
        return add(self.model, self.index, parts, options)

    def add_vectors(
        self,
        vectors: ArrayLike,
        *,
        ids: Sequence[str],
        medium: str,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        second: ArrayLike | None = None,
        upsert: bool = False,
    ) -> AddReport:
        """Stores vectors that this model made elsewhere: all of them, or none. :meth:`add_features` makes them here.

        Args:
            vectors: (N, D) of any floating dtype, of the index's representation.
            ids: N different texts.
            medium: of all of them, such as ``image``.
            metadata: N mappings; None stores empty ones.
            second: (N, D2) of the second representation; needed if the index keeps one, and only then.
            upsert: replace items that are there already, instead of refusing them.

        Raises:
            ItemError, ConfigError: see :meth:`dckt.index.Index.add`.
        """
        ids = list(ids)
        self.index.add(medium, ids, vectors, metadata=metadata, second=second, upsert=upsert)
        return AddReport(len(ids))

    def delete(self, ids: str | Iterable[str], medium: str | None = None) -> None:
        """Deletes items.

        Args:
            ids: one, or several; all that are named go, or none of a medium.
            medium: of all of them; None takes every medium that holds an id.

        Raises:
            UnknownItemError: an id is not there; nothing was deleted.
        """
        ids = [ids] if isinstance(ids, str) else list(ids)
        if medium is not None:
            self.index.delete(medium, ids)
            return
        there = {name: self.index.existing(name, ids) for name in self.index.media}
        unknown = sorted(set(ids).difference(*there.values()))
        if unknown:
            raise UnknownItemError(f"the index holds nothing with the id {shown(unknown)}")
        for name, of in there.items():
            if of:
                self.index.delete(name, sorted(of))

    def get(self, item: str, medium: str) -> Hit:
        """An item by its id, with score 1.

        Raises:
            UnknownItemError: the index does not hold it.
        """
        return self.index.get(item, medium)

    def count(self, medium: str | None = None, where: Where = None) -> int:
        """How many items there are.

        Args:
            medium: of this one; None counts all.
            where: those for which this holds; see :meth:`search`.
        """
        return self.index.count(medium, where)

    def compact(self) -> None:
        """Makes the index small and fast again, while searches go on; see :meth:`dckt.index.Index.compact`."""
        self.index.compact()

    def _add(self, part: Part, options: Options, bad: Sequence[int] = ()) -> AddReport:
        """Adds all rows but the bad ones, which hold a number that is not finite."""
        if not bad or not isinstance(part.rows, Sequence):
            return add(self.model, self.index, [part], options)[part.medium]
        reason = ItemError("the features hold a number that is not finite")
        if options.on_error == "raise":
            raise ItemError(f"{part.medium} {part.rows[bad[0]].id!r}: {reason}")
        left = set(bad)
        good = [row for place, row in enumerate(part.rows) if place not in left]
        report = add(self.model, self.index, [Part(part.medium, good)], options)[part.medium]
        left_out = [
            Failure(part.rows[place].id, reason if options.on_error == "collect" else str(reason)) for place in bad
        ]
        return replace(report, failed=(*left_out, *report.failed))

    # --- searching ---

    def search(
        self,
        image: ImageSource | None = None,
        *,
        text: str | None = None,
        features: ArrayLike | None = None,
        medium: str | None = None,
        k: int = 10,
        media: Media = None,
        where: Where = None,
        min_score: MinScore = None,
        reorder: int = 0,
    ) -> SearchResult:
        """The items that belong to a picture, to a text, or to an item of another medium.

        Args:
            image: a path, the content of a file, a Pillow image, or an array (H, W, 3) of uint8.
            text: instead of an image; with at least one word that the model knows.
            features: instead of either, (F,) numbers of an item of another medium, as the model was trained on.
            medium: which one that is, such as ``audio``.
            k: how many hits; more than there are items gives all.
            media: which media to find; None means every medium but the query's own, so a picture finds texts.
            where: which items to find, by their metadata, such as ``{"shop": "A", "price": {"lt": 20}}``; see
                :meth:`dckt.index.Index.search`.
            min_score: the least similarity of a hit; ``calibrated`` takes what the bundle's calibration found for the
                direction from the query's medium to the hit's. There may be no hit: nothing fits.
            reorder: 0, or how many of the best items, at least ``k``, are reordered by the second representation that
                the index keeps, which finds the very item and not only its like. Their scores are then its
                similarities; ``min_score`` is still about the first's.

        Raises:
            ImageError: the picture cannot be decoded.
            TextError: the model knows no word of the text.
            ItemError: the features are not F finite numbers, or the model gives no usable vector for the query.
            ConfigError: not one of image, text and features, features without a medium that the model has, k is below
                1, there is no such medium, a mistake in the filter, or the bundle is not calibrated or the index has no
                second representation for what is asked.
        """
        asked, source = self._query({"image": image, "text": text}, features, medium, "an image or a text or features")
        question = self._question(asked, self._wanted(media, asked), k, where, min_score, reorder)
        began = time.perf_counter()
        prepared = self.model.prepare(asked, source)
        ready = time.perf_counter()
        if asked in self._batchers:
            found, stages = self._batchers[asked]((prepared, question))()
        else:
            found, stages = find(self.index, self.model.encode(asked, [prepared]), question)
        return _results(asked, began, ready, found, stages)[0]

    def search_batch(
        self,
        images: Iterable[ImageSource] | None = None,
        *,
        texts: Iterable[str] | None = None,
        features: ArrayLike | None = None,
        medium: str | None = None,
        k: int = 10,
        media: Media = None,
        where: Where = None,
        min_score: MinScore = None,
        reorder: int = 0,
        batch_size: int = 32,
    ) -> tuple[SearchResult, ...]:
        """As :meth:`search`, for several pictures, texts or rows of features: a result for each, in their order.

        Args:
            images: pictures.
            texts: instead of images.
            features: instead of either, (N, F).
            medium: of the features.
            k: see :meth:`search`.
            media: see :meth:`search`.
            where: see :meth:`search`.
            min_score: see :meth:`search`.
            reorder: see :meth:`search`.
            batch_size: how many are decoded and encoded at once.

        Raises:
            DcktError: see :meth:`search`; one bad query refuses all.
        """
        asked, queries = self._query({"image": images, "text": texts}, features, medium, "images or texts or features")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        if isinstance(queries, str | bytes) or not isinstance(queries, Iterable):
            raise ConfigError(f"expected a sequence of {asked} queries, not a single one; use search for that")
        question = self._question(asked, self._wanted(media, asked), k, where, min_score, reorder)
        rest = iter(queries)
        results: list[SearchResult] = []
        while part := list(islice(rest, batch_size)):
            began = time.perf_counter()
            prepared = self.model.prepare_all(asked, part)
            ready = time.perf_counter()
            found, stages = find(self.index, self.model.encode(asked, prepared), question)
            results += _results(asked, began, ready, found, stages)
        return tuple(results)

    def similar(
        self,
        item: str,
        medium: str,
        *,
        k: int = 10,
        media: Media = None,
        where: Where = None,
        min_score: MinScore = None,
    ) -> SearchResult:
        """The items nearest to one of the index, without that one itself.

        Args:
            item: its id.
            medium: its medium.
            k: how many hits.
            media: which media to find; None means all of them, the item's own too.
            where: see :meth:`search`.
            min_score: see :meth:`search`.

        Raises:
            UnknownItemError: the index does not hold the item.
            ConfigError: see :meth:`search`.
        """
        wanted = self._wanted(media, None)
        question = self._question(medium, wanted, k, where, min_score, 0)
        vector = self.index.vector(item, medium)
        hits, timings = find(self.index, {self.bundle.manifest.representation: vector[None]}, question.wider())
        others = [hit for hit in hits[0] if (hit.id, hit.medium) != (item, medium)]
        return SearchResult(tuple(others[:k]), medium, timings)

    def _query(self, sources: Mapping[str, Any], features: Any, medium: str | None, expected: str) -> tuple[str, Any]:
        """The medium of a query and the query itself, of which there must be one."""
        if (features is None) != (medium is None):
            raise ConfigError("features and their medium go together, such as features=row, medium='audio'")
        if medium is not None:
            self.model.width(medium)  # refuses one that it does not have
            sources = {**sources, medium: features}
        given = [(name, source) for name, source in sources.items() if source is not None]
        if len(given) != 1:
            raise ConfigError(f"a search takes {expected}, one of them")
        return given[0]

    def _share(self, medium: str, asked: Sequence[_Asked]) -> Sequence[Callable[[], Found]]:
        vectors = self.model.encode(medium, [prepared for prepared, _ in asked])
        return find_shared(self.index, vectors, [question for _, question in asked])

    def _question(
        self, medium: str, wanted: Sequence[str], k: int, where: Where, min_score: MinScore, reorder: int
    ) -> Question:
        if reorder and self.index.meta.second is None:
            raise ConfigError(
                f"reorder is {reorder}, and the index keeps no second representation; make one that does, with "
                "second_stage=True"
            )
        lowest = floors(min_score, self.bundle.manifest.calibration, medium, wanted)
        return Question(k=k, media=wanted, where=where, floors=lowest, reorder=reorder)

    def _wanted(self, media: Media, query_medium: str | None) -> list[str]:
        known = sorted({*self.bundle.media, *self.index.media})
        if media is None:
            return [name for name in known if name != query_medium]
        names = [media] if isinstance(media, str) else list(media)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ConfigError(f"media is {media!r}; expected one or several of {', '.join(known)}")
        return names


def _results(
    medium: str, began: float, ready: float, found: Sequence[Sequence[Hit]], stages: Mapping[str, float]
) -> list[SearchResult]:
    """Results of what was prepared from one moment to another, and found behind that."""
    encoded = time.perf_counter()
    hits = [tuple(own) for own in found]  # made here, where no other caller waits for it
    made = time.perf_counter()
    first = {"image": "decode", "text": "tokenize"}.get(medium, "check")
    timings = {
        first: ready - began,
        "encode": encoded - ready - sum(stages.values()),
        **stages,
        "search": stages["search"] + made - encoded,
    }
    return [SearchResult(own, medium, timings) for own in hits]


def _second(bundle: Bundle) -> tuple[str, int]:
    """Name and width of the representation that reorders."""
    manifest = bundle.manifest
    others = {name: width for name, width in manifest.dimensions.items() if name != manifest.representation}
    # A bundle has these two; among more of them, the one that tells items apart best comes first.
    for name in ("fc9", *others):
        if name in others:
            return name, others[name]
    raise ConfigError(f"{bundle.path}: has no representation beside {manifest.representation}, so no second stage")


def _path_id(image: object) -> str:
    if not isinstance(image, str | os.PathLike):
        raise ConfigError(f"a picture is a {type(image).__name__}, which gives no id; give ids for all pictures")
    return Path(image).as_posix()
