"""NumPy's .npz files of arrays of images and labels, of any numeric type and range."""

import math

import numpy as np

from capsnet_core.errors import UserError
from inputs.levels import NAMED_WHITES, may_be_dark, scaled_to_bytes, white_of
from inputs.readers.dataset import Dataset
from inputs.readers.image_folders import natural_key
from utils import NPZ_ERRORS, open_npz, printable

_MAX_CLASSES = 1000  # more are probably a mistake in the labels
_SPLITS = {"train": "training", "test": "test", "val": "validation"}  # in names of arrays: in words


def read_npz(path):
    """Read a Dataset from four arrays, or six with those of validation."""
    arrays, notes = _load_arrays(path)
    splits = [split for split in _SPLITS if f"x_{split}" in arrays]
    images = {
        split: _shaped(path, f"x_{split}", arrays[f"x_{split}"], arrays[f"y_{split}"], notes)
        for split in splits
    }
    for split in splits[1:]:
        sizes = images["train"].shape[1:], images[split].shape[1:]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{path}: images are {sizes[0]} in training and {sizes[1]} in {_SPLITS[split]}, "
                "expected one size"
            )
    images = _as_bytes(path, images, notes)
    labels = {
        split: _plain_labels(path, f"y_{split}", arrays[f"y_{split}"], len(images[split]), notes)
        for split in splits
    }
    numbered, names = _numbered(path, labels, arrays.get("class_names"), notes)
    return Dataset(
        printable(path.stem),
        *(images["train"], numbered["train"], images["test"], numbered["test"], names),
        notes=tuple(dict.fromkeys(notes)),
        x_validation=images.get("val"),
        y_validation=numbered.get("val"),
    )


def _load_arrays(path):
    """Load the arrays of a .npz file: a dict, and notes."""
    expected = "expected x_train, y_train, x_test and y_test as numpy.savez writes them"
    needed = ["x_train", "y_train", "x_test", "y_test"]
    try:
        with open_npz(path) as file:
            if {"x_val", "y_val"} & set(file.files):
                needed += ["x_val", "y_val"]
            known = [*needed, *({"class_names"} & set(file.files))]
            arrays = {name: np.asarray(file[name]) for name in known}
            others = [printable(name) for name in file.files if name not in known]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a .npz file") from None
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; {expected}") from None
    except NPZ_ERRORS as error:
        if "Object arrays" in str(error):
            expected += ", and text as numpy.array(labels, str)"
        raise UserError(f"{path} cannot be read ({error}); {expected}") from None
    return arrays, [f"left out: {', '.join(others)}"] if others else []


# --- Images ---------------------------------------------------------------------------------------


def _shaped(path, name, array, labels, notes):
    """Return images as (N, H, W, C); flat ones are square."""
    shape = array.shape
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: {name} is {array.dtype}, expected uint8, or floats from 0 to 1")
    if advice := _advice_on_axes(name, shape, max(labels.shape, default=0)):
        cause, remedy = advice
        raise UserError(
            f"{path}: {name} has shape {shape}, {cause}, expected (N, H, W, C); write {remedy}"
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


def _advice_on_axes(name, shape, count):
    """Say what is wrong with the axes of images of `count` labels, and what to write, or None."""
    if not math.prod(shape):
        return None
    if len(shape) in (3, 4) and shape[-1] == count != shape[0]:
        return "with the images along the last axis", f"numpy.moveaxis({name}, -1, 0)"
    if len(shape) == 4 and shape[1] <= 4 < min(shape[2:]):
        return "with the channels first", f"numpy.moveaxis({name}, 1, -1)"
    if len(shape) == 2 and shape[0] != count == shape[1]:
        return "with the images along the last axis", f"{name}.T"
    side = math.isqrt(shape[-1] // 3)
    if len(shape) == 2 and side and 3 * side**2 == shape[1]:
        return (
            f"which may be {side}x{side} pixels in three colours",
            f"{name}.reshape(-1, {side}, {side}, 3), or, if the channels come first, as in "
            f"CIFAR-10's files, numpy.moveaxis({name}.reshape(-1, 3, {side}, {side}), 1, -1)",
        )
    return None


def _as_bytes(path, images, notes):
    """Convert images by split to uint8, by what stands for white in those of training."""
    converted, trained, train = {}, None, images["train"]
    for split, array in images.items():
        name = f"x_{split}"
        smallest, largest = _check_numbers(path, name, array)
        if (train.dtype.kind == "f") != (array.dtype.kind == "f"):
            raise UserError(
                f"{path}: x_train is {train.dtype} and {name} {array.dtype}, expected the same type"
            )
        white = _white_of(array.dtype, largest)
        if trained is not None and may_be_dark(largest, trained):
            white = trained
        if white is None or trained not in (None, white):
            there = "" if trained is None else f" while x_train is from 0 to {trained}"
            raise UserError(
                f"{path}: {name} is {array.dtype} from {smallest} to {largest}{there}, so what "
                "stands for white is unclear, expected uint8, or floats from 0 to 1, or whole "
                f"numbers from 0 to {NAMED_WHITES}; divide them by the value of white"
            )
        trained, converted[split] = white, scaled_to_bytes(array, white)
        if white != 255 and (white > 1 or array.dtype.kind != "f"):
            notes.append(f"images are {array.dtype} from 0 to {white}, scaled to 0 to 255")
        elif white == 255 and array.dtype != np.uint8:
            notes.append(f"images are {array.dtype} from 0 to 255, taken as uint8")
    return converted


def _white_of(dtype, largest):
    """Return what stands for white in numbers of a type up to `largest`, None if unclear."""
    if dtype.kind == "b" or (dtype.kind == "f" and largest <= 1):
        return 1
    return white_of(int(largest), of_bytes=dtype == np.uint8)


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
    if images.dtype.kind == "f" and largest > 1 and (images != np.rint(images)).any():
        raise UserError(f"{problem}, {expected}; divide them by the value of white")
    return smallest, largest


# --- Labels ---------------------------------------------------------------------------------------


def _plain_labels(path, name, labels, count, notes):
    """Return labels (N,) as text, or as int64: from columns, one-hot rows, booleans or floats."""
    if labels.shape == (count, 1):
        labels = labels.reshape(-1)
    if labels.dtype.kind in "US" and labels.shape == (count,):
        return _text(labels)
    numbers = labels.dtype.kind in "biuf"
    if numbers and labels.ndim == 2 and len(labels) == count and _is_one_hot(labels):
        notes.append(f"labels are one-hot rows of {labels.shape[1]}")
        return labels.argmax(axis=1)
    whole = numbers and labels.shape == (count,) and (labels == np.rint(labels)).all()
    if not whole or labels.min() < 0 or labels.max() > 2**31 - 1:
        advice = ""
        if labels.shape == (1, count):
            advice = f"; write {name}.reshape(-1)"
        elif labels.ndim == 2 and labels.shape[1] == count != len(labels):
            advice = f"; if these are one-hot columns, write {name}.T"
        raise UserError(
            f"{path}: {name} is {labels.dtype} of shape {labels.shape}, expected {count} integers "
            f"from 0, names of classes, or one-hot rows{advice}"
        )
    if labels.dtype.kind in "bf":
        notes.append(f"labels are {labels.dtype}, taken as integers")
    return labels.astype(np.int64)


def _text(array):
    """Return an array of text, bytes or numbers as printable text."""
    texts = (
        v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else str(v) for v in array
    )
    return np.array([printable(text) for text in texts], str)


def _is_one_hot(rows):
    """Return whether each row has a single 1 and else only zeros."""
    return bool((np.count_nonzero(rows, axis=1) == 1).all() and (rows.max(axis=1) == 1).all())


def _numbered(path, labels, class_names, notes):
    """Number labels, integers or text (N,) by split, from 0 without gaps.

    Return labels by split, int32 (N,), and the names of the classes: those of the file, if any.
    """
    classes = np.unique(labels["train"])
    _check_classes(path, classes, labels)
    text = classes.dtype.kind == "U"
    if class_names is not None:
        names, order = _named(path, classes, _text(np.ravel(class_names)), notes)
    elif text:
        order = sorted(range(len(classes)), key=lambda n: natural_key(str(classes[n])))
        names = [str(classes[n]) for n in order]
        notes.append(f"labels are text, {len(names)} classes in natural order")
    else:
        names, order = map(str, classes), range(len(classes))
    if not text and classes[-1] != len(classes) - 1:
        source = "their original numbers" if class_names is None else "class_names"
        notes.append(
            f"{len(classes)} different labels from {classes[0]} to {classes[-1]} numbered from 0; "
            f"the classes are named by {source}"
        )
    number = np.argsort(order).astype(np.int32)  # of each of the sorted classes
    numbered = {split: number[np.searchsorted(classes, array)] for split, array in labels.items()}
    return numbered, tuple(names)


def _check_classes(path, classes, labels):
    """Raise UserError if the number of classes cannot be, or some of them are not trained."""
    if len({array.dtype.kind for array in labels.values()}) > 1:
        kinds = ", ".join(f"y_{split} is {array.dtype}" for split, array in labels.items())
        raise UserError(f"{path}: {kinds}, expected numbers in all of them, or text")
    others = {split: np.unique(array) for split, array in labels.items() if split != "train"}
    unknown = any(len(np.setdiff1d(array, classes)) for array in others.values())
    if unknown or not 2 <= len(classes) <= _MAX_CLASSES:
        listed = ", ".join(f"y_{split} up to {array[-1]}" for split, array in others.items())
        raise UserError(
            f"{path}: y_train has {len(classes)} different labels up to {classes[-1]}, {listed}, "
            f"expected two classes or more, at most {_MAX_CLASSES}, and all of them in y_train"
        )


def _named(path, classes, class_names, notes):
    """Return the names of the sorted classes, and for each name the place of its class in them.

    They are taken from `class_names`, those of the file.
    """
    known = class_names.tolist()
    if len(set(known)) < len(known):
        raise UserError(f"{path}: class_names has a name twice, expected different names")
    if classes.dtype.kind == "U":
        names = [name for name in known if name in classes]
        order = [int(np.searchsorted(classes, name)) for name in names]
    else:
        by_number = known if len(known) > classes[-1] else []
        names = (
            known if len(known) == len(classes) else [by_number[n] for n in classes if by_number]
        )
        order = list(range(len(names)))
    if len(names) < len(classes):
        raise UserError(
            f"{path}: class_names has {len(known)} names, and y_train {len(classes)} different "
            f"labels up to {classes[-1]}, expected a name for each"
        )
    if len(known) > len(names):
        notes.append(f"{len(known) - len(names)} of class_names have no training images")
    return names, order
