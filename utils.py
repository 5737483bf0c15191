"""Write files atomically, draw random numbers, and fit an image to a network."""

import csv
import hashlib
import json
import os
import secrets
import tokenize
import unicodedata
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from capsnet_core.errors import UserError, os_advice

# What `open_npz` raises for a damaged .npz file, or one that is not an .npz file at all.
NPZ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)

SAMPLE = 1000  # images that are looked at to judge all of them
CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of controls and ends of lines

ROOT = Path(__file__).resolve().parent  # the folder of the program

# --- Files ----------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path):
    """Yield a temporary path that replaces `path` on success.

    The temporary file is in the same folder (created if missing) and has the same suffix. A failure
    inside the `with` block leaves an older file as it was, and no temporary one.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(6)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            # Without it, a power cut could leave `path` with contents that were never written.
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        advice = os_advice(error) or "choose another path"
        raise UserError(f"cannot write {path}: {error}; {advice}") from error


def write_json(path, obj):
    """Write an object, NumPy numbers and arrays included, as JSON. Raise as `atomic_path`."""
    text = json.dumps(obj, indent=2, default=lambda value: value.tolist())
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def open_npz(path):
    """Open a .npz file, to be used in a `with` block. Raises one of NPZ_ERRORS."""
    file = np.load(path)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise TypeError("a single array")
    return file


def write_csv(path, header, rows):
    """Write a table as CSV. Raise as `atomic_path`."""
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic_path(path) as temporary, open(temporary, "w", **options) as file:
        csv.writer(file).writerows([header, *rows])


def find_in_cwd_or_repo(folder, needed):
    """Return a folder, of the working folder or else the program, that has a file, or None."""
    candidates = Path(folder), ROOT / folder
    return next((path for path in candidates if (path / needed).exists()), None)


def markdown_table(header, rows):
    """Return the lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def random_stream(seed, epoch, purpose):
    """Create a generator of random numbers that depends on (seed, epoch, purpose) alone.

    Both numbers are integers of any size from 0; the purpose says in a word what the numbers are
    for. Raise UserError if the seed is negative.
    """
    if seed < 0:
        raise UserError(f"the seed is {seed}, expected 0 or more; choose another one")
    # The purpose comes last, so that no two triples have the same text.
    triple = f"{int(seed)}/{int(epoch)}/{purpose}"
    key = hashlib.blake2b(triple.encode(), digest_size=16).digest()  # Philox has 128-bit keys
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def printable(name):
    """Return a name without control characters and bytes that are not UTF-8: these are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in CONTROL else c for c in text)


def to_uint8(images):
    """Convert floats in [0, 1] to bytes, clipped and rounded; NaN becomes 0."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)


# --- Images ---------------------------------------------------------------------------------------


def evenly(items, most=SAMPLE):
    """Return at most `most` items, evenly spread over all of them: the first, ..., the last."""
    return items[np.linspace(0, len(items) - 1, min(len(items), most)).astype(int)]


def edge_pixels(image):
    """Return the pixels on the edge of an image (H, W, …): (n, …); those of the corners twice."""
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def edge_color(image):
    """Return the median of the pixels on the edge of an image (H, W, C): (C,)."""
    return np.median(edge_pixels(image), axis=0)


def is_dark_on_light(image):
    """Return whether the edge of an image, uint8 (H, W, C), is brighter than mid-grey."""
    return float(edge_color(image).mean()) > 127.5


def fit_image(image, shape, inverted):
    """Make an image look like those that a network was trained on.

    An image of other proportions is padded with the colour of its edge, then resized.

    Args:
        image: uint8 (H, W, 1 or 3).
        shape: (H', W', C') of the result.
        inverted: whether to swap light and dark.

    Returns:
        uint8 (H', W', C'), and in words what was done to the image.
    """
    done = []
    height, width, channels = shape
    if image.shape[-1] > channels:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
        done.append("made grey")
    image = np.broadcast_to(image, (*image.shape[:2], channels))
    if inverted:
        image = 255 - image
        done.append("inverted")
    if image.shape[:2] != (height, width):
        if image.shape[0] * width != image.shape[1] * height:
            done.append("filled up at its edges")
        done.append(f"resized from {image.shape[1]}×{image.shape[0]}")
        color = tuple(edge_color(image).astype(int).tolist())
        picture = Image.fromarray(np.squeeze(image, -1) if channels == 1 else image)
        background = color[0] if channels == 1 else color
        picture = ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, background)
        image = np.asarray(picture).reshape(shape)
    return image, ", ".join(done) or "unchanged"
