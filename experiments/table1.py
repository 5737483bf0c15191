"""The paper's table 1: routing iterations, reconstruction, and the convolutional baselines.

    python experiments/table1.py --epochs=3 --seeds=0
    python experiments/table1.py --epochs=3 --seeds=0 --dataset=multi_MNIST --rows=cnn,3-yes

Trains each chosen row with each seed on all training images, shifted by up to 2 pixels (MultiMNIST: pairs
drawn anew in each epoch), tests it on all test images, and prints means and standard deviations beside
the paper's. Started again it goes on where it stopped. Writes table1_DATASET.json and .png.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

import trial

import utils

# Row: method, routing iterations, whether it reconstructs, the paper's error in percent on MNIST and
# on MultiMNIST (mean and, where it says so, standard deviation of three trials).
ROWS = {
    "cnn": ("Baseline CNN", None, None, "0.39", "8.1"),
    "1-no": ("CapsNet", 1, False, "0.34 ± 0.032", "–"),
    "1-yes": ("CapsNet", 1, True, "0.29 ± 0.011", "7.5"),
    "3-no": ("CapsNet", 3, False, "0.35 ± 0.036", "–"),
    "3-yes": ("CapsNet", 3, True, "0.25 ± 0.005", "5.2"),
}


def run_row(row, seed, flags):
    """The result of one training; see `trial.run`."""
    _, model = trial.start()
    from cnn import CNN

    import main as main_module  # `main` is this script's own

    mnist = utils.load_dataset("mnist", flags.data_dir)
    overlap = flags.dataset == "multi_MNIST"
    margin, size = 4 * overlap, flags.train_size or None
    train_data = model.Data(mnist.x_train[:size], mnist.y_train[:size], margin,
                            4 if overlap else 2, overlap)
    test_data = model.Data(mnist.x_test, mnist.y_test, margin, margin, overlap)
    shape = train_data.canvas_shape()
    _, iterations, reconstructs, *_ = ROWS[row]

    def make():
        if row == "cnn":
            return CNN(shape, 10, "multi" if overlap else "mnist", 1 + overlap,
                       model.fastest_conv(), seed)
        return model.CapsNet(shape, 10, routing_iterations=iterations,
                             conv=model.fastest_conv())

    # However few epochs and images: the rate falls as far as it does by default in all of them.
    settings = {row[0]: row[1] for row in main_module.FLAGS["Training"]} | (
        main_module.MULTI_MNIST if overlap else {})
    how = model.Training(
        seed=seed, batch_size=settings["batch_size"], averaging=settings["averaging"],
        decay_steps=max(1, settings["decay_steps"] * flags.epochs * len(train_data.labels)
                        // (settings["epoch"] * len(mnist.y_train))),
        reconstruction_weight=settings["reconstruction_weight"] if reconstructs else 0.0)
    folder = Path(flags.output, f"{flags.dataset}_{row}_seed_{seed}")
    return trial.run(folder, make, train_data, test_data, how, flags.epochs)[0]


def table(results, dataset):
    """Lines of Markdown; results: {row: [outcome of each seed]}."""
    heads = ["method", "routing", "reconstruction", "parameters", "error here, %", "wrong", "seeds",
             "epochs", "minutes", f"the paper, {dataset}, %"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row, outcomes in results.items():
        method, iterations, reconstructs, *paper = ROWS[row]
        errors = [outcome["error_percent"] for outcome in outcomes]
        spread = f" ± {statistics.stdev(errors):.3f}" if len(errors) > 1 else ""
        cells = [method, iterations or "–", {None: "–", True: "yes", False: "no"}[reconstructs],
                 f"{outcomes[0]['parameters']:,}", f"{statistics.mean(errors):.2f}{spread}",
                 ", ".join(str(outcome["wrong"]) for outcome in outcomes),
                 ", ".join(str(outcome["training"]["seed"]) for outcome in outcomes),
                 outcomes[0]["epochs"],
                 ", ".join(f"{outcome['training_seconds'] / 60:.0f}" for outcome in outcomes),
                 paper[dataset == "multi_MNIST"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def draw(path, results, dataset):
    """Errors here and in the paper as bars."""
    figure, (panel,) = utils.new_figure(1, width=6)
    here, there = "here", "the paper"  # each in the legend once
    for place, (row, outcomes) in enumerate(results.items()):
        errors = [outcome["error_percent"] for outcome in outcomes]
        spread = statistics.stdev(errors) if len(errors) > 1 else None
        panel.bar(place - 0.2, statistics.mean(errors), 0.36, yerr=spread,
                  color=utils.LINE_COLORS[0],
                  label=here)
        here = None
        paper = ROWS[row][3 + (dataset == "multi_MNIST")]
        if paper != "–":
            panel.bar(place + 0.2, float(paper.split()[0]), 0.36, color="#b0b0b0", label=there)
            there = None
    names = [f"CapsNet, routing {row[0]},\n{'with' if 'yes' in row else 'no'} reconstruction"
             if row != "cnn" else "Baseline CNN" for row in results]
    epochs = next(iter(results.values()))[0]["epochs"]
    utils.label_panel(panel, f"Test error on {dataset}, %, after {epochs} epoch{'s' * (epochs > 1)} here")
    panel.set_xticks(range(len(names)), names)
    panel.grid(visible=False, axis="x")
    panel.legend(fontsize=7, frameon=False)
    utils.save_figure(path, figure)


def numbers(text):
    found = [int(word) for word in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else []
    if not found or len(set(found)) < len(found) or max(found) >= 2**31:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected different numbers below {2**31:,}, such as 0,1,2")
    return found


def main(argv=None):
    parser = trial.Parser(__doc__)
    parser.add_argument("--rows", type=trial.some_of(ROWS), help=f"some of {','.join(ROWS)} (default: all that the "
                        "paper has)")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="default 0,1,2")
    parser.add_argument("--epochs", type=trial.positive, default=10, help="default 10")
    parser.add_argument("--dataset", choices=("MNIST", "multi_MNIST"), default="MNIST")
    parser.add_argument("--train_size", type=trial.positive, help="only the first N training images")
    parser.add_argument("--data_dir", default=str(trial.ROOT / "data"))
    parser.add_argument("--output", default="runs/table1", help="folder (default runs/table1)")
    flags = parser.parse_args(argv)
    column = 3 + (flags.dataset == "multi_MNIST")
    chosen = flags.rows or [row for row, cells in ROWS.items() if cells[column] != "–"]
    return trial.report_errors("table1.py", lambda: train_all(chosen, flags))


def train_all(chosen, flags):
    results = {}
    for row in chosen:
        for seed in flags.seeds:
            print(f"{flags.dataset}, row {row}, seed {seed}:", flush=True)
            results.setdefault(row, []).append(run_row(row, seed, flags))
    path = Path(flags.output, f"table1_{flags.dataset}.json")
    utils.write_json(path, results)
    draw(path.with_suffix(".png"), results, flags.dataset)
    some = next(iter(results.values()))[0]
    print("\n" + "\n".join(table(results, flags.dataset)))
    print(f"\n{some['machine']}, TensorFlow {some['versions']['tensorflow']}; {some['images']:,} "
          f"tested. Wrote {path}, {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
