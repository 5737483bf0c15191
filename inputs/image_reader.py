"""Read image files as bytes: upright, opaque, and scaled by what is white in all of them."""

import contextlib
import io
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from capsnet_core.errors import UserError
from inputs.levels import scaled_to_bytes, white_of
from utils import to_uint8

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # of one image; Pillow refuses more
# Formats whose frames or pages are images of their own. Others hold previews, sizes or layers.
_OF_FRAMES = {"AVIF", "FLI", "GIF", "PNG", "TIFF", "WEBP"}
_DAMAGE = (OSError, ValueError, SyntaxError, struct.error)


class ImageFile(NamedTuple):
    """An image file that was read."""

    pixels: np.ndarray  # uint8 (H, W, 1 or 3), or int32 (H, W, 1) if what is white is not known
    has_more: bool  # whether it has more frames or pages than the one that was read


class Readings(NamedTuple):
    """What was read from image files."""

    results: list  # of the files that could be read, in their order
    errors: list  # of the others: (path, UserError)
    brightest: int  # the largest value in files of 8 bits
    white: int | None  # what stands for white in files of more bits; None if there are none
    notes: tuple[str, ...]  # lines for the user


def read_images(paths, use, white=None):
    """Return Readings of image files.

    Those of more than 8 bits are read twice: what is white is found in all of them.

    Args:
        paths: paths of the files.
        use: function of a path and its image, uint8 (H, W, 1 or 3); returns what to keep of it, or
            raises UserError.
        white: what stands for white in files of more than 8 bits, if they do not exceed it.
    """
    results, errors, deep, largest, brightest, more = {}, [], [], 0, 0, 0
    for path in paths:
        try:
            pixels, has_more = read_image(path)
            if pixels.dtype == np.uint8:
                brightest = max(brightest, int(pixels.max()))
                results[path] = use(path, pixels)
            else:
                largest = max(largest, int(pixels.max()))
                deep.append(path)
            more += has_more
        except UserError as error:
            errors.append((path, error))
    if white is None or largest > white:
        white = white_of(largest, of_bytes=True)
    for path in deep:
        try:
            if white is None:
                raise _unclear_white(deep, largest)
            results[path] = use(path, scaled_to_bytes(read_image(path).pixels, white))
        except UserError as error:
            errors.append((path, error))
    notes = []
    if deep and white not in (None, 65535):
        notes.append(
            f"grey of 16 bits from 0 to {white} in {len(deep)} of {len(paths)} files, scaled to "
            "0 to 255"
        )
    if more:
        notes.append(
            f"{more} of {len(paths)} files have several frames or pages, the first is used"
        )
    kept = [results[path] for path in paths if path in results]
    return Readings(kept, errors, brightest, white if deep else None, tuple(notes))


def _unclear_white(paths, largest):
    """Return the error of files of more than 8 bits that do not say what stands for white."""
    return UserError(
        f"{paths[0]}: grey of 16 bits from 0 to {largest} in {len(paths)} files, so what stands "
        "for white is unclear, expected 255, 1023, 4095 or 65535, and half of it in use; multiply "
        "all pixels by 65535 / white"
    )


def read_image(path):
    """Read an ImageFile, turned upright as its EXIF data say. Raise UserError if that fails.

    Transparent parts become white behind dark ink and black behind light ink.
    """
    try:
        # Pillow warns of odd metadata and of images that are large, but allowed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(path) as file:
                has_more = file.format in _OF_FRAMES and getattr(file, "is_animated", False)
                image = _turned_upright(file)
                return ImageFile(_pixels_of(image, holds_bytes=file.format != "PPM"), has_more)
    except Image.DecompressionBombError:
        problem = f"more than {MAX_PIXELS:,} pixels, the most that are allowed; reduce it"
        raise UserError(f"{path} cannot be read as an image: {problem}") from None
    except _DAMAGE as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); put a good one in its "
            "place, or remove it"
        ) from None


def _opened(path):
    """Open an image file; a JPEG file whose resolution cannot be read, without its EXIF data."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        content = Path(path).read_bytes()
        if not (content.startswith(b"\xff\xd8") and b"Exif\0\0" in content):
            raise
        return Image.open(io.BytesIO(content.replace(b"Exif\0\0", b"none\0\0", 1)))


def _turned_upright(file):
    """Load an image that was opened, and turn it upright. Pixels are good whatever EXIF says."""
    for key, kind in ("xmp", bytes), ("XML:com.adobe.xmp", str):
        if not isinstance(file.info.get(key), kind):
            file.info.pop(key, None)
    with contextlib.suppress(Exception):  # Pillow raises errors of many kinds
        exif = file.getexif()
        for tag in set(exif) - {ExifTags.Base.Orientation}:
            del exif[tag]
    for key in "exif", "Raw profile type exif":  # else Pillow would write them again
        file.info.pop(key, None)
    file.load()
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(file)
    return file


def _pixels_of(image, holds_bytes):
    """Return the pixels of a Pillow image, see `ImageFile`.

    `holds_bytes` says whether the numbers of a wide type may be bytes, or of 10 or 12 bits. In a
    format whose header says what white is, they are a dark image.
    """
    if image.mode == "F":
        return to_uint8(_checked_grey(image, 1))[..., None]
    if image.mode[0] == "I":
        grey = _checked_grey(image, 65535)[..., None]
        return grey.astype(np.int32) if holds_bytes else scaled_to_bytes(grey, 65535)
    if "transparency" in image.info or "A" in image.getbands():
        image = _flatten(image.convert("RGBA"))
    pixels = np.asarray(image.convert("RGB"))
    grey = (pixels == pixels[..., :1]).all()
    return pixels[..., :1] if grey else pixels


def _checked_grey(image, largest):
    """Return the numbers of a grey image (H, W) as floats. Raise ValueError if out of range."""
    grey = np.asarray(image, np.float64)
    if not 0 <= grey.min() <= grey.max() <= largest:
        raise ValueError(
            f"grey from {grey.min():g} to {grey.max():g}, expected at most 0 to {largest}"
        )
    return grey


def _flatten(image):
    """Put an RGBA image on a white background if its ink is dark, else on a black one."""
    *ink, alpha = np.moveaxis(np.asarray(image, np.float64), -1, 0)
    dark = (np.mean(ink, axis=0) * alpha).sum() < 127.5 * alpha.sum()
    background = Image.new("RGBA", image.size, "white" if dark else "black")
    return Image.alpha_composite(background, image)
