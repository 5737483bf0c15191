"""`--predict`: classify image files."""

import glob
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import utils
from capsnet_core.errors import UserError
from commands.weights import appearance_of
from figures import examples, files
from figures.pages import drawable_names
from inputs import image_reader, ink
from inputs.appearance import background_of
from inputs.datasets import subtract_background
from model import CHUNK_SIZE
from runtime.terminal import report_written

TOP_K = 3  # classes that are named for each file
THUMBNAIL = 224  # pixels of the longer side of a file, as it is kept to be drawn


class Picture(NamedTuple):
    """An image file that was read."""

    path: str
    original: np.ndarray  # uint8 (h, w, 1 or 3), the file, reduced if it is large
    image: np.ndarray  # uint8 (H, W, C), as the network gets it
    done: str  # in words, what was done to the image


def matching_files(pattern):
    """Return the files that a pattern matches, sorted. Raise UserError if there is none.

    If it matches none, brackets in it are taken as they are: they may be part of a name.
    """
    path = os.path.expanduser(pattern)
    files = [path] if os.path.isfile(path) else _files_like(path)
    files = files or _files_like(path.replace("[", "[[]"))
    if os.path.isdir(path):
        raise UserError(
            f"--predict={pattern} is a folder, expected image files; give a quoted pattern, "
            f"such as '{os.path.join(pattern, '*')}'"
        )
    if not files:
        raise UserError(
            f"--predict={pattern} matches no file, expected image files; quote a "
            "pattern; ** matches folders in folders"
        )
    return files


def _files_like(pattern):
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def predict(flags, weights):
    """Print the likeliest classes of image files, and write a CSV file and a sheet of pictures.

    Raise UserError if no file matches, or some cannot be read; the others are still predicted.
    """
    paths = matching_files(flags.predict)
    names, per_example = weights.class_names, weights.digits_per_example
    drawn, config = drawable_names(names), weights.network.config
    appearance = appearance_of(flags, weights)
    pictures, failed, *_, notes = read_pictures(paths, config.image_shape, appearance)
    for note in notes:
        print(note)
    rows, captions, reconstructions = [], [], []
    for start in range(0, len(pictures), CHUNK_SIZE):
        chunk = pictures[start : start + CHUNK_SIZE]
        images = [picture.image for picture in chunk]
        scores, decoded = classify(weights.network, images, per_example)
        reconstructions.extend(decoded)
        for (path, _, _, done), row in zip(chunk, scores, strict=True):
            likeliest = np.argsort(-row)[:TOP_K]
            best = [(names[k], float(row[k])) for k in likeliest]
            print(f"{path} ({done}): {in_words(best, per_example)}")
            rows.append([path, done, *(cell for pair in best for cell in pair)])
            captions.append(caption(path, [(drawn[k], row[k]) for k in likeliest], drawn))
    if rows:
        folder = Path(flags.sample_dir)
        numbers = range(1, 1 + min(TOP_K, len(names)))
        header = [f"{column}_{n}" for n in numbers for column in ("class", config.score)]
        utils.write_csv(folder / "predictions.csv", ["file", "done", *header], rows)
        sheet = folder / "predictions.png"
        originals, images = zip(*((p.original, p.image) for p in pictures), strict=True)
        page = examples.draw_predictions(originals, images, reconstructions, captions)
        files.write_png(sheet, page)
        report_written([folder / "predictions.csv", sheet])
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} files could not be read: {failed[0][1]}")


def in_words(best, per_example):
    """Return the likeliest classes with their lengths; of pairs, first which two are predicted."""
    scores = ", ".join(f"{name}: {value:.3f}" for name, value in best)
    if per_example == 1:
        return scores
    predicted = " and ".join(name for name, _ in best[:per_example])
    return f"{predicted} ({scores})"


def read_pictures(paths, shape, appearance):
    """Read image files and make them look like the training images: return Readings of Pictures.

    `shape` is (H, W, C) of the network's images, `appearance` that of the training images.
    """
    if shape[-1] not in (1, 3):
        raise UserError(
            f"--predict reads pictures, grey or in colour, and the network takes images of "
            f"{shape[-1]} channels, expected one of 1 or 3"
        )
    style = appearance.ink_style

    def picture(path, original):
        image, done = None, None
        try:
            if style:
                image, done = place_ink(original, style, shape)
            if image is None:  # photographs, or a page without ink
                image, done = fit(original, shape, appearance)
        except Exception as error:  # the other files are predicted all the same
            raise UserError(f"{path} cannot be made to fit ({error})") from error
        return Picture(path, thumbnail(original), image, done)

    return image_reader.read_images(paths, picture, appearance.white)


def fit(image, shape, appearance):
    """Make an image fit as a whole, and do to it what was done to the training images.

    uint8 (h, w, 1 or 3) -> uint8 (H, W, C), the `shape`, and in words what was done.
    """
    inverted = appearance.inverted
    if appearance.background is not None:
        inverted = appearance.background != background_of(image)
    image, done = utils.fit_image(image, shape, inverted)
    if appearance.subtracted:
        image = subtract_background(image, appearance.subtracted)
        done = f"{done}, its background subtracted"
    return image, done


def place_ink(image, style, shape):
    """Take the ink of an image off its paper, and place it in an InkStyle.

    An image that has its ink there already is left as it is, or only inverted.

    Returns:
        uint8 (H, W, 1), the `shape`, and in words what was done; (None, None) if there is no ink.
    """
    if image.shape == tuple(shape):
        for alike, done in (image, "unchanged"), (255 - image, "inverted"):
            if ink.follows(alike, style):
                return alike, done
    isolated = ink.isolate(image)
    if isolated is None:
        return None, None
    (height, width), paper = isolated.size, "dark" if isolated.light else "light"
    done = (
        f"ink of {width}×{height} pixels taken off {paper} paper of "
        f"{image.shape[1]}×{image.shape[0]}, scaled and centred"
    )
    return ink.place(isolated.strokes, style, shape), done


def thumbnail(image):
    """Return an image, uint8 (h, w, 1 or 3), reduced if it is large."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def classify(network, images, per_example=1):
    """Classify images, N arrays (H, W, C) uint8, and reconstruct their K longest capsules.

    Returns:
        The scores (N, J), and the reconstructions (N, K, H, W, C); K is 0 for a network without
        capsules.
    """
    images = np.stack(images) / np.float32(255)
    if network.config.network != "capsnet":
        return network(images).numpy(), np.zeros((len(images), 0, *images.shape[1:]))
    served = network.serve(images, per_example)
    return served["lengths"].numpy(), served["reconstructions"].numpy()


def caption(path, best, names):
    """Return the lines below an image: the file's name and the likeliest classes."""
    lines = [f"{name}: {value:.2f}" for name, value in best]
    if max(map(len, names)) < 4:  # short names fit in one line
        lines = ["  ".join(lines)]
    return [os.path.basename(path), *lines]
