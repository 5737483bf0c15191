"""Pages of examples: reconstructions, errors, overlapping digits, predictions."""

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from figures import pages
from figures.grids import enlarge, overlay_digits, to_rgb
from figures.pages import FAINT, GREY, INK, RED
from utils import to_uint8

# Two digits in one picture: readers who confuse red and green tell these apart, and where both
# digits are, the sum is white.
PAIR_COLORS = (255, 140, 0), (0, 115, 255)  # orange, blue


def draw_reconstructions(outputs, labels, class_names, title="Reconstructions"):
    """Draw the first 20 images, each next to its two reconstructions; wrong predictions in red.

    Args:
        outputs: `model.Outputs` of N >= 1 images, as arrays.
        labels: (N, K) true classes, in any order.
        class_names: name of each class.
        title: first line of the page.
    """
    captions = []
    for label, prediction in zip(labels[:20], outputs.predictions[:20], strict=True):
        true, guess = ("+".join(class_names[k] for k in sorted(row)) for row in (label, prediction))
        captions.append([(f"true {true}, predicted {guess}", _caption_color(label, prediction))])
    reconstructed = overlay_digits(outputs.with_label), overlay_digits(outputs.without_label)
    triples = (to_uint8(images[:20]) for images in (outputs.canvas, *reconstructed))
    tiles = np.stack(list(triples), axis=1)[:, None]
    note = "with label: from the capsule of the true class; no label: from the longest capsule"
    above = "input", "with label", "no label"
    return pages.draw_tiles(title, note, tiles, captions, 4, above)


def draw_misclassified(images, numbers, labels, predictions, lengths, class_names):
    """Draw the first 64 wrong images with the capsule lengths of true and predicted class.

    Args:
        images: (N, H, W, C), only misclassified ones, N >= 0.
        numbers: (N,) positions in the test set.
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        lengths: (N, classes), the lengths of all digit capsules.
        class_names: name of each class.
    """
    if not len(images):
        blank = np.full((1, 1, 3), 255, np.uint8)
        return pages.draw_page("No image is misclassified", "", blank, [])
    captions = []
    for i, (label, prediction) in enumerate(zip(labels[:64], predictions[:64], strict=True)):
        true = f"{class_names[label]}: {lengths[i, label]:.2f}"
        guess = f"{class_names[prediction]}: {lengths[i, prediction]:.2f}"
        captions.append([(f"no. {numbers[i]}", FAINT), (true, INK), (guess, RED)])
    title = _counted(len(images), "misclassified image", 64)
    note = (
        "number in the test set, from 0; capsule lengths of the true class (black) and of the "
        "predicted class (red)"
    )
    return pages.draw_tiles(title, note, images[:64, None, None], captions, 8)


def draw_multi(title, inputs, reconstructions, labels, predictions, class_names):
    """Draw the first 20 MultiMNIST examples, a column each, like figure 5 of the paper.

    Args:
        title: first line of the page.
        inputs: (N, H, W, C), N >= 1.
        reconstructions: (N, 2, H, W, C) of the predicted digits, in the order of `predictions`.
        labels: (N, 2) true classes, in any order.
        predictions: (N, 2) predicted classes, in any order. They are shown in the order of the
            labels.
        class_names: name of each class.
    """
    two_lines = max(map(len, class_names)) > 3
    orders = [
        _in_order_of(label, prediction)
        for label, prediction in zip(labels[:20], predictions[:20], strict=True)
    ]
    predictions = np.take_along_axis(np.asarray(predictions[:20]), np.array(orders), axis=1)
    captions = []
    for label, prediction in zip(labels[:20], predictions, strict=True):
        texts = []
        for letter, (first, second) in (("L", label), ("R", prediction)):
            parts = f"{letter}:({class_names[first]},", f"{class_names[second]})"
            texts += parts if two_lines else [" ".join(parts)]
        color = _caption_color(label, prediction)
        captions.append([(text, color) for text in texts])
    grey = to_uint8(reconstructions[:20]).mean(-1, keepdims=True)
    grey = np.stack([pair[order] for pair, order in zip(grey, orders, strict=True)])
    first, second = (grey[:, k] / 255 * np.array(PAIR_COLORS[k]) for k in (0, 1))
    colored = [np.rint(image).astype(np.uint8) for image in (first + second, first, second)]
    tiles = np.stack([to_rgb(inputs[:20]), *colored], axis=1)[:, :, None]
    note = "L: the label; R: the two longest capsules, reconstructed (first orange, second blue)"
    before = "input", "both", "first", "second"
    return pages.draw_tiles(title, note, tiles, captions, 10, before=before)


def draw_predictions(originals, images, reconstructions, captions):
    """Draw the first 40 files, each next to what the network gets and its reconstructions.

    Args:
        originals: N arrays (h, w, 1 or 3) uint8 of any sizes, N >= 1.
        images: (N, H, W, C), as the network gets them.
        reconstructions: (N, K, H, W, C), from the K longest capsules; K = 0 without capsules.
        captions: the lines of text of each file, as many for each.
    """
    title = "Predictions for " + _counted(len(images), "image", 40)
    digits = np.shape(reconstructions)[1]
    note = "the file, the image as the network gets it"
    if digits == 1:
        note += ", and its reconstruction from the longest capsule"
    elif digits > 1:
        note += f", and its reconstructions from the {digits} longest capsules"
    columns = [images, *np.moveaxis(np.asarray(reconstructions[:40]), 1, 0)]
    seen = [enlarge(to_rgb(column[:40])) for column in columns]
    fitted = [_fit_into_tile(original, *seen[0].shape[1:3]) for original in originals[:40]]
    tiles = np.stack([fitted, *seen], axis=1)[:, None]
    captions = [[(line, INK) for line in lines] for lines in captions[:40]]
    return pages.draw_tiles(title, note, tiles, captions, 4 if digits == 1 else 3)


def _counted(count, noun, limit):
    """Return for example "1 image" or "70 images, the first 64"."""
    text = f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
    return f"{text}, the first {limit}" if count > limit else text


def _caption_color(label, prediction):
    return INK if sorted(label) == sorted(prediction) else RED


def _in_order_of(label, prediction):
    """Return the order in which the most of two predicted classes are where the labels are."""
    swapped = list(prediction)[::-1]
    return [1, 0] if np.sum(swapped == label) > np.sum(prediction == label) else [0, 1]


def _fit_into_tile(image, height, width):
    """Fit an image of any size into the middle of a tile, uint8 (height, width, 3).

    The tile is grey and has an edge of a pixel, for white paper on a white page.
    """
    # Pixels that are enlarged stay square.
    method = Image.Resampling.LANCZOS
    if image.shape[0] < height and image.shape[1] < width:
        method = Image.Resampling.NEAREST
    picture = Image.fromarray(np.ascontiguousarray(to_rgb(image)))
    tile = ImageOps.pad(picture, (width, height), method, color=GREY)
    ImageDraw.Draw(tile).rectangle((0, 0, width - 1, height - 1), outline=GREY)
    return np.asarray(tile)
