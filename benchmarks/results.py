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

from benchmark_lib import timing

from capsnet_core import errors
from runtime.command_line import run_script

FOLDER = timing.ROOT / "results"
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
    """Return a row for each command from the contents of test.json: MNIST, largest error first."""
    groups = {}
    for result in sorted(results, key=lambda run: run["seed"]):
        groups.setdefault(command_of(result), []).append(result)
    ordered = sorted(groups.items(), key=lambda group: place(group[1]))
    return [describe(command, runs) for command, runs in ordered]


def mean_error(runs):
    """Return the mean test error of runs, in percent."""
    return statistics.mean(run["error_percent"] for run in runs)


def describe(command, runs):
    """Return the cells of the runs of a command, by their headings."""
    error = f"{mean_error(runs):.2f}"
    if len(runs) > 1:
        deviation = statistics.stdev(run["error_percent"] for run in runs)
        error = f"{mean_error(runs):.3f} ± {deviation:.3f}"
    seconds = (run["training_seconds"] for run in runs)  # older runs do not say it: None
    paper, replication = REFERENCES.get(runs[0]["dataset"], ("–", "–"))
    return {
        "command": f"`{command}`",
        "seeds": ", ".join(str(run["seed"]) for run in runs),
        "wrong": ", ".join(f"{run['wrong']:,}" for run in runs) + f" of {runs[0]['images']:,}",
        "test error, %": error,
        "the paper, %": paper,
        "best replication, %": replication,
        "minutes of training": ", ".join(f"{s / 60:.0f}" if s else "–" for s in seconds),
        "date": ", ".join(sorted({run["date"][:10] for run in runs})),
    }


def print_results(_):
    """Print the table, and what the results were made with."""
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    if not results:
        raise errors.UserError(f"no results in {FOLDER}; put the test.json of a run there")
    timing.print_table(rows(results))
    sources = {
        f"{run['machine']}, Python {run['versions']['python']}, TensorFlow "
        f"{run['versions']['tensorflow']}"
        for run in results
    }
    print("; ".join(sorted(sources)))


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, [], print_results, starts_tensorflow=False))
