"""The pictures of the documentation, drawn again.

    python experiments/draw_docs.py

Draws what the weights that come with the program give (all 10,000 test images and 10,000 pairs of
them are tested), and what results/experiments and the tables of docs/performance.md hold. Runs
docs/tour.ipynb and saves it with its outputs. The learning curve and TensorBoard need whole
training runs; docs/results.md and docs/usage.md have their commands.

A dimension of a capsule gets its name by measurement. Slant, thickness, width, height and position
of the ink are measured in the reconstructions while one dimension is changed. A name goes to the
dimension that changes this property much, compared with how much it differs between test digits of
the class, and the others little, as long as the network still reads the digit. Among the first test
images of each class, those are shown whose dimensions fit their names best.
"""

import csv
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from experiment_lib import flags

import utils
from capsnet_core.errors import UserError
from figures import examples, files, pages, plots, tweaks
from inputs import datasets
from runtime import terminal
from runtime.command_line import run_script

SHOWN = 3  # digits in the animation
TRIED = 10  # test images of a class, one of which may be shown
LEGIBLE = 0.5  # least length of the capsule of a digit that can be read
PROPERTIES = ("slant", "thickness", "width", "height", "position")
RIGHT, WRONG = 12, 8  # examples in the picture of reconstructions
NARROW = 24  # pixels between the images of the animation
MEASURED = 300  # test digits of a class, for the spread of a property
# What main.py writes -> its name here.
SINGLE = {
    f"{name}.png": f"{name}.png"
    for name in ("confusion_matrix", "misclassified", "capsule_lengths", "predictions")
}
PAIRS = {"multi_MNIST.png": "multi_MNIST.png", "predictions.png": "pair_predictions.png"}
TOUR = utils.ROOT / "docs" / "tour.ipynb"
RESULTS = utils.ROOT / "results" / "experiments"
FLAGS = [flags.output(str(utils.ROOT / "assets")), flags.DATA_DIR]


# --- Properties of ink ----------------------------------------------------------------------------


def measure(images):
    """Measure the properties of the ink of images.

    Args:
        images: (..., H, W), light ink on a dark background.

    Returns:
        (..., 5), in the order of PROPERTIES: the shear, positive if the upper end leans to the
        right; the mean width of the strokes in pixels; the standard deviations of the ink across,
        without the slant, and down; its mean place across.
    """
    images = np.asarray(images, np.float64)
    y, x = np.mgrid[: images.shape[-2], : images.shape[-1]]
    total = images.sum((-1, -2)) + 1e-9

    def mean(values):
        return (images * values).sum((-1, -2)) / total

    place = mean(x)
    dy, dx = y - mean(y)[..., None, None], x - place[..., None, None]
    down, across, both = mean(dy * dy) + 1e-9, mean(dx * dx), mean(dy * dx)
    # A stroke of width w and length n has n * w ink and edges of 2 * n.
    edges = sum(np.abs(np.diff(images, axis=axis)).sum((-1, -2)) for axis in (-1, -2))
    width = np.sqrt(np.maximum(across - both**2 / down, 0))
    parts = -both / down, 2 * total / (edges + 1e-9), width, np.sqrt(down), place
    return np.stack(parts, axis=-1)


def name_dimensions(swept, spread, legible):
    """Find the dimension of a capsule for each property.

    Args:
        swept: (dims, steps, H, W), reconstructions while each dimension is changed.
        spread: (5,), how much each property differs between images of the class.
        legible: (dims,), whether the digit can be read however the dimension is changed; another
            one gets no name if there are enough.

    Returns:
        A different dimension for each of PROPERTIES, and how well the worst of them fits its name.
    """
    from scipy.optimize import linear_sum_assignment

    measured = measure(swept)
    change = (measured[:, -1] - measured[:, 0]) / spread  # (dims, 5)
    # Large if a dimension changes this property much and the others little.
    score = change**2 / (np.linalg.norm(change, axis=1, keepdims=True) + 1e-9)
    score[~legible] = 0
    dimensions, properties = linear_sum_assignment(-score)
    return dimensions[np.argsort(properties)], score[dimensions, properties].min()


def spread_of(images):
    """Return how much each property differs between images (N, H, W) of a class that are shifted.

    MNIST's digits are centered; those of a training run are shifted by whole pixels, from -2 to 2.
    """
    shifts = np.array([0, 0, 0, 0, np.var(np.arange(-2, 3))])
    return np.sqrt(measure(images).var(axis=0) + shifts)


# --- Pictures of the pretrained network -----------------------------------------------------------


class Sweep(NamedTuple):
    """A digit, and the dimensions of its capsule that have a name."""

    number: int  # the test image's
    swept: np.ndarray  # (dims, S, H, W, C), reconstructions while each dimension is changed
    dimensions: np.ndarray  # (5,), one for each of PROPERTIES
    fit: float  # how well the worst of them fits its name


def sweep_digit(network, mnist, digit):
    """Return the Sweep that fits best of the first TRIED test images of a class."""
    of_class = np.flatnonzero(mnist.y_test == digit)
    numbers = of_class[:TRIED]
    _, capsules = network(mnist.x_test[numbers] / np.float32(255))
    swept = np.asarray(network.tweak(np.asarray(capsules), np.full(len(numbers), digit)))
    lengths, _ = network(swept[:, :, [0, -1]].reshape(-1, *swept.shape[3:]))
    lengths = np.asarray(lengths).reshape(len(swept), len(numbers), 2, -1)
    is_longest = lengths.argmax(axis=-1) == digit
    legible = (is_longest & (lengths[..., digit] > LEGIBLE)).all(axis=-1)  # (dims, images)
    spread = spread_of(mnist.x_test[of_class[:MEASURED], ..., 0] / 255)
    sweeps = []
    for image, number in enumerate(numbers):
        named = name_dimensions(swept[:, image, ..., 0], spread, legible[:, image])
        sweeps.append(Sweep(number, swept[:, image], *named))
    return max(sweeps, key=lambda sweep: sweep.fit)


def draw_capsules(network, mnist, output):
    """Draw digits with the named dimensions of their capsules changed; return the files."""
    from model import TWEAKS

    sweeps = [sweep_digit(network, mnist, digit) for digit in range(len(mnist.class_names))]
    best = sorted(sweeps, key=lambda sweep: sweep.fit, reverse=True)[:SHOWN]
    shown = sorted(best, key=lambda sweep: mnist.y_test[sweep.number])
    captions = [
        [
            ("original", f"no. {sweep.number}"),
            *((name, f"dim {d}") for name, d in zip(PROPERTIES, sweep.dimensions, strict=True)),
        ]
        for sweep in shown
    ]
    columns = np.stack([sweep.swept[sweep.dimensions] for sweep in shown])
    originals = mnist.x_test[[sweep.number for sweep in shown]]
    sweep = draw_sweep(originals, columns, TWEAKS, captions)
    files.write_gif(output / "sweep.gif", sweep)
    first = best[0]
    rows = [f"{name} (dim {d})" for name, d in zip(PROPERTIES, first.dimensions, strict=True)]
    name = mnist.class_names[mnist.y_test[first.number]]
    arguments = first.swept[first.dimensions], TWEAKS, name, rows
    files.write_png(output / "overview.png", tweaks.draw_tweak_overview(*arguments))
    return [output / "sweep.gif", output / "overview.png"]


def draw_sweep(originals, images, deltas, captions):
    """Draw digits with chosen dimensions of their capsules changed, a page for each step.

    Args:
        originals: (digits, H, W, C), the images that the network saw.
        images: (digits, columns, steps, H, W, C), reconstructions.
        deltas: (steps,), what was added to the dimension.
        captions: the lines of text of each digit's original and columns, (digits, 1 + columns),
            as many for each.

    Returns:
        The pixels of each page, uint8 (H, W, 3).
    """
    digits, columns = images.shape[:2]
    lines = [[(line, pages.INK) for line in cell] for row in captions for cell in row]
    note = "each column changes another dimension"
    drawn = []
    for step, delta in enumerate(deltas):
        title = f"One dimension of the digit's capsule, changed by {tweaks.signed(delta)}"
        parts = utils.to_uint8(originals)[:, None], utils.to_uint8(images[:, :, step])
        tiles = np.concatenate(parts, axis=1)
        tiles = tiles.reshape(digits * (1 + columns), 1, 1, *tiles.shape[2:])
        drawn.append(pages.draw_tiles(title, note, tiles, lines, 1 + columns, gap=NARROW))
    return drawn


def run_main(words, data_dir, folder):
    """Run main.py; its pictures go to a folder, and its results to logs/ in it."""
    command = f"main.py {shlex.join(words)}"
    words = [
        *words,
        f"--data_dir={Path(data_dir).resolve()}",
        f"--sample_dir={folder}",
        f"--logdir={folder}/logs",
    ]
    if subprocess.run([sys.executable, "main.py", *words], cwd=utils.ROOT).returncode:
        raise UserError(f"{command} failed, its message is above")


def copy_pictures(folder, pictures, output):
    """Copy pictures, a dict of name to new name, from one folder to another; return the files."""
    for written, name in pictures.items():
        shutil.copy(Path(folder, written), output / name)
    return [output / name for name in pictures.values()]


def draw_single(data_dir, output):
    """Test and predict with the included weights for single digits.

    Returns:
        The pictures, and the numbers of the test images that are wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_main(["--test", "--pretrained", "--predict=assets/digits/*.png"], data_dir, folder)
        pictures = copy_pictures(folder, SINGLE, output)
        table = Path(folder, "logs", "mnist_pretrained", "predictions.csv")
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    wrong = [int(row["number"]) for row in rows if row["label"] != row["prediction"]]
    return pictures, wrong


def draw_pairs(data_dir, output):
    """Test and predict with the included weights for overlapping digits; return the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--test", "--multi_MNIST", "--pretrained", "--predict=assets/pairs/*.png"]
        run_main(words, data_dir, folder)
        return copy_pictures(folder, PAIRS, output)


def draw_reconstructions(network, mnist, wrong, path):
    """Draw the first right test images and the first wrong ones with their reconstructions."""
    from commands.pictures import outputs_of
    from inputs.pipeline import Examples

    right = [number for number in range(len(mnist.y_test)) if number not in set(wrong)][:RIGHT]
    chosen = right + wrong[:WRONG]
    data = Examples(mnist.x_test, mnist.y_test)
    outputs, labels = outputs_of(network, data, data.evaluation_plan().take(np.array(chosen)))
    title = f"Reconstructions of the first {len(right)} right and {len(chosen) - len(right)} wrong"
    title = f"{title} test images"
    page = examples.draw_reconstructions(outputs, labels, mnist.class_names, title)
    files.write_png(path, page)


# --- The tour -------------------------------------------------------------------------------------


def run_tour(path):
    """Run a notebook and return it with its outputs, without traces of the run.

    It runs without ipywidgets: sliders only work while it runs, a saved picture remains.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    without = nbformat.v4.new_code_cell("import sys\nsys.modules['ipywidgets'] = None")
    notebook.cells.insert(0, without)
    place = {"metadata": {"path": str(Path(path).parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    notebook.cells.pop(0)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count, cell.metadata = number, {}  # without the times
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def save_tour(path):
    """Run the notebook and write it with its outputs."""
    import nbformat

    text = nbformat.writes(run_tour(path))
    with utils.atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


# --- Pictures of results --------------------------------------------------------------------------


def read_table(text, beginning):
    """Return the rows of a Markdown table as dicts, by the beginning of its first line."""
    lines = text[text.index(beginning) :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def draw_speed(page, path):
    """Draw the tables of docs/performance.md that compare this tool with PyTorch as bars."""
    text, panels = page.read_text(encoding="utf-8"), []
    for title, first in (
        ("Training step", "train step, with deformation"),
        ("Inference", "inference"),
    ):
        head = f"{first}, batch 64"
        try:
            rows = read_table(text, f"| {head} |")
        except ValueError:
            raise UserError(f"{page} lacks a table to draw, expected both comparisons") from None
        rows = [row for row in rows if row[head] != "this tool, mixed_bfloat16"]
        names = [textwrap.fill(row[head], 30) for row in rows]
        panels.append((f"{title}, 64 images", names, [_number(row["ms"]) for row in rows], "ms"))
    files.write_png(path, draw_bars(panels))


def draw_bars(panels):
    """Draw horizontal bars with their values, in panels side by side; the last is this tool's own.

    Args:
        panels: list of (title, names, values, unit).

    Returns:
        The pixels, uint8 (H, W, 3).
    """
    most = max(len(names) for _, names, *_ in panels)
    figure, axes = plots.new_figure(len(panels), width=9, height=0.7 + 0.36 * most)
    for axis, (title, names, values, unit) in zip(axes, panels, strict=True):
        colors = ["#b0b0b0"] * (len(values) - 1) + [plots.LINE_COLORS[0]]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{value:,g}" for value in values], padding=3, fontsize=7)
        plots.label_panel(axis, title, unit)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(values))
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", labelsize=7, length=0)
    return plots.render(figure)


def _number(cell):
    return float(cell.replace(",", ""))


def draw_results(output):
    """Draw the results of the experiments and of the benchmarks; return the files."""
    import affine
    import routing

    outcomes = json.loads((RESULTS / "affine.json").read_text())
    affine.draw(output / "affine.png", outcomes)
    watched = json.loads((RESULTS / "routing.json").read_text())
    routing.draw(output / "routing.png", watched["changes"], watched["entropies_bits"])
    draw_speed(utils.ROOT / "docs" / "performance.md", output / "speed.png")
    return [output / f"{name}.png" for name in ("affine", "routing", "speed")]


def draw_all(values):
    """Draw all pictures."""
    import routing

    output = Path(values.output)
    output.mkdir(parents=True, exist_ok=True)
    terminal.report_written(draw_results(output))
    mnist = datasets.load_dataset("mnist", values.data_dir)
    network, _ = routing.load_network(mnist.x_test.shape[1:], None)
    terminal.report_written(draw_capsules(network, mnist, output))
    files, wrong = draw_single(values.data_dir, output)
    draw_reconstructions(network, mnist, wrong, output / "reconstruction.png")
    terminal.report_written(
        [*files, output / "reconstruction.png", *draw_pairs(values.data_dir, output)]
    )
    save_tour(TOUR)
    terminal.report_written([TOUR])


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, FLAGS, draw_all))
