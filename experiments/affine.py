"""Robustness to affine transformations (the paper's section 5.2).

    python experiments/affine.py

Trains a CapsNet and three convolutional networks on MNIST digits placed at random on 40×40 pixels,
without any other deformation, each until it has the same accuracy on held-out digits (looked at
twice an epoch), and tests them on digits transformed as those of affNIST are: rotated by
up to 20 degrees, sheared by up to 0.2, scaled by 0.8 to 1.2 in each axis, and moved anywhere on the
canvas. The transformed digits are made from MNIST's test digits by the published description and a
fixed seed: they have affNIST's distribution, and are not the affNIST file. In training the whole
28×28 image stays on the canvas, in that test only the ink does; so the same places without
deformation are tested as well. Writes affine.json and affine.png.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from experiment_lib import flags
from PIL import Image

import utils
from capsnet_core import config
from figures import files, plots
from inputs import datasets
from runtime import terminal
from runtime.command_line import MOST, Flag, distinct, number, one_of, run_script

CANVAS, PADDING = 40, 6  # pixels: 28 + 2 * 6
# Nobody knows beforehand how many epochs an accuracy takes, so the learning rate falls more slowly
# than in main.py, and the averages, which are what is tested, are longer.
DECAY_STEPS, AVERAGING = 3000, 0.998
DECAY_RATE = config.TrainingConfig().decay_rate


class Network(NamedTuple):
    """A network of the comparison."""

    title: str
    architecture: str | None  # of `capsnet_core.networks.CNN_LAYERS`; None for the CapsNet
    paper: float  # percent of affNIST that the paper's has right, at 99.23% of placed MNIST


# The paper says of its CNN only that it has pooling, dropout and about as many parameters, as the
# first one here. The others are that of section 5 and that of the authors' public code.
NETWORKS = {
    "capsnet": Network("CapsNet", None, 79.0),
    "cnn": Network("CNN, pooled", "affine", 66.0),
    "cnn_section5": Network("CNN, section 5", "mnist", 66.0),
    "cnn_authors": Network("CNN, authors", "authors", 66.0),
}
COLORS = dict(zip(NETWORKS, (*plots.LINE_COLORS, "#2a7f4f", "#8a5fb0"), strict=True))
ROTATION, SHEAR, SCALE = 20.0, 0.2, 0.2  # affNIST's limits: degrees; ratio; from 1, in each axis


class Sweep(NamedTuple):
    """Values of one factor of a transformation, while the others are at rest."""

    values: tuple
    in_affnist: tuple  # (lowest, highest) value
    unit: str


SWEEPS = {
    "rotation": Sweep((0.0, 20.0, 40.0, 60.0), (0.0, ROTATION), "degrees"),
    "shear": Sweep((0.0, 0.2, 0.4, 0.6), (0.0, SHEAR), "shear"),
    "scale": Sweep((0.6, 0.8, 1.0, 1.2), (1 - SCALE, 1 + SCALE), "scale of both axes"),
    # From the middle of the canvas, 0, to where the ink is at its edges, 1.
    "translation": Sweep((0.0, 0.4, 0.7, 1.0), (0.0, 1.0), "from the middle to the edges"),
}


FLAGS = [
    Flag("networks", ",".join(NETWORKS), distinct(one_of(NETWORKS)), "networks to train and test"),
    Flag(
        "accuracy",
        99.23,
        number(float, 10, 100),  # a share, such as 0.99, is a mistake
        "accuracy on held-out digits, in percent, at which training stops; default: what the "
        "paper's networks have on test digits",
    ),
    Flag("epochs", 20, number(int, 1, MOST), "largest number of epochs"),
    Flag(
        "decay_steps",
        DECAY_STEPS,
        number(int, 1, MOST),
        f"steps over which the learning rate is multiplied by {DECAY_RATE:g} once",
    ),
    Flag(
        "averaging",
        AVERAGING,
        number(float, 0, 0.99999),
        "momentum of the running averages of the weights, which are tested; 0: no averages",
    ),
    Flag("seed", 0, number(int, 0, 2**31 - 1), "seed of the weights, of the order and of dropout"),
    flags.TRAIN_SIZE,
    flags.DATA_DIR,
    flags.output("runs/affine"),
]


# --- Transformed digits ---------------------------------------------------------------------------


def transform_matrix(rotation=0.0, shear=0.0, scale_y=1.0, scale_x=1.0):
    """Return the 2×2 matrix of a scaling, then a shear, then a rotation about a digit's middle.

    It takes (x, y), from the middle, to where that point moves.

    Args:
        rotation: degrees, clockwise on the screen.
        shear: pixels to the right for each pixel down.
        scale_y: factor of the height.
        scale_x: factor of the width.
    """
    angle = math.radians(rotation)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return rotate @ np.array([[1, shear], [0, 1]]) @ np.diag([scale_x, scale_y])


def transform(image, matrix, place, canvas=CANVAS):
    """Transform a digit about its middle and move it on a canvas of zeros.

    Args:
        image: (H, W) uint8.
        matrix: matrix from `transform_matrix`.
        place: (down, right) in [0, 1] each: from the first to the last whole pixel at which all ink
            is on the canvas. Digits larger than the canvas stay in its middle.
        canvas: pixels of its sides.

    Returns:
        (canvas, canvas) uint8.
    """
    height, width = image.shape
    large = 2 * canvas
    # Pillow asks where each output pixel comes from; its coordinates are those of pixels' corners.
    inverse = np.linalg.inv(matrix)
    offset = np.array([width, height]) / 2 - inverse @ np.array([large, large]) / 2
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    picture = Image.fromarray(image).transform((large, large), affine, coefficients, bilinear)
    pixels, result = np.asarray(picture), np.zeros((canvas, canvas), np.uint8)
    if pixels.any():
        rows, to_rows = _move_ink(pixels.any(axis=1), place[0], canvas)
        columns, to_columns = _move_ink(pixels.any(axis=0), place[1], canvas)
        result[to_rows, to_columns] = pixels[rows, columns]
    return result


def _move_ink(has_ink, place, canvas):
    """Return which rows (or columns) of a digit to take, and where they are on the canvas."""
    ink = np.flatnonzero(has_ink)
    first, size = ink[0], ink[-1] - ink[0] + 1
    if size > canvas:
        first += (size - canvas) // 2
        return slice(first, first + canvas), slice(0, canvas)
    free = canvas - size
    start = min(int(place * (free + 1)), free)
    return slice(first, first + size), slice(start, start + size)


def affine_test_images(images, seed=0, deformed=True):
    """Make images of affNIST's distribution: (N, 28, 28, 1) -> (N, 40, 40, 1), uint8.

    They depend on the arguments alone. Unless `deformed`, they are only moved, to the same places.
    """
    stream = utils.random_stream(seed, 0, "affine test")
    draws = stream.uniform(-1, 1, (len(images), 4))
    places = stream.uniform(0, 1, (len(images), 2))
    if not deformed:
        draws = np.zeros_like(draws)
    canvases = []
    for image, (rotation, shear, y, x), place in zip(images, draws, places, strict=True):
        matrix = transform_matrix(ROTATION * rotation, SHEAR * shear, 1 + SCALE * y, 1 + SCALE * x)
        canvases.append(transform(image[..., 0], matrix, place))
    return np.stack(canvases)[..., None]


def swept_images(images, factor, value):
    """Transform images by one factor, a key of SWEEPS: (N, 28, 28, 1) -> (N, 40, 40, 1), uint8.

    Digits are in the middle of the canvas; a translation moves them to its four corners in turn.
    """
    changed = {"scale": ("scale_y", "scale_x"), "translation": ()}.get(factor, (factor,))
    matrix = transform_matrix(**dict.fromkeys(changed, value))
    distance = value / 2 if factor == "translation" else 0.0
    canvases = []
    corners = itertools.cycle(itertools.product((-1, 1), repeat=2))
    for image, (y, x) in zip(images, corners, strict=False):
        place = 0.5 + distance * y, 0.5 + distance * x
        canvases.append(transform(image[..., 0], matrix, place))
    return np.stack(canvases)[..., None]


# --- Training and testing -------------------------------------------------------------------------


def placed(data):
    """Plan an evaluation in which each digit is somewhere on the canvas, always at one place."""
    plan = data.evaluation_plan()
    shift = utils.random_stream(0, 0, "affine place").integers(
        -data.max_shift, data.max_shift, plan.shift.shape, np.int32, endpoint=True
    )
    return plan._replace(shift=shift)


def train_and_test(name, values, mnist):
    """Train a network to the accuracy asked for, and test it on all transformed digits.

    Returns:
        dict: the result of `trial.run` with that of `test_transformed`.
    """
    from experiment_lib import trial

    from inputs.pipeline import Examples, split_validation

    size = min(values.train_size or MOST, len(mnist.y_train))
    train_indices, held_out = split_validation(size, seed=0)
    placing = {"padding": PADDING, "max_shift": PADDING}
    data = Examples(mnist.x_train[:size], mnist.y_train[:size], **placing)
    validation, test_data = data.subset(held_out), Examples(mnist.x_test, mnist.y_test, **placing)
    training = config.TrainingConfig(
        seed=values.seed, decay_steps=values.decay_steps, averaging=values.averaging
    )
    architecture = NETWORKS[name].architecture
    if architecture:
        training = training._replace(reconstruction_weight=0.0)
    return trial.run(
        Path(values.output, name),
        lambda: trial.make_network(data.canvas_shape(), architecture),
        data.subset(train_indices),
        test_data,
        training,
        values.epochs,
        placed(test_data),
        trial.Goal(values.accuracy / 100, validation, placed(validation)),
        lambda evaluator: test_transformed(evaluator, mnist),
    )


def test_transformed(evaluator, mnist):
    """Test a network on all transformed digits.

    Returns:
        dict: "affine_right" and "places_right", how many of the digits of `affine_test_images` are
        right; "sweeps", factor -> percent right at each value.
    """
    from inputs.pipeline import Examples

    def count_right(images):
        data = Examples(images, mnist.y_test)
        return int(evaluator.evaluate(data, data.evaluation_plan()).correct.sum())

    def percent_right(factor, value):
        return 100 * count_right(swept_images(mnist.x_test, factor, value)) / len(mnist.y_test)

    return {
        "affine_right": count_right(affine_test_images(mnist.x_test)),
        "places_right": count_right(affine_test_images(mnist.x_test, deformed=False)),
        "sweeps": {
            factor: [percent_right(factor, value) for value in sweep.values]
            for factor, sweep in SWEEPS.items()
        },
    }


# --- Results --------------------------------------------------------------------------------------


def interval(right, n):
    """Return Wilson's 95% confidence interval of a share, in percent."""
    from scipy.stats import binomtest

    bounds = binomtest(right, n).proportion_ci(method="wilson")
    return 100 * bounds.low, 100 * bounds.high


def table(outcomes):
    """Return the table of what `train_and_test` returned for each network, lines of Markdown."""
    lines = [describe(NETWORKS[name], outcome) for name, outcome in outcomes.items()]
    return utils.markdown_table(lines[0], [line.values() for line in lines])


def describe(network, outcome):
    """Return the cells of a Network by their headings."""
    n, right = outcome["images"], outcome["affine_right"]
    low, high = interval(right, n)
    share = f"{100 * right / n:.2f} ({low:.2f} to {high:.2f})"
    return {
        "network": network.title,
        "parameters": f"{outcome['parameters']:,}",
        "epochs": f"{outcome['trained_epochs']:g}",
        "held-out accuracy, %": f"{100 * outcome['held_out_accuracy']:.2f}",
        "test digits placed at random, %": f"{100 * outcome['accuracy']:.2f}",
        "anywhere on the canvas, %": f"{100 * outcome['places_right'] / n:.2f}",
        "of affNIST's distribution, % (95% interval)": share,
        "the paper, affNIST, %": f"{network.paper:g}",
    }


def draw(path, outcomes):
    """Draw the accuracy of each network over the values of each factor."""
    figure, panels = plots.new_figure(len(SWEEPS), width=9, sharey=True)
    for panel, (factor, sweep) in zip(panels, SWEEPS.items(), strict=True):
        for name, outcome in outcomes.items():
            shares = outcome["sweeps"][factor]
            style = {"color": COLORS[name], "label": NETWORKS[name].title}
            panel.plot(sweep.values, shares, "o-", ms=3, **style)
        panel.axvspan(*sweep.in_affnist, color="#e4e6e8", lw=0, label="affNIST's range")
        plots.label_panel(panel, factor.capitalize(), sweep.unit)
    panels[0].set_ylabel("accuracy (%)", fontsize=7)
    panels[0].legend(fontsize=6, frameon=False)
    files.write_png(path, plots.render(figure))


def compare(values):
    """Train and test the chosen networks, print the table, and write the picture and the results.

    The last line says what the transformed digits are, since they are not the affNIST file.
    """
    from experiment_lib.trial import reaches

    mnist = datasets.load_dataset("mnist", values.data_dir)
    outcomes = {name: train_and_test(name, values, mnist) for name in values.networks}
    print("\n" + "\n".join(table(outcomes)))
    output = Path(values.output)
    utils.write_json(output / "affine.json", outcomes)
    draw(output / "affine.png", outcomes)
    for name, outcome in outcomes.items():
        if not reaches(outcome["held_out_accuracy"], values.accuracy / 100):
            epochs = terminal.plural(outcome["trained_epochs"], "epoch")
            print(
                f"\n{NETWORKS[name].title} did not reach {values.accuracy:g}% in {epochs}; to "
                "train longer: a larger --epochs."
            )
    print(
        f"\n{len(mnist.y_test):,} digits of affNIST's distribution made from MNIST's test digits, "
        f"not the affNIST file. Wrote {output / 'affine.json'}, {output / 'affine.png'}"
    )


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, FLAGS, compare))
