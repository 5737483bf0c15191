"""The table of results in the docs, from the files in results/.

    python benchmarks/results.py

Each file is the test.json of one run (`--train --test` in a new clone, copied from LOGDIR/RUN).
Runs of one command, whatever its seed, make a row: mean and standard deviation of their test
errors.
"""

import json
import re
import statistics
import sys

import timing

from capsnet import errors

FOLDER = timing.ROOT / "results"
HEADER = [
    "command",
    "seeds",
    "wrong",
    "test error, %",
    "the paper, %",
    "best replication, %",
    "minutes of training",
    "date",
]
# Test errors in percent of the paper, and the lowest of a public replication that does not choose
# its epoch on test images, in the order of the table.
REFERENCES = {
    "mnist": ("0.25 ± 0.005", "0.31"),
    "multi_mnist": ("5.2", "none known"),
}


def command_of(result):
    """Return the command as a user types it, without the seed."""
    words = re.sub(r" --seed[= ]\d+", "", result["command"])
    return re.sub(r"^\S*main\.py", "python main.py", words)


def place(runs):
    """Return what to sort the runs of a command by: the order of REFERENCES, the largest error."""
    datasets, dataset = list(REFERENCES), runs[0]["dataset"]
    number = datasets.index(dataset) if dataset in datasets else len(datasets)
    return number, -mean_error(runs)


def rows(results):
    """Return a row for each command, MNIST first, and there the largest error.

    Args:
        results: list of the contents of test.json.
    """
    groups = {}
    for result in sorted(results, key=lambda run: run["seed"]):
        groups.setdefault(command_of(result), []).append(result)
    ordered = sorted(groups.items(), key=lambda group: place(group[1]))
    return [describe(command, runs) for command, runs in ordered]


def mean_error(runs):
    """Return the mean test error of runs, in percent."""
    return statistics.mean(run["error_percent"] for run in runs)


def describe(command, runs):
    """Return the cells of a command's row."""
    error = f"{mean_error(runs):.2f}"
    if len(runs) > 1:
        deviation = statistics.stdev(run["error_percent"] for run in runs)
        error = f"{mean_error(runs):.3f} ± {deviation:.3f}"
    seconds = (run["training_seconds"] for run in runs)  # older runs do not say it: None
    return [
        f"`{command}`",
        ", ".join(str(run["seed"]) for run in runs),
        ", ".join(f"{run['wrong']:,}" for run in runs) + f" of {runs[0]['images']:,}",
        error,
        *REFERENCES.get(runs[0]["dataset"], ("–", "–")),
        ", ".join(f"{each / 60:.0f}" if each else "–" for each in seconds),
        ", ".join(sorted({run["date"][:10] for run in runs})),
    ]


def print_results(_):
    """Print the table, and what the results were made with."""
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    if not results:
        raise errors.UserError(f"no results in {FOLDER}; put the test.json of a run there")
    timing.print_table(HEADER, rows(results))
    sources = {
        f"{run['machine']}, Python {run['versions']['python']}, TensorFlow "
        f"{run['versions']['tensorflow']}"
        for run in results
    }
    print("; ".join(sorted(sources)))


if __name__ == "__main__":
    sys.exit(timing.run(sys.argv, __doc__, print_results, starts_tensorflow=False))
