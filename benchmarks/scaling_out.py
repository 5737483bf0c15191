"""Step time, share of the communication and differences of results for 1, 2 and 4 replicas.

    python benchmarks/scaling_out.py [--steps=50] [--batch_size=64]

The replicas are logical devices of this machine's CPU, and share its cores: what the table shows is
what dividing the work costs, not what more devices would gain. Every number of replicas is a
process of its own, all on the same batches of the paper's network; one replica has no strategy.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timing

import utils

REPLICAS = (1, 2, 4)


def train(replicas, steps, batch_size, file):
    """Save the first loss and gradients, the last weights, and the times of the parts of a step."""
    utils.keep_big_buffers()
    import tensorflow as tf

    import model

    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = model.choose_strategy("one" if replicas == 1 else "mirrored")
    tf.keras.utils.set_random_seed(0)
    dataset = utils.load_dataset("mnist", timing.ROOT / "data")
    data = model.Data(dataset.x_train, dataset.y_train, max_shift=2)
    with strategy.scope():
        net = model.CapsNet(data.canvas_shape(), 10, conv="dft")
    how = model.Training(batch_size=batch_size)
    trainer = model.Trainer(
        net, data, None, how, model.Folders(*[Path("unused")] * 3), {}, strategy=strategy
    )
    found, seconds = {}, []
    plan = data.training_plan(0, 0).take(slice(steps * batch_size))
    for batch in model.batches(data, plan, batch_size, strategy=strategy):
        began = time.perf_counter()
        metrics = trainer.train_step(batch).numpy()
        seconds.append(time.perf_counter() - began)
        if not found:
            # After one step Adam's first moment is a tenth of the gradient.
            found = {
                f"gradient {v.path}": 10 * v.numpy()
                for v in trainer.optimizer.variables
                if v.path.endswith("_momentum")
            } | {"loss": metrics[:2]}
    found |= {f"weight {v.path}": v.numpy() for v in net.trainable_variables}
    found["step"] = 1000 * np.median(seconds[1:])
    found["reduce"] = timing.milliseconds(all_reduce_alone(strategy, net), 10)
    np.savez(file, **found)


def all_reduce_alone(strategy, net):
    """A call that adds up arrays of the gradients' sizes over the replicas, and nothing else."""
    import tensorflow as tf

    shapes = [v.shape for v in net.trainable_variables]

    @tf.function(autograph=False)
    def call(value):
        def of_replica():
            replica = tf.distribute.get_replica_context()
            sums = replica.all_reduce("SUM", [tf.fill(shape, value) for shape in shapes])
            return tf.add_n([each[(0,) * len(each.shape)] for each in sums])

        return strategy.run(of_replica)

    return lambda: strategy.experimental_local_results(call(tf.constant(1.0)))[0].numpy()


def largest_difference(one, other, kind):
    """The largest difference of the arrays of a kind, in units of each array's largest value."""
    return max(
        np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()
        for name in one.files
        if name.startswith(kind)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return train(int(args.one[0]), args.steps, args.batch_size, args.one[1])
    print(timing.machine() + f", batch {args.batch_size}, {args.steps} steps\n")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for replicas in REPLICAS:
            file = f"{folder}/{replicas}.npz"
            command = [sys.executable, __file__, "--one", str(replicas), file]
            command += [f"--steps={args.steps}", f"--batch_size={args.batch_size}"]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            found[replicas] = np.load(file)
        rows, one = [], found[1]
        size = sum(one[name].nbytes for name in one.files if name.startswith("gradient"))
        for replicas, result in found.items():
            step, reduce = float(result["step"]), float(result["reduce"]) * (replicas > 1)
            differences = [
                f"{largest_difference(one, result, kind):.1e}"
                for kind in ("loss", "gradient", "weight")
            ]
            rows.append(
                [
                    replicas,
                    f"{step:.0f}",
                    f"{float(one['step']) / step:.2f}",
                    f"{reduce:.0f}",
                    f"{100 * reduce / step:.0f}%",
                    f"{2 * (replicas - 1) / replicas * size / 1e6:.1f}",
                    *(differences if replicas > 1 else ["0"] * 3),
                ]
            )
    header = ["replicas", "ms/step", "efficiency on the same cores", "all-reduce ms", "its share"]
    header += ["MB sent by each (ring)", "first loss", "first gradients"]
    timing.table([*header, f"weights after {args.steps} steps"], rows)
    print(f"Gradients: {size / 1e6:.1f} MB. Differences in units of each array's largest value.")
    return None


if __name__ == "__main__":
    main()
