"""The paper's table 1: routing iterations, reconstruction, and the convolutional baselines.

    python experiments/table1.py --epochs=3 --seeds=0
    python experiments/table1.py --epochs=3 --seeds=0 --dataset=multi_MNIST --rows=cnn,3-yes

Trains each chosen row with each seed on all training images, shifted by up to 2 pixels (MultiMNIST:
other pairs in each epoch), tests it on all test images, and prints means and standard deviations
next to the paper's. The same command again resumes where it stopped. Writes table1_DATASET.json.
"""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from experiment_lib import flags

import utils
from capsnet_core import config
from inputs import datasets
from runtime.command_line import MOST, Flag, distinct, number, one_of, run_script


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
    flags.TRAIN_SIZE,
    flags.DATA_DIR,
    flags.output("runs/table1"),
]


def make_training(row, seed, overlap, epochs, share):
    """Return the TrainingConfig of a row.

    The learning rate falls over the whole training run as far as it does by default, however few
    the epochs and images are.

    Args:
        row: Row.
        seed: seed of the training run.
        overlap: whether an image shows two digits.
        epochs: to train for.
        share: (images trained on, all training images).
    """
    preset = dict(config.MULTI_MNIST) if overlap else {}
    default_epochs = preset.pop("epoch", config.EPOCHS)
    training = config.TrainingConfig(seed=seed)._replace(**preset)
    used, available = share
    steps = training.decay_steps * epochs * used // (default_epochs * available)
    weight = training.reconstruction_weight if row.reconstructs else 0.0
    return training._replace(decay_steps=max(1, steps), reconstruction_weight=weight)


def run_row(name, seed, values):
    """Train and test a row with a seed; return the result, see `trial.run`."""
    from experiment_lib import trial

    from inputs.pipeline import Examples

    row, mnist = ROWS[name], datasets.load_dataset("mnist", values.data_dir)
    overlap = values.dataset == "multi_MNIST"
    if overlap:
        padding, train_shift, test_shift = config.MULTI_PADDING, *(config.MULTI_SHIFT,) * 2
    else:
        padding, train_shift, test_shift = 0, config.MAX_SHIFT, 0
    size = values.train_size
    train_data = Examples(mnist.x_train[:size], mnist.y_train[:size], padding, train_shift, overlap)
    test_data = Examples(mnist.x_test, mnist.y_test, padding, test_shift, overlap)
    share = len(train_data.labels), len(mnist.y_train)
    settings = {"routing_iterations": row.iterations}
    if name == "cnn":
        settings = {"architecture": "multi" if overlap else "mnist", "n_digits": 1 + overlap}
    return trial.run(
        Path(values.output, f"{values.dataset}_{name}_seed_{seed}"),
        lambda: trial.make_network(train_data.canvas_shape(), **settings),
        train_data,
        test_data,
        make_training(row, seed, overlap, values.epochs, share),
        values.epochs,
    )


def table(results, dataset):
    """Return the table of the results of each row's seeds, lines of Markdown."""
    lines = [describe(ROWS[name], outcomes, dataset) for name, outcomes in results.items()]
    return utils.markdown_table(lines[0], [line.values() for line in lines])


def describe(row, outcomes, dataset):
    """Return the cells of a Row by their headings, from the results of its seeds."""
    mean, deviation = mean_error(outcomes)
    return {
        "method": row.method,
        "routing": row.iterations or ABSENT,
        "reconstruction": {None: ABSENT, True: "yes", False: "no"}[row.reconstructs],
        "parameters": f"{outcomes[0]['parameters']:,}",
        "error here, %": f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.3f}",
        "wrong": ", ".join(str(outcome["wrong"]) for outcome in outcomes),
        "seeds": ", ".join(str(outcome["training"]["seed"]) for outcome in outcomes),
        "epochs": outcomes[0]["epochs"],
        "minutes": ", ".join(f"{outcome['training_seconds'] / 60:.0f}" for outcome in outcomes),
        f"the paper, {dataset}, %": row.paper.get(dataset, ABSENT),
    }


def mean_error(outcomes):
    """Return mean and standard deviation (None for a single one) of the errors in percent."""
    errors = [outcome["error_percent"] for outcome in outcomes]
    return statistics.mean(errors), statistics.stdev(errors) if len(errors) > 1 else None


def train_all(values):
    """Train and test all chosen rows, print the table, and write the results."""
    dataset, results = values.dataset, {}
    for row in values.rows or [name for name in ROWS if dataset in ROWS[name].paper]:
        for seed in values.seeds:
            print(f"{dataset}, row {row}, seed {seed}:", flush=True)
            results.setdefault(row, []).append(run_row(row, seed, values))
    path = Path(values.output, f"table1_{dataset}.json")
    utils.write_json(path, results)
    print("\n" + "\n".join(table(results, dataset)))
    first = next(iter(results.values()))[0]
    print(
        f"\n{first['machine']}, TensorFlow {first['versions']['tensorflow']}; "
        f"{first['images']:,} tested. Wrote {path}"
    )


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, FLAGS, train_all))
