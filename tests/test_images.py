"""One image file: its pixels are those that a viewer shows, and every damaged file is one line that names it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import GREY_LEVEL, INTEGER_LEVEL, JPEG_LEVEL, UNIT_ROUNDOFF

from antdiff.data.images import read_image, unit_range

RAMP = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
LEVELS = RAMP / 257  # 0..65535 as 0..255
GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)
ORIENTATION = 0x0112


def png(array: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of `array` [H, W] or [H, W, C]."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], depth, colour, 0, 0, 0)
    samples = array.astype(">u2") if depth == 16 else array
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


def tiff(array: np.ndarray, *, photometric: int = 1, bits: int | None = None) -> bytes:
    """Return an uncompressed grey TIFF of `array` [H, W] in the byte order of its dtype."""
    order = ">" if array.dtype.byteorder == ">" else "<"
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    size = 8 * array.dtype.itemsize
    entries = [
        (256, array.shape[1]), (257, array.shape[0]), (258, bits or size), (259, 1), (262, photometric), (273, 134),
        (277, 1), (278, array.shape[0]), (279, array.nbytes), (339, kind),
    ]  # fmt: skip
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    fields = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    return start + fields + bytes(4) + array.tobytes()


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(folder: Path, data: bytes, size: int = 32) -> np.ndarray:
    path = folder / "image.png"  # the content decides, not the suffix
    path.write_bytes(data)
    return read_image(path, size)[0]


# ---- numbers of more than 8 bits ---------------------------------------------------------------------------------

UNITS = {
    "PNG of 16 bits": png(RAMP, 16, 0),
    "TIFF of 16 bits": tiff(RAMP.astype("<u2")),
    "TIFF of 16 bits, big-endian": tiff(RAMP.astype(">u2")),
    "TIFF of 16 bits, 0 is white": tiff(65535 - RAMP, photometric=0),
    "TIFF of 16 bits, LZW": encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "TIFF of 32 bits": tiff(RAMP.astype(np.uint32) * 65537),
    "TIFF of 32 bits, signed": tiff(RAMP.astype(np.int32)),
    "TIFF of 32 bits, signed, big-endian": tiff(RAMP.astype(">i4")),
    "TIFF of floats": tiff((RAMP / 65535).astype(np.float32)),
    "TIFF of floats, big-endian": tiff((RAMP / 65535).astype(">f4")),
    "TIFF of floats, 0 is white": tiff((1 - RAMP / 65535).astype(np.float32), photometric=0),
}


@pytest.mark.parametrize("name", UNITS)
def test_numbers_of_more_than_8_bits_are_scaled_not_clipped(name: str, tmp_path: Path) -> None:
    with Image.open(io.BytesIO(UNITS[name])) as image:
        image.load()
        unit = unit_range(image)
    assert unit is not None
    # One rounding of the quotient, and one of its difference from 1 where 0 is white.
    assert np.abs(unit - RAMP / 65535).max() <= 2 * UNIT_ROUNDOFF[torch.float32]
    pixels = read(tmp_path, UNITS[name])
    assert np.abs(pixels - LEVELS[..., None]).max() <= GREY_LEVEL
    assert read_image(tmp_path / "image.png", 32)[1]  # grey


def test_12_bits_use_the_range_of_12_bits(tmp_path: Path) -> None:
    numbers = np.arange(4096).reshape(64, 64)
    packed = np.empty((64, 96), np.uint8)  # two numbers in three bytes
    left, right = numbers[:, ::2], numbers[:, 1::2]
    packed[:, ::3], packed[:, 1::3], packed[:, 2::3] = left >> 4, (left & 15) << 4 | right >> 8, right & 255
    file = bytearray(tiff(packed, bits=12))
    struct.pack_into("<I", file, 10 + 8, 64)  # the width in pixels
    pixels = read(tmp_path, bytes(file), 64)
    assert np.abs(pixels[..., 0] - numbers * (255 / 4095)).max() <= GREY_LEVEL


def test_resizing_of_16_bits_is_that_of_8_bits(tmp_path: Path) -> None:
    shallow = read(tmp_path, encoded(Image.fromarray(GREYS), "PNG"), 7).astype(int)
    deep = read(tmp_path, png(GREYS * np.uint16(257), 16, 0), 7)
    assert np.abs(shallow - deep).max() <= 2 * INTEGER_LEVEL  # Pillow rounds 8 bits after each of its two passes


def test_16_bits_per_colour_keep_their_upper_byte(tmp_path: Path) -> None:
    wide = RAMP
    opaque = np.full_like(wide, 65535)
    for name, channels, colour in (
        ("RGB", [wide] * 3, 2),
        ("LA", [wide, opaque], 4),
        ("RGBA", [*[wide] * 3, opaque], 6),
    ):
        pixels = read(tmp_path, png(np.stack(channels, -1), 16, colour))
        assert np.abs(pixels - LEVELS[..., None]).max() <= INTEGER_LEVEL, name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff((RAMP * 3.0).astype(np.float32)), r"must hold floats in \[0, 1\]; got 0.0 to 196605.0"),
        (tiff((RAMP / 65535 - 0.1).astype(np.float32)), r"must hold floats in \[0, 1\]; got -0.1"),
        (tiff(np.full((8, 8), np.nan, np.float32)), r"must hold floats in \[0, 1\]; got nan"),
        (tiff(np.full((8, 8), np.inf, np.float32)), r"must hold floats in \[0, 1\]; got inf"),
        (tiff(RAMP.astype(np.int32) * 2), r"must hold integers in 0\.\.65535, .* got 0 to 131070"),
        (tiff(RAMP.astype(np.int32) - 1), r"must hold integers in 0\.\.65535, .* got -1 to 65534"),
        (tiff((RAMP >> 1).astype(np.int16)), "must hold unsigned integers; got signed ones of 16 bits"),
        (tiff((RAMP >> 9).astype(np.int8)), "must hold unsigned integers; got signed ones of 8 bits"),
        (
            png(np.stack([RAMP] * 3, -1), 16, 2, (b"tRNS", struct.pack(">HHH", 9, 9, 9))),
            "must have an alpha channel",
        ),
    ],
)
def test_numbers_without_a_known_white_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"image.png {message}"):
        read(tmp_path, data)


def test_floats_may_overshoot_by_less_than_half_a_level(tmp_path: Path) -> None:
    overshoot = np.array([[-0.0019, 1.0019], [0, 1]], np.float32)
    assert read(tmp_path, tiff(overshoot), 2)[..., 0].tolist() == [[0, 255], [0, 255]]


# ---- orientation -------------------------------------------------------------------------------------------------

BLOCKS = np.kron(np.array([[10, 60, 110, 160], [35, 85, 135, 250]], np.uint8), np.ones((8, 8), np.uint8))  # [16, 32]
TURNED = {
    1: BLOCKS,
    2: BLOCKS[:, ::-1],
    3: BLOCKS[::-1, ::-1],
    4: BLOCKS[::-1],
    5: BLOCKS.T,
    6: np.rot90(BLOCKS, -1),
    7: BLOCKS[::-1, ::-1].T,
    8: np.rot90(BLOCKS),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    "kind", ["PNG", "PNG of 16 bits", "JPEG", "WEBP", "TIFF", "TIFF of 16 bits", "RGBA", "palette"]
)
def test_every_exif_orientation_is_applied(orientation: int, kind: str, tmp_path: Path) -> None:
    image, form, options = Image.fromarray(BLOCKS), kind.partition(" ")[0], {}
    if kind.endswith("16 bits"):
        image = Image.fromarray(BLOCKS * np.uint16(257))
    elif kind == "JPEG":
        options = {"quality": 100}
    elif kind == "WEBP":
        image, options = image.convert("RGB"), {"lossless": True}
    elif kind == "RGBA":
        image, form = image.convert("RGBA"), "PNG"
    elif kind == "palette":
        image, form = image.convert("P"), "PNG"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = read(tmp_path, encoded(image, form, exif=exif, **options), 16)
    expected = TURNED[orientation]
    h, w = expected.shape
    square = expected[h // 2 - 8 : h // 2 + 8, w // 2 - 8 : w // 2 + 8].astype(int)
    assert np.abs(pixels - square[..., None]).max() <= (JPEG_LEVEL if kind == "JPEG" else 0)


# ---- transparency, palettes and other modes ----------------------------------------------------------------------


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    alpha = GREYS[::-1]
    share = alpha / 255
    expected = (GREYS * share + 255 * (1 - share))[..., None]
    grey_alpha = Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(alpha)])
    for image in (grey_alpha, grey_alpha.convert("RGBA")):
        for form in ("PNG", "TIFF"):
            assert np.abs(read(tmp_path, encoded(image, form), 16) - expected).max() <= INTEGER_LEVEL
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0] = 200
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert (read(tmp_path, encoded(Image.fromarray(clear), form, **options), 8) == 255).all()


def test_a_transparent_number_is_white(tmp_path: Path) -> None:
    grey, colour = Image.fromarray(GREYS), Image.fromarray(np.stack([GREYS] * 3, -1))
    palette = grey.convert("P")
    palette.putpalette([value for i in range(256) for value in (i, i, i)])
    expected = np.where(GREYS == 7, 255, GREYS)[..., None]
    for image, transparency in ((grey, 7), (colour, (7, 7, 7)), (palette, 7)):
        assert (read(tmp_path, encoded(image, "PNG", transparency=transparency), 16) == expected).all()
    assert (read(tmp_path, encoded(palette, "GIF", transparency=7), 16) == expected).all()
    shares = np.arange(256)[GREYS] / 255  # each colour of the palette has its own alpha
    mixed = read(tmp_path, encoded(palette, "PNG", transparency=bytes(range(256))), 16)
    assert np.abs(mixed[..., 0] - (GREYS * shares + 255 * (1 - shares))).max() <= INTEGER_LEVEL
    bits = Image.fromarray(GREYS > 99)
    assert (read(tmp_path, encoded(bits, "PNG", transparency=0), 16) == 255).all()
    key = int(RAMP[3, 3])
    deep = read(tmp_path, png(RAMP, 16, 0, (b"tRNS", struct.pack(">H", key))))
    assert np.abs(deep[..., 0] - np.where(key == RAMP, 255, LEVELS)).max() <= GREY_LEVEL


def test_modes_become_rgb_or_grey(tmp_path: Path) -> None:
    colours = np.stack([GREYS, GREYS[::-1], GREYS.T], -1)
    palette = Image.fromarray(GREYS).convert("P")
    palette.putpalette(colours.reshape(-1, 3).tobytes())
    assert (read(tmp_path, encoded(palette, "PNG"), 16) == colours).all()
    bits = Image.fromarray(GREYS > 99)
    for form in ("PNG", "TIFF", "BMP"):
        assert (read(tmp_path, encoded(bits, form), 16) == 255 * (GREYS > 99)[..., None]).all()
    flat = Image.new("RGB", (16, 16), (200, 30, 90))
    for form, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        for mode in ("CMYK", "RGB"):
            pixels = read(tmp_path, encoded(flat.convert(mode), form, **options), 16)
            assert np.abs(pixels - np.array([200.0, 30, 90])).max() <= JPEG_LEVEL, (form, mode)
    grey = {"1": True, "L": True, "LA": True, "RGB": False, "RGBA": False, "P": False}
    for mode, expected in grey.items():
        Image.new(mode, (4, 4)).save(tmp_path / "grey.png")
        assert read_image(tmp_path / "grey.png", 4)[1] is expected, mode


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_a_file_of_several_frames_gives_the_first(form: str, tmp_path: Path) -> None:
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(first, form, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert (read(tmp_path, data, 8) == (250, 0, 0)).all()


# ---- damaged files -----------------------------------------------------------------------------------------------


def refusal(path: Path, size: int = 16) -> str | None:
    """Return the message with which a file is refused, or None if it is read. Any other exception goes through."""
    try:
        read_image(path, size)
    except ValueError as error:
        return str(error)
    return None


NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
FILES = {
    "PNG": encoded(Image.fromarray(NOISE), "PNG"),
    "PNG of 16 bits": png(RAMP, 16, 0),
    "palette": encoded(Image.fromarray(NOISE).quantize(), "PNG"),
    "animated PNG": encoded(Image.fromarray(NOISE), "PNG", save_all=True, append_images=[Image.fromarray(255 - NOISE)]),
    "JPEG": encoded(Image.fromarray(NOISE), "JPEG"),
    "progressive JPEG": encoded(Image.fromarray(NOISE), "JPEG", progressive=True),
    "CMYK JPEG": encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "GIF": encoded(Image.fromarray(NOISE), "GIF"),
    "WEBP": encoded(Image.fromarray(NOISE), "WEBP"),
    "BMP": encoded(Image.fromarray(NOISE), "BMP"),
    "TIFF": encoded(Image.fromarray(NOISE), "TIFF"),
    "TIFF, LZW": encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw"),
    "TIFF of floats": tiff((RAMP / 65535).astype(np.float32)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, data = tmp_path / "cut.png", FILES[name]
    path.write_bytes(data)
    whole = read_image(path, 16)[0]
    for length in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:length])
        message = refusal(path)
        if message is None:  # only bytes behind the pixels are missing
            assert np.array_equal(read_image(path, 16)[0], whole), length
        else:
            assert message.startswith(f"{path} must be an image; it cannot be read ("), length
            assert "\n" not in message
    path.write_bytes(data[: len(data) // 2])
    assert refusal(path) is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_damaged_bytes_is_read_or_refused_by_name(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    path, refused = tmp_path / "damaged.png", 0
    for _ in range(100):
        data = np.frombuffer(FILES[name], np.uint8).copy()
        damage = rng.integers(0, min(len(data), rng.choice([40, 400, 4000])), rng.integers(1, 6))
        data[damage] = rng.integers(0, 256, len(damage))
        path.write_bytes(data.tobytes())
        message = refusal(path)
        if message is not None:
            refused += 1
            assert message.startswith(f"{path} must ")
            assert "\n" not in message
    assert refused
    if name != "TIFF, LZW":  # libtiff itself writes to stderr
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("side", [20_000, 10_000])  # 400 million pixels, an error of Pillow; 100 million, its warning
def test_a_decompression_bomb_is_refused_by_name(side: int, tmp_path: Path) -> None:
    small = png(np.zeros((1, 1), np.uint8), 8, 0)
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = small[:12] + body + struct.pack(">I", zlib.crc32(body)) + small[33:]
    with pytest.raises(ValueError, match=r"image.png must have at most 89,478,485 pixels, .* Scale it down"):
        read(tmp_path, bomb)


def test_errors_without_a_message_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("antdiff.data.images._decode", out_of_memory)
    with pytest.raises(ValueError, match=r"image.png must be an image; it cannot be read \(MemoryError\)"):
        read(tmp_path, FILES["PNG"])


def test_content_of_other_formats_is_refused(tmp_path: Path) -> None:
    """Pillow would pass PostScript to another program, whatever the suffix of the file is."""
    for data in (b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", bytes(1000)):
        with pytest.raises(ValueError, match=r"image.png must be an image; .* \(it is damaged, or no PNG"):
            read(tmp_path, data)
