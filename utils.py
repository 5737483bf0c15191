"""Data and pictures: files -> arrays, (seed, epoch) -> plan of an epoch, arrays -> PNG."""

import csv
import ctypes
import functools
import gzip
import hashlib
import json
import math
import os
import platform
import secrets
import struct
import tokenize
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


class UserError(Exception):
    """A problem the user can solve: one line with what is wrong, what was expected, what to do."""


# ---------------------------------------------------------------- files


@contextmanager
def atomic_path(path):
    """Gives a temporary path to write to, which takes the place of `path` when all went well.

    The temporary file has the same folder (made if missing) and suffix. A failure inside the `with`
    block leaves an older file as it was, and no temporary one. Raises UserError: cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(6)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            # Without it a power cut could leave the new name on blocks that were never written.
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose a writable path") from error


def write_json(path, obj):
    """Writes `obj` (NumPy numbers and arrays too) as JSON. Raises UserError like atomic_path."""
    text = json.dumps(obj, indent=2, default=lambda value: value.tolist())
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path, head, rows):
    """Writes a table with the names of its columns. Raises UserError like atomic_path."""
    with atomic_path(path) as temporary, open(
            temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([head, *rows])


# ---------------------------------------------------------------- memory


@functools.cache
def keep_big_buffers():
    """Makes glibc keep freed memory, in huge pages: handing it back costs a third of a step.

    All threads share one arena, which grows by the heap alone and is not trimmed. The heap is grown
    once, marked, and freed untouched, so that no memory is taken before it is used. Elsewhere than
    on Linux with glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size, page, madv_hugepage = 1900 * 2**20, 2**21, 14  # below the threshold; mman.h
    if heap := libc.malloc(size):
        libc.madvise(-(-heap // page) * page, size - 2 * page, madv_hugepage)
        libc.free(heap)


# ---------------------------------------------------------------- data sets

_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_KMNIST = "o,ki,su,tsu,na,ha,ma,ya,re,wo"
CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": tuple(_FASHION.split(",")),
    "kmnist": tuple(_KMNIST.split(",")),
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# What numpy raises for a file that is no .npz, or a damaged one.
NPZ_ERRORS = (OSError, EOFError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error,
              tokenize.TokenError)
_MAX_CLASSES = 1000  # more is rather a mistake in the labels
_MAX_IDX_BYTES = 2**30  # 20 times MNIST's training images
_MAX_EXPANSION = 1032  # of deflate: at best two bits for a run of 258 bytes


class Dataset(NamedTuple):
    """Images uint8 (N, H, W, C), labels int32 (N,) from 0 to len(class_names) - 1."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]


def read_idx(path, remedy="put a good copy in its place"):
    """Reads a gzipped IDX file of unsigned bytes: uint8 (N,) or (N, H, W), no dimension zero.

    Safe on hostile files: memory grows with the data that are there, not with what the header
    claims, and reading stops one byte after the claim. `remedy` is what an error tells the user to
    do. Raises UserError: cannot be read, is damaged, or does not hold exactly what it claims.
    Source: the description of the format at http://yann.lecun.com/exdb/mnist/.
    """

    def unusable(problem):
        return UserError(f"{path}: {problem}; {remedy}")

    try:
        compressed = os.stat(path).st_size
        if not os.path.isfile(path):  # a pipe would block
            raise unusable("not a regular file")
        with gzip.open(path) as file:
            magic = file.read(4)
            if magic not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
                raise unusable(f"starts with {magic.hex(' ')}, expected 00 00 08 and 01 or 03")
            counts = file.read(4 * magic[3])
            if len(counts) < 4 * magic[3]:
                raise unusable("ends within its header")
            shape = struct.unpack(f">{magic[3]}i", counts)
            if min(shape) < 1:
                raise unusable(f"its header counts {shape}, expected positive numbers")
            claim = math.prod(shape)
            bound = min(_MAX_EXPANSION * compressed, _MAX_IDX_BYTES)
            if claim > bound:
                raise unusable(f"its header claims {claim:,} bytes, at most {bound:,} are possible")
            data = bytearray()
            # The last read asks for one byte too many: it finds trailing bytes, or the end of the
            # stream, where gzip compares the checksum.
            while len(data) <= claim and (chunk := file.read(min(2**20, claim + 1 - len(data)))):
                data += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise unusable(getattr(error, "strerror", None) or error) from error
    if len(data) != claim:
        amount = f"only {len(data):,}" if len(data) < claim else "more"
        raise unusable(f"its header claims {claim:,} bytes of data, but it holds {amount}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_idx_pair(folder, split, classes, remedy):
    """Images (N, H, W, 1) uint8 and labels (N,) int32 of one split, which must belong together."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", remedy)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", remedy)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max() >= classes:
        found = f"{images.shape} images, {labels.shape} labels up to {labels.max()}"
        expected = f"(N, H, W) and (N,) up to {classes - 1}"
        raise UserError(f"{folder}: {split} has {found}, expected {expected}; {remedy}")
    return images[..., None], labels.astype(np.int32)


def load_dataset(name, data_dir):
    """Loads a data set.

    Args:
        name: one of CLASS_NAMES, read from the four gzipped IDX files in `data_dir`/`name`; or a
            `.npz` file of x_train, y_train, x_test, y_test; or a folder of images by class,
            train/CLASS/* and test/CLASS/*.
        data_dir: folder of the sets of CLASS_NAMES.

    Raises UserError: unknown name, or files missing, damaged or not belonging together.
    """
    if name not in CLASS_NAMES:
        path = Path(name).expanduser()
        if path.is_dir():
            return _read_folders(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        raise UserError(f"unknown data set {name!r}; choose one of: {', '.join(CLASS_NAMES)}, a "
                        ".npz file, or a folder with train/CLASS and test/CLASS")
    names, folder = CLASS_NAMES[name], Path(data_dir) / name
    remedy = f"run: python download.py {name}"
    x_train, y_train = _read_idx_pair(folder, "train", len(names), remedy)
    x_test, y_test = _read_idx_pair(folder, "t10k", len(names), remedy)
    if x_train.shape[1:] != x_test.shape[1:]:
        sizes = f"{x_train.shape[1:]} in training, {x_test.shape[1:]} in test"
        raise UserError(f"{folder}: images are {sizes}, expected one size; {remedy}")
    return Dataset(name, x_train, y_train, x_test, y_test, names)


def _read_npz(path):
    """A Dataset from arrays: images (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1]."""
    expected = "expected x_train, y_train, x_test and y_test as numpy.savez writes them"
    arrays = {}
    try:
        with np.load(path) as file:  # TypeError: a single array
            for key in ("x_train", "y_train", "x_test", "y_test"):
                arrays[key] = np.asarray(file[key])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a .npz file") from None
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; {expected}") from None
    except NPZ_ERRORS as error:
        raise UserError(f"{path} cannot be read ({error}); {expected}") from None
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise UserError(f"{path}: x_{split} has shape {arrays[f'x_{split}'].shape}, expected "
                            "(N, H, W), (N, H, W, 1) or (N, H, W, 3), N at least 1")
        if images.dtype != np.uint8:
            if images.dtype.kind != "f" or not 0 <= images.min() <= images.max() <= 1:
                span = "" if images.dtype.kind != "f" else f" from {images.min()} to {images.max()}"
                raise UserError(f"{path}: x_{split} is {images.dtype}{span}, expected uint8, or "
                                "floats from 0 to 1; divide them by their largest value")
            floats, images = images, np.empty(images.shape, np.uint8)
            for n in range(0, len(floats), 1000):  # in parts: the work takes memory by the pixel
                images[n:n + 1000] = _to_uint8(floats[n:n + 1000])
        if labels.shape in ((len(images), 1), (len(images),)):
            labels = labels.reshape(-1)
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0 or (
                labels.max() >= _MAX_CLASSES):
            raise UserError(f"{path}: y_{split} is {labels.dtype} of shape {labels.shape}, expected "
                            f"{len(images)} integers from 0 to {_MAX_CLASSES - 1}")
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images, labels.astype(np.int32)
    sizes = [arrays[key].shape[1:] for key in ("x_train", "x_test")]
    if sizes[0] != sizes[1]:
        raise UserError(f"{path}: images are {sizes[0]} in training and {sizes[1]} in test, "
                        "expected one size")
    trained, last = np.unique(arrays["y_train"]), arrays["y_test"].max()
    if len(trained) < 2 or last >= len(trained) or trained[-1] != len(trained) - 1:
        raise UserError(f"{path}: y_train has {len(trained)} different labels up to {trained[-1]}, "
                        f"y_test up to {last}, expected two classes or more, numbered from 0 without "
                        "gaps, and all of them in y_train; number them anew")
    return Dataset(path.stem, **arrays, class_names=tuple(map(str, trained)))


def read_image(path):
    """An image file, upright, as uint8 (H, W, 1), or (H, W, 3) if it has colours.

    Transparent parts become white behind dark ink and black behind light ink.
    Raises UserError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # grey of 16 bits, or floats
                grey, whole = np.asarray(image, np.float64), 65535 if image.mode[0] == "I" else 1
                if image.mode == "I" and grey.max() < 256:  # wider than what is in it
                    whole = 255
                if not 0 <= grey.min() <= grey.max() <= whole:
                    raise ValueError(f"grey from {grey.min():g} to {grey.max():g}, expected at most "
                                     f"0 to {whole}")
                return _to_uint8(grey / whole)[..., None]
            if "transparency" in image.info or "A" in image.getbands():
                image = image.convert("RGBA")
                *ink, alpha = np.moveaxis(np.asarray(image, np.float64), -1, 0)
                dark = (np.mean(ink, axis=0) * alpha).sum() < 127.5 * alpha.sum()
                ground = Image.new("RGBA", image.size, "white" if dark else "black")
                image = Image.alpha_composite(ground, image)
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); put a good one in its "
                        "place, or take it away") from None
    grey = (pixels == pixels[..., :1]).all()
    return pixels[..., :1] if grey else pixels


def _edge_color(image):
    """The median of the pixels on the edge of an image (H, W, C): (C,)."""
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def is_dark_on_light(image):
    """Whether the edge of an image, uint8 (H, W, C), is brighter than half."""
    return float(_edge_color(image).mean()) > 127.5


def fit_image(image, shape, inverted):
    """Makes an image one of those that a network was trained on.

    Args: image, uint8 (H, W, 1 or 3); shape, (H', W', C') of the result; inverted, whether light
    and dark are to change places. An image of other proportions is filled up with the colour of its
    edge, then its size changed.

    Returns uint8 (H', W', C'), and in words what was done to it.
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
        done.append(f"resized from {image.shape[1]}×{image.shape[0]}")
        color = tuple(_edge_color(image).astype(int).tolist())
        picture = Image.fromarray(np.squeeze(image, -1) if channels == 1 else image)
        if image.shape[0] * width != image.shape[1] * height:
            done[-1:-1] = ["filled up at its edges"]
        picture = ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS,
                               color[0] if channels == 1 else color)
        image = np.asarray(picture).reshape(shape)
    return image, ", ".join(done) or "as it was"


def _read_folders(folder):
    """A Dataset from train/CLASS/* and test/CLASS/*; classes in the order of their names."""
    names = sorted(path.name for path in folder.glob("train/[!.]*/"))
    if len(names) < 2 or not any(folder.glob("test/[!.]*/")):
        raise UserError(f"{folder}: expected folders of images, train/CLASS for two classes or more "
                        "and test/CLASS")
    arrays, size, example = {}, None, None
    for split in ("train", "test"):
        images, labels = [], []
        for place in sorted(folder.glob(f"{split}/[!.]*/")):
            if place.name not in names:
                raise UserError(f"{place}: a class without {folder}/train/{place.name}, expected "
                                "only classes that are trained")
            for path in sorted(place.iterdir()):
                if path.suffix.lower() not in _IMAGE_SUFFIXES:
                    continue
                image = read_image(path)
                size, example = size or image.shape[:2], example or path
                if image.shape[:2] != size:
                    raise UserError(f"{path} has {image.shape[1]}×{image.shape[0]} pixels, expected "
                                    f"{size[1]}×{size[0]} like {example}; resize the images")
                images.append(image)
                labels.append(names.index(place.name))
        if not images:
            raise UserError(f"{folder}/{split}: no images, expected files that end in "
                            f"{', '.join(sorted(_IMAGE_SUFFIXES))}")
        order = random_stream(0, 0, f"folder {split}").permutation(len(labels))  # classes mixed
        arrays[f"x_{split}"] = [images[n] for n in order]
        arrays[f"y_{split}"] = np.array(labels, np.int32)[order]
    channels = max(image.shape[-1] for key in ("x_train", "x_test") for image in arrays[key])
    for key in ("x_train", "x_test"):
        arrays[key] = np.stack([np.broadcast_to(image, (*size, channels)) for image in arrays[key]])
    return Dataset(folder.resolve().name, **arrays, class_names=tuple(names))


# ---------------------------------------------------------------- what an epoch consists of


class Plan(NamedTuple):
    """The examples of an epoch or an evaluation, in order; a batch is a slice of both arrays.

    K images lie on top of each other in an example: 1 for single digits, 2 for MultiMNIST.
    `index` (N, K) int32 tells which, counted in the labels that the plan was made for;
    `shift` (N, K, 2) int32 by how many whole pixels each moves, down and to the right.
    """

    index: np.ndarray
    shift: np.ndarray

    def take(self, chosen):
        """The plan of only these examples, given as a slice or as their numbers."""
        return Plan(self.index[chosen], self.shift[chosen])


def random_stream(seed, epoch, purpose):
    """A generator that depends on (seed, epoch, purpose) alone; different triples, other numbers.

    Args: seed and epoch, integers from 0 of any size; purpose, a word for what the numbers are for.
    Raises UserError: the seed is negative.
    """
    if seed < 0:
        raise UserError(f"the seed is {seed}, expected 0 or more; choose another one")
    # The purpose comes last, so that no two triples have the same text.
    triple = f"{int(seed)}/{int(epoch)}/{purpose}"
    key = hashlib.blake2b(triple.encode(), digest_size=16).digest()  # Philox has 128-bit keys
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def split_validation(n, seed):
    """Holds out a sixth (n // 6) of n training images, chosen by the seed.

    Returns the indices to train on and those to validate with, both sorted, int64.
    Raises UserError: fewer than 6 images.
    """
    if n < 6:
        raise UserError(f"{n} training images, expected at least 6 to hold out a sixth; use more")
    held_out = np.zeros(n, bool)
    held_out[random_stream(seed, 0, "validation").permutation(n)[: n // 6]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _draw_partners(labels, firsts, stream):
    """For each image in `firsts` one drawn uniformly from all images of every other class."""
    counts = np.bincount(labels)
    classes = np.count_nonzero(counts)
    if classes < 2:
        raise UserError(f"images of {classes} class, expected two to make pairs; use more images")
    by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    own = labels[firsts]
    rank = stream.integers(0, len(labels) - counts[own])
    rank += np.where(rank >= starts[own], counts[own], 0)  # steps over the block of its own class
    return by_class[rank]


def _draw_shifts(shape, max_shift, stream):
    return stream.integers(-max_shift, max_shift, (*shape, 2), np.int32, endpoint=True)


def training_plan(labels, seed, epoch, max_shift, overlap):
    """Plan of N examples, each image once and shuffled. A function of its arguments alone.

    Args:
        labels: (N,) integers, of the images to train on.
        seed, epoch: integers from 0.
        max_shift: 0 or more; each image is shifted by -max_shift..max_shift pixels on each axis.
        overlap: each image gets a partner, drawn anew in each epoch from the images of every other
            class (paper, section 6.1).

    Raises UserError: `overlap` with fewer than two classes, or a negative seed.
    """
    # Drawn by image and then put in order, so that an image's shift does not hang on its place.
    index = np.arange(len(labels))[:, None]
    if overlap:
        partners = _draw_partners(labels, index[:, 0], random_stream(seed, epoch, "partner"))
        index = np.column_stack([index, partners])
    shift = _draw_shifts(index.shape, max_shift, random_stream(seed, epoch, "shift"))
    order = random_stream(seed, epoch, "order").permutation(len(labels))
    return Plan(index[order].astype(np.int32), shift[order])


def evaluation_plan(labels, max_shift, overlap, pairs_per_image=1):
    """Plan of N examples, in order and unshifted, or of N * pairs_per_image overlapping pairs.

    Arguments and errors as for `training_plan`. The pairs and their shifts depend on no seed of the
    user's, so that runs can be compared; each image is the first of `pairs_per_image` pairs (the
    paper tests with 1,000).
    """
    index = np.arange(len(labels), dtype=np.int32)[:, None]
    if not overlap:
        return Plan(index, np.zeros((*index.shape, 2), np.int32))
    index = np.tile(index, (pairs_per_image, 1))  # so more pairs begin with those of one each
    partners = _draw_partners(labels, index[:, 0], random_stream(0, 0, "evaluation partner"))
    index = np.column_stack([index, partners.astype(np.int32)])
    shifts = _draw_shifts(index.shape, max_shift, random_stream(0, 0, "evaluation shift"))
    return Plan(index, shifts)


# ---------------------------------------------------------------- pictures
# Images are uint8 or floats in [0, 1], (..., H, W, C), with one or three channels; files are PNG.
# What draws a page of images returns its pixels too, (H, W, 3) uint8; a path of None writes no file.

_DPI = 200
_INK, _FAINT, _RED, _GREY = (34, 34, 34), (176, 176, 176), (192, 57, 43), (228, 230, 232)
_TILE = 112  # pixels that an image is enlarged to at most: 28 * 4
_LINE, _SEAM, _GAP = 28, 4, 60  # text line; between images; between examples
_MARGIN, _TOP = 36, 36 + 3 * _LINE  # around the page; where the contents begin, below the title


def _to_uint8(images):
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)


def _enlarge(image):
    """(H, W, C) -> uint8 (H * scale, W * scale, 3), the larger side about _TILE pixels."""
    scale = max(1, _TILE // max(image.shape[:2]))
    pixels = _to_uint8(image).repeat(scale, 0).repeat(scale, 1)
    return pixels.repeat(3 // pixels.shape[-1], -1)


@functools.cache
def _font(points, bold=False):
    import matplotlib  # for its DejaVu Sans; not needed, and slow to import, until there is text

    file = Path(matplotlib.get_data_path(), "fonts/ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(file, round(points * _DPI / 72))


def _text_width(texts, bold=False):
    return max((math.ceil(_font(7, bold).getlength(text)) for text in texts), default=0)


class _Sheet:
    """A white page with a title and a note; positions are pixels from the corner below them."""

    def __init__(self, width, height, title, note):
        width = max(width, _text_width([note]), math.ceil(_font(9, True).getlength(title)))
        self.page = Image.new("RGB", (width + 2 * _MARGIN, height + _TOP + _MARGIN), "white")
        self.text(0, -2.5 * _LINE, title, points=9, bold=True, anchor="lm")
        self.text(0, -1.5 * _LINE, note, anchor="lm")

    def paste(self, x, y, pixels):
        self.page.paste(Image.fromarray(pixels), (_MARGIN + x, _TOP + y))

    def text(self, x, y, text, width=math.inf, points=7, bold=False, color=_INK, anchor="mm"):
        """Writes one line; one that is wider than `width` is set smaller, then cut short."""
        while points > 5 and _font(points, bold).getlength(text) > width:
            points -= 0.5
        while len(text) > 1 and _font(points, bold).getlength(text) > width:
            text = text[:-2] + "…"
        place = _MARGIN + round(x), _TOP + round(y)
        ImageDraw.Draw(self.page).text(place, text, color, _font(points, bold), anchor)

    def save(self, path):
        """Writes the page, unless `path` is None, and returns its pixels (H, W, 3) uint8."""
        if path is not None:
            with atomic_path(path) as temporary:
                self.page.save(temporary, "PNG", dpi=(_DPI, _DPI))
        return np.asarray(self.page)


def _save_examples(path, title, note, examples, per_row, above=(), before=()):
    """Draws examples (captions, tiles): lines of (text, colour) above rows of images.

    `above` heads the tiles' columns in the top examples, `before` their rows in the left ones.
    """
    captions, tiles = examples[0]
    height, width = _enlarge(tiles[0][0]).shape[:2]
    left, top = _text_width(before, bold=True) + 16 if before else 0, _LINE + 4 if above else 0
    block = len(tiles[0]) * (width + _SEAM) - _SEAM
    step = len(captions) * _LINE + len(tiles) * (height + _SEAM) + _LINE  # from row to row
    columns, rows = min(per_row, len(examples)), math.ceil(len(examples) / per_row)
    size = left + columns * (block + _GAP) - _GAP, top + rows * step - _SEAM - _LINE
    sheet = _Sheet(*size, title, note)
    for n, (captions, tiles) in enumerate(examples):
        x, y = left + n % columns * (block + _GAP), top + n // columns * step
        for text, color in captions:
            sheet.text(x + block / 2, y + _LINE / 2, text, block + _GAP - 12, color=color)
            y += _LINE
        for i, j in np.ndindex(len(tiles), len(tiles[0])):
            tile_x, tile_y = x + j * (width + _SEAM), y + i * (height + _SEAM)
            sheet.paste(tile_x, tile_y, _enlarge(tiles[i][j]))
            if above and n < columns and i == 0:
                sheet.text(tile_x + width / 2, _LINE / 2, above[j], width, bold=True)
            if before and n % columns == 0 and j == 0:
                sheet.text(left - 16, tile_y + height / 2, before[i], bold=True, anchor="rm")
    return sheet.save(path)


def image_grid(images):
    """Lays out images (B, H, W, C), B >= 1, row by row in ceil(sqrt(B)) columns.

    Returns uint8 (rows * (H + 1) - 1, columns * (W + 1) - 1, C): a grey line between the images.
    """
    count, height, width, channels = np.shape(images)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * columns, height + 1, width + 1, channels), 128, np.uint8)
    grid[:count, :height, :width] = _to_uint8(images)
    grid = grid.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]


def save_grid(path, images, scale=3):
    """Draws `image_grid(images)`, each pixel `scale` times as wide and high."""
    grid = image_grid(images).repeat(scale, 0).repeat(scale, 1)
    with atomic_path(path) as temporary:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(temporary, "PNG")


def merge(images):
    """Reconstructions (N, K, H, W, C) of an image's digits laid over each other: (N, H, W, C)."""
    return np.minimum(np.sum(images, axis=1), 1)


def save_reconstructions(path, images, with_label, without_label, labels, predictions, class_names):
    """Draws the first 20 inputs, N >= 1, each beside its two reconstructions; wrong ones in red.

    Args: images (N, H, W, C); the reconstructions with the mask of the labels and with that of the
    longest capsules, (N, K, H, W, C); labels and predictions (N, K), in any order; names by class.
    """
    examples = []
    triples = zip(images[:20], merge(with_label[:20]), merge(without_label[:20]))
    for triple, label, prediction in zip(triples, labels, predictions):
        true, guess = ("+".join(class_names[k] for k in sorted(row)) for row in (label, prediction))
        color = _INK if sorted(label) == sorted(prediction) else _RED
        examples.append(([(f"true {true}, predicted {guess}", color)], [triple]))
    note = "with label: from the capsule of the true class; no label: from the longest capsule"
    above = "input", "with label", "no label"
    return _save_examples(path, "Reconstructions", note, examples, 4, above)


def confusion_matrix(labels, predictions, n_classes):
    """Counts how often each true class (row) was predicted as each class (column): (n, n) int64."""
    cells = np.asarray(labels, np.int64) * n_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def save_confusion_matrix(path, matrix, class_names):
    """Draws counts (n, n): true classes down, predicted ones across, names by class.

    Only errors are coloured: the right predictions, a hundred times more, would drown them.
    """
    n, total, errors = len(matrix), matrix.sum(), matrix - np.diag(np.diag(matrix))
    width, height = min(max(64, _text_width(class_names) + 16), 150), 64
    written = n <= 40  # more classes are a map of colours
    if not written:
        width = height = max(2, 2400 // n)
    left, top = _text_width([*class_names, "true class"], bold=True) + 16, 2 * _LINE + 4
    wrong = errors.sum()
    title = f"{total:,} images, {wrong:,} wrong: error {wrong / max(total, 1):.2%}"
    sheet = _Sheet(left + n * width, top + n * height, title, "the redder a cell, the more errors")
    shade = np.sqrt(errors / max(errors.max(), 10))
    colors = np.rint(255 + shade[..., None] * (np.array(_RED) - 255)).astype(np.uint8)
    colors[np.diag_indices(n)] = _GREY
    cells = colors.repeat(height, 0).repeat(width, 1)
    if written:
        cells[::height] = cells[:, ::width] = 255
    sheet.paste(left, top, cells)
    sheet.text(left + n * width / 2, _LINE / 2, "predicted class", bold=True)
    sheet.text(left - 16, _LINE * 3 / 2, "true class", bold=True, anchor="rm")
    for i, j in np.ndindex(n * written, n):
        x, y = left + (j + 0.5) * width, top + (i + 0.5) * height
        if i == j:
            sheet.text(x, _LINE * 3 / 2, class_names[i], width - 6)
            sheet.text(left - 16, y, class_names[i], anchor="rm")
        ink = _INK if i == j or 0 < shade[i, j] < 0.6 else "white" if matrix[i, j] else _FAINT
        sheet.text(x, y, str(matrix[i, j]), width - 6, bold=i == j, color=ink)
    return sheet.save(path)


def save_misclassified(path, images, numbers, labels, predictions, scores, class_names):
    """Draws the first 64 wrong images with the capsule lengths of true and predicted class.

    Args: images (N, H, W, C), N >= 0, only wrongly classified ones; their numbers in the test set,
    labels and predictions (N,); scores (N, classes), the lengths of all digit capsules; names by class.
    """
    if not len(images):
        return _Sheet(0, 0, "No image is misclassified", "").save(path)
    examples = []
    for image, number, label, prediction, score in zip(
            images[:64], numbers, labels, predictions, scores):
        pair = (label, _INK), (prediction, _RED)
        captions = [(f"{class_names[k]}: {score[k]:.2f}", color) for k, color in pair]
        examples.append(([(f"no. {number}", _FAINT), *captions], [[image]]))
    title = f"{len(images):,} misclassified images" + ", the first 64" * (len(images) > 64)
    note = ("number in the test set, from 0; capsule lengths of the true class (black) and of the "
            "predicted class (red)")
    return _save_examples(path, title, note, examples, 8)


def _signed(number):
    return "0" if abs(number) < 1e-9 else f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")


def _save_steps(path, title, images, deltas, row_names):
    above = [_signed(delta) for delta in deltas]
    note = "the number above is added; at 0 the capsule as the network found it"
    return _save_examples(path, title, note, [((), images)], 1, above, row_names)


def save_tweak(path, images, deltas, dimension, class_names_of_rows):
    """Draws one dimension of the digit capsules changed in steps: digits down, steps across.

    Args: images (digits, steps, H, W, C); deltas (steps,), what was added to the dimension; its
    number, as the title shows it; the class of each row.
    """
    title = f"Dimension {dimension} of the longest capsule of each image, changed"
    return _save_steps(path, title, images, deltas, class_names_of_rows)


def save_tweak_overview(path, images, deltas, class_name):
    """Draws every dimension of one digit's capsule changed in steps, as in the paper's figure 4.

    Args: images (dims, steps, H, W, C), rows numbered from 0; deltas (steps,); the digit's class.
    """
    title = f"Each dimension of the capsule of class {class_name}, changed"
    return _save_steps(path, title, images, deltas, [f"dim {i}" for i in range(len(images))])


def save_sweep(path, images, deltas, class_names_of_rows):
    """Draws every dimension of several digits' capsules changed to and fro, as an animated GIF.

    Args: images (dims, digits, steps, H, W, C); deltas (steps,), what was added to the dimension;
    the class of each row.
    """
    dims, steps = images.shape[0], images.shape[2]
    note = "one column a dimension of the capsule, the other dimensions as the network found them"
    pages = []
    for step in range(steps):
        title = f"Every dimension of the longest capsules, changed by {_signed(deltas[step])}"
        tiles = images[:, :, step].swapaxes(0, 1)
        page = Image.fromarray(_save_examples(
            None, title, note, [((), tiles)], 1, [str(i) for i in range(dims)],
            class_names_of_rows))
        pages.append(page.reduce(2).quantize(64))
    back = pages[-2:0:-1]
    with atomic_path(path) as temporary:
        pages[0].save(temporary, "GIF", save_all=True, append_images=[*pages[1:], *back], loop=0,
                      duration=120)


LINE_COLORS = "#20639b", "#c0392b"


def new_figure(panels, width=7, **kwargs):
    """A Matplotlib figure of so many inches, and its panels side by side (arguments: `subplots`)."""
    from matplotlib.figure import Figure

    figure = Figure((width, 2.8), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **kwargs)[0]


def label_panel(panel, title, below=None):
    """Gives a panel of a figure the look of all: its title, what its horizontal axis shows, a grid."""
    ink, faint, grey = (np.divide(color, 255) for color in (_INK, _FAINT, _GREY))
    panel.set_title(title, fontsize=9, fontweight="bold", loc="left", color=ink)
    panel.set_xlabel(below, fontsize=7)
    panel.tick_params(which="both", labelsize=6, color=faint)
    panel.grid(color=grey, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(path, figure):
    """Writes a Matplotlib figure as PNG. Raises UserError like atomic_path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def save_learning_curves(path, curves, steps_per_epoch):
    """Draws loss and error over the epochs, one line for training and one for validation.

    Args: curves, from the name of a line to {"loss/total" and "accuracy": (steps, values)}; lines of
    more than 100 points become means of at most 100 equal parts of the steps; gaps are values of 0.
    """
    from matplotlib.ticker import LogLocator

    figure, panels = new_figure(2)
    for (name, scalars), color in zip(curves.items(), LINE_COLORS):
        for panel, tag in zip(panels, ("loss/total", "accuracy")):
            size = math.ceil(len(scalars[tag][0]) / 100)
            starts = range(0, len(scalars[tag][0]), size)
            epochs, values = ([np.mean(a[n:n + size]) for n in starts] for a in scalars[tag])
            shown = 100 * (1 - np.array(values)) if tag == "accuracy" else np.array(values)
            shown[shown <= 0] = np.nan  # no error at all has no place on a logarithmic axis
            panel.plot(np.array(epochs) / steps_per_epoch, shown, color=color, label=name, lw=1.2,
                       marker="o" if len(epochs) < 60 else None, ms=2.5)
    for panel, title in zip(panels, ("Total loss", "Error, % of images")):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_minor_formatter("{x:g}")
        label_panel(panel, title, "epoch")
    panels[0].legend(fontsize=7, frameon=False)
    save_figure(path, figure)


def save_predictions(path, images, reconstructions, captions):
    """Draws the first 40 images beside what the network sees in them, N >= 1.

    Args: images (N, H, W, C); reconstructions (N, H, W, C); captions, the lines of each, as many.
    """
    examples = [([(line, _INK) for line in lines], [pair])
                for *pair, lines in zip(images[:40], reconstructions, captions)]
    title = f"Predictions for {len(images):,} images" + ", the first 40" * (len(images) > 40)
    note = "the image as the network gets it, and its reconstruction from the longest capsule"
    return _save_examples(path, title, note, examples, 5)


def save_multi(path, title, inputs, reconstructions, labels, predictions, class_names):
    """Draws the first 20 MultiMNIST examples, N >= 1, a column each, like the paper's figure 5.

    Args: inputs (N, H, W, C); reconstructions (N, 2, H, W, C) of the predicted digits in the order
    of predictions; labels and predictions (N, 2), pairs in any order; names by class.
    """
    space = "\n" if max(map(len, class_names)) > 3 else " "  # two long names need two lines
    examples = []
    for image, pair, label, predicted in zip(inputs[:20], reconstructions, labels, predictions):
        captions = []
        for letter, (first, second) in ("L", label), ("R", predicted):
            text = f"{letter}:({class_names[first]},{space}{class_names[second]})"
            captions += text.split("\n")
        color = _INK if sorted(label) == sorted(predicted) else _RED
        grey = _to_uint8(pair).mean(-1, keepdims=True).astype(np.uint8)  # (2, H, W, 1)
        red, green = grey * np.eye(2, 3, dtype=np.uint8)[:, None, None]  # (2, H, W, 3)
        tiles = [[image], [red + green], [red], [green]]
        examples.append(([(text, color) for text in captions], tiles))
    note = "L: the label; R: the two longest capsules, reconstructed (first red, second green)"
    before = "input", "both", "first", "second"
    return _save_examples(path, title, note, examples, 10, before=before)
