import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from figures import plots

ROOT = Path(__file__).parent.parent


@pytest.fixture
def unrendered(monkeypatch):
    """Make functions return the Matplotlib figure instead of its pixels."""
    monkeypatch.setattr(plots, "render", lambda figure: figure)


def titles(figure):
    return [panel.get_title("left") for panel in figure.axes]


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_learning_curves_hold_loss_and_error_of_training_and_validation(unrendered):
    steps = np.arange(1, 1001)
    loss, accuracy = 0.5 * np.exp(-steps / 300), 1 - 0.4 * np.exp(-steps / 300)
    train = {"loss/total": (steps, loss), "accuracy": (steps, accuracy)}
    every = slice(99, None, 100)
    validation = {
        "loss/total": (steps[every], 2 * loss[every]),
        "accuracy": (steps[every], accuracy[every] / 2),
    }
    figure = plots.draw_learning_curves({"train": train, "validation": validation}, 100, "kmnist")
    assert titles(figure) == ["Total loss on kmnist", "Error on kmnist, % of images"]
    names = ["training images", "held-out images"]
    assert legend(figure.axes[0]) == names
    for panel, training, validating in (
        (figure.axes[0], loss, 2 * loss[every]),
        (figure.axes[1], 100 * (1 - accuracy), 100 * (1 - accuracy[every] / 2)),
    ):
        assert panel.get_yscale() == "log" and panel.get_xlabel() == "epoch"
        first, second = panel.lines
        assert [line.get_label() for line in panel.lines] == names
        assert tuple(line.get_color() for line in panel.lines) == plots.LINE_COLORS
        # 1000 points become the means of 100 times 10.
        np.testing.assert_allclose(first.get_xdata(), np.arange(5.5, 1000, 10) / 100)
        means = [sum(training[n : n + 10]) / 10 for n in range(0, 1000, 10)]
        np.testing.assert_allclose(first.get_ydata(), means)
        assert first.get_marker() in (None, "None")
        np.testing.assert_allclose(second.get_xdata(), np.arange(1, 11))
        np.testing.assert_allclose(second.get_ydata(), validating)
        assert second.get_marker() == "o"


@pytest.mark.filterwarnings("error")  # of a character that the font lacks
def test_learning_curves_may_lack_validation_and_have_a_single_point_and_any_name():
    blue, red = (np.array(ImageColor.getrgb(color)) for color in plots.LINE_COLORS)
    train, validation = (
        {tag: (np.array([100]), np.array([value])) for tag in ("loss/total", "accuracy")}
        for value in (0.5, 0.4)
    )
    for curves, name in (
        ({"train": train}, "猫"),
        ({"train": train, "validation": validation}, "a$b$_{"),
    ):
        picture = plots.draw_learning_curves(curves, 100, name)
        for half in (picture[:, :700], picture[:, 700:]):
            near = [(np.abs(half.astype(int) - color).sum(-1) < 40).any() for color in (blue, red)]
            assert near == [True, "validation" in curves]


@pytest.mark.parametrize("name, shown", [("a$b$_{", "a$b$_{"), ("猫", "the data set")])
def test_steps_without_any_error_leave_a_gap_in_the_curve_and_titles_name_the_data_set(
    unrendered, name, shown
):
    accuracy = np.where(np.arange(240) // 3 % 2, 1.0, 0.8)  # in parts of three steps
    steps = np.arange(1, 241)
    curves = {"train": {"loss/total": (steps, np.ones(240)), "accuracy": (steps, accuracy)}}
    figure = plots.draw_learning_curves(curves, 60, name)
    assert titles(figure) == [f"Total loss on {shown}", f"Error on {shown}, % of images"]
    (line,) = figure.axes[1].lines
    np.testing.assert_allclose(line.get_xdata(), np.arange(2, 241, 3) / 60)
    np.testing.assert_allclose(line.get_ydata(), [20, np.nan] * 40)
    np.testing.assert_array_equal(accuracy[:6], [0.8, 0.8, 0.8, 1, 1, 1])  # not changed


def test_a_histogram_of_lengths_counts_present_and_absent_capsules(unrendered):
    stream = np.random.default_rng(0)
    present, absent = stream.beta(9, 1, 400), stream.beta(1, 9, 3600)
    (panel,) = plots.draw_length_histogram(present, absent, (0.1, 0.85)).axes
    assert panel.get_yscale() == "log" and panel.get_xlabel() == "length"
    assert legend(panel) == [
        *("class absent: 3,600 capsules", "class present: 400 capsules"),
        "margins of the loss",
    ]
    assert [line.get_xdata()[0] for line in panel.lines] == [0.1, 0.85]
    for patch, values in zip(panel.patches, (absent, present), strict=True):
        steps = patch.get_xy()
        for low in range(0, 100, 2):
            count = sum(low / 100 <= value < low / 100 + 0.02 for value in values)
            heights = steps[np.isclose(steps[:, 0], low / 100), 1]
            assert count == 0 or np.isclose(heights, count).any(), low


def test_figures_have_panels_of_a_common_style():
    figure, panels = plots.new_figure(3, width=9, sharey=True)
    assert len(panels) == 3 and tuple(figure.get_size_inches()) == (9, 2.8)
    panels[0].set_ylim(0, 7)
    assert panels[2].get_ylim() == (0, 7)
    plots.label_panel(panels[0], "Title", "unit")
    plots.label_panel(panels[1], "Another title")
    assert titles(figure) == ["Title", "Another title", ""]
    assert [panel.get_xlabel() for panel in panels] == ["unit", "", ""]
    assert not panels[0].spines["top"].get_visible() and panels[2].spines["top"].get_visible()
    pixels = plots.render(figure)
    assert pixels.shape == (560, 1800, 3) and pixels.dtype == np.uint8


def test_no_picture_needs_a_display_or_pyplot():
    code = (
        "import sys, numpy\n"
        "from figures import plots, tweaks\n"
        "assert 'matplotlib' not in sys.modules\n"
        "tweaks.draw_tweak_overview(numpy.zeros((2, 2, 8, 8, 3)), (0, 1), 'x')\n"
        "curve = numpy.arange(1, 9), numpy.full(8, 0.5)\n"
        "curves = {'train': {'loss/total': curve, 'accuracy': curve}}\n"
        "assert plots.draw_learning_curves(curves, 4, 'x').shape == (560, 1400, 3)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment["MPLBACKEND"] = "tkagg"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
