"""The paper's table 1: routing iterations, reconstruction, and the convolutional baselines.

    python experiments/table1.py --epochs=3 --seeds=0
    python experiments/table1.py --epochs=3 --seeds=0 --dataset=multi_MNIST --rows=cnn,3-yes

Trains each chosen row with each seed on all training images, shifted by up to 2 pixels (MultiMNIST:
other pairs in each epoch), tests it on all test images, and prints means and standard deviations
next to the paper's. The same command again resumes where it stopped. Writes table1_DATASET.json and
table1_DATASET.png.
"""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from command_line import DATA_DIR, MOST, Flag, distinct, number, one_of, path_name, run_script

import utils
from capsnet import config
from figures import image_files, plots
from inputs import datasets
from runtime import machine, terminal


class Row(NamedTuple):
    """A row of the paper's table 1."""

    method: str
    iterations: int | None  # routing iterations
    reconstructs: bool | None
    paper: dict  # data set -> test error in percent, and where given the deviation of three trials


ROWS = {
    "cnn": Row("Baseline CNN", None, None, {"MNIST": "0.39", "multi_MNIST": "8.1"}),
    "1-no": Row("CapsNet", 1, False, {"MNIST": "0.34 ± 0.032"}),
    "1-yes": Row("CapsNet", 1, True, {"MNIST": "0.29 ± 0.011", "multi_MNIST": "7.5"}),
    "3-no": Row("CapsNet", 3, False, {"MNIST": "0.35 ± 0.036"}),
    "3-yes": Row("CapsNet", 3, True, {"MNIST": "0.25 ± 0.005", "multi_MNIST": "5.2"}),
}
ABSENT = "–"  # in a cell of the table
CLASSES = 10

FLAGS = [
    Flag(
        "rows",
        None,
        distinct(one_of(ROWS)),
        f"rows to train, of {','.join(ROWS)}; default: all in the paper",
    ),
    Flag(
        "seeds", "0,1,2", distinct(number(int, 0, 2**31 - 1)), "seeds that each row is trained with"
    ),
    Flag("epochs", config.EPOCHS, number(int, 1, MOST), "epochs of each training run"),
    Flag("dataset", "MNIST", one_of(("MNIST", "multi_MNIST")), "MNIST or multi_MNIST"),
    Flag("train_size", None, number(int, 1, MOST), "use only the first N training images"),
    DATA_DIR,
    Flag("output", "runs/table1", path_name, "folder to write to"),
]


def make_network(row, shape, overlap, seed):
    """Create the network of a row.

    Args:
        row: key of ROWS.
        shape: (H, W, C) of the images.
        overlap: whether an image shows two digits.
        seed: seed of the dropout.
    """
    from cnn import CNN

    from model import CapsNet

    conv = machine.fastest_conv()
    if row != "cnn":
        return CapsNet(shape, CLASSES, routing_iterations=ROWS[row].iterations, conv=conv)
    architecture, digits = ("multi", 2) if overlap else ("mnist", 1)
    return CNN(shape, CLASSES, architecture, digits, conv, seed)


def make_training(row, seed, overlap, epochs, share):
    """Return the TrainingConfig of a row.

    The learning rate falls over the whole training as far as it does by default, however few the
    epochs and images are.

    Args:
        row: key of ROWS.
        seed: seed of the training.
        overlap: whether an image shows two digits.
        epochs: to train for.
        share: (images trained on, all training images).
    """
    preset = dict(config.MULTI_MNIST) if overlap else {}
    default_epochs = preset.pop("epoch", config.EPOCHS)
    training = config.TrainingConfig(seed=seed)._replace(**preset)
    used, available = share
    steps = training.decay_steps * epochs * used // (default_epochs * available)
    weight = training.reconstruction_weight if ROWS[row].reconstructs else 0.0
    return training._replace(decay_steps=max(1, steps), reconstruction_weight=weight)


def run_row(row, seed, flags):
    """Train and test a row with a seed; return the result, see `trial.run`."""
    import trial

    from inputs.pipeline import Examples

    mnist = datasets.load_dataset("mnist", flags.data_dir)
    overlap = flags.dataset == "multi_MNIST"
    if overlap:
        padding, train_shift, test_shift = config.MULTI_PADDING, *(config.MULTI_SHIFT,) * 2
    else:
        padding, train_shift, test_shift = 0, config.MAX_SHIFT, 0
    size = flags.train_size
    train_data = Examples(mnist.x_train[:size], mnist.y_train[:size], padding, train_shift, overlap)
    test_data = Examples(mnist.x_test, mnist.y_test, padding, test_shift, overlap)
    share = len(train_data.labels), len(mnist.y_train)
    outcome, _ = trial.run(
        Path(flags.output, f"{flags.dataset}_{row}_seed_{seed}"),
        lambda: make_network(row, train_data.canvas_shape(), overlap, seed),
        train_data,
        test_data,
        make_training(row, seed, overlap, flags.epochs, share),
        flags.epochs,
    )
    return outcome


def table(results, dataset):
    """Return the table of the results, lines of Markdown.

    Args:
        results: dict of row to the results of its seeds.
        dataset: "MNIST" or "multi_MNIST".
    """
    header = [
        "method",
        "routing",
        "reconstruction",
        "parameters",
        "error here, %",
        "wrong",
        "seeds",
        "epochs",
        "minutes",
        f"the paper, {dataset}, %",
    ]
    rows = []
    for name, outcomes in results.items():
        row = ROWS[name]
        mean, deviation = mean_error(outcomes)
        rows.append(
            [
                row.method,
                row.iterations or ABSENT,
                {None: ABSENT, True: "yes", False: "no"}[row.reconstructs],
                f"{outcomes[0]['parameters']:,}",
                f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.3f}",
                ", ".join(str(outcome["wrong"]) for outcome in outcomes),
                ", ".join(str(outcome["training"]["seed"]) for outcome in outcomes),
                outcomes[0]["epochs"],
                ", ".join(f"{outcome['training_seconds'] / 60:.0f}" for outcome in outcomes),
                row.paper.get(dataset, ABSENT),
            ]
        )
    return utils.markdown_table(header, rows)


def mean_error(outcomes):
    """Return mean and standard deviation (None for a single one) of the errors in percent."""
    errors = [outcome["error_percent"] for outcome in outcomes]
    return statistics.mean(errors), statistics.stdev(errors) if len(errors) > 1 else None


def draw(path, results, dataset):
    """Draw the errors here and the paper's as bars."""
    figure, (panel,) = plots.new_figure(1, width=6)
    here, paper = {}, {}  # place of the row -> error
    for place, (name, outcomes) in enumerate(results.items()):
        here[place] = mean_error(outcomes)
        if dataset in ROWS[name].paper:
            paper[place] = float(ROWS[name].paper[dataset].split()[0])
    panel.bar(
        [place - 0.2 for place in here],
        [mean for mean, _ in here.values()],
        0.36,
        yerr=[deviation or 0 for _, deviation in here.values()],
        color=plots.LINE_COLORS[0],
        label="here",
    )
    panel.bar(
        [place + 0.2 for place in paper],
        list(paper.values()),
        0.36,
        color="#b0b0b0",
        label="the paper",
    )
    epochs = terminal.plural(next(iter(results.values()))[0]["epochs"], "epoch")
    plots.label_panel(panel, f"Test error on {dataset}, %, after {epochs} here")
    panel.set_xticks(range(len(results)), [bar_name(ROWS[name]) for name in results])
    panel.grid(visible=False, axis="x")
    panel.legend(fontsize=7, frameon=False)
    image_files.write_png(path, plots.render(figure))


def bar_name(row):
    """Return what is written below the bars of a Row."""
    if row.iterations is None:
        return row.method
    reconstruction = "with" if row.reconstructs else "no"
    return f"{row.method}, routing {row.iterations},\n{reconstruction} reconstruction"


def train_all(flags):
    """Train and test all chosen rows, print the table, and write the picture and the results."""
    dataset, results = flags.dataset, {}
    for row in flags.rows or [name for name in ROWS if dataset in ROWS[name].paper]:
        for seed in flags.seeds:
            print(f"{dataset}, row {row}, seed {seed}:", flush=True)
            results.setdefault(row, []).append(run_row(row, seed, flags))
    path = Path(flags.output, f"table1_{dataset}.json")
    utils.write_json(path, results)
    draw(path.with_suffix(".png"), results, dataset)
    print("\n" + "\n".join(table(results, dataset)))
    first = next(iter(results.values()))[0]
    print(
        f"\n{first['machine']}, TensorFlow {first['versions']['tensorflow']}; "
        f"{first['images']:,} tested. Wrote {path}, {path.with_suffix('.png')}"
    )


def main(argv):
    """Run a command line and return its exit code."""
    return run_script(argv, __doc__, FLAGS, train_all)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
