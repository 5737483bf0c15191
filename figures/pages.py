"""Pictures: arrays -> grids of images, pages with captions, curves (PNG), and an animation (GIF).

Pillow draws the pages; Matplotlib would take five times as long. Matplotlib draws the curves. It is
slow to import, so only the functions that need it import it. A function with a `path` raises
UserError if it cannot write there.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from utils import atomic_path, printable, to_uint8

LINE_COLORS = "#20639b", "#c0392b"
# Two digits in one picture: readers who confuse red and green tell these apart, and where both
# digits are, the sum is white.
PAIR_COLORS = (255, 140, 0), (0, 115, 255)  # orange, blue

_INK, _FAINT, _RED, _GREY, _BAR = "#222222", "#808080", "#c0392b", "#e4e6e8", "#b0b0b0"
_SPLIT_NAMES = {"train": "training images", "validation": "held-out images"}
_DPI = 200
# Pixels: side of an enlarged image (28 * 4), line of text, widest head of a row; white between
# images, between examples, between heads and images, and around the page.
_TILE, _LINE, _HEAD = 112, 28, 336
_SEAM, _GAP, _PAD, _MARGIN = 4, 60, 16, 36
_NARROW = 24  # between examples of a single tile


# ---------------------------------------------------------------- grids of images


def _arrange(images, columns, below, beside, color):
    """Lay out images (N, H, W, C) row by row, with seams of a color between them."""
    rows = math.ceil(len(images) / columns)
    paddings = (0, rows * columns - len(images)), (0, below), (0, beside), (0, 0)
    tiles = np.pad(images, paddings, constant_values=color)
    _, height, width, channels = tiles.shape
    tiles = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    page = tiles.reshape(rows * height, columns * width, channels)
    return page[: rows * height - below, : columns * width - beside]


def image_grid(images):
    """Lay out images row by row in ceil(sqrt(B)) columns, with a grey line between them.

    Args:
        images: (B, H, W, C), B >= 1, uint8 or floats in [0, 1].

    Returns:
        uint8 (rows * (H + 1) - 1, columns * (W + 1) - 1, C); unused cells are grey.
    """
    return _arrange(to_uint8(images), math.ceil(math.sqrt(len(images))), 1, 1, color=128)


def save_grid(path, images):
    """Save `image_grid(images)`, enlarged by 3, and return the pixels, uint8 (H, W, 3)."""
    return _save_png(path, _rgb(image_grid(images)).repeat(3, 0).repeat(3, 1))


def overlay_digits(images):
    """Overlay the reconstructed digits of each image: (N, K, H, W, C) -> (N, H, W, C)."""
    return np.minimum(np.sum(images, axis=1), 1)


def _rgb(images):
    """Return images (..., H, W, C) as uint8 (..., H, W, 3).

    Of two channels the first is shown, of more than three the first three.
    """
    images = to_uint8(images)
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _enlarge(tiles):
    """Enlarge small tiles (..., H, W, C) by a whole number."""
    scale = max(1, _TILE // max(tiles.shape[-3:-1]))
    return tiles.repeat(scale, -3).repeat(scale, -2)


def _save_png(path, pixels):
    """Write pixels, uint8 (H, W, 3), unless `path` is None, and return them."""
    if path is not None:
        with atomic_path(path) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG", dpi=(_DPI, _DPI))
    return pixels


# ---------------------------------------------------------------- layout of pages


class _Text(NamedTuple):
    """A line of text; x and y are pixels from the upper left corner of the page's contents."""

    x: float
    y: float
    text: str
    font: Any
    color: str
    anchor: str  # Pillow's: "lm" starts at x, "mm" has its middle there, "rm" ends there

    def box(self):
        """Return the left, upper, right and lower edge."""
        left, _, right, _ = self.font.getbbox(self.text, anchor=self.anchor)
        return self.x + left, self.y - _LINE / 2, self.x + right, self.y + _LINE / 2


def _font_file(bold):
    import matplotlib  # for its DejaVu Sans

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path(), "fonts/ttf", name)


@functools.cache
def _font(points, bold):
    return ImageFont.truetype(_font_file(bold), round(points * _DPI / 72))


@functools.cache
def _characters():
    """Return the numbers of the characters that the font can draw, also in bold."""
    from matplotlib.ft2font import FT2Font

    return frozenset.intersection(
        *(frozenset(FT2Font(str(_font_file(bold))).get_charmap()) for bold in (False, True))
    )


def drawable_names(class_names):
    """Return the names of classes as pictures show them.

    A name with a character that the font lacks is replaced by the number of its class, as "#3".
    """
    return tuple(
        name if _characters().issuperset(map(ord, name)) else f"#{number}"
        for number, name in enumerate(class_names)
    )


def _fit(x, y, text, width=math.inf, points=7, bold=False, color=_INK, anchor="mm"):
    """Return a _Text at most `width` pixels wide: a longer one is set smaller, then cut."""
    text = printable(text)  # file names may have any bytes
    while points > 5 and _font(points, bold).getlength(text) > width:
        points -= 0.5
    while len(text) > 1 and _font(points, bold).getlength(text) > width:
        text = text[:-2] + "…"
    return _Text(x, y, text, _font(points, bold), color, anchor)


def _save_page(path, title, note, pixels, texts):
    """Save `pixels` (H, W, 3) with `texts` over and around them, below a title and a note.

    Returns:
        The pixels of the whole page, which is as large as the texts need.
    """
    boxes = [(0, 0, pixels.shape[1], pixels.shape[0]), *(text.box() for text in texts)]
    left, top = np.min(boxes, axis=0)[:2]
    heading = [
        _fit(left, top - 2.5 * _LINE, title, points=9, bold=True, anchor="lm"),
        _fit(left, top - 1.5 * _LINE, note, anchor="lm"),
    ]
    boxes += [text.box() for text in heading]
    # Even numbers: `save_sweep` halves the page, which must not mix neighboring pixels of an image.
    left, top = 2 * np.floor(np.min(boxes, axis=0)[:2] / 2).astype(int) - _MARGIN
    right, bottom = 2 * np.ceil(np.max(boxes, axis=0)[2:] / 2).astype(int) + _MARGIN

    page = Image.new("RGB", (right - left, bottom - top), "white")
    page.paste(Image.fromarray(pixels), (-left, -top))
    draw = ImageDraw.Draw(page)
    for text in heading + texts:
        place = round(text.x) - left, round(text.y) - top
        draw.text(place, text.text, text.color, text.font, text.anchor)
    return _save_png(path, np.asarray(page))


def _save_examples(path, title, note, tiles, captions, per_row, above=(), before=(), gap=_GAP):
    """Draw examples, each some lines of text above rows of images.

    Args:
        path: file to write, or None.
        title: first line of the page.
        note: second line of the page.
        tiles: (N, rows, columns, H, W, 1 or 3), N >= 1.
        captions: the lines (text, color) of each example, as many for each.
        per_row: number of examples side by side.
        above: heads of the tiles' columns.
        before: heads of the tiles' rows.
        gap: pixels between examples side by side.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    tiles = _enlarge(_rgb(tiles))
    columns, height, width = tiles.shape[2:5]
    text_height = len(captions[0]) * _LINE
    examples = [_arrange(np.concatenate(rows), columns, _SEAM, _SEAM, color=255) for rows in tiles]
    examples = np.pad(examples, ((0, 0), (text_height, 0), (0, 0), (0, 0)), constant_values=255)
    per_row = min(per_row, len(examples))
    pixels = _arrange(examples, per_row, _LINE, gap, color=255)

    step_y, step_x = examples.shape[1] + _LINE, examples.shape[2] + gap
    texts = []
    for n, lines in enumerate(captions):
        x, y = n % per_row * step_x + examples.shape[2] / 2, n // per_row * step_y + _LINE / 2
        for i, (line, color) in enumerate(lines):
            texts.append(_fit(x, y + i * _LINE, line, step_x - 12, color=color))
    for left in range(0, pixels.shape[1], step_x):
        for j, head in enumerate(above):
            x = left + j * (width + _SEAM) + width / 2
            texts.append(_fit(x, -_LINE / 2 - 4, head, width, bold=True))
    for top in range(text_height, pixels.shape[0], step_y):
        for i, head in enumerate(before):
            y = top + i * (height + _SEAM) + height / 2
            texts.append(_fit(-_PAD, y, head, _HEAD, bold=True, anchor="rm"))
    return _save_page(path, title, note, pixels, texts)


def _counted(count, noun, limit):
    """Return for example "1 image" or "70 images, the first 64"."""
    text = f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
    return f"{text}, the first {limit}" if count > limit else text


def _caption_color(label, prediction):
    return _INK if sorted(label) == sorted(prediction) else _RED


# ---------------------------------------------------------------- evaluation


def save_reconstructions(
    path,
    images,
    with_label,
    without_label,
    labels,
    predictions,
    class_names,
    title="Reconstructions",
):
    """Draw the first 20 images, each next to its two reconstructions; wrong predictions in red.

    Args:
        path: file to write, or None.
        images: (N, H, W, C), N >= 1, uint8 or floats in [0, 1].
        with_label: (N, K, H, W, C), reconstructed from the capsules of the labels.
        without_label: (N, K, H, W, C), reconstructed from the longest capsules.
        labels: (N, K) true classes, in any order.
        predictions: (N, K) predicted classes, in any order.
        class_names: name of each class.
        title: first line of the page.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    captions = []
    for label, prediction in zip(labels[:20], predictions[:20], strict=True):
        true, guess = ("+".join(class_names[k] for k in sorted(row)) for row in (label, prediction))
        captions.append([(f"true {true}, predicted {guess}", _caption_color(label, prediction))])
    triples = images[:20], overlay_digits(with_label[:20]), overlay_digits(without_label[:20])
    tiles = np.stack([to_uint8(column) for column in triples], axis=1)[:, None]
    note = "with label: from the capsule of the true class; no label: from the longest capsule"
    above = "input", "with label", "no label"
    return _save_examples(path, title, note, tiles, captions, 4, above)


def save_misclassified(path, images, numbers, labels, predictions, lengths, class_names):
    """Draw the first 64 wrong images with the capsule lengths of true and predicted class.

    Args:
        path: file to write, or None.
        images: (N, H, W, C), only misclassified ones, N >= 0.
        numbers: (N,) positions in the test set.
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        lengths: (N, classes), the lengths of all digit capsules.
        class_names: name of each class.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    if not len(images):
        blank = np.full((1, 1, 3), 255, np.uint8)
        return _save_page(path, "No image is misclassified", "", blank, [])
    captions = []
    for i, (label, prediction) in enumerate(zip(labels[:64], predictions[:64], strict=True)):
        true = f"{class_names[label]}: {lengths[i, label]:.2f}"
        guess = f"{class_names[prediction]}: {lengths[i, prediction]:.2f}"
        captions.append([(f"no. {numbers[i]}", _FAINT), (true, _INK), (guess, _RED)])
    title = _counted(len(images), "misclassified image", 64)
    note = (
        "number in the test set, from 0; capsule lengths of the true class (black) and of the "
        "predicted class (red)"
    )
    return _save_examples(path, title, note, images[:64, None, None], captions, 8)


def save_multi(path, title, inputs, reconstructions, labels, predictions, class_names):
    """Draw the first 20 MultiMNIST examples, a column each, like figure 5 of the paper.

    Args:
        path: file to write, or None.
        title: first line of the page.
        inputs: (N, H, W, C), N >= 1.
        reconstructions: (N, 2, H, W, C) of the predicted digits, in the order of `predictions`.
        labels: (N, 2) true classes, in any order.
        predictions: (N, 2) predicted classes, in any order. They are shown in the order of the
            labels.
        class_names: name of each class.

    Returns:
        The pixels, uint8 (H, W, 3).
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
    tiles = np.stack([_rgb(inputs[:20]), *colored], axis=1)[:, :, None]
    note = "L: the label; R: the two longest capsules, reconstructed (first orange, second blue)"
    before = "input", "both", "first", "second"
    return _save_examples(path, title, note, tiles, captions, 10, before=before)


def _in_order_of(label, prediction):
    """Return the order in which the most of two predicted classes are where the labels are."""
    swapped = list(prediction)[::-1]
    return [1, 0] if np.sum(swapped == label) > np.sum(prediction == label) else [0, 1]


def save_predictions(path, originals, images, reconstructions, captions):
    """Draw the first 40 files, each next to what the network gets and its reconstructions.

    Args:
        path: file to write, or None.
        originals: N arrays (h, w, 1 or 3) uint8 of any sizes, N >= 1.
        images: (N, H, W, C), as the network gets them.
        reconstructions: (N, K, H, W, C), from the K longest capsules.
        captions: the lines of text of each file, as many for each.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    title = "Predictions for " + _counted(len(images), "image", 40)
    digits = np.shape(reconstructions)[1]
    longest = "its reconstruction from the longest capsule"
    if digits > 1:
        longest = f"its reconstructions from the {digits} longest capsules"
    note = f"the file, the image as the network gets it, and {longest}"
    columns = [images, *np.moveaxis(np.asarray(reconstructions[:40]), 1, 0)]
    seen = [_enlarge(_rgb(column[:40])) for column in columns]
    fitted = [_fit_into_tile(original, *seen[0].shape[1:3]) for original in originals[:40]]
    tiles = np.stack([fitted, *seen], axis=1)[:, None]
    captions = [[(line, _INK) for line in lines] for lines in captions[:40]]
    return _save_examples(path, title, note, tiles, captions, 4 if digits == 1 else 3)


def _fit_into_tile(image, height, width):
    """Fit an image of any size into the middle of a tile, uint8 (height, width, 3).

    The tile is grey and has an edge of a pixel, for white paper on a white page.
    """
    # Pixels that are enlarged stay square.
    method = Image.Resampling.LANCZOS
    if image.shape[0] < height and image.shape[1] < width:
        method = Image.Resampling.NEAREST
    picture = Image.fromarray(np.ascontiguousarray(_rgb(image)))
    tile = ImageOps.pad(picture, (width, height), method, color=_GREY)
    ImageDraw.Draw(tile).rectangle((0, 0, width - 1, height - 1), outline=_GREY)
    return np.asarray(tile)


# ---------------------------------------------------------------- confusion matrix


def confusion_matrix(labels, predictions, n_classes):
    """Count how often each true class (row) was predicted as each class (column).

    Args:
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        n_classes: number of classes.

    Returns:
        int64 (n_classes, n_classes).
    """
    cells = np.asarray(labels, np.int64) * n_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def save_confusion_matrix(path, matrix, class_names):
    """Draw a confusion matrix; only the errors are colored.

    Args:
        path: file to write, or None.
        matrix: (n, n) counts, true classes down, predicted ones across.
        class_names: name of each class.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    n, errors = len(matrix), matrix - np.diag(np.diag(matrix))
    total, wrong = matrix.sum(), errors.sum()
    title = f"{total:,} images, {wrong:,} wrong: error {wrong / max(total, 1):.2%}"
    # On a common scale the right predictions, a hundred times more, would drown the errors.
    shade = np.sqrt(errors / max(errors.max(), 10))
    red = np.array(ImageColor.getrgb(_RED))
    colors = np.rint(255 + shade[..., None] * (red - 255)).astype(np.uint8)
    colors[np.diag_indices(n)] = ImageColor.getrgb(_GREY)
    if n > 40:  # a map of colors: the cells are too small for text
        side, texts = max(2, 2400 // n), []
        pixels = colors.repeat(side, 0).repeat(side, 1)
    else:
        longest = max(_font(7, False).getlength(name) for name in class_names)
        width, height = round(min(max(64, longest + 16), 150)), 64
        cells = colors.reshape(-1, 1, 1, 3).repeat(height - 1, 1).repeat(width - 1, 2)
        pixels = _arrange(cells, n, 1, 1, color=255)
        texts = _count_texts(matrix, shade, class_names, width, height)
    texts.append(_fit(pixels.shape[1] / 2, -1.5 * _LINE - 4, "predicted class", bold=True))
    texts.append(_fit(-_PAD, -_LINE / 2 - 4, "true class", bold=True, anchor="rm"))
    return _save_page(path, title, "the redder a cell, the more errors", pixels, texts)


def _count_texts(matrix, shade, class_names, width, height):
    """Return the class names around a confusion matrix and the counts in its cells."""
    texts = []
    for i, name in enumerate(class_names):
        texts.append(_fit((i + 0.5) * width, -_LINE / 2 - 4, name, width - 6))
        texts.append(_fit(-_PAD, (i + 0.5) * height, name, _HEAD, anchor="rm"))
    for (i, j), count in np.ndenumerate(matrix):
        color = _INK if i == j or shade[i, j] < 0.6 else "white"
        if count == 0:
            color = _FAINT
        x, y = (j + 0.5) * width, (i + 0.5) * height
        texts.append(_fit(x, y, str(count), width - 6, bold=i == j, color=color))
    return texts


# ---------------------------------------------------------------- tweaked capsules


def _signed(number):
    return "0" if abs(number) < 1e-9 else f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")


def _save_steps(path, title, images, deltas, row_names):
    """Draw images (rows, steps, H, W, C), each column below its delta."""
    note = "the number above each column is added; 0 is the capsule as the network found it"
    above = [_signed(delta) for delta in deltas]
    return _save_examples(path, title, note, images[None], [()], 1, above, row_names)


def save_tweak(path, images, deltas, dimension, row_names):
    """Draw digits with one dimension of their capsules changed: digits down, steps across.

    Args:
        path: file to write, or None.
        images: (digits, steps, H, W, C).
        deltas: (steps,), what was added to the dimension.
        dimension: its number.
        row_names: class of each digit.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    title = f"Dimension {dimension} of the longest capsule of each image, changed"
    return _save_steps(path, title, images, deltas, row_names)


def save_tweak_overview(path, images, deltas, class_name, row_names=None):
    """Draw a digit with each dimension of its capsule changed, like figure 4 of the paper.

    Args:
        path: file to write, or None.
        images: (dims, steps, H, W, C).
        deltas: (steps,), what was added to the dimension.
        class_name: class of the digit.
        row_names: names of chosen dimensions, None if `images` has all of them.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    which = "Each dimension" if row_names is None else "Chosen dimensions"
    row_names = row_names or [f"dim {i}" for i in range(len(images))]
    title = f"{which} of the capsule of class {class_name}, changed"
    return _save_steps(path, title, images, deltas, row_names)


def save_sweep(path, images, deltas, row_names):
    """Draw digits with each dimension of their capsules swept back and forth, as an animated GIF.

    Args:
        path: file to write.
        images: (dims, digits, steps, H, W, C).
        deltas: (steps,), what was added to the dimension.
        row_names: class of each digit.
    """
    note = "one column per dimension of the capsule, the other dimensions as the network found them"
    above = [str(dimension) for dimension in range(len(images))]
    pages = []
    for step, delta in enumerate(deltas):
        title = f"Every dimension of the longest capsules, changed by {_signed(delta)}"
        tiles = images[:, :, step].swapaxes(0, 1)  # (dims, digits, ...) -> (digits, dims, ...)
        pixels = _save_examples(None, title, note, tiles[None], [()], 1, above, row_names)
        pages.append(Image.fromarray(pixels).reduce(2).quantize(64))
    _save_to_and_fro(path, pages)


def save_named_sweep(path, originals, images, deltas, captions):
    """Draw digits with chosen dimensions of their capsules swept back and forth, as a GIF.

    Args:
        path: file to write.
        originals: (digits, H, W, C), the images that the network saw.
        images: (digits, columns, steps, H, W, C), reconstructions.
        deltas: (steps,), what was added to the dimension.
        captions: the lines of text of each digit's original and columns, (digits, 1 + columns),
            as many for each.
    """
    digits, columns = np.shape(images)[:2]
    lines = [[(line, _INK) for line in cell] for row in captions for cell in row]
    note = "each column changes another dimension"
    pages = []
    for step, delta in enumerate(deltas):
        title = f"One dimension of the digit's capsule, changed by {_signed(delta)}"
        swept = np.asarray(images)[:, :, step]
        tiles = np.concatenate([to_uint8(originals)[:, None], to_uint8(swept)], axis=1)
        tiles = tiles.reshape(digits * (1 + columns), 1, 1, *tiles.shape[2:])
        pixels = _save_examples(None, title, note, tiles, lines, 1 + columns, gap=_NARROW)
        pages.append(Image.fromarray(pixels).quantize(64))
    _save_to_and_fro(path, pages)


def _save_to_and_fro(path, pages):
    """Save pages as an animated GIF that runs to the last page and back, for ever."""
    first, *others = pages + pages[-2:0:-1]
    with atomic_path(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, loop=0, duration=120)


# ---------------------------------------------------------------- curves


def new_figure(panels, width=7, height=2.8, **kwargs):
    """Create a Matplotlib figure, which needs no display.

    Args:
        panels: number of panels, side by side.
        width: in inches.
        height: in inches.
        **kwargs: passed to `Figure.subplots`, for example `sharey=True`.

    Returns:
        The figure and an array of its panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False, **kwargs)[0]


def label_panel(panel, title, xlabel=None):
    """Give a panel its title, the label of its horizontal axis, and the common style."""
    style = {"fontsize": 9, "fontweight": "bold", "loc": "left", "color": _INK}
    panel.set_title(title, **style, parse_math=False)  # a name may have dollar signs
    panel.set_xlabel(xlabel, fontsize=7)
    panel.tick_params(which="both", labelsize=6, color=_FAINT)
    panel.grid(color=_GREY, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(path, figure):
    """Draw a figure from `new_figure`.

    Args:
        path: file to write, or None.
        figure: the figure.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    figure.canvas.draw()
    return _save_png(path, np.array(figure.canvas.buffer_rgba())[..., :3])


def save_learning_curves(path, curves, steps_per_epoch, dataset):
    """Draw loss and error over the epochs, on logarithmic axes; an error of 0 is a gap.

    Args:
        path: file to write, or None.
        curves: {"train": scalars, "validation": scalars} or one of them, with the scalars
            {"loss/total": (steps, values), "accuracy": (steps, values)}. Longer curves become the
            means of at most 100 equal parts.
        steps_per_epoch: number of training steps in an epoch.
        dataset: name of the data set, for the titles.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    from matplotlib.ticker import LogLocator

    figure, panels = new_figure(2)
    for (name, scalars), color in zip(curves.items(), LINE_COLORS, strict=False):
        for panel, tag in zip(panels, ("loss/total", "accuracy"), strict=True):
            steps, values = (_means_of_parts(column) for column in scalars[tag])
            shown = 100 * (1 - values) if tag == "accuracy" else values
            shown[shown <= 0] = np.nan  # a logarithmic axis has no place for 0
            marker = "o" if len(steps) < 60 else None
            style = {"color": color, "lw": 1.2, "marker": marker, "ms": 2.5}
            label = _SPLIT_NAMES.get(name, name)
            panel.plot(steps / steps_per_epoch, shown, label=label, **style)
    if not _characters().issuperset(map(ord, dataset)):
        dataset = "the data set"
    titles = f"Total loss on {dataset}", f"Error on {dataset}, % of images"
    for panel, title in zip(panels, titles, strict=True):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_minor_formatter("{x:g}")
        label_panel(panel, title, "epoch")
    panels[0].legend(fontsize=7, frameon=False)
    return save_figure(path, figure)


def save_length_histogram(path, present, absent):
    """Draw how long the capsules of the classes in an image are, and those of the other classes.

    Args:
        path: file to write, or None.
        present: (n,), lengths of the capsules of classes that are in their image.
        absent: (m,), lengths of the capsules of all other classes.

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    figure, (panel,) = new_figure(1)
    blue, red = LINE_COLORS
    edges = np.linspace(0, 1, 51)
    for values, name, color in ((absent, "absent", red), (present, "present", blue)):
        label = f"class {name}: {len(values):,} capsules"
        panel.hist(values, edges, histtype="stepfilled", alpha=0.6, color=color, label=label)
    for place in (0.1, 0.9):
        label = "margins of the loss" if place == 0.1 else None
        panel.axvline(place, color=_FAINT, lw=0.8, ls="--", label=label)
    panel.set_yscale("log")
    panel.set_ylabel("capsules", fontsize=7)
    label_panel(panel, "Lengths of the capsules of test images", "length")
    panel.legend(fontsize=7, frameon=False)
    return save_figure(path, figure)


def save_bars(path, panels):
    """Draw horizontal bars with their values, in panels side by side.

    Args:
        path: file to write, or None.
        panels: list of (title, names, values, unit).

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    most = max(len(names) for _, names, *_ in panels)
    figure, axes = new_figure(len(panels), width=9, height=0.7 + 0.36 * most)
    for axis, (title, names, values, unit) in zip(axes, panels, strict=True):
        # The tool's own bar is the last one.
        colors = [_BAR] * (len(values) - 1) + [LINE_COLORS[0]]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{value:,g}" for value in values], padding=3, fontsize=7)
        label_panel(axis, title, unit)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(values))
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", labelsize=7, length=0)
    return save_figure(path, figure)


def _means_of_parts(values, parts=100):
    size = math.ceil(len(values) / parts)
    return np.array([np.mean(values[n : n + size]) for n in range(0, len(values), size)])
