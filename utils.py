"""Read data sets and images into arrays, fit an image to a network, and write files atomically."""

import csv
import gzip
import hashlib
import json
import math
import os
import secrets
import struct
import tokenize
import unicodedata
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import config
from errors import DataFileError, UserError

CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of controls and ends of lines

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
        raise UserError(f"cannot write {path}: {error}; choose a writable path") from error


def write_json(path, obj):
    """Write an object, NumPy numbers and arrays included, as JSON. Raise as `atomic_path`."""
    text = json.dumps(obj, indent=2, default=lambda value: value.tolist())
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(path, header, rows):
    """Write a table as CSV. Raise as `atomic_path`."""
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with atomic_path(path) as temporary, open(temporary, "w", **options) as file:
        csv.writer(file).writerows([header, *rows])


def markdown_table(header, rows):
    """Return the lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def random_stream(seed, epoch, purpose):
    """Create a generator of random numbers that depends on (seed, epoch, purpose) alone.

    Args:
        seed: integer from 0, of any size.
        epoch: integer from 0, of any size.
        purpose: what the numbers are for, in a word.

    Returns:
        np.random.Generator, independent of that of any other triple.

    Raises:
        UserError: the seed is negative.
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


# --- Data sets ------------------------------------------------------------------------------------

_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_KMNIST = "o,ki,su,tsu,na,ha,ma,ya,re,wo"
CLASS_NAMES = {
    "mnist": config.DIGITS,
    "fashion_mnist": tuple(_FASHION.split(",")),
    "kmnist": tuple(_KMNIST.split(",")),
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# What NumPy raises for a damaged .npz file, or a file that is none.
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
_MAX_CLASSES = 1000  # more are probably a mistake in the labels
_MAX_IDX_BYTES = 2**30  # 20 times MNIST's training images
_MAX_EXPANSION = 1032  # of deflate: at best two bits for a run of 258 bytes


class Dataset(NamedTuple):
    """Images uint8 (N, H, W, C) and labels int32 (N,) from 0 to len(class_names) - 1."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]


def read_idx(path, dataset=None):
    """Read a gzipped IDX file of unsigned bytes.

    Hostile files do no harm: memory grows with the data in the file, not with what the header
    claims, and reading stops one byte after the claim. Source of the format:
    http://yann.lecun.com/exdb/mnist/.

    Args:
        path: of the file.
        dataset: name of the data set that it belongs to, for the error.

    Returns:
        uint8 (N,) or (N, H, W), no dimension zero.

    Raises:
        DataFileError: the file cannot be read, is damaged, or does not hold exactly what it claims.
    """
    try:
        compressed = os.stat(path).st_size
        if not os.path.isfile(path):  # a pipe would block
            raise DataFileError(path, "not a regular file", dataset)
        with gzip.open(path) as file:
            try:
                shape = _read_idx_header(file, compressed)
            except ValueError as error:
                raise DataFileError(path, error, dataset) from None
            claim, data = math.prod(shape), bytearray()
            # The last read asks for one byte too many: it finds trailing bytes, or the end of the
            # stream, where gzip compares the checksum.
            while len(data) <= claim and (chunk := file.read(min(2**20, claim + 1 - len(data)))):
                data += chunk
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataFileError(path, reason, dataset) from error
    if len(data) != claim:
        amount = f"only {len(data):,}" if len(data) < claim else "more"
        problem = f"its header claims {claim:,} bytes of data, but it holds {amount}"
        raise DataFileError(path, problem, dataset)
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_idx_header(file, compressed):
    """Read the shape from an IDX file's header. Raise ValueError if it is not plausible."""
    magic = file.read(4)
    if magic not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
        raise ValueError(f"starts with {magic.hex(' ')}, expected 00 00 08 and 01 or 03")
    counts = file.read(4 * magic[3])
    if len(counts) < 4 * magic[3]:
        raise ValueError("ends within its header")
    shape = struct.unpack(f">{magic[3]}i", counts)
    if min(shape) < 1:
        raise ValueError(f"its header counts {shape}, expected positive numbers")
    claim, bound = math.prod(shape), min(_MAX_EXPANSION * compressed, _MAX_IDX_BYTES)
    if claim > bound:
        raise ValueError(f"its header claims {claim:,} bytes, at most {bound:,} are possible")
    return shape


def _read_idx_pair(folder, split, dataset):
    """Read images (N, H, W, 1) uint8 and labels (N,) int32 of one split; they must match."""
    classes = len(CLASS_NAMES[dataset])
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", dataset)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", dataset)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max() >= classes:
        problem = (
            f"{split} has {images.shape} images, {labels.shape} labels up to {labels.max()}, "
            f"expected (N, H, W) and (N,) up to {classes - 1}"
        )
        raise DataFileError(folder, problem, dataset)
    return images[..., None], labels.astype(np.int32)


def load_dataset(name, data_dir):
    """Load a data set.

    Args:
        name: one of CLASS_NAMES, read from the four gzipped IDX files in `data_dir`/`name`; or a
            `.npz` file of x_train, y_train, x_test, y_test; or a folder of images by class,
            train/CLASS/* and test/CLASS/*.
        data_dir: folder of the sets of CLASS_NAMES.

    Returns:
        Dataset.

    Raises:
        DataFileError: IDX files are missing, damaged or do not fit each other.
        UserError: the name is unknown, or the .npz file or the folder is no data set.
    """
    if name in CLASS_NAMES:
        return _read_idx_files(name, Path(data_dir) / name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folders(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise UserError(
        f"unknown data set {name!r}; choose one of: {', '.join(CLASS_NAMES)}, a "
        ".npz file, or a folder with train/CLASS and test/CLASS"
    )


def dataset_name(name):
    """Return the `Dataset.name` of what `load_dataset` loads under a name, without loading it."""
    if name in CLASS_NAMES:
        return name
    path = Path(name).expanduser()
    return path.stem if path.suffix == ".npz" and not path.is_dir() else path.resolve().name


def _read_idx_files(name, folder):
    """Read a Dataset from its four IDX files."""
    x_train, y_train = _read_idx_pair(folder, "train", name)
    x_test, y_test = _read_idx_pair(folder, "t10k", name)
    if x_train.shape[1:] != x_test.shape[1:]:
        sizes = f"{x_train.shape[1:]} in training, {x_test.shape[1:]} in test"
        raise DataFileError(folder, f"images are {sizes}, expected one size", name)
    return Dataset(name, x_train, y_train, x_test, y_test, CLASS_NAMES[name])


def _read_npz(path):
    """Read a Dataset from arrays: images (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1]."""
    arrays = _load_arrays(path)
    for split in ("train", "test"):
        images = _images_of_npz(path, split, arrays[f"x_{split}"])
        arrays[f"x_{split}"] = images
        arrays[f"y_{split}"] = _labels_of_npz(path, split, arrays[f"y_{split}"], len(images))
    sizes = [arrays[key].shape[1:] for key in ("x_train", "x_test")]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path}: images are {sizes[0]} in training and {sizes[1]} in test, expected one size"
        )
    trained, last = np.unique(arrays["y_train"]), arrays["y_test"].max()
    if len(trained) < 2 or last >= len(trained) or trained[-1] != len(trained) - 1:
        raise UserError(
            f"{path}: y_train has {len(trained)} different labels up to {trained[-1]}, "
            f"y_test up to {last}, expected two classes or more, numbered from 0 without "
            "gaps, and all of them in y_train; renumber them"
        )
    return Dataset(printable(path.stem), **arrays, class_names=tuple(map(str, trained)))


def _load_arrays(path):
    """Load the four arrays of a .npz file."""
    expected = "expected x_train, y_train, x_test and y_test as numpy.savez writes them"
    try:
        with np.load(path) as file:  # TypeError: a single array
            names = ("x_train", "y_train", "x_test", "y_test")
            return {name: np.asarray(file[name]) for name in names}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a .npz file") from None
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; {expected}") from None
    except NPZ_ERRORS as error:
        raise UserError(f"{path} cannot be read ({error}); {expected}") from None


def _images_of_npz(path, split, array):
    """Check images and convert them to uint8 (N, H, W, C)."""
    images = array[..., None] if array.ndim == 3 else array
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise UserError(
            f"{path}: x_{split} has shape {array.shape}, expected "
            "(N, H, W), (N, H, W, 1) or (N, H, W, 3), N at least 1"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f" or not 0 <= images.min() <= images.max() <= 1:
        span = "" if images.dtype.kind != "f" else f" from {images.min()} to {images.max()}"
        raise UserError(
            f"{path}: x_{split} is {images.dtype}{span}, expected uint8, or "
            "floats from 0 to 1; divide them by their largest value"
        )
    converted = np.empty(images.shape, np.uint8)
    for n in range(0, len(images), 1000):  # in parts: the floats in between take much memory
        converted[n : n + 1000] = to_uint8(images[n : n + 1000])
    return converted


def _labels_of_npz(path, split, labels, count):
    """Check labels and convert them to int32 (N,)."""
    if labels.shape in ((count, 1), (count,)):
        labels = labels.reshape(-1)
    integers = labels.shape == (count,) and labels.dtype.kind in "iu"
    if not integers or labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        raise UserError(
            f"{path}: y_{split} is {labels.dtype} of shape {labels.shape}, expected "
            f"{count} integers from 0 to {_MAX_CLASSES - 1}"
        )
    return labels.astype(np.int32)


def read_image(path):
    """Read an image file, turned upright as its EXIF data say.

    Transparent parts become white behind dark ink and black behind light ink.

    Returns:
        uint8 (H, W, 1), or (H, W, 3) if the image has colours.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                return _deep_grey(image)
            if "transparency" in image.info or "A" in image.getbands():
                image = _flatten(image.convert("RGBA"))
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); put a good one in its "
            "place, or remove it"
        ) from None
    grey = (pixels == pixels[..., :1]).all()
    return pixels[..., :1] if grey else pixels


def _deep_grey(image):
    """Convert grey of 16 bits, or floats from 0 to 1, to uint8 (H, W, 1)."""
    grey, largest = np.asarray(image, np.float64), 65535 if image.mode[0] == "I" else 1
    if image.mode == "I" and grey.max() < 256:  # a wide type that holds bytes
        largest = 255
    if not 0 <= grey.min() <= grey.max() <= largest:
        raise ValueError(
            f"grey from {grey.min():g} to {grey.max():g}, expected at most 0 to {largest}"
        )
    return to_uint8(grey / largest)[..., None]


def _flatten(image):
    """Put an RGBA image on a white ground if its ink is dark, else on a black one."""
    *ink, alpha = np.moveaxis(np.asarray(image, np.float64), -1, 0)
    dark = (np.mean(ink, axis=0) * alpha).sum() < 127.5 * alpha.sum()
    ground = Image.new("RGBA", image.size, "white" if dark else "black")
    return Image.alpha_composite(ground, image)


def _edge_color(image):
    """Return the median of the pixels on the edge of an image (H, W, C): (C,)."""
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def is_dark_on_light(image):
    """Tell whether the edge of an image, uint8 (H, W, C), is brighter than mid-grey."""
    return float(_edge_color(image).mean()) > 127.5


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
        color = tuple(_edge_color(image).astype(int).tolist())
        picture = Image.fromarray(np.squeeze(image, -1) if channels == 1 else image)
        ground = color[0] if channels == 1 else color
        picture = ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, ground)
        image = np.asarray(picture).reshape(shape)
    return image, ", ".join(done) or "as it was"


def _read_folders(folder):
    """Read a Dataset from train/CLASS/* and test/CLASS/*; classes in the order of their names."""
    names = sorted(path.name for path in folder.glob("train/[!.]*/"))
    if len(names) < 2 or not any(folder.glob("test/[!.]*/")):
        raise UserError(
            f"{folder}: expected folders of images, train/CLASS for two classes or more "
            "and test/CLASS"
        )
    splits, first = {}, None
    for split in ("train", "test"):
        images, labels = [], []
        for path, label in _image_files(folder, split, names):
            image = read_image(path)
            first = first or (path, image.shape[:2])
            _check_same_size(path, image, *first)
            images.append(image)
            labels.append(label)
        order = random_stream(0, 0, f"folder {split}").permutation(len(labels))  # mix the classes
        splits[split] = [images[n] for n in order], np.array(labels, np.int32)[order]
    channels = max(image.shape[-1] for images, _ in splits.values() for image in images)
    shape = (*first[1], channels)
    stacks = [
        np.stack([np.broadcast_to(image, shape) for image in images])
        for images, _ in splits.values()
    ]
    labels = [labels for _, labels in splits.values()]
    name, names = printable(folder.resolve().name), tuple(printable(name) for name in names)
    return Dataset(name, stacks[0], labels[0], stacks[1], labels[1], names)


def _image_files(folder, split, names):
    """List the image files of a split with their labels. Raise UserError if there are none."""
    files = []
    for place in sorted(folder.glob(f"{split}/[!.]*/")):
        if place.name not in names:
            raise UserError(
                f"{place}: a class without {folder}/train/{place.name}, expected "
                "only classes that are trained"
            )
        files += [
            (path, names.index(place.name))
            for path in sorted(place.iterdir())
            if path.suffix.lower() in _IMAGE_SUFFIXES
        ]
    if not files:
        raise UserError(
            f"{folder}/{split}: no images, expected files that end in "
            f"{', '.join(sorted(_IMAGE_SUFFIXES))}"
        )
    return files


def _check_same_size(path, image, first_path, size):
    if image.shape[:2] != size:
        raise UserError(
            f"{path} has {image.shape[1]}×{image.shape[0]} pixels, expected "
            f"{size[1]}×{size[0]} like {first_path}; resize the images"
        )
