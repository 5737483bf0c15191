"""Training step and inference of three formulations, beside the machine's matrix products.

    python benchmarks/speed.py [--rounds=5] [--steps=3]

Each round measures everything in turn; the table has the medians over the rounds, of times and of
ratios within a round, because the speed of a machine changes from minute to minute.
"""

import argparse
import warnings

import numpy as np
import timing

import utils


def literal_layer():
    """Routing as it is usually written: W tiled over the batch, one small product for each vote."""
    import tensorflow as tf

    import ops

    class TiledDigitCapsules(ops.DigitCapsules):
        def call(self, u, at_once=None):
            w = tf.tile(tf.convert_to_tensor(self.W)[None], (tf.shape(u)[0], 1, 1, 1, 1))
            u = tf.tile(u[:, None, :, None], (1, self.n_capsules, 1, 1, 1))
            return ops.routing(tf.matmul(u, w)[..., 0, :], self.iterations)

    return TiledDigitCapsules


def stages(trainer, batch):
    """Name -> call that runs one stage of the step forward and backward by itself."""
    import tensorflow as tf

    import ops

    net = trainer.model
    images, _ = ops.compose(batch[0], batch[1], 0)
    features = net.conv1(images)
    primary = net.primary(features)
    capsules = net.digits(primary)
    mask = ops.label_mask(batch[2], 10)

    def both_ways(layer, x, *more, input_gradient=True):
        upstream = tf.ones_like(layer(x, *more))

        @tf.function(jit_compile=trainer.jit, autograph=False)
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, *more)
            sources = [v.value for v in layer.trainable_variables] + [x] * input_gradient
            return tape.gradient(y, sources, upstream)

        return lambda: run(x)

    variables = net.trainable_variables
    gradients = [tf.ones_like(v) for v in variables]

    @tf.function(jit_compile=trainer.jit, autograph=False)
    def update():
        trainer.optimizer.apply(gradients, variables)

    return {
        "conv1": both_ways(net.conv1, images, input_gradient=False),
        "primary capsules": both_ways(net.primary, features),
        "digit capsules, routing": both_ways(net.digits, primary),
        "decoder": both_ways(net.decoder, capsules, mask),
        "Adam": update,
    }


def main():
    # The literal layer takes the place of one whose weights the optimizer still lists.
    warnings.filterwarnings("ignore", "Gradients do not exist")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    utils.keep_big_buffers()
    print(timing.machine() + "\n")
    peak = timing.GemmPeak()
    kinds = {
        "literal, tiled W": ("direct", False, literal_layer()),
        "direct, untiled": ("direct", False, None),
        "default: DFT, XLA": ("dft", True, None),
    }
    for batch_size in (64, 128):
        calls = {}
        for name, (conv, jit, layer) in kinds.items():
            trainer, batch = timing.make_trainer(batch_size, conv, jit, digits_layer=layer)
            step = trainer.train_step
            calls[name] = (
                lambda step=step, batch=batch: step(batch).numpy(),
                timing.make_inference(trainer, batch),
            )
        parts = stages(trainer, batch)
        found = {key: [] for name in kinds for key in ((name, 0), (name, 1))}
        shares, rates = {name: [] for name in parts}, []
        for _ in range(args.rounds):
            rates.append(peak.measure())
            for name, pair in calls.items():
                for way in (0, 1):
                    found[name, way].append(timing.milliseconds(pair[way], args.steps))
            for name, call in parts.items():
                shares[name].append(timing.milliseconds(call, args.steps))
        floor = timing.DIRECT_GFLOP_AT_64 * batch_size / 64 / np.array(rates) * 1000
        base = np.array(found["literal, tiled W", 0]), np.array(found["literal, tiled W", 1])
        rows = []
        for name in kinds:
            train, infer = np.array(found[name, 0]), np.array(found[name, 1])
            rows.append(
                [
                    name,
                    f"{np.median(train):.0f}",
                    f"{batch_size * 1000 / np.median(train):.0f}",
                    f"{np.median(base[0] / train):.2f}",
                    f"{np.median(floor / train):.2f}",
                    f"{batch_size * 1000 / np.median(infer):.0f}",
                    f"{np.median(base[1] / infer):.2f}",
                ]
            )
        print(
            f"Batch {batch_size}. GEMM peak {np.median(rates):.0f} GFLOP/s; the direct "
            f"convolution at that rate takes {np.median(floor):.0f} ms a step.\n"
        )
        timing.table(
            [
                "formulation",
                "train ms/step",
                "train images/s",
                "× literal",
                "× direct at GEMM peak",
                "inference images/s",
                "× literal",
            ],
            rows,
        )
        whole = np.median(found["default: DFT, XLA", 0])
        timing.table(
            ["stage of the default, alone, forward and backward", "ms", "share of a step"],
            [
                [name, f"{np.median(ms):.0f}", f"{100 * np.median(ms) / whole:.0f}%"]
                for name, ms in shares.items()
            ],
        )


if __name__ == "__main__":
    main()
