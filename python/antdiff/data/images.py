"""The pixels of one image file, as a viewer shows them: upright, on white, and over the full range of brightness."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from einops import repeat

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # by content; Pillow would start other programs for some others
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BACKGROUND = "white"  # shows through where an image is transparent

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
_SIGNED = 2  # a value of _SAMPLE_FORMAT


def read_image(path: Path, size: int) -> tuple[np.ndarray, bool]:
    """Read an image as uint8 [size, size, 3], and say whether it is grey.

    The image is turned as its EXIF orientation says, composited on white where it is transparent, scaled to 0..255 if
    it has 16 bits or floats, cropped to the square in its centre, and resized. A file of several frames or pages gives
    its first one. Colour profiles are ignored.

    Raises:
        ValueError: the file cannot be decoded, has too many pixels, or holds numbers without a known black and white.
        PermissionError: the file may not be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about metadata, which do not name the file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From a path Pillow maps the file into memory, and then it garbles a TIFF that is turned by 90 degrees.
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
                return _decode(image, size)
    except PermissionError:
        raise
    except _UnsuitableError as error:
        raise ValueError(f"{path} {error}, or remove it from the folder") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} must have at most {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against decompression bombs; "
            "it has more. Scale it down, or remove it from the folder"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} must be an image; it cannot be read (it is damaged, or no "
            f"{', '.join(FORMATS)} that Pillow knows). Repair it or remove it from the folder"
        ) from error
    except Exception as error:  # Pillow's parsers are plain Python, so a damaged file can end in any exception
        raise ValueError(
            f"{path} must be an image; it cannot be read ({_line(error)}). Repair it or remove it from the folder"
        ) from error


class _UnsuitableError(Exception):
    """A file that is an image, with numbers that do not say what is black and what is white."""


def _decode(image: ImageFile, size: int) -> tuple[np.ndarray, bool]:
    """Do the work of :func:`read_image` on an opened file. Any exception means that the file is not usable."""
    from PIL import Image, ImageOps

    # Pillow keeps the upper 8 of 16 bits of a colour, but not of the colour that is declared transparent.
    if "transparency" in image.info and any("RGB;16" in str(tile) for tile in image.tile):
        raise _UnsuitableError(
            "must have an alpha channel if it has transparency and 16 bits per colour; got one transparent colour. "
            "Save it with an alpha channel"
        )
    image.load()
    unit = unit_range(image)
    if unit is not None:
        upright = _upright(Image.fromarray(unit * np.float32(255)), image)
        fitted = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS))
        grey = np.rint(fitted.clip(0, 255)).astype(np.uint8)  # the filter overshoots
        return repeat(grey, "h w -> h w 3"), True
    rgb = _upright(_opaque(image), image)
    return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)), image.mode in ("1", "L", "LA", "La")


def _upright(pixels: Image, file: ImageFile) -> Image:
    """Turn the pixels of a file as its EXIF orientation says."""
    from PIL import ExifTags, ImageOps

    if file.format == "TIFF":  # turned by Pillow as it loads
        return pixels
    pixels.getexif()[ExifTags.Base.Orientation] = file.getexif().get(ExifTags.Base.Orientation, 1)
    return ImageOps.exif_transpose(pixels)


def unit_range(image: ImageFile) -> np.ndarray | None:
    """Return the pixels of an image of more than 8 bits as float32 [H, W] in [0, 1]; None for other images.

    Unsigned integers are divided by the largest number of their type. Signed integers of 32 bits must be in 0..65535
    and count as 16 bits, since Pillow opens and saves images of 16 bits in this type. Floats must be in [0, 1].
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, signed = tags.get(_BITS, (16,))[0], tags.get(_SAMPLE_FORMAT, (0,))[0] == _SIGNED
    if signed and bits < 32:
        raise _UnsuitableError(
            f"must hold unsigned integers; got signed ones of {bits} bits. Save it as unsigned integers"
        )
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    numbers = np.asarray(image)
    if image.mode == "F":
        # A number that rounds to one of the 256 levels of grey is in range: resampled floats overshoot a little.
        if not bool(((numbers * 255 >= -0.5) & (numbers * 255 <= 255.5)).all()):  # NaN is out of range as well
            raise _UnsuitableError(f"must hold floats in [0, 1]; got {numbers.min()} to {numbers.max()}. Scale them")
        unit = numbers.clip(0, 1)
    elif signed:
        if numbers.min() < 0 or numbers.max() > 65535:
            raise _UnsuitableError(
                f"must hold integers in 0..65535, since they are signed and of 32 bits; got {numbers.min()} to "
                f"{numbers.max()}. Scale them"
            )
        unit = (numbers / 65535).astype(np.float32)
    else:
        unit = (numbers.view(np.uint32 if bits == 32 else numbers.dtype) / (2**bits - 1)).astype(np.float32)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow inverts images of 8 bits only
        unit = 1 - unit
    if "transparency" in image.info:  # a number that is transparent
        unit[numbers == image.info["transparency"]] = 1
    return unit


def _opaque(image: Image) -> Image:
    """Return an image of 8 bits or less as RGB, composited on the background if it has transparency."""
    from PIL import Image

    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if not transparent:
        return image.convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")


def _line(error: BaseException) -> str:
    """Return the message of an error on one line, or the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
