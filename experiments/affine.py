"""Robustness to affine transformations (the paper's section 5.2).

    python experiments/affine.py

Trains a CapsNet and a convolutional baseline of about its size on MNIST digits placed at random on 40×40
pixels, without any other deformation, each until it has the same accuracy on held-out digits (looked at
twice an epoch), and tests both on digits transformed as those of affNIST are: rotated by up to 20
degrees, sheared by up to 0.2, scaled by 0.8 to 1.2 in each axis, and moved anywhere on the canvas. The
transformed digits are made here from MNIST's test digits by the published description and a fixed seed:
they are of affNIST's distribution, and not the affNIST file. In training the whole 28×28 image stays on
the canvas, in that test only the ink does; so the same places without deformation are tested as well.
Writes affine.json and affine.png.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import trial
from PIL import Image

import utils

CANVAS, MARGIN = 40, 6  # pixels
PAPER = {"capsnet": 79.0, "cnn": 66.0}  # percent of affNIST right, at 99.23% of expanded MNIST
NAMES = {"capsnet": "CapsNet", "cnn": "CNN"}
LIMITS = {"rotation": 20.0, "shear": 0.2, "scale": 0.2}  # degrees; ratio; from 1, in each axis
SWEEPS = {  # translation: from the middle of the canvas, 0, to where the ink is at its edges, 1
    "rotation": (0.0, 20.0, 40.0, 60.0), "shear": (0.0, 0.2, 0.4, 0.6),
    "scale": (0.6, 0.8, 1.0, 1.2), "translation": (0.0, 0.4, 0.7, 1.0),
}
AT_REST = {"rotation": 0.0, "shear": 0.0, "scale": 1.0, "translation": 0.0}


def transform_matrix(rotation, shear, scale_y, scale_x):
    """The 2×2 matrix that rotates (degrees, clockwise on the screen), after a shear and a scaling.

    It takes (x, y) from the middle of a digit to where that point goes.
    """
    angle = math.radians(rotation)
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return rotate @ np.array([[1, shear], [0, 1]]) @ np.diag([scale_x, scale_y])


def transform(image, matrix, place, canvas=CANVAS):
    """A digit (H, W) uint8 transformed about its middle and moved on a canvas of zeros.

    Args:
        matrix: of `transform_matrix`.
        place: (down, right) in [0, 1] each: from the first to the last whole pixel at which all ink
            is on the canvas; digits larger than it stay in its middle.

    Returns uint8 (canvas, canvas).
    """
    height, width = image.shape
    large = 2 * canvas
    # Pillow asks where each output pixel comes from; its coordinates are those of pixels' corners.
    back = np.linalg.inv(matrix)
    offset = np.array([width, height]) / 2 - back @ np.array([large, large]) / 2
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    pixels = np.asarray(Image.fromarray(image).transform(
        (large, large), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))
    result = np.zeros((canvas, canvas), np.uint8)
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if len(rows):
        spans, starts = [], []
        for found, share in zip((rows, columns), place):
            size = found[-1] - found[0] + 1
            if size > canvas:  # its middle
                spans.append(slice(found[0] + (size - canvas) // 2,
                                   found[0] + (size - canvas) // 2 + canvas))
                starts.append(0)
            else:
                spans.append(slice(found[0], found[-1] + 1))
                starts.append(min(int(share * (canvas - size + 1)), canvas - size))
        part = pixels[spans[0], spans[1]]
        result[starts[0]:starts[0] + part.shape[0], starts[1]:starts[1] + part.shape[1]] = part
    return result


def affine_test_images(images, seed=0, deformed=True):
    """Images (N, 28, 28, 1) -> (N, 40, 40, 1) of affNIST's distribution; a function of the seed.

    Not deformed, they are only moved to the same places.
    """
    stream = utils.random_stream(seed, 0, "affine test")
    draws = deformed * stream.uniform(-1, 1, (len(images), 4))
    places = stream.uniform(0, 1, (len(images), 2))
    return np.stack([
        transform(image[..., 0], transform_matrix(
            LIMITS["rotation"] * r, LIMITS["shear"] * s, 1 + LIMITS["scale"] * y,
            1 + LIMITS["scale"] * x), place)
        for image, (r, s, y, x), place in zip(images, draws, places)])[..., None]


def swept_images(images, factor, value):
    """All images with one factor at one value, the others at rest.

    They are in the middle of the canvas; those moved by a translation in turn to its four corners.
    """
    settings = {"rotation": 0.0, "shear": 0.0, "scale_y": 1.0, "scale_x": 1.0}
    distance = value / 2 if factor == "translation" else 0.0
    changed = {"scale": ("scale_y", "scale_x"), "translation": ()}.get(factor, (factor,))
    matrix = transform_matrix(**settings | dict.fromkeys(changed, value))
    return np.stack([
        transform(image[..., 0], matrix, (0.5 + distance * y, 0.5 + distance * x))
        for image, (y, x) in zip(images, itertools.cycle(((-1, -1), (-1, 1), (1, -1), (1, 1))))
    ])[..., None]


def interval(right, n):
    """Wilson's 95% confidence interval of a share, in percent."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half), 100 * (middle + half)


def placed(data):
    """A plan in which each digit lies somewhere on the canvas, the same at each call."""
    plan = data.evaluation_plan()
    shift = utils.random_stream(0, 0, "affine place").integers(
        -data.max_shift, data.max_shift, plan.shift.shape, np.int32, endpoint=True)
    return plan._replace(shift=shift)


def examine(name, flags, mnist):
    """Train one network to the accuracy asked for, and test it on all that is transformed; once."""
    _, model = trial.start()
    from cnn import CNN

    conv = model.fastest_conv()
    size = min(flags.train_size or 10**9, len(mnist.y_train))
    trained, held_out = utils.split_validation(size, 0)
    whole = model.Data(mnist.x_train[:size], mnist.y_train[:size], MARGIN, MARGIN)
    train_data, validation = whole.subset(trained), whole.subset(held_out)
    test_data = model.Data(mnist.x_test, mnist.y_test, MARGIN, MARGIN)
    shape = train_data.canvas_shape()

    def make():
        if name == "cnn":
            return CNN(shape, 10, "affine", conv=conv)
        return model.CapsNet(shape, 10, conv=conv)

    how = model.Training(reconstruction_weight=0.0005 if name == "capsnet" else 0.0)
    outcome, folder = trial.run(
        Path(flags.output, name), make, train_data, test_data, how, flags.epochs, placed(test_data),
        (flags.accuracy / 100, validation, placed(validation)))
    tests = {"affine_right": affine_test_images(mnist.x_test),
             "places_right": affine_test_images(mnist.x_test, deformed=False)}
    basis = {name: hashlib.sha256(images).hexdigest()[:16] for name, images in tests.items()} | {
        factor: list(values) for factor, values in SWEEPS.items()}
    basis["trained_epochs"] = outcome["trained_epochs"]
    kept = folder / "tested.json"
    tested = json.loads(kept.read_text()) if kept.exists() else {}
    if tested.get("basis") != basis:
        tested = {"basis": basis, "sweeps": {}}
    network = make()
    model.load_weights(network, folder / "checkpoint", print)
    on_canvas = model.Data(np.zeros((1, CANVAS, CANVAS, 1), np.uint8), mnist.y_test)
    forward = model.compile_forward(network, on_canvas, True)

    def right(images):
        data = on_canvas._replace(images=images)
        return int(model.evaluate(forward, data, data.evaluation_plan())["correct"].sum())

    n = len(mnist.y_test)
    for what, images in tests.items():
        if what not in tested:
            tested[what] = right(images)
            utils.write_json(kept, tested)
    for factor, values in SWEEPS.items():
        found = tested["sweeps"].setdefault(factor, [])
        for value in values[len(found):]:
            if value == AT_REST[factor] and "at_rest" in tested:  # the same images for each factor
                found.append(tested["at_rest"])
                continue
            print(f"{NAMES[name]}, {factor} {value:g}", flush=True)
            found.append(100 * right(swept_images(mnist.x_test, factor, value)) / n)
            if value == AT_REST[factor]:
                tested["at_rest"] = found[-1]
            utils.write_json(kept, tested)
    return outcome | tested


def draw(path, outcomes):
    figure, panels = utils.new_figure(len(SWEEPS), width=9, sharey=True)
    units = {"rotation": "degrees", "shear": "shear", "scale": "scale of both axes",
             "translation": "from the middle to the edges"}
    ranges = {factor: (0, limit) for factor, limit in LIMITS.items()} | {
        "scale": (1 - LIMITS["scale"], 1 + LIMITS["scale"]), "translation": (0, 1)}
    for panel, (factor, values) in zip(panels, SWEEPS.items()):
        for (name, outcome), color in zip(outcomes.items(), utils.LINE_COLORS):
            panel.plot(values, outcome["sweeps"][factor], "o-", ms=3, color=color,
                       label=NAMES[name])
        panel.axvspan(*ranges[factor], color="#e4e6e8", lw=0, label="affNIST's range")
        utils.label_panel(panel, factor.capitalize(), units[factor])
    panels[0].set_ylabel("% right", fontsize=7)
    panels[0].legend(fontsize=6, frameon=False)
    utils.save_figure(path, figure)


def percent(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}, expected percent, more than 1 and up to 100")
    return value


def main(argv=None):
    parser = trial.Parser(__doc__)
    parser.add_argument("--networks", type=trial.some_of(NAMES), default=list(NAMES),
                        help=f"some of {','.join(NAMES)} (default: both)")
    parser.add_argument("--accuracy", type=percent, default=99.23,
                        help="percent of held-out digits at which training stops (default 99.23, the "
                        "paper's)")
    parser.add_argument("--epochs", type=trial.positive, default=20,
                        help="after which it stops in any case (default 20)")
    parser.add_argument("--train_size", type=trial.positive, help="only the first N images")
    parser.add_argument("--data_dir", default=str(trial.ROOT / "data"))
    parser.add_argument("--output", default="runs/affine", help="folder (default runs/affine)")
    flags = parser.parse_args(argv)
    return trial.report_errors("affine.py", lambda: compare(flags))


def table(outcomes):
    """Lines of Markdown; outcomes: {network: what `examine` returns}."""
    heads = ["network", "parameters", "epochs", "held-out accuracy, %",
             "test digits placed at random, %", "anywhere on the canvas, %",
             "of affNIST's distribution, % (95% interval)", "the paper, affNIST, %"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, outcome in outcomes.items():
        n = outcome["images"]
        low, high = interval(outcome["affine_right"], n)
        lines.append(
            f"| {NAMES[name]} | {outcome['parameters']:,} | {outcome['trained_epochs']:g} "
            f"| {100 * outcome['held_out_accuracy']:.2f} | {100 * outcome['accuracy']:.2f} "
            f"| {100 * outcome['places_right'] / n:.2f} "
            f"| {100 * outcome['affine_right'] / n:.2f} ({low:.2f} to {high:.2f}) "
            f"| {PAPER[name]:g} |")
    return lines


def compare(flags):
    mnist = utils.load_dataset("mnist", flags.data_dir)
    outcomes = {name: examine(name, flags, mnist) for name in flags.networks}
    print("\n" + "\n".join(table(outcomes)))
    output = Path(flags.output)
    utils.write_json(output / "affine.json", outcomes)
    draw(output / "affine.png", outcomes)
    for name, outcome in outcomes.items():
        if not trial.reaches(outcome["held_out_accuracy"], flags.accuracy / 100):
            epochs = outcome["trained_epochs"]
            print(f"\n{NAMES[name]} did not reach {flags.accuracy:g}% in {epochs:g} "
                  f"epoch{'s' * (epochs != 1)}; to go on: a larger --epochs.")
    print(f"\n{len(mnist.y_test):,} digits of affNIST's distribution made from MNIST's test digits, not the affNIST file. "
          f"Wrote {output / 'affine.json'}, {output / 'affine.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
