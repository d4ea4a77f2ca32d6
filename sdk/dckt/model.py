"""A bundle, opened to encode: from a picture, a text, or the features of another medium to vectors.

Shape letters: B batch, F features of an item, D width of a representation.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dckt.bundle import MEDIA, Bundle
from dckt.errors import ConfigError, ItemError, TextError
from dckt.features import checked_rows
from dckt.preprocessing import ImageLimits, decode_image, image_array, image_batch, image_digest, token_batch, tokenizer
from dckt.runtime import Encoder
from dckt.runtime.choice import open_encoders

Vectors = dict[str, NDArray[np.float32]]
"""By representation: (B, D) float32."""


class Model:
    """What encodes pictures, texts, and features of other media. Safe to use from many threads.

    Use :meth:`open`, and close it.

    Attributes:
        bundle: where it comes from.
        encoders: by medium.
        limits: of bytes and pixels of pictures.
        workers: threads that decode pictures.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoders: dict[str, Encoder],
        *,
        limits: ImageLimits | None = None,
        threads: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.encoders = encoders
        self.limits = limits or ImageLimits()
        self.workers = threads or os.cpu_count() or 1

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        *,
        variant: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        also: Sequence[str] = (),
        limits: ImageLimits | None = None,
    ) -> Self:
        """Opens the encoders of a bundle and runs each once, so that the first search is not the slow one.

        Args:
            bundle: see :func:`open_bundle`.
            variant: see :func:`dckt.runtime.choice.choose`.
            device: see :func:`dckt.runtime.choice.choose`.
            threads: of the model on the CPU, and of decoding pictures; None takes every core.
            also: representations to compute beside the bundle's own, in the same pass.
            limits: of pictures; None takes the defaults.

        Raises:
            DcktError: see :func:`dckt.runtime.choice.open_encoders`.
        """
        encoders = open_encoders(bundle, variant=variant, device=device, threads=threads, also=also)
        with ExitStack() as opened:
            for encoder in encoders.values():
                opened.enter_context(encoder)
                _warm_up(encoder)
            _warm_up_decoder()
            _ = bundle.vocabulary  # so that the first search does not have to read it
            opened.pop_all()
        return cls(bundle, encoders, limits=limits, threads=threads)

    def close(self) -> None:
        """Closes the encoders."""
        for encoder in self.encoders.values():
            encoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def providers(self) -> dict[str, str]:
        """The variant that serves each medium, and what it really runs on, such as ``openvino-bf16 on CPU``."""
        return {
            medium: f"{encoder.variant} on {encoder.provider.removesuffix('ExecutionProvider')}"
            for medium, encoder in self.encoders.items()
        }

    def width(self, medium: str) -> int:
        """F, the numbers of an item of a medium beside pictures and texts.

        Raises:
            ConfigError: the model has no such medium.
        """
        others = [name for name in self.encoders if name not in MEDIA]
        if medium not in others:
            raise ConfigError(
                f"medium is {medium!r}; {self.bundle.path} takes features of: {', '.join(others) or 'no medium'}"
            )
        return self.encoders[medium].input_shape[1] or 0

    def prepare(self, medium: str, source: Any) -> Any:
        """A picture as pixels (S, S, 3) uint8, a text as token ids, or features as (F,) float32.

        Raises:
            ImageError, TextError, ItemError: the source cannot be used.
        """
        manifest = self.bundle.manifest
        if medium == "image":
            return image_array(source, manifest.image, self.limits)
        if medium != "text":
            rows, bad = checked_rows([source], self.width(medium), medium)
            if bad:
                raise ItemError(f"{medium} features hold a number that is not finite")
            return rows[0]
        return self.bundle.vocabulary.encode(_text(source), manifest.text)

    def prepare_all(self, medium: str, sources: Sequence[Any]) -> list[Any]:
        """As :meth:`prepare`, for several at once."""
        if medium != "image" or min(len(sources), self.workers) < 2:
            return [self.prepare(medium, source) for source in sources]
        with ThreadPoolExecutor(min(len(sources), self.workers)) as pool:
            return list(pool.map(partial(self.prepare, medium), sources))

    def digest(self, medium: str, source: Any) -> str:
        """SHA-256 of a source, in hexadecimal: of what decides its vector, beside the model.

        Raises:
            ImageError, TextError, ItemError: the source cannot be read.
        """
        if medium == "image":
            return image_digest(source, self.limits)
        if medium != "text":
            return hashlib.sha256(self.prepare(medium, source).tobytes()).hexdigest()
        # What is no Unicode has no UTF-8; its escapes tell it from everything else.
        return hashlib.sha256(_text(source).encode(errors="surrogatepass")).hexdigest()

    def encode(self, medium: str, prepared: Sequence[Any]) -> Vectors:
        """Vectors (B, D) of what :meth:`prepare` gave, by representation, the bundle's own first; B may be 0.

        Raises:
            ItemError, ProviderError: see :meth:`dckt.runtime.Encoder.run`.
        """
        batch: NDArray[Any]
        if medium == "text":
            batch = token_batch(prepared)
        elif prepared:
            batch = np.stack(prepared)
        elif medium == "image":
            batch = image_batch([], self.bundle.manifest.image)
        else:
            batch = np.empty((0, self.width(medium)), np.float32)
        return self.encoders[medium].run_all(batch)


def open_bundle(path: str | Path) -> Bundle:
    """A bundle whose tokenizer is there: before an index is made, and not only when the first text comes.

    Raises:
        BundleError: see :meth:`dckt.bundle.Bundle.open`.
        ConfigError: the bundle names a tokenizer that is neither registered nor installed.
    """
    bundle = Bundle.open(path)
    try:
        tokenizer(bundle.manifest.text.tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return bundle


def _warm_up(encoder: Encoder) -> None:
    """Runs an encoder once: memory is asked for and kernels are chosen in the first run."""
    try:
        encoder.run_all(np.ones([size or 1 for size in encoder.input_shape], encoder.input_dtype))
    except ItemError:
        return  # no number for an even picture, or a length that an engine was not built for: no fault of a real item


def _warm_up_decoder() -> None:
    """Decodes a picture: Pillow loads its decoders with the first one."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    decode_image(picture.getvalue())


def _text(source: object) -> str:
    if not isinstance(source, str):
        raise TextError(f"a text is a {type(source).__name__}; expected str")
    return source
