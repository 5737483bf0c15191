"""What routing does from iteration to iteration (the paper's appendix A, figure A.1).

    python experiments/routing.py

For a trained network and all test images: how much the routing logits b_ij change in each iteration,
and, beyond the paper, the entropy of the coupling coefficients c_ij over the upper capsules j. Writes
routing.png and routing.json.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import trial

import utils


def measure(u_hat, iterations):
    """Procedure 1 on votes, watched.

    Args:
        u_hat: (B, J, I, D).
        iterations: how many.

    Returns:
        mean |change| of the logits in each iteration, mean entropy in bits of the coupling
        coefficients of each, and the capsules (B, J, D) of the last.
    """
    import tensorflow as tf

    import ops

    changes, entropies = [], []
    b = tf.zeros_like(u_hat[..., 0])  # (B, J, I)
    for _ in range(iterations):
        c = tf.nn.softmax(b, axis=1)
        entropies.append(-tf.reduce_sum(c * tf.math.log(c + 1e-30), axis=1) / np.log(2))
        v = ops.squash(tf.einsum("bji,bjid->bjd", c, u_hat))
        change = tf.einsum("bjid,bjd->bji", u_hat, v)
        changes.append(tf.abs(change))
        b += change
    means = ([float(tf.reduce_mean(x)) for x in values] for values in (changes, entropies))
    return *means, v


def draw(path, changes, entropies, classes):
    from matplotlib.figure import Figure

    figure = Figure((7, 2.8), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = np.arange(1, len(changes) + 1)
    left.semilogy(numbers, changes, "o-", color="#20639b", ms=3)
    left.set_title("Mean change of a routing logit", fontsize=9, fontweight="bold", loc="left")
    right.plot(numbers, entropies, "o-", color="#c0392b", ms=3)
    right.axhline(np.log2(classes), color="#b0b0b0", lw=0.8, ls="--")
    right.set_title("Entropy of the couplings, bits", fontsize=9, fontweight="bold", loc="left")
    for panel in (left, right):
        panel.set_xlabel("iteration", fontsize=7)
        panel.tick_params(which="both", labelsize=6)
        panel.grid(color="#e4e6e8", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    with utils.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=10, choices=range(1, 101),
                        metavar="1..100", help="iterations to watch (default 10)")
    parser.add_argument("--checkpoint", help="folder of a trained network of the default sizes; "
                        "without it the weights that come with the program")
    parser.add_argument("--output", default="runs/routing", help="folder (default runs/routing)")
    parser.add_argument("--data_dir", default=str(trial.ROOT / "data"))
    parser.add_argument("--images", type=trial.positive, default=10_000, help="test images, the first so many")
    flags = parser.parse_args(argv)
    return trial.report_errors("routing.py", lambda: watch(flags))


def watch(flags):
    _, model = trial.start()
    import ops

    mnist = utils.load_dataset("mnist", flags.data_dir)
    images = mnist.x_test[: flags.images]
    network = model.CapsNet(images.shape[1:], 10, conv="dft")
    if flags.checkpoint:
        facts = model.load_weights(network, flags.checkpoint, print)
    else:
        facts = model.load_pretrained(network, trial.ROOT / "pretrained" / "mnist")
    totals = np.zeros((2, flags.iterations))
    spectra = network.spectra()
    for start in range(0, len(images), 100):
        part = images[start:start + 100].astype(np.float32) / 255
        u = network.primary(network.conv1(part, spectra[0]), spectra[1])
        u_hat = ops.votes(u, network.digits.W.value)
        changes, entropies, _ = measure(u_hat, flags.iterations)
        totals += len(part) * np.array([changes, entropies])
    changes, entropies = totals / len(images)
    print(f"{len(images):,} test images, weights of step {facts['step']:,}; entropy at most "
          f"{np.log2(10):.3f} bits\n")
    print("| iteration | mean change of a logit | entropy of the couplings, bits |")
    print("|---|---|---|")
    for number, (change, entropy) in enumerate(zip(changes, entropies), 1):
        print(f"| {number} | {change:.5f} | {entropy:.4f} |")
    output = Path(flags.output)
    draw(output / "routing.png", changes, entropies, 10)
    utils.write_json(output / "routing.json", {
        "changes": changes, "entropies_bits": entropies, "images": len(images),
        "step": facts["step"], "training": facts["training"]})
    print(f"\nWrote {output / 'routing.png'}, {output / 'routing.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
