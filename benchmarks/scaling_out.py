"""Efficiency, communication and differences of results for 1, 2 and 4 replicas.

    python benchmarks/scaling_out.py [--steps=50] [--batch_size=64]

The replicas are logical devices of this machine's CPU and share its cores: the table shows what
dividing the work costs, not what more devices would gain. Each number of replicas has its own
process, and all train the paper's network on the same batches; one replica has no strategy.
"""

import sys
import time

import numpy as np
from benchmark_lib import timing

from runtime.command_line import run_script

REPLICAS = (1, 2, 4)


def train(replicas, steps, batch_size):
    """Train on a number of replicas.

    Returns:
        dict: "step" and "all-reduce", milliseconds; "loss", array of the first losses; "gradients"
        and "weights", dicts of path to array, of the first step and after all steps.
    """
    import keras
    import tensorflow as tf

    from inputs.pipeline import batches
    from training.distribution import choose_strategy

    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = choose_strategy("one" if replicas == 1 else "mirrored")
    keras.utils.set_random_seed(0)
    data = timing.load_digits()
    trainer = timing.make_trainer(data, batch_size, strategy=strategy)
    result, seconds = {}, []
    plan = data.training_plan(seed=0, epoch=0).take(slice(steps * batch_size))
    for batch in batches(data, plan, batch_size, strategy=strategy):
        began = time.perf_counter()
        metrics = trainer.train_step(batch).numpy()
        seconds.append(time.perf_counter() - began)
        if not result:
            result = {"loss": metrics[:2], "gradients": first_gradients(trainer.optimizer)}
    variables = trainer.network.trainable_variables
    result["weights"] = {v.path: v.numpy() for v in variables}
    result["step"] = 1000 * float(np.median(seconds[1:] or seconds))
    result["all-reduce"] = timing.milliseconds(all_reduce_alone(strategy, variables), 10)
    return result


def first_gradients(optimizer):
    """Return the gradients of the first step: ten times Adam's first moment after it."""
    moments = [v for v in optimizer.variables if v.path.endswith("_momentum")]
    return {v.path: 10 * v.numpy() for v in moments}


def all_reduce_alone(strategy, variables):
    """Return a call that only adds up arrays of the gradients' sizes over the replicas."""
    import tensorflow as tf

    shapes = [v.shape for v in variables]

    @tf.function(autograph=False)
    def call(value):
        def add_up():
            replica = tf.distribute.get_replica_context()
            sums = replica.all_reduce("SUM", [tf.fill(shape, value) for shape in shapes])
            return tf.add_n([each[(0,) * len(each.shape)] for each in sums])

        return strategy.run(add_up)

    return lambda: strategy.experimental_local_results(call(tf.constant(1.0)))[0].numpy()


def largest_difference(expected, actual):
    """Return the largest difference of arrays, or of dicts of arrays, by name.

    It is in units of each expected array's largest value.
    """
    if isinstance(expected, dict):
        return max(largest_difference(expected[name], actual[name]) for name in expected)
    return np.abs(expected - actual).max() / np.abs(expected).max()


def row(replicas, result, single, steps):
    """Return the cells of a number of replicas, compared with the result of a single one."""
    step, reduce, differences = result["step"], 0.0, ["0"] * 3
    if replicas > 1:
        reduce = result["all-reduce"]
        differences = [
            f"{largest_difference(single[kind], result[kind]):.1e}"
            for kind in ("loss", "gradients", "weights")
        ]
    compared = ("first loss", "first gradients", f"weights after {steps} steps")
    return {
        "replicas": replicas,
        "ms/step": f"{step:.0f}",
        "efficiency on the same cores": f"{single['step'] / step:.2f}",
        "all-reduce ms": f"{reduce:.0f}",
        "its share": f"{100 * reduce / step:.0f}%",
        "MB sent by each (ring)": f"{2 * (replicas - 1) / replicas * megabytes(single):.1f}",
        **dict(zip(compared, differences, strict=True)),
    }


def megabytes(result):
    """Return the size of all gradients in MB."""
    return sum(gradient.nbytes for gradient in result["gradients"].values()) / 1e6


def compare(flags):
    """Train on each number of replicas and print the table."""
    print(timing.conditions() + f", batch {flags.batch_size}, {flags.steps} steps\n", flush=True)
    results = {}
    for replicas in REPLICAS:
        with timing.new_process() as process:
            training = process.submit(train, replicas, flags.steps, flags.batch_size)
            results[replicas] = training.result()
    single = results[1]
    timing.print_table([row(n, result, single, flags.steps) for n, result in results.items()])
    print(
        f"Gradients: {megabytes(single):.1f} MB. Differences in units of each array's largest "
        "value."
    )


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, timing.counts(steps=50, batch_size=64), compare))
