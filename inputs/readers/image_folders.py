"""Folders of image files by class."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from capsnet_core.errors import ImageSizesDiffer, UserError
from inputs.image_reader import read_images
from inputs.readers.dataset import Dataset, draw_by_class
from utils import fit_image, printable, random_stream

_SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"val", "valid", "validation"},
}
_NO_CLASSES = {"__MACOSX"}  # added to archives by macOS
# Formats that Pillow recognizes but cannot decode itself.
_NOT_BY_PILLOW = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_NAMED = 10  # files or classes that an error names


def image_suffixes():
    """Return the suffixes of the files that Pillow can open."""
    extensions = Image.registered_extensions()
    readable = set(Image.OPEN) - _NOT_BY_PILLOW
    return {suffix for suffix, format_name in extensions.items() if format_name in readable}


def natural_key(name):
    """Return what to sort a name by, so that 2 comes before 10."""
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


class Split(NamedTuple):
    """The images of one split, such as those to train on."""

    images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray  # int32 (N,)
    files: np.ndarray  # N paths

    def take(self, indices):
        """Return the images of these indices."""
        return Split(*(array[indices] for array in self))


def read_folders(folder, image_size, seed):
    """Read a Dataset from train/CLASS/* and test/CLASS/*, or from CLASS/*, in natural order."""
    names, files, skipped = _list_files(folder)
    held_out_seed, (splits, white, notes) = None, _read_splits(files, image_size)
    if skipped:
        kinds = (f"{count} {kind}" for kind, count in sorted(skipped.items()))
        notes.append(f"left out: {', '.join(kinds)}")
    if image_size is not None:
        notes.append(f"images made to fit {image_size[0]}x{image_size[1]} pixels")
    if "test" not in splits:
        train, held_out_seed = splits["train"], seed
        kept, held_out = _hold_out(folder, train.labels, seed)
        splits["train"], splits["test"] = train.take(kept), train.take(held_out)
        notes.append(
            f"no train and test folders, so {len(held_out)} of {len(train.labels)} images, drawn "
            f"by seed {seed}, are held out as test images"
        )
    for name, split in splits.items():
        if missing := sorted(set(range(len(names))) - set(split.labels.tolist())):
            notes.append(f"no {name} images of {_listed([names[label] for label in missing])}")
        order = random_stream(0, 0, f"folder {name}").permutation(len(split.labels))
        splits[name] = split.take(order)
    validation = splits.get("validation")
    return Dataset(
        printable(folder.resolve().name),
        *splits["train"][:2],
        *splits["test"][:2],
        class_names=tuple(map(printable, names)),
        notes=tuple(notes),
        x_validation=validation.images if validation else None,
        y_validation=validation.labels if validation else None,
        test_files=tuple(printable(str(path)) for path in splits["test"].files),
        held_out_seed=held_out_seed,
        white=white,
    )


def _list_files(folder):
    """List the image files of a folder. Raise UserError if they are no classes of images.

    Returns:
        Names of the classes; by split lists of (path, label), all in "train" without a split; and a
        Counter of what is left out, by its kind.
    """
    root, skipped = _innermost(folder), Counter()
    splits = _split_folders(root)
    if "train" in splits:
        beside = [path for path in root.iterdir() if path not in splits.values()]
        skipped["beside the splits"] += sum(
            not path.name.startswith(".") and path.name not in _NO_CLASSES for path in beside
        )
    else:  # classes may be named "test" or "valid"
        splits = {"train": root}
    names = sorted((path.name for path in _folders_in(splits["train"])), key=natural_key)
    if len(names) < 2 or not all(_folders_in(place) for place in splits.values()):
        raise UserError(
            f"{folder}: expected folders of images, train/CLASS for two classes or more and "
            "test/CLASS, or CLASS for two classes or more"
        )
    if splits["train"] != root and "test" not in splits:
        raise UserError(
            f"{folder}: found {' and '.join(path.name for path in splits.values())}, expected also "
            "test/CLASS; rename a folder, or put the classes of all images in one folder"
        )
    if len(set(map(printable, names))) < len(names):
        raise UserError(
            f"{splits['train']}: some names of classes differ only in characters that cannot be "
            "shown; rename their folders"
        )
    files = {split: _files_of(place, names, skipped) for split, place in splits.items()}
    return names, files, +skipped  # without the kinds of which there are none


def _innermost(folder):
    """Return the folder that holds the classes or splits: archives often wrap it in another one."""
    for _ in range(3):
        inside = _folders_in(folder)
        if len(inside) != 1 or _split_of(inside[0]):
            break
        folder = inside[0]
    return folder


def _folders_in(place):
    """Return the folders in a folder, without hidden ones."""
    return [
        path
        for path in sorted(place.iterdir())
        if path.is_dir() and not path.name.startswith(".") and path.name not in _NO_CLASSES
    ]


def _split_of(path):
    """Return which split a folder is by its name, in capitals or not, or None."""
    name = path.name.casefold()
    return next((split for split, names in _SPLITS.items() if name in names), None)


def _split_folders(root):
    """Return the folders of the splits by "train", "test" and "validation"."""
    splits = {}
    for path in _folders_in(root):
        split = _split_of(path)
        if split in splits:
            raise UserError(
                f"{root}: {splits[split].name} and {path.name} are the same split, expected one"
            )
        if split:
            splits[split] = path
    return {split: splits[split] for split in _SPLITS if split in splits}


def _files_of(place, names, skipped):
    """List the image files of a split with their labels; count in `skipped` what is left out.

    Raise UserError if a class has no images, or is not one of the trained ones, `names`.
    """
    suffixes, files, empty = image_suffixes(), [], []
    skipped["in no class"] += sum(path.is_file() for path in place.iterdir())
    for folder in _folders_in(place):
        if folder.name not in names:
            raise UserError(
                f"{folder}: there are no training images of this class, expected only classes "
                "that are trained; remove it, or add some"
            )
        paths = [path for path in sorted(folder.iterdir()) if _is_image(path, suffixes, skipped)]
        files += [(path, names.index(folder.name)) for path in paths]
        if not paths:
            empty.append(folder.name)
    if empty:
        raise UserError(
            f"{place}: no images in {_listed(empty)}, expected some for each class, in a "
            "format that Pillow reads (.png, .jpg, .tif, .webp and others); remove empty folders"
        )
    return files


def _is_image(path, suffixes, skipped):
    """Return whether a file is to be read; count it by its kind if not."""
    if path.name.startswith("."):
        skipped["hidden (a dot first)"] += 1
    elif path.is_dir():
        skipped["folders in a class, with their files"] += 1
    elif path.suffix.lower() not in suffixes:
        skipped[path.suffix or "without a suffix"] += 1
    elif path.exists() and not path.is_file():  # a pipe would block
        skipped["not regular files"] += 1
    else:
        return True
    return False


def _listed(names):
    """List the first names, and say how many there are if there are more."""
    shown = ", ".join(map(str, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _read_splits(files, image_size):
    """Read the image files of all splits, lists of (path, label) by name, see `_read_files`.

    Returns:
        Splits by name, what stands for white in files of more than 8 bits, and notes.
    """
    images, white, notes = _read_files(
        [path for listed in files.values() for path, _ in listed], image_size
    )
    channels = max(image.shape[-1] for image in images)
    images = iter([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    splits = {}
    for name, listed in files.items():
        paths, labels = zip(*listed, strict=True)
        stack = np.stack([next(images) for _ in paths])
        splits[name] = Split(stack, np.array(labels, np.int32), np.array(paths, object))
    return splits, white, notes


def _read_files(paths, image_size):
    """Read image files; make them fit a size (H, W) unless it is None. They have one size then."""

    def fitted(_, image):
        if image_size is None:
            return image
        return fit_image(image, (*image_size, image.shape[-1]), False)[0]

    images, errors, brightest, white, notes = read_images(paths, fitted)
    if len({str(error) for _, error in errors}) == 1:
        raise errors[0][1]
    if errors:
        raise UserError(
            f"{len(errors)} files cannot be read as images: {_listed([p for p, _ in errors])}; "
            "put good ones in their places, or remove them"
        )
    if white is None and 1 <= brightest < 16:
        raise UserError(
            f"{paths[0].parent.parent}: the largest value in all images is {brightest}, expected "
            "more than 15 of 255; if they have colours of 10 or 12 bits, or whole numbers "
            "from 0 to 1, multiply them so that white is the largest value of the format"
        )
    for path, image in zip(paths, images, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise ImageSizesDiffer(path, image.shape[:2], paths[0], images[0].shape[:2])
    return images, white, list(notes)


def _hold_out(folder, labels, seed):
    """Hold out a sixth of all images, about as many of each class, drawn by the seed.

    Return the indices to train on and those to test, sorted. Raise UserError if they are too few.
    """
    stream = random_stream(seed, 0, "held-out test")
    chosen = draw_by_class(labels, len(labels) // 6, stream, skipped=1)
    held_out = np.zeros(len(labels), bool)
    held_out[chosen] = True
    if not len(chosen) or len(np.unique(labels[~held_out])) < len(np.unique(labels)):
        raise UserError(
            f"{folder}: {len(labels)} images, too few to hold out a sixth of them as test images; "
            "use more, or make folders train and test"
        )
    return np.flatnonzero(~held_out), chosen
