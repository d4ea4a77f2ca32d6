"""From a picture file to the pixels that the image graph takes.

Shape letters: B batch, S side of the square crop. Pixels are uint8 in RGB order, channels last, (B, S, S, 3);
the mean and standard deviation are applied inside the graph, in float32, so that there is no second place to
get them wrong.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dckt.errors import ConfigError, ImageError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The only decoders that a file can reach. Pillow has many more; among them EPS, which runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Above this Pillow itself warns, and above twice this it refuses.
MOST_PIXELS = 89_478_485
# Our own limit stands in place of that warning. Behind all other filters, so that an application's own have their say.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)
# What turns a picture of each EXIF orientation upright; 1 is upright already.
_TURNS: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a picture becomes pixels. Stored in the bundle.

    Attributes:
        side: side S of the square that the network sees, in pixels.
        crop_share: share of the short side that the centred square covers; 224/256 is the field's resize-256,
            crop-224.
        mean: per-channel mean, of pixels in 0..1, subtracted inside the graph.
        std: per-channel standard deviation, of pixels in 0..1, divided by inside the graph.
        max_pixels: a picture whose header claims more is refused before any of it is decoded.
    """

    side: int = 224
    crop_share: float = 224 / 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    max_pixels: int = 80_000_000

    def __post_init__(self) -> None:
        # One form for equal values, so that equal specifications have equal hashes.
        object.__setattr__(self, "crop_share", float(self.crop_share))
        for name in ("mean", "std"):
            values = tuple(map(float, getattr(self, name)))
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ConfigError(f"image {name} is {values}; expected three finite numbers")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ConfigError(f"image std is {self.std}; expected numbers above 0")
        if not 1 <= self.side <= 4096:
            raise ConfigError(f"image side is {self.side}; expected 1 to 4096 pixels")
        if not 0 < self.crop_share <= 1:
            raise ConfigError(f"image crop_share is {self.crop_share}; expected more than 0 and at most 1")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise ConfigError(f"image max_pixels is {self.max_pixels}; expected 1 to {MOST_PIXELS:,}")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may be, checked before any of it is decoded. For who serves; no part of the bundle.

    Attributes:
        max_bytes: of its file. By default as much as the largest picture of most bundles has, uncompressed.
        max_pixels: as its header claims; a bundle's own ``max_pixels`` holds as well.
    """

    max_bytes: int = 256 * 2**20
    max_pixels: int = 80_000_000

    def __post_init__(self) -> None:
        for name, value in (("max_bytes", self.max_bytes), ("max_pixels", self.max_pixels)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"image {name} is {value!r}; expected an integer of at least 1")


def decode_image(source: ImageSource, spec: ImageSpec | None = None, limits: ImageLimits | None = None) -> Image.Image:
    """Decodes a picture to upright 8-bit RGB.

    The content decides the format, not the name. EXIF rotation is applied; transparency is laid over white;
    16-bit grey is scaled to 8 bits; of an animation the first frame counts.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array (H, W, 3) or (H, W) of uint8.
        spec: may set a lower ``max_pixels``.
        limits: of bytes and pixels; None takes the defaults.

    Raises:
        ImageError: there is no such file, it is no picture, it is cut short, or it is larger than the limits.
    """
    limits = limits or ImageLimits()
    limit = min((spec or ImageSpec()).max_pixels, limits.max_pixels)
    name = _name(source)
    _check_bytes(source, name, limits.max_bytes)
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, name, limit)
        if isinstance(source, Image.Image):
            return _to_rgb(source, name, limit)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return _to_rgb(image, name, limit)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: is no picture; expected JPEG, PNG, WebP, GIF, BMP or TIFF") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: claims more than {limit:,} pixels; refused before decoding") from error
    # Damaged files make Pillow's decoders raise whatever their arithmetic ran into; all of it means the same.
    except Exception as error:
        raise ImageError(f"{name}: the picture cannot be decoded ({error}); is the file whole?") from error


def image_array(source: ImageSource, spec: ImageSpec, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """One picture as the network sees it: (S, S, 3) uint8, RGB.

    The centred square is cut and resized in one antialiased bilinear step, so a 1 x 4000 strip never grows to
    an enormous intermediate picture.

    Raises:
        ImageError: see :func:`decode_image`.
    """
    image = decode_image(source, spec, limits)
    width, height = image.size
    edge = min(width, height) * spec.crop_share
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (left, top, left + edge, top + edge)
    return np.array(image.resize((spec.side, spec.side), Image.Resampling.BILINEAR, box=box))


def image_batch(sources: Iterable[ImageSource], spec: ImageSpec) -> NDArray[np.uint8]:
    """Pictures as a batch (B, S, S, 3) uint8; B may be 0.

    Raises:
        ImageError: for the first picture that cannot be decoded.
    """
    arrays = [image_array(source, spec) for source in sources]
    return np.stack(arrays) if arrays else np.zeros((0, spec.side, spec.side, 3), np.uint8)


def image_digest(source: ImageSource, limits: ImageLimits | None = None) -> str:
    """SHA-256 in hexadecimal of what a picture holds: the bytes of a file, as a path or as such; or upright pixels.

    Equal digests are equal pictures. A picture as a file and as pixels has two digests.

    Raises:
        ImageError: there is no such file, it is larger than the limits, or pixels are not what :func:`decode_image`
            takes.
    """
    limits = limits or ImageLimits()
    name = _name(source)
    _check_bytes(source, name, limits.max_bytes)
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, np.ndarray | Image.Image):
        pixels = decode_image(source, limits=limits)
        return hashlib.sha256(f"pixels {pixels.size}\0".encode() + pixels.tobytes()).hexdigest()
    try:
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error})") from error


def _check_bytes(source: ImageSource, name: str, limit: int) -> None:
    """Refuses, before a byte is read, what is too large and what is no file: reading a pipe might never end."""
    if isinstance(source, bytes):
        size = len(source)
    elif isinstance(source, str | os.PathLike):
        try:
            about = Path(source).stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageError(f"{name}: there is no such file; check the path") from error
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            raise ImageError(f"{name}: cannot be read ({error})") from error
        if not stat.S_ISREG(about.st_mode):
            raise ImageError(f"{name}: is no file; expected a picture")
        size = about.st_size
    else:
        return
    if size > limit:
        raise ImageError(f"{name}: has {size:,} bytes; expected at most {limit:,}")


def _name(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, np.ndarray):
        return f"<array {source.shape} {source.dtype}>"
    if isinstance(source, Image.Image):
        return f"<{type(source).__name__} {source.size}>"
    if isinstance(source, str | os.PathLike):
        return str(Path(source))
    raise ImageError(f"a {type(source).__name__} is no picture; expected a path, bytes, a Pillow image or an array")


def _from_array(array: NDArray[np.uint8], name: str, limit: int) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise ImageError(f"{name}: expected uint8 of shape (H, W, 3) in RGB order, or (H, W) grey, and not empty")
    _check_size(array.shape[1], array.shape[0], name, limit)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _to_rgb(image: Image.Image, name: str, limit: int) -> Image.Image:
    _check_size(*image.size, name, limit)
    if image.mode == "F":
        raise ImageError(f"{name}: has floating-point pixels of unknown range; save it with 8 or 16 bits")
    upright = _upright(image)
    if upright.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey to white; 65535 is to become 255 (257 is odd: no halves).
        grey = np.asarray(upright).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """As ``ImageOps.exif_transpose``, which also rewrites the EXIF and fails on odd tags that have no say here."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - damaged EXIF raises as many kinds of error as damaged pixels
        return image  # the pixels are whole, and nothing says that they lie otherwise
    return image if turn is None else image.transpose(turn)


def _check_size(width: int, height: int, name: str, limit: int) -> None:
    if not 0 < width * height <= limit:
        raise ImageError(f"{name}: is {width} x {height} pixels; expected 1 to {limit:,} pixels in all")
