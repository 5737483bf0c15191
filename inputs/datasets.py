"""Load a data set, and normalize it: one size, light ink on a dark background.

`Dataset.notes` lists whatever was changed, left out or held out.
"""

import os
from pathlib import Path

import numpy as np

from capsnet_core.config import CLASS_NAMES
from capsnet_core.errors import DataFileError, UserError
from inputs.readers.dataset import draw_by_class
from inputs.readers.idx import read_idx_files, read_idx_pair
from inputs.readers.image_folders import read_folders
from inputs.readers.npz import read_npz
from utils import (
    ROOT,
    edge_color,
    edge_pixels,
    evenly,
    fit_image,
    is_dark_on_light,
    printable,
    random_stream,
)

FORMS = (
    f"{', '.join(CLASS_NAMES)}, a .npz file with x_train, y_train, x_test and y_test, or a folder "
    "of images, FOLDER/CLASS/* or FOLDER/train/CLASS/* and FOLDER/test/CLASS/*"
)


def load_dataset(name, data_dir, image_size=None, seed=0):
    """Load a data set.

    Args:
        name: one of CLASS_NAMES, read from the four IDX files in `data_dir`/`name`, gzipped or not;
            or a `.npz` file of x_train, y_train, x_test, y_test; or a folder of images by class,
            CLASS/*, or train/CLASS/* and test/CLASS/*.
        data_dir: folder of the sets of CLASS_NAMES.
        image_size: (H, W) to make all images fit, or None to take them as they are.
        seed: says which images of a folder without a test part are held out.

    Returns:
        Dataset. Grey images of dark ink on a light background are inverted.

    Raises:
        UserError: the name is unknown, or the files are not a usable data set.
    """
    if name in CLASS_NAMES:
        return _fit_all(read_idx_files(name, Path(data_dir) / name), image_size)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return note_if_transposed(invert_if_light(read_folders(path, image_size, seed)))
    if path.suffix == ".npz":
        return note_if_transposed(invert_if_light(_fit_all(read_npz(path), image_size)))
    raise UserError(f"unknown data set {name!r}; choose one of: {FORMS}")


def dataset_name(name):
    """Return the `Dataset.name` of what `load_dataset` loads under a name, without loading it."""
    if name in CLASS_NAMES:
        return name
    path = Path(os.path.expanduser(name))
    is_file = path.suffix == ".npz" and not path.is_dir()
    return printable(path.stem if is_file else path.resolve().name)


def training_images(dataset, size, seed):
    """Return `size` training images and their labels, or all of them if it is 0.

    MNIST and the sets like it are shuffled, so their first images are taken. Other sets may be
    sorted by class: of them the same share of each class is drawn by the seed.
    """
    if not size:
        return dataset.x_train, dataset.y_train
    kept = slice(size)
    if not dataset.shuffled:
        kept = draw_by_class(dataset.y_train, size, random_stream(seed, 0, "training images"))
    return dataset.x_train[kept], dataset.y_train[kept]


def _fit_all(dataset, image_size):
    """Make all images of a Dataset fit a size (H, W), unless it is None or theirs already."""
    before = dataset.x_train.shape[1:3]
    if image_size is None or before == tuple(image_size):
        return dataset
    (old_height, old_width), (height, width) = before, image_size
    note = f"images resized from {old_height}x{old_width} to {height}x{width} pixels"
    return dataset.map_images(lambda images: _resized(images, image_size)).with_note(note)


def _resized(images, image_size):
    """Make images (N, H, W, C) fit a size (H', W'): (N, H', W', C)."""
    channels = images.shape[-1]
    step = 3 if channels == 3 else 1  # other channels than colours are resized one by one
    result = np.empty((len(images), *image_size, channels), np.uint8)
    for number, image in enumerate(images):
        for c in range(0, channels, step):
            part = slice(c, c + step)
            result[number, ..., part], _ = fit_image(image[..., part], (*image_size, step), False)
    return result


def common_background(images):
    """Return whether nearly all images, uint8 (N, H, W, C), are "light" or "dark" at their edges.

    None if neither: the edges of photographs are light or dark by chance.
    """
    light = np.mean([is_dark_on_light(image) for image in evenly(images)])
    if light > 0.95:
        return "light"
    if light < 0.05:
        return "dark"
    return None


def even_background(images):
    """Return the colour that nearly all edges of images (N, H, W, C) have, uint8 (C,), or None."""
    sample = evenly(images)
    background = np.median([edge_color(image) for image in sample], axis=0)
    edges = np.concatenate([edge_pixels(image) for image in sample])
    close = (np.abs(edges - background) <= 32).all(axis=1).mean()
    return np.rint(background).astype(np.uint8) if close > 0.75 else None


def invert_if_light(dataset, colours=False):
    """Invert a Dataset of dark ink on a light background; images in colour only with `colours`.

    Shifts and overlaid digits assume a black background, and a network trains better on it. Raise
    UserError if the training images and those of another split have opposite backgrounds.
    """
    grey = dataset.x_train.shape[-1] == 1
    if not (grey or colours):
        return dataset
    background = common_background(dataset.x_train)
    for split, images in ("test", dataset.x_test), ("validation", dataset.x_validation):
        other = None if images is None else common_background(images)
        if None not in (background, other) and other != background:
            raise UserError(
                f"{dataset.name}: the training images have a {background} background and the "
                f"{split} images a {other} one, expected the same; invert one split"
            )
    if background != "light":
        return dataset
    note = "dark ink on a light background, so all images are inverted"
    return dataset.map_images(lambda images: 255 - images)._replace(inverted=True).with_note(note)


def remove_background(dataset):
    """Subtract an even background that is not black from all images, so that only ink is left.

    A light background is inverted first. Overlaid images are added up.
    """
    dataset = invert_if_light(dataset, colours=True)
    background = even_background(dataset.x_train)
    if background is None or not background.any():
        return dataset
    color = tuple(background.tolist())
    shown = color[0] if len(color) == 1 else color
    subtracted = dataset.map_images(lambda images: subtract_background(images, color))
    return subtracted._replace(subtracted=color).with_note(
        f"a background of {shown} is subtracted from all images"
    )


def subtract_background(images, color):
    """Subtract the colour (C,) of a background from images, uint8 (..., C), clipped at 0."""
    color = np.array(color, np.uint8)
    return np.maximum(images, color) - color


def note_if_transposed(dataset):
    """Note it if the digits of a Dataset look transposed, as EMNIST's files store them.

    They do if the mean images of most digits, transposed, are likest MNIST's of the same digits.
    Nothing is noted if a digit has no training images, or MNIST's test images cannot be read.
    """
    digits = CLASS_NAMES["mnist"]
    if not set(digits) <= set(dataset.class_names) or dataset.x_train.shape[1:] != (28, 28, 1):
        return dataset
    numbers = [dataset.class_names.index(digit) for digit in digits]
    if not np.isin(numbers, dataset.y_train).all():
        return dataset
    try:
        known = read_idx_pair(ROOT / "data" / "mnist", "t10k", "mnist")
    except (DataFileError, OSError):
        return dataset
    means = _class_means(dataset.x_train, dataset.y_train, numbers)
    expected = _class_means(*known, range(len(digits)))
    upright, transposed = (
        np.count_nonzero(np.tensordot(these, expected, ([1, 2], [1, 2])).argmax(1) == range(10))
        for these in (means, means.swapaxes(1, 2))
    )
    if not transposed >= 5 > upright:
        return dataset
    return dataset.with_note(
        "its digits look transposed, as EMNIST's are stored; to predict upright ones, swap rows "
        "and columns of all images"
    )


def _class_means(images, labels, numbers):
    """Return the mean images (K, H, W) of K classes, shifted and scaled to mean 0 and norm 1."""
    means = np.stack([evenly(images[labels == number])[..., 0].mean(axis=0) for number in numbers])
    means -= means.mean(axis=(1, 2), keepdims=True)
    return means / np.maximum(np.linalg.norm(means, axis=(1, 2), keepdims=True), 1e-9)
