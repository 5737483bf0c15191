"""What routing does from iteration to iteration (the paper's appendix A, figure A.1).

    python experiments/routing.py

For a trained network and all test images: how much the routing logits b_ij change in each iteration,
and, beyond the paper, the entropy of the coupling coefficients c_ij over the upper capsules j. Writes
routing.png and routing.json.
"""

import functools
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
    figure, (left, right) = utils.new_figure(2)
    first, second = utils.LINE_COLORS
    numbers = np.arange(1, len(changes) + 1)
    left.plot(numbers, changes, "o-", color=first, ms=3)
    utils.label_panel(left, "Mean change of a routing logit", "iteration")
    right.plot(numbers, entropies, "o-", color=second, ms=3)
    right.axhline(np.log2(classes), color="#b0b0b0", lw=0.8, ls="--", label="all couplings equal")
    right.legend(fontsize=7, frameon=False)
    utils.label_panel(right, "Entropy of the couplings, bits", "iteration")
    utils.save_figure(path, figure)


def main(argv=None):
    parser = trial.Parser(__doc__)
    parser.add_argument("--iterations", type=functools.partial(trial.positive, most=100), default=10,
                        help="iterations to watch, 1 to 100 (default 10)")
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
    network = model.CapsNet(images.shape[1:], 10, conv=model.fastest_conv())
    if flags.checkpoint:
        with trial.without_flags("give the folder of a network of the default sizes"):
            facts = model.load_weights(network, flags.checkpoint, print)
        if (trained := facts["training"].get("dataset", "mnist")) != "mnist":
            raise utils.UserError(f"{flags.checkpoint} was trained on {trained}, expected a network of "
                                  "MNIST; give its folder")
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
