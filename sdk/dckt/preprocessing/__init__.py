"""Preprocessing as data: the one implementation that training, export and serving all use.

NumPy and Pillow only. What a model expects is a frozen dataclass (:class:`ImageSpec`, :class:`TextSpec`) that
travels in the bundle, so serving cannot disagree with training.
"""

from __future__ import annotations

from dckt.preprocessing.image import (
    ImageLimits,
    ImageSource,
    ImageSpec,
    decode_image,
    image_array,
    image_batch,
    image_digest,
)
from dckt.preprocessing.text import (
    TextSpec,
    Vocabulary,
    normalise,
    register_tokenizer,
    token_batch,
    tokenize,
    tokenizer,
)

__all__ = [
    "ImageLimits",
    "ImageSource",
    "ImageSpec",
    "TextSpec",
    "Vocabulary",
    "decode_image",
    "image_array",
    "image_batch",
    "image_digest",
    "normalise",
    "register_tokenizer",
    "token_batch",
    "tokenize",
    "tokenizer",
]
