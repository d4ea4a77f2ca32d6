from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from dckt.errors import ConfigError, ImageError
from dckt.preprocessing import ImageLimits, ImageSpec, decode_image, image_array, image_batch, image_digest

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
WHOLE = ImageSpec(side=8, crop_share=1.0)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(256, size=(height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0]).convert(mode)


def corners() -> Image.Image:
    """48 x 32: red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (48, 32))
    for place, colour in (((0, 0), RED), ((24, 0), GREEN), ((0, 16), BLUE), ((24, 16), WHITE)):
        image.paste(colour, (*place, place[0] + 24, place[1] + 16))
    return image


def corner_names(image: Image.Image) -> list[str]:
    """The nearest of the four colours at 1/8 in from each corner: top left, top right, bottom left, bottom right."""
    names = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    width, height = image.size
    places = [(x, y) for y in (height // 8, height - 1 - height // 8) for x in (width // 8, width - 1 - width // 8)]
    pixels = [np.array(image.getpixel(place), dtype=int) for place in places]
    return [min(names, key=lambda name: int(abs(pixel - names[name]).sum())) for pixel in pixels]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and that holds almost nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


# --- the folder of odd images -------------------------------------------------------------------------------------


@pytest.mark.data
def test_odd_images(data_dir: Path) -> None:
    folder = data_dir / "odd_images"
    expected = json.loads((folder / "expected.json").read_text())
    assert len(expected) == 30
    for name, truth in expected.items():
        if truth["valid"]:
            image = decode_image(folder / name)
            assert image.mode == "RGB", name
            assert list(image.size) == truth["upright_size"], name
            assert image_array(folder / name, WHOLE).shape == (8, 8, 3), name
        else:
            with pytest.raises(ImageError, match=name):
                decode_image(folder / name)
        if "orientation" in truth:
            assert corner_names(image) == ["red", "green", "blue", "white"], name


@pytest.mark.data
def test_odd_images_keep_their_colours(data_dir: Path) -> None:
    folder = data_dir / "odd_images"
    grey = np.asarray(decode_image(folder / "gray16.png"))
    with Image.open(folder / "gray16.png") as image:
        sixteen = np.asarray(image)
    assert len(np.unique(sixteen)) > 2
    np.testing.assert_allclose(grey[..., 0], sixteen / 257, atol=0.5)
    assert len(np.unique(grey)) > 2, "not clipped to white"
    assert decode_image(folder / "animated.gif").getpixel((48, 32)) == RED
    rgba = decode_image(folder / "rgba.png")
    assert rgba.getpixel((0, 32)) == WHITE, "alpha is 0 at the left"
    assert rgba.getpixel((95, 32)) != WHITE


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = decode_image(file(corners(), kind, **options))
    assert image.mode == "RGB"
    assert corner_names(image) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_modes(mode: str) -> None:
    image = Image.new(mode, (5, 4))
    assert decode_image(image).mode == "RGB"
    assert decode_image(image).size == (5, 4)


# How a camera stores an upright picture that it marks with each orientation; rotations are counterclockwise.
STORED: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: ImageOps.flip(image.rotate(90, expand=True)),
    6: lambda image: image.rotate(90, expand=True),
    7: lambda image: ImageOps.mirror(image.rotate(90, expand=True)),
    8: lambda image: image.rotate(-90, expand=True),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    stored = STORED[orientation](corners())
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = file(stored, kind, exif=exif)
    image = decode_image(raw)
    assert image.size == (48, 32)
    assert corner_names(image) == ["red", "green", "blue", "white"]
    with Image.open(io.BytesIO(raw)) as opened:
        assert corner_names(decode_image(opened)) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize("orientation", [0, 9, 255, "6"])
def test_orientation_that_does_not_exist_turns_nothing(orientation: object) -> None:
    image = corners()
    image.getexif()[0x0112] = orientation
    assert decode_image(image).size == (48, 32)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_odd_exif_does_not_cost_the_picture(kind: str) -> None:
    """Any bytes in the EXIF of a turned picture: the pixels are whole, so they count."""
    exif = Image.Exif()
    for tag, value in ((0x0112, 6), (0x010F, "Maker"), (0x011A, 72.0), (0x0132, "2020:01:01 00:00:00")):
        exif[tag] = value
    exif.get_ifd(0x8769)[0x829A] = 0.01
    raw = file(corners(), kind, exif=exif)
    start, length = raw.find(b"MM\0*") if b"MM\0*" in raw else raw.find(b"II*\0"), len(exif.tobytes()) - 6
    assert start > 0
    generator = random.Random(0)
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(3):
            damaged[start + generator.randrange(length)] = generator.randrange(256)
        if kind == "PNG":
            chunk = start - 4
            size = int.from_bytes(damaged[chunk - 4 : chunk], "big")
            damaged[start + size : start + size + 4] = struct.pack(">I", zlib.crc32(damaged[chunk : start + size]))
        assert decode_image(bytes(damaged)).size in {(48, 32), (32, 48)}


def test_16_bit_grey_is_scaled_and_rounded() -> None:
    values = np.array([[0, 127, 128, 129, 257, 385, 386, 32768, 65406, 65407, 65535]], np.uint16)
    expected = [0, 0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
    assert [round(int(value) / 257) for value in values[0]] == expected
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode_image(file(Image.fromarray(values), kind)))
        assert pixels[0, :, 0].tolist() == expected
        assert (pixels[..., 0] == pixels[..., 2]).all()


def test_32_bit_grey_counts_as_16_bit() -> None:
    pixels = np.asarray(decode_image(Image.fromarray(np.array([[-5, 65535, 70000, 257]], np.int32))))
    assert pixels[0, :, 1].tolist() == [0, 255, 255, 1]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="8 or 16 bits"):
        decode_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 0, 0, 0])
        image.putpixel((1, 0), 1)
        raw = file(image, transparency=0)
    else:
        dark = (0, 0, 0) if mode == "RGBA" else (0,)
        image = Image.new(mode, (2, 1), (*dark, 0))
        image.putpixel((1, 0), (*dark, 255))
        raw = file(image)
    assert [decode_image(raw).getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 0)]


def test_half_transparent_red_is_pink() -> None:
    assert decode_image(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


def test_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        raw = file(frames[0], kind, save_all=True, append_images=frames[1:])
        assert corner_names(decode_image(raw)) == ["green"] * 4, kind


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file(corners(), "JPEG"))
    assert decode_image(tmp_path / "a.png").size == (48, 32)


def test_decoders_that_run_programs_are_out_of_reach(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="is no picture"):
        decode_image(script)
    (tmp_path / "a.eps").write_bytes(script)
    with pytest.raises(ImageError, match="is no picture"):
        decode_image(tmp_path / "a.eps")


# --- sources ------------------------------------------------------------------------------------------------------


def test_all_sources_agree(tmp_path: Path) -> None:
    image = noise(37, 23)
    path = tmp_path / "a.png"
    path.write_bytes(file(image))
    spec = ImageSpec(side=16)
    arrays = [image_array(source, spec) for source in (path, str(path), path.read_bytes(), image, np.asarray(image))]
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])
    with Image.open(path) as opened:
        np.testing.assert_array_equal(image_array(opened, spec), arrays[0])


def test_grey_and_strided_arrays() -> None:
    pixels = np.asarray(noise(10, 12))
    np.testing.assert_array_equal(np.asarray(decode_image(pixels[::2, ::-1])), pixels[::2, ::-1])
    grey = np.asarray(decode_image(pixels[..., 0]))
    assert (grey == pixels[..., :1]).all()


def test_source_is_not_changed() -> None:
    image = noise(20, 10, "RGBA")
    before = image.tobytes()
    image_array(image, WHOLE)
    decode_image(image).paste(RED, (0, 0, 5, 5))
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (20, 10), before)
    plain = noise(20, 10)
    before = plain.tobytes()
    decode_image(plain).paste(RED, (0, 0, 5, 5))
    assert plain.tobytes() == before, "the result is a copy even where nothing had to be converted"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((3, 4), np.uint16),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        np.zeros(4, np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_another_kind(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match="expected uint8 of shape"):
        decode_image(array)


@pytest.mark.parametrize("source", [None, 7, [1, 2], bytearray(b"x")])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(ImageError, match="expected a path, bytes, a Pillow image or an array"):
        decode_image(source)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.jpg: there is no such file"):
        decode_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="is no file"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        decode_image("a\0b")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0", b"plain text", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_no_picture(content: bytes) -> None:
    with pytest.raises(ImageError, match=f"<{len(content)} bytes>"):
        decode_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_cut_short(kind: str) -> None:
    raw = file(noise(64, 64), kind)
    with pytest.raises(ImageError):
        decode_image(raw[: len(raw) // 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_damage_never_escapes_as_another_error(kind: str) -> None:
    raw = file(noise(24, 24), kind)
    generator, refused = random.Random(kind), 0
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(min(len(raw), generator.choice([64, 100_000])))] = generator.randrange(256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


def test_bomb_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (9000, 9000)):
        with pytest.raises(ImageError, match="pixels"):
            decode_image(png_claiming(width, height))


def test_size_that_pillow_only_warns_of() -> None:
    """Between Pillow's warning and its refusal our limit decides, with or without warnings as errors."""
    raw = png_claiming(10_000, 10_000)
    with pytest.raises(ImageError, match="claims more than 80,000,000 pixels"):
        decode_image(raw)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ImageError, match="expected 1 to 80,000,000 pixels"),
    ):
        decode_image(raw)


def test_pillows_warning_does_not_reach_the_user(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_claiming(10_000, 10_000))
    code = "import sys; from dckt.preprocessing import image_array, ImageSpec; image_array(sys.argv[1], ImageSpec())"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True, check=False
    )
    assert "expected 1 to 80,000,000 pixels" in done.stderr
    assert "Warning" not in done.stderr


def test_max_pixels_is_the_limit_for_every_source(tmp_path: Path) -> None:
    image = noise(20, 10)
    (tmp_path / "a.png").write_bytes(file(image))
    for source in (tmp_path / "a.png", file(image), image, np.asarray(image)):
        assert decode_image(source, ImageSpec(max_pixels=200)).size == (20, 10)
        with pytest.raises(ImageError, match="20 x 10"):
            decode_image(source, ImageSpec(max_pixels=199))


@pytest.mark.parametrize(
    "change",
    [
        {"side": 0},
        {"side": 4097},
        {"crop_share": 0},
        {"crop_share": 1.01},
        {"crop_share": float("nan")},
        {"mean": (0, 0)},
        {"mean": (0, 0, float("nan"))},
        {"std": (1, 1, 0)},
        {"std": (1, 1, float("nan"))},
        {"std": (1, 1, 1, 1)},
        {"max_pixels": 0},
        {"max_pixels": 10**9},
    ],
    ids=str,
)
def test_bad_spec(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ImageSpec(**change)


# --- geometry -----------------------------------------------------------------------------------------------------


def test_centre_is_cut_and_not_resampled_when_sizes_agree() -> None:
    """12 x 8, share 0.5: the edge is 4, from column (12 - 4) / 2 = 4 and row (8 - 4) / 2 = 2."""
    pixels = np.asarray(noise(12, 8))
    cut = image_array(pixels, ImageSpec(side=4, crop_share=0.5))
    np.testing.assert_array_equal(cut, pixels[2:6, 4:8])


def test_whole_square() -> None:
    pixels = np.asarray(noise(6, 6))
    np.testing.assert_array_equal(image_array(pixels, ImageSpec(side=6, crop_share=1)), pixels)


def test_halving_by_hand() -> None:
    """A bilinear, antialiased halving weighs 1 3 3 1; where the edge cuts that short, 3 3 1."""
    row = np.array([0, 70, 140, 210], np.uint8)
    pixels = np.repeat(np.repeat(row[None, :, None], 4, axis=0), 3, axis=2)
    halved = image_array(pixels, ImageSpec(side=2, crop_share=1))
    left = (3 * 0 + 3 * 70 + 1 * 140) / 7
    np.testing.assert_array_equal(halved[..., 0], [[left, 210 - left]] * 2)


def test_side_and_share_take_effect() -> None:
    image = noise(40, 30)
    assert image_array(image, ImageSpec(side=5)).shape == (5, 5, 3)
    wide, narrow = (image_array(image, ImageSpec(side=8, crop_share=share)) for share in (1.0, 0.5))
    assert not np.array_equal(wide, narrow)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    array = image_array(Image.new("RGB", size, (1, 2, 3)), ImageSpec(side=16))
    assert (array == [1, 2, 3]).all()
    assert array.shape == (16, 16, 3)


def test_strip_shows_its_middle() -> None:
    strip = Image.new("RGB", (4000, 10), BLUE)
    strip.paste(RED, (1990, 0, 2010, 10))
    assert (image_array(strip, ImageSpec(side=4)) == RED).all()


def test_array_is_ours_to_write() -> None:
    array = image_array(noise(9, 9), WHOLE)
    array[:] = 0
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous


# --- batches ------------------------------------------------------------------------------------------------------


def test_batch_is_its_pictures() -> None:
    images = [noise(9, 9), noise(30, 20), corners()]
    batch = image_batch(iter(images), WHOLE)
    assert batch.shape == (3, 8, 8, 3)
    for row, image in zip(batch, images, strict=True):
        np.testing.assert_array_equal(row, image_array(image, WHOLE))


def test_empty_batch() -> None:
    batch = image_batch([], WHOLE)
    assert batch.shape == (0, 8, 8, 3)
    assert batch.dtype == np.uint8


def test_bad_picture_in_a_batch() -> None:
    with pytest.raises(ImageError, match="<3 bytes>"):
        image_batch([noise(9, 9), b"bad", noise(9, 9)], WHOLE)


# --- limits, before anything is decoded ---


def test_more_bytes_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file(noise(20, 20))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    exact, less = ImageLimits(max_bytes=len(content)), ImageLimits(max_bytes=len(content) - 1)
    for source in (content, path, str(path)):
        assert decode_image(source, limits=exact).size == (20, 20)
        assert image_digest(source, exact)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("was opened"))
    for source in (content, path, str(path)):
        for refused in (
            lambda source=source: decode_image(source, limits=less),
            lambda source=source: image_digest(source, less),
        ):
            with pytest.raises(ImageError, match=f"has {len(content):,} bytes; expected at most {len(content) - 1:,}"):
                refused()


def test_more_pixels_than_the_limit() -> None:
    few = ImageLimits(max_pixels=399)
    for source in (file(noise(20, 20)), noise(20, 20), np.zeros((20, 20, 3), np.uint8)):
        assert decode_image(source, limits=ImageLimits(max_pixels=400)).size == (20, 20)
        with pytest.raises(ImageError, match="20 x 20 pixels; expected 1 to 399"):
            decode_image(source, limits=few)
    with pytest.raises(ImageError, match="expected 1 to 100 pixels"):
        decode_image(noise(20, 20), ImageSpec(max_pixels=100), ImageLimits(max_pixels=200))
    with pytest.raises(ImageError, match="expected 1 to 200 pixels"):
        decode_image(noise(20, 20), ImageSpec(max_pixels=300), ImageLimits(max_pixels=200))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (20_000, 3)])
def test_from_one_pixel_to_twenty_thousand_wide(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    for source in (file(image), file(image, "JPEG", quality=100), np.asarray(image)):
        pixels = image_array(source, ImageSpec(side=8))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels.astype(int) - RED).max() <= 2


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to would never end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path):
        for refused in (decode_image, image_digest):
            with pytest.raises(ImageError, match="is no file"):
                refused(path)
    for path, said in ((tmp_path / "none.jpg", "no such file"), ("a\0b.jpg", "cannot be read")):
        for refused in (decode_image, image_digest):
            with pytest.raises(ImageError, match=said):
                refused(path)


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"max_pixels": -1}, {"max_bytes": 1.5}, {"max_pixels": True}])
def test_limits_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"image {next(iter(wrong))} is"):
        ImageLimits(**wrong)


# --- digests ---


def test_equal_pictures_have_equal_digests(tmp_path: Path) -> None:
    image = noise(7, 5)
    content = file(image)
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "b.png").write_bytes(content)
    assert image_digest(content) == image_digest(tmp_path / "a.png") == image_digest(str(tmp_path / "b.png"))
    assert image_digest(image) == image_digest(np.asarray(image)) != image_digest(content)


def test_different_pictures_have_different_digests() -> None:
    image = noise(6, 4)
    other = image.copy()
    other.putpixel((5, 3), (1, 2, 3))
    turned = noise(6, 4)
    turned.getexif()[0x0112] = 3
    reshaped = np.asarray(image).reshape(6, 4, 3)
    digests = [image_digest(one) for one in (image, other, turned, reshaped, file(image), file(other))]
    assert len(set(digests)) == len(digests)


def test_a_digest_of_what_is_no_picture() -> None:
    with pytest.raises(ImageError, match="int is no picture"):
        image_digest(3)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="expected uint8"):
        image_digest(np.zeros((2, 2, 3)))  # type: ignore[arg-type]
