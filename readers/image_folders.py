"""Folders of image files by class."""

import re
from collections import Counter

import numpy as np
from PIL import Image

from errors import ImageSizesDiffer, UserError
from readers.dataset import Dataset
from utils import fit_image, printable, random_stream, read_image

_SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"val", "valid", "validation"},
}
_NO_CLASSES = {"__MACOSX"}  # what archives of macOS have besides
# Formats that Pillow names, but hands to other programs, or cannot read by itself.
_NOT_BY_PILLOW = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_NAMED = 10  # files or classes that an error names


def image_suffixes():
    """Return the suffixes of the files that Pillow can open, with its installed plugins."""
    extensions = Image.registered_extensions()
    readable = set(Image.OPEN) - _NOT_BY_PILLOW
    return {suffix for suffix, format_name in extensions.items() if format_name in readable}


def natural_key(name):
    """Return what to sort a name by, so that 2 comes before 10."""
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def read_folders(folder, image_size, seed):
    """Read a Dataset from train/CLASS/* and test/CLASS/*, or from CLASS/*, in natural order."""
    skipped, notes = Counter(), []
    names, files = _list_files(folder, skipped)
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        notes.append(f"{plural_files(sum(skipped.values()))} skipped: {kinds}")
    images, labels = _read_splits(files, image_size)
    if image_size is not None:
        notes.append(f"images made to fit {image_size[0]}x{image_size[1]} pixels")
    if "test" not in labels:
        train, test = _hold_out(folder, labels["train"], seed)
        images["train"], images["test"] = images["train"][train], images["train"][test]
        labels["train"], labels["test"] = labels["train"][train], labels["train"][test]
        notes.append(
            f"no train and test folders, so {len(test)} of {len(train) + len(test)} images, drawn "
            f"by seed {seed}, are held out as test images"
        )
    for split in labels:
        order = random_stream(0, 0, f"folder {split}").permutation(len(labels[split]))
        images[split], labels[split] = images[split][order], labels[split][order]
    return Dataset(
        printable(folder.resolve().name),
        images["train"],
        labels["train"],
        images["test"],
        labels["test"],
        tuple(map(printable, names)),
        tuple(f"{folder}: {note}" for note in notes),
        images.get("validation"),
        labels.get("validation"),
    )


def plural_files(count):
    """Return how many files, in words."""
    return f"{count} file" if count == 1 else f"{count} files"


def _list_files(folder, skipped):
    """List the image files of a folder.

    Args:
        folder: folder of the data set.
        skipped: Counter of the files left out by their kinds; it is filled.

    Returns:
        Names of the classes, and by split lists of (path, label); without a split all files are of
        "train".
    """
    root = _innermost(folder)
    splits = _split_folders(root)
    if not splits:
        splits = {"train": root}
    elif "train" not in splits or "test" not in splits:
        splits = {}
    names = sorted((path.name for path in _folders_in(splits.get("train"))), key=natural_key)
    if len(names) < 2 or not all(_folders_in(place) for place in splits.values()):
        raise UserError(
            f"{folder}: expected folders of images, train/CLASS for two classes or more and "
            "test/CLASS, or CLASS for two classes or more"
        )
    files = {split: _files_of(place, names, skipped) for split, place in splits.items()}
    return names, files


def _innermost(folder):
    """Return the folder that holds the classes or splits: archives often wrap it in another one."""
    for _ in range(3):
        inside = _folders_in(folder)
        if len(inside) != 1 or _split_of(inside[0]):
            break
        folder = inside[0]
    return folder


def _folders_in(place):
    """Return the folders in a folder, without hidden ones; [] for None."""
    if place is None:
        return []
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
    """List the image files of a split with their labels.

    Raises:
        UserError: a class has no images, or is not trained.
    """
    suffixes, files, empty = image_suffixes(), [], []
    for path in place.iterdir():
        if path.is_file():
            skipped["in no class"] += 1
    for folder in _folders_in(place):
        if folder.name not in names:
            raise UserError(
                f"{folder}: a class without train/{folder.name}, expected only classes that are "
                "trained"
            )
        paths = [path for path in sorted(folder.iterdir()) if _is_image(path, suffixes, skipped)]
        files += [(path, names.index(folder.name)) for path in paths]
        if not paths:
            empty.append(folder.name)
    if empty:
        raise UserError(
            f"{place}: no images in {_listed(empty)}, expected some for each class, in files that "
            f"end in {', '.join(sorted(suffixes))}; remove empty folders"
        )
    return files


def _is_image(path, suffixes, skipped):
    """Tell whether a file is to be read; count it by its kind if not."""
    if path.name.startswith("."):
        skipped["with a name that begins with a dot"] += 1
    elif path.is_dir():
        skipped["that is a folder in a class"] += 1
    elif path.suffix.lower() not in suffixes:
        skipped[path.suffix or "without a suffix"] += 1
    else:
        return True
    return False


def _listed(names):
    """List the first names, and say how many there are if there are more."""
    shown = ", ".join(map(str, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _read_splits(files, image_size):
    """Read the image files of all splits.

    Args:
        files: lists of (path, label) by split.
        image_size: (H, W) to make all images fit, or None if they are of one size.

    Returns:
        Images uint8 (N, H, W, C) by split, and labels int32 (N,) by split.

    Raises:
        UserError: some files cannot be read; it names the first of them.
        ImageSizesDiffer: there are several sizes, and `image_size` is None.
    """
    images, damaged = {}, []
    for split, listed in files.items():
        images[split] = []
        for path, _ in listed:
            try:
                image = read_image(path)
            except UserError as error:
                damaged.append((path, error))
                continue
            if image_size is not None:
                image, _ = fit_image(image, (*image_size, image.shape[-1]), False)
            images[split].append(image)
    if len(damaged) == 1:
        raise damaged[0][1]
    if damaged:
        raise UserError(
            f"{len(damaged)} files cannot be read as images: {_listed([p for p, _ in damaged])}; "
            "put good ones in their places, or remove them"
        )
    _check_same_size(files, images)
    channels = max(image.shape[-1] for part in images.values() for image in part)
    stacks = {
        split: np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in part])
        for split, part in images.items()
    }
    labels = {
        split: np.array([label for _, label in listed], np.int32) for split, listed in files.items()
    }
    return stacks, labels


def _check_same_size(files, images):
    """Raise ImageSizesDiffer if the images of all splits are not of one size."""
    paths = [path for listed in files.values() for path, _ in listed]
    sizes = [image.shape[:2] for part in images.values() for image in part]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise ImageSizesDiffer(path, size, paths[0], sizes[0])


def _hold_out(folder, labels, seed):
    """Hold out a sixth of all images, about as many of each class, drawn by the seed.

    Returns:
        The indices to train on and those to test, both sorted.

    Raises:
        UserError: there are too few images.
    """
    stream = random_stream(seed, 0, "held-out test")
    order = stream.permutation(len(labels))
    # How far through its class each image comes in this order; the first sixth is held out.
    position = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        position[of_class] = np.arange(1, len(of_class) + 1) / len(of_class)
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels))
    chosen = np.lexsort((rank, position))[: len(labels) // 6]
    held_out = np.zeros(len(labels), bool)
    held_out[chosen] = True
    if not len(chosen) or len(np.unique(labels[~held_out])) < len(np.unique(labels)):
        raise UserError(
            f"{folder}: {len(labels)} images, too few to hold out a sixth of them as test images; "
            "use more, or make folders train and test"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
