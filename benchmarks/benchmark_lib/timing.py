"""What the benchmarks share: flags, machine, tables, processes, and a Trainer to time."""

import concurrent.futures
import multiprocessing
import time
from pathlib import Path

import numpy as np

import utils
from capsnet_core import config
from inputs import datasets
from runtime import machine, startup
from runtime.command_line import MOST, Flag, number

ROOT = utils.ROOT
# Multiply-adds ×2 of the network at batch 64, direct convolutions: three times the forward pass
# (forward, gradient of inputs, gradient of weights) less conv1's gradient of the input.
DIRECT_GFLOP_AT_64 = 77.0
CLASSES = 10
FLAGS = {
    "rounds": "rounds, in each of which everything is measured in turn",
    "steps": "steps in a measurement",
    "batch_size": "images in a step",
    "kills": "kills in training",
    "save_kills": "kills in mid-save",
    "inputs": "mutated files and command lines",
    "seed": "decides what is broken, and when",
}


def counts(**defaults):
    """Return flags that are counts; their names are keys of FLAGS."""
    return [
        Flag(name, default, number(int, 0 if name == "seed" else 1, MOST), FLAGS[name])
        for name, default in defaults.items()
    ]


def conditions():
    """Return processor, cores, units for bfloat16, versions and date, in a line."""
    source, present = machine.provenance(), machine.bfloat16_units()
    units = [
        f"{'with' if unit in present else 'without'} {unit}"
        for unit in machine.BFLOAT16_UNITS.values()
    ]
    versions = source["versions"]
    return (
        f"{', '.join([source['machine'], *units])}, Python {versions['python']}, "
        f"TensorFlow {versions['tensorflow']}, {source['date'][:10]}"
    )


def print_table(rows, header=None):
    """Print a Markdown table and an empty line.

    Args:
        rows: list of dict of heading to cell, or of lists of cells.
        header: list of headings, for rows that are lists.
    """
    cells = rows if header else [row.values() for row in rows]
    print("\n".join(utils.markdown_table(header or rows[0], cells)) + "\n", flush=True)


def milliseconds(function, repeats):
    """Return the median time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def peak_megabytes():
    """Return the peak memory of this process so far."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def new_process(initializer=startup.start_tensorflow, arguments=()):
    """Return an executor of one new process, which calls the initializer first."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer, arguments)


class GemmPeak:
    """The highest rate of `tf.matmul` at 1024³, 2048³ and 4096³, without XLA and with it."""

    def __init__(self):
        import tensorflow as tf

        self.products = []
        for n in (1024, 2048, 4096):
            a, b = tf.random.normal((n, n)), tf.random.normal((n, n))
            for jit in (False, True):
                product = tf.function(tf.matmul, jit_compile=jit, autograph=False)
                self.products.append((2e-6 * n**3, lambda f=product, a=a, b=b: f(a, b)))

    def measure(self, repeats=3):
        """Return the rate in GFLOP/s."""
        return max(mflop / milliseconds(call, repeats) for mflop, call in self.products)


def load_digits(count=None, image_size=28):
    """Return Examples of the first training digits of MNIST, shifted in training.

    Args:
        count: number of digits, None for all.
        image_size: pixels of a side; digits are padded to it with zeros.
    """
    from inputs.pipeline import Examples

    mnist = datasets.load_dataset("mnist", ROOT / "data")
    edge = (image_size - 28) // 2
    images = np.pad(mnist.x_train[:count], ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    return Examples(images, mnist.y_train[:count], max_shift=config.MAX_SHIFT)


def make_trainer(
    data,
    batch_size,
    conv="dft",
    jit=True,
    strategy=None,
    digits_layer=None,
    precision="float32",
):
    """Create a Trainer of the paper's network. Nothing is written while only steps are run.

    `digits_layer` is a class of layer that takes the place of `ops.DigitCapsules`.
    """
    import tensorflow as tf

    from model import CapsNet
    from training.folders import Folders
    from training.trainer import Device, Run, Trainer

    with (strategy or tf.distribute.get_strategy()).scope():
        network = CapsNet(data.canvas_shape(), CLASSES, conv=conv, dtype=precision)
    if digits_layer:
        primary = network.conv1.compute_output_shape((None, *data.canvas_shape()))
        network.digits = digits_layer(CLASSES, network.config.digit_dim)
        network.digits.build(network.primary.compute_output_shape(primary))
    training = config.TrainingConfig(batch_size=batch_size)
    run = Run(Folders(*[Path("unused")] * 3))
    return Trainer(network, data, training, run, device=Device(strategy, jit))


def first_batch(trainer):
    """Return the first batch of a training run."""
    from inputs.pipeline import batches

    plan = trainer.data.training_plan(seed=0, epoch=0)
    return next(iter(batches(trainer.data, plan, trainer.config.batch_size)))


def make_inference(network, batch, jit=True):
    """Return a call that computes the lengths of the digit capsules of a batch."""
    import tensorflow as tf

    import ops

    images, _ = ops.compose(batch[0], batch[1], padding=0)

    def compile_part(function):
        return tf.function(function, jit_compile=jit, autograph=False)

    inference = network.inference(compile_part)

    @tf.function(autograph=False)
    def lengths(images, spectra):
        return ops.length(inference.compute(images, spectra))

    spectra = inference.prepare()
    return lambda: lengths(images, spectra).numpy()
