"""The README's table of results, made from the files in results/.

    python benchmarks/results.py

Each file is the test.json of one run (`--train --test` in a new clone, copied from LOGDIR/RUN). Runs of
the same command but for its seed make a row: mean and standard deviation of their test errors.
"""

import json
import re
import statistics
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "results"


def command_of(result):
    """The command as a user types it, without the seed."""
    words = re.sub(r" --seed[= ]\d+", "", result["command"])
    return re.sub(r"^\S*main\.py", "python main.py", words)


def rows(results):
    """For each command, by error: what the table says of it."""
    groups = {}
    for result in results:
        groups.setdefault(command_of(result), []).append(result)
    for command, runs in sorted(groups.items(), key=lambda item: -statistics.mean(
            run["error_percent"] for run in item[1])):
        runs.sort(key=lambda run: run["seed"])
        errors = [run["error_percent"] for run in runs]
        error = (f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}" if len(runs) > 1
                 else f"{errors[0]:.2f}")
        minutes = [run["training_seconds"] / 60 for run in runs if run["training_seconds"]]
        yield [f"`{command}`", ", ".join(str(run["seed"]) for run in runs),
               ", ".join(f"{run['wrong']:,}" for run in runs) + f" of {runs[0]['images']:,}",
               error, ", ".join(f"{m:.0f}" for m in minutes),
               ", ".join(sorted({run["date"][:10] for run in runs}))]


def main():
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    if not results:
        print(f"no results in {FOLDER}; put the test.json of a run there", file=sys.stderr)
        return 1
    table = [["command", "seeds", "wrong", "test error, %", "minutes of training", "date"],
             ["---"] * 6, *rows(results)]
    for row in table:
        print("| " + " | ".join(row) + " |")
    print("\n" + "; ".join(sorted({
        f"{run['machine']}, Python {run['versions']['python']}, TensorFlow "
        f"{run['versions']['tensorflow']}" for run in results})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
