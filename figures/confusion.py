"""The confusion matrix."""

import numpy as np
from PIL import ImageColor

from figures import pages
from figures.grids import arrange
from figures.pages import FAINT, GREY, HEAD, INK, LINE, PAD, RED, fit_text


def confusion_matrix(labels, predictions, n_classes):
    """Count how often each true class (row) was predicted as each class (column).

    (N,) classes and their (N,) predictions -> int64 (n_classes, n_classes).
    """
    cells = np.asarray(labels, np.int64) * n_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def draw_confusion_matrix(matrix, class_names):
    """Draw a confusion matrix; only the errors are colored.

    Args:
        matrix: (n, n) counts, true classes down, predicted ones across.
        class_names: name of each class.
    """
    n, errors = len(matrix), matrix - np.diag(np.diag(matrix))
    total, wrong = matrix.sum(), errors.sum()
    title = f"{total:,} images, {wrong:,} wrong: error {wrong / max(total, 1):.2%}"
    # On a common scale the right predictions, a hundred times more, would drown the errors.
    shade = np.sqrt(errors / max(errors.max(), 10))
    red = np.array(ImageColor.getrgb(RED))
    colors = np.rint(255 + shade[..., None] * (red - 255)).astype(np.uint8)
    colors[np.diag_indices(n)] = ImageColor.getrgb(GREY)
    if n > 40:  # a map of colors: the cells are too small for text
        side, texts = max(2, 2400 // n), []
        pixels = colors.repeat(side, 0).repeat(side, 1)
    else:
        longest = max(pages.load_font(7, False).getlength(name) for name in class_names)
        width, height = round(min(max(64, longest + 16), 150)), 64
        cells = colors.reshape(-1, 1, 1, 3).repeat(height - 1, 1).repeat(width - 1, 2)
        pixels = arrange(cells, n, 1, 1, color=255)
        texts = _count_texts(matrix, shade, class_names, width, height)
    texts.append(fit_text(pixels.shape[1] / 2, -1.5 * LINE - 4, "predicted class", bold=True))
    texts.append(fit_text(-PAD, -LINE / 2 - 4, "true class", bold=True, anchor="rm"))
    return pages.draw_page(title, "the redder a cell, the more errors", pixels, texts)


def _count_texts(matrix, shade, class_names, width, height):
    """Return the class names around a confusion matrix and the counts in its cells."""
    texts = []
    for i, name in enumerate(class_names):
        texts.append(fit_text((i + 0.5) * width, -LINE / 2 - 4, name, width - 6))
        texts.append(fit_text(-PAD, (i + 0.5) * height, name, HEAD, anchor="rm"))
    for (i, j), count in np.ndenumerate(matrix):
        color = INK if i == j or shade[i, j] < 0.6 else "white"
        if count == 0:
            color = FAINT
        x, y = (j + 0.5) * width, (i + 0.5) * height
        texts.append(fit_text(x, y, str(count), width - 6, bold=i == j, color=color))
    return texts
