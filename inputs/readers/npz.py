"""NumPy's .npz files of four arrays, of any numeric type and range."""

import math

import numpy as np

from capsnet.errors import UserError
from inputs.readers.dataset import Dataset
from utils import NPZ_ERRORS, open_npz, printable, to_uint8

_MAX_CLASSES = 1000  # more are probably a mistake in the labels
# Values of white in whole numbers: bits, sums of 4×4 bits, bytes, 16 bits.
_WHITES = (1, 16, 255, 65535)


def read_npz(path):
    """Read a Dataset from four arrays."""
    arrays, notes = _load_arrays(path), []
    images = [
        _shaped(path, f"x_{split}", arrays[f"x_{split}"], notes) for split in ("train", "test")
    ]
    sizes = [array.shape[1:] for array in images]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path}: images are {sizes[0]} in training and {sizes[1]} in test, expected one size"
        )
    x_train, x_test = _as_bytes(path, *images, notes)
    labels = [
        _whole_labels(path, f"y_{split}", arrays[f"y_{split}"], len(array), notes)
        for split, array in (("train", x_train), ("test", x_test))
    ]
    y_train, y_test, names = _renumbered(path, *labels, notes)
    notes = tuple(dict.fromkeys(notes))
    return Dataset(printable(path.stem), x_train, y_train, x_test, y_test, names, notes)


def _load_arrays(path):
    """Load the four arrays of a .npz file."""
    expected = "expected x_train, y_train, x_test and y_test as numpy.savez writes them"
    try:
        with open_npz(path) as file:
            names = ("x_train", "y_train", "x_test", "y_test")
            return {name: np.asarray(file[name]) for name in names}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a .npz file") from None
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; {expected}") from None
    except NPZ_ERRORS as error:
        raise UserError(f"{path} cannot be read ({error}); {expected}") from None


def _shaped(path, name, array, notes):
    """Return images as (N, H, W, C); flat ones are square."""
    shape = array.shape
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: {name} is {array.dtype}, expected uint8, or floats from 0 to 1")
    if array.ndim == 4 and shape[1] <= 4 < min(shape[2:]):
        raise UserError(
            f"{path}: {name} has shape {shape}, with the channels first, expected (N, H, W, C); "
            f"write numpy.moveaxis({name}, 1, -1)"
        )
    if array.ndim == 2 and array.size:
        side = math.isqrt(shape[1])
        if side**2 == shape[1]:
            notes.append(f"images of {shape[1]} numbers taken as {side}x{side} pixels")
            return array.reshape(-1, side, side, 1)
    images = array[..., None] if array.ndim == 3 else array
    if images.ndim != 4 or not images.size:
        raise UserError(
            f"{path}: {name} has shape {shape}, expected (N, H, W), (N, H, W, C) or, for square "
            "images, (N, H * W), N at least 1"
        )
    return images


def _as_bytes(path, x_train, x_test, notes):
    """Convert images to uint8: floats by their range of 0 to 1, whole numbers by what they are."""
    ranges = [
        _check_numbers(path, name, images)
        for name, images in (("x_train", x_train), ("x_test", x_test))
    ]
    if (x_train.dtype.kind == "f") != (x_test.dtype.kind == "f"):
        raise UserError(
            f"{path}: x_train is {x_train.dtype} and x_test {x_test.dtype}, expected the same type"
        )
    trained, converted = None, []
    for name, images, (smallest, largest) in zip(
        ("x_train", "x_test"), (x_train, x_test), ranges, strict=True
    ):
        if images.dtype.kind == "f":
            converted.append(_scaled(images, 1))
            continue
        white = _white_of(images.dtype, largest)
        if trained is not None and _may_be_dark(largest, trained):
            white = trained
        if white is None or trained not in (None, white):
            there = "" if trained is None else f" while x_train is from 0 to {trained}"
            raise UserError(
                f"{path}: {name} is {images.dtype} from {smallest} to {largest}{there}, so what "
                "stands for white is unclear, expected uint8, or floats from 0 to 1, or whole "
                "numbers from 0 to 1, 16, 255 or 65535; divide them by the value of white"
            )
        trained = white
        converted.append(_scaled(images, white))
        if white != 255:
            notes.append(f"images are {images.dtype} from 0 to {white}, scaled to 0 to 255")
        elif images.dtype != np.uint8:
            notes.append(f"images are {images.dtype} from 0 to 255, taken as uint8")
    return converted


def _white_of(dtype, largest):
    """Return the value of white in whole numbers up to `largest`, None if unclear."""
    if dtype.kind == "b" or largest == 1:
        return 1
    if largest == 16:
        return 16
    # Half of the range has to be in use, unless the type is that of bytes.
    if largest <= 255 and (largest >= 128 or (dtype == np.uint8 and not 2 <= largest < 16)):
        return 255
    return 65535 if 32768 <= largest <= 65535 else None


def _may_be_dark(largest, white):
    """Return whether test images up to `largest` fit training images up to `white`."""
    below = max((other for other in _WHITES if other < white), default=0)
    return largest == 0 or below < largest <= white


def _check_numbers(path, name, images):
    """Return the smallest and the largest number of images. Raise UserError if none can be used."""
    smallest, largest = images.min(), images.max()
    problem = f"{path}: {name} is {images.dtype} from {smallest} to {largest}"
    expected = "expected uint8, or floats from 0 to 1"
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise UserError(
            f"{path}: {name} is {images.dtype} and has numbers that are NaN or infinite, "
            f"{expected}; look for where they come from, or write numpy.nan_to_num({name})"
        )
    if -1 <= smallest < 0 and largest <= 1:
        raise UserError(f"{problem}, {expected}; for a range of -1 to 1 write ({name} + 1) / 2")
    if images.dtype == np.int8 and smallest < 0:
        raise UserError(
            f"{problem}, {expected}; if uint8 was stored as int8, write {name}.view('uint8')"
        )
    if smallest < 0:
        raise UserError(
            f"{problem}, {expected}; if the images were standardized, undo that; else write "
            f"({name} - smallest) / (largest - smallest), with the same numbers for all images"
        )
    if images.dtype.kind == "f" and 0 < largest < 0.1:
        raise UserError(f"{problem}, {expected}; were they divided by 255 twice?")
    if images.dtype.kind == "f" and largest > 1:
        raise UserError(f"{problem}, {expected}; divide them by the value of white")
    return smallest, largest


def _scaled(images, largest):
    """Convert images from 0 to `largest` to uint8 (N, H, W, C)."""
    if largest == 255:
        return images.astype(np.uint8, copy=False)
    converted = np.empty(images.shape, np.uint8)
    for n in range(0, len(images), 1000):  # in parts: the floats in between take much memory
        part = images[n : n + 1000]
        converted[n : n + 1000] = to_uint8(part / largest)
    return converted


def _whole_labels(path, name, labels, count, notes):
    """Return labels as int64 (N,): from columns, one-hot rows, booleans or whole floats."""
    if labels.shape == (count, 1):
        labels = labels.reshape(-1)
    numbers = labels.dtype.kind in "biuf"
    if numbers and labels.ndim == 2 and len(labels) == count and _is_one_hot(labels):
        notes.append(f"labels are one-hot rows of {labels.shape[1]}")
        return labels.argmax(axis=1)
    whole = numbers and labels.shape == (count,) and (labels == np.rint(labels)).all()
    if not whole or labels.min() < 0 or labels.max() > 2**31 - 1:
        raise UserError(
            f"{path}: {name} is {labels.dtype} of shape {labels.shape}, expected {count} integers "
            "from 0, or one-hot rows"
        )
    if labels.dtype.kind in "bf":
        notes.append(f"labels are {labels.dtype}, taken as integers")
    return labels.astype(np.int64)


def _is_one_hot(rows):
    """Return whether each row has a single 1 and else only zeros."""
    return bool((np.count_nonzero(rows, axis=1) == 1).all() and (rows.max(axis=1) == 1).all())


def _renumbered(path, y_train, y_test, notes):
    """Number labels from 0 without gaps.

    Returns:
        Labels of training and test, int32 (N,), and the original numbers as names of the classes.
    """
    classes, unknown = np.unique(y_train), np.setdiff1d(y_test, y_train)
    if len(unknown) or not 2 <= len(classes) <= _MAX_CLASSES:
        raise UserError(
            f"{path}: y_train has {len(classes)} different labels up to {classes[-1]}, y_test up "
            f"to {y_test.max()}, expected two classes or more, at most {_MAX_CLASSES}, and all of "
            "them in y_train"
        )
    if classes[-1] != len(classes) - 1:
        notes.append(
            f"{len(classes)} different labels from {classes[0]} to {classes[-1]} numbered from 0; "
            "the classes are named by their original numbers"
        )
    numbered = (np.searchsorted(classes, labels).astype(np.int32) for labels in (y_train, y_test))
    return (*numbered, tuple(map(str, classes)))
