"""Training step and inference of three formulations, next to the machine's matrix products.

    python benchmarks/speed.py [--rounds=5] [--steps=3]

Each round measures everything in turn. The table has the medians over the rounds, of times and of
ratios within a round, because the speed of a machine changes from minute to minute.
"""

import sys
import warnings

import numpy as np
from benchmark_lib import timing

from runtime.command_line import run_script

LITERAL, DIRECT, DEFAULT = "literal, tiled W", "direct, untiled", "default: DFT, XLA"
HEADER = [
    "train ms/step",
    "train images/s",
    "× literal",
    "× direct at GEMM peak",
    "inference images/s",
    "× literal",
]


def literal_layer():
    """Return a layer that routes as it is usually written.

    W is tiled over the batch, with one small product for each vote.
    """
    import tensorflow as tf

    import ops

    class TiledDigitCapsules(ops.DigitCapsules):
        def call(self, u, chunk_size=None):
            w = tf.tile(tf.convert_to_tensor(self.W)[None], (tf.shape(u)[0], 1, 1, 1, 1))
            u = tf.tile(u[:, None, :, None], (1, self.n_capsules, 1, 1, 1))
            return ops.routing(tf.matmul(u, w)[..., 0, :], self.iterations)

    return TiledDigitCapsules


def stages(trainer, batch):
    """Return calls by name, each of which runs one stage of a training step alone."""
    import tensorflow as tf

    import ops

    network = trainer.network
    images, _ = ops.compose(batch[0], batch[1], padding=0)
    features = network.conv1(images)
    primary = network.primary(features)
    capsules = network.digits(primary)
    mask = ops.label_mask(batch[2], timing.CLASSES)

    def forward_and_backward(layer, x, *more, input_gradient=True):
        upstream = tf.ones_like(layer(x, *more))

        @tf.function(jit_compile=True, autograph=False)
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, *more)
            sources = [v.value for v in layer.trainable_variables]
            if input_gradient:
                sources.append(x)
            return tape.gradient(y, sources, upstream)

        return lambda: run(x)

    variables = network.trainable_variables
    gradients = [tf.ones_like(v) for v in variables]

    @tf.function(jit_compile=True, autograph=False)
    def update():
        trainer.optimizer.apply(gradients, variables)

    return {
        "conv1": forward_and_backward(network.conv1, images, input_gradient=False),
        "primary capsules": forward_and_backward(network.primary, features),
        "digit capsules, routing": forward_and_backward(network.digits, primary),
        "decoder": forward_and_backward(network.decoder, capsules, mask),
        "Adam": update,
    }


def make_calls(batch_size):
    """Return what to time, three dicts of name to call.

    They are the training step of each formulation, its inference, and the stages of the default.
    """
    formulations = {
        LITERAL: ("direct", False, literal_layer()),
        DIRECT: ("direct", False, None),
        DEFAULT: ("dft", True, None),
    }
    data = timing.load_digits(batch_size)
    train, infer = {}, {}
    for name, (conv, jit, layer) in formulations.items():
        trainer = timing.make_trainer(data, batch_size, conv, jit, digits_layer=layer)
        batch = timing.first_batch(trainer)
        step = trainer.train_step
        train[name] = lambda step=step, batch=batch: step(batch).numpy()
        infer[name] = timing.make_inference(trainer.network, batch, jit)
    return train, infer, stages(trainer, batch)


def measure(batch_size, rounds, steps, peak):
    """Measure all calls in turn.

    Returns:
        Milliseconds of training steps, inference and stages, dicts of name to array (rounds,); and
        the rates of matrix products in GFLOP/s, (rounds,).
    """
    groups = make_calls(batch_size)
    times, rates = [{name: [] for name in calls} for calls in groups], []
    for _ in range(rounds):
        rates.append(peak.measure())
        for calls, milliseconds in zip(groups, times, strict=True):
            for name, call in calls.items():
                milliseconds[name].append(timing.milliseconds(call, steps))
    arrays = [{name: np.array(values) for name, values in each.items()} for each in times]
    return *arrays, np.array(rates)


def row(name, train, infer, floor, batch_size):
    """Return the cells of a formulation; a ratio is the median of the ratios within a round.

    Args:
        name: name of the formulation.
        train: milliseconds of a step, dict of name to array (rounds,).
        infer: the same for inference.
        floor: (rounds,), milliseconds of the direct convolution at the rate of matrix products.
        batch_size: images in a step.
    """
    train_ms, infer_ms = np.median(train[name]), np.median(infer[name])
    return [
        name,
        f"{train_ms:.0f}",
        f"{1000 * batch_size / train_ms:.0f}",
        f"{np.median(train[LITERAL] / train[name]):.2f}",
        f"{np.median(floor / train[name]):.2f}",
        f"{1000 * batch_size / infer_ms:.0f}",
        f"{np.median(infer[LITERAL] / infer[name]):.2f}",
    ]


def compare(flags):
    """Measure both batch sizes and print the tables."""
    # The literal layer replaces one whose weights the optimizer still lists.
    warnings.filterwarnings("ignore", "Gradients do not exist")
    print(timing.conditions() + "\n", flush=True)
    peak = timing.GemmPeak()
    for batch_size in (64, 128):
        train, infer, alone, rates = measure(batch_size, flags.rounds, flags.steps, peak)
        floor = 1000 * timing.DIRECT_GFLOP_AT_64 * batch_size / 64 / rates
        print(
            f"Batch {batch_size}. GEMM peak {np.median(rates):.0f} GFLOP/s; the direct convolution "
            f"at that rate takes {np.median(floor):.0f} ms a step.\n"
        )
        timing.print_table(
            [row(name, train, infer, floor, batch_size) for name in train],
            [f"formulation, batch {batch_size}", *HEADER],
        )
        step = np.median(train[DEFAULT])
        stage = f"stage of the default at batch {batch_size}, alone, forward and backward"
        timing.print_table(
            [
                [name, f"{np.median(ms):.0f}", f"{100 * np.median(ms) / step:.0f}%"]
                for name, ms in alone.items()
            ],
            [stage, "ms", "share of a step"],
        )


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, timing.counts(rounds=5, steps=3), compare))
