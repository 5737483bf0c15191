"""What routing does from iteration to iteration (the paper's appendix A, figure A.1).

    python experiments/routing.py

For a trained network and all test images: how much the routing logits b_ij change in each
iteration, and, beyond the paper, the entropy of the coupling coefficients c_ij over the upper
capsules j. Writes routing.png and routing.json.
"""

import sys
from pathlib import Path

import numpy as np
from experiment_lib import flags

import utils
from capsnet_core import errors
from figures import files, plots
from inputs import datasets
from runtime import machine
from runtime.command_line import MOST, Flag, number, path_name, run_script

ITERATIONS, IMAGES, CLASSES = 10, 10_000, 10
BATCH_SIZE = 100
FLAGS = [
    Flag("iterations", ITERATIONS, number(int, 1, 100), "routing iterations to follow, 1 to 100"),
    Flag(
        "checkpoint",
        None,
        path_name,
        "folder of a CapsNet trained on MNIST; default: the weights that come with the program",
    ),
    flags.output("runs/routing"),
    flags.DATA_DIR,
    Flag("images", IMAGES, number(int, 1, MOST), "use only the first N test images"),
]
ADVICE = dict.fromkeys(
    (errors.NoCheckpoint, errors.DamagedCheckpoints), "give the folder of a trained network"
)


def measure(u_hat, iterations):
    """Route votes and measure each iteration of procedure 1.

    Args:
        u_hat: (B, J, I, D), the votes.
        iterations: number of iterations.

    Returns:
        For each iteration the mean |change| of the logits; for each the mean entropy in bits of the
        coupling coefficients; and the upper capsules (B, J, D).
    """
    import tensorflow as tf

    import ops

    changes, entropies = [], []

    def record(c, v):  # (B, J, 1, I), (B, J, 1, D)
        change = ops.agreement(v, u_hat)  # line 7, of the last iteration too
        changes.append(float(tf.reduce_mean(tf.abs(change))))
        bits = -tf.reduce_sum(c * tf.math.log(c + 1e-30), axis=1) / np.log(2)
        entropies.append(float(tf.reduce_mean(bits)))

    v = ops.routing(u_hat, iterations, on_iteration=record)
    return changes, entropies, v


def load_network(image_shape, checkpoint):
    """Return a trained network and the metadata of its weights.

    Args:
        image_shape: (H, W, C).
        checkpoint: folder, None for the weights that come with the program.

    Raises:
        UserError: the weights are damaged, or of another network or data set.
    """
    import model
    from commands.weights import assign, config_of, read_exported
    from training.checkpoints import load_weights, newest_metadata

    folder = checkpoint or utils.ROOT / "pretrained" / "mnist"
    if checkpoint:
        metadata = newest_metadata(folder)
    else:
        metadata, values = read_exported(folder)
    config, trained = config_of(metadata, folder), metadata["training"].get("dataset", "mnist")
    found = config.network, trained, tuple(config.image_shape)
    if found != ("capsnet", "mnist", tuple(image_shape)):
        raise errors.UserError(
            f"{folder} holds a {config.network} for {trained} of {config.image_shape}, expected a "
            f"capsnet for mnist of {image_shape}"
        )
    network = model.build(config, conv=machine.fastest_conv())
    if checkpoint:
        return network, load_weights(network, folder, print)
    assign(network.variables, values, folder)
    return network, metadata


def measure_images(network, images, iterations):
    """Measure routing over all images (N, H, W, C) uint8; return means as (2, iterations)."""
    import ops

    totals = np.zeros((2, iterations))
    spectra = network.conv1.spectrum(), network.primary.spectrum()
    for start in range(0, len(images), BATCH_SIZE):
        part = images[start : start + BATCH_SIZE].astype(np.float32) / 255
        u = network.primary(network.conv1(part, spectra[0]), spectra[1])
        u_hat = ops.votes(u, network.digits.W.value)
        changes, entropies, _ = measure(u_hat, iterations)
        totals += len(part) * np.array([changes, entropies])
    return totals / len(images)


def table(changes, entropies):
    """Return the table of an experiment, lines of Markdown."""
    header = ["iteration", "mean change of a logit", "entropy of the couplings, bits"]
    rows = [
        (iteration, f"{change:.5f}", f"{entropy:.4f}")
        for iteration, (change, entropy) in enumerate(zip(changes, entropies, strict=True), 1)
    ]
    return utils.markdown_table(header, rows)


def draw(path, changes, entropies):
    """Draw the changes and the entropies over the iterations."""
    figure, (left, right) = plots.new_figure(2)
    first, second = plots.LINE_COLORS
    iterations = np.arange(1, len(changes) + 1)
    left.plot(iterations, changes, "o-", color=first, ms=3)
    plots.label_panel(left, "Mean change of a routing logit", "iteration")
    right.plot(iterations, entropies, "o-", color=second, ms=3)
    right.axhline(np.log2(CLASSES), color="#b0b0b0", lw=0.8, ls="--", label="all couplings equal")
    right.legend(fontsize=7, frameon=False)
    plots.label_panel(right, "Entropy of the couplings, bits", "iteration")
    files.write_png(path, plots.render(figure))


def watch(values):
    """Measure routing, print the table, and write the picture and the figures."""
    mnist = datasets.load_dataset("mnist", values.data_dir)
    images = mnist.x_test[: values.images]
    network, metadata = load_network(images.shape[1:], values.checkpoint)
    changes, entropies = measure_images(network, images, values.iterations)
    print(
        f"{len(images):,} test images, weights of step {metadata['step']:,}; entropy at most "
        f"{np.log2(CLASSES):.3f} bits\n"
    )
    print("\n".join(table(changes, entropies)))
    output = Path(values.output)
    draw(output / "routing.png", changes, entropies)
    result = {
        "changes": changes,
        "entropies_bits": entropies,
        "images": len(images),
        "step": metadata["step"],
        "training": metadata["training"],
    }
    utils.write_json(output / "routing.json", result)
    print(f"\nWrote {output / 'routing.png'}, {output / 'routing.json'}")


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, FLAGS, watch, ADVICE))
