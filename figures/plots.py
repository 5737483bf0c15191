"""Curves and histograms.

Matplotlib draws them. It is slow to import, so only the functions that need it import it.
"""

import math

import numpy as np

from figures.files import DPI
from figures.pages import FAINT, GREY, INK, is_drawable

LINE_COLORS = "#20639b", "#c0392b"
_SPLIT_NAMES = {"train": "training images", "validation": "held-out images"}


def new_figure(panels, width=7, height=2.8, **kwargs):
    """Create a Matplotlib figure, `width` by `height` inches, that needs no display.

    Return it and the array of its panels, side by side; `kwargs` are of `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False, **kwargs)[0]


def label_panel(panel, title, xlabel=None):
    """Give a panel its title, the label of its horizontal axis, and the common style."""
    style = {"fontsize": 9, "fontweight": "bold", "loc": "left", "color": INK}
    panel.set_title(title, **style, parse_math=False)  # a name may have dollar signs
    panel.set_xlabel(xlabel, fontsize=7)
    panel.tick_params(which="both", labelsize=6, color=FAINT)
    panel.grid(color=GREY, lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def render(figure):
    """Return the pixels, uint8 (H, W, 3), of a figure from `new_figure`."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3]


def draw_learning_curves(curves, steps_per_epoch, dataset):
    """Draw loss and error over the epochs, on logarithmic axes; an error of 0 is a gap.

    Args:
        curves: {"train": scalars, "validation": scalars} or one of them, with the scalars
            {"loss/total": (steps, values), "accuracy": (steps, values)}. Longer curves become the
            means of at most 100 equal parts.
        steps_per_epoch: number of training steps in an epoch.
        dataset: name of the data set, for the titles.
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
    if not is_drawable(dataset):
        dataset = "the data set"
    titles = f"Total loss on {dataset}", f"Error on {dataset}, % of images"
    for panel, title in zip(panels, titles, strict=True):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_minor_formatter("{x:g}")
        label_panel(panel, title, "epoch")
    panels[0].legend(fontsize=7, frameon=False)
    return render(figure)


def draw_length_histogram(present, absent, margins):
    """Draw how long the capsules of the classes in an image are, and those of the other classes.

    Args:
        present: (n,), lengths of the capsules of classes that are in their image.
        absent: (m,), lengths of the capsules of all other classes.
        margins: lengths at which the loss of an absent and of a present class ends.
    """
    figure, (panel,) = new_figure(1)
    blue, red = LINE_COLORS
    edges = np.linspace(0, 1, 51)
    for values, name, color in ((absent, "absent", red), (present, "present", blue)):
        label = f"class {name}: {len(values):,} capsules"
        panel.hist(values, edges, histtype="stepfilled", alpha=0.6, color=color, label=label)
    for margin, label in zip(margins, ("margins of the loss", None), strict=True):
        panel.axvline(margin, color=FAINT, lw=0.8, ls="--", label=label)
    panel.set_yscale("log")
    panel.set_ylabel("capsules", fontsize=7)
    label_panel(panel, "Lengths of the capsules of test images", "length")
    panel.legend(fontsize=7, frameon=False)
    return render(figure)


def _means_of_parts(values, parts=100):
    size = math.ceil(len(values) / parts)
    return np.array([np.mean(values[n : n + size]) for n in range(0, len(values), size)])
