"""What the benchmarks share: the machine, the rate of its matrix products, a trainer to time."""

import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import utils

# Multiply-adds ×2 of the network at batch 64, direct convolutions: three times the forward pass
# (forward, gradient of inputs, gradient of weights) less conv1's gradient of the input.
DIRECT_GFLOP_AT_64 = 77.0


def machine():
    """One line: processor, cores, system, versions."""
    import tensorflow as tf

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, TensorFlow {tf.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def milliseconds(function, repeats):
    """Median time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


class GemmPeak:
    """The best rate in GFLOP/s of `tf.matmul` at 1024³, 2048³ and 4096³, plain and under XLA."""

    def __init__(self):
        import tensorflow as tf

        self.products = []
        for n in (1024, 2048, 4096):
            a, b = tf.random.normal((n, n)), tf.random.normal((n, n))
            for jit in (False, True):
                product = tf.function(tf.matmul, jit_compile=jit, autograph=False)
                self.products.append((2e-6 * n**3, lambda f=product, a=a, b=b: f(a, b)))

    def measure(self, repeats=3):
        return max(gflop / milliseconds(call, repeats) for gflop, call in self.products)


def make_trainer(batch_size, conv="dft", jit=True, image_size=28, digits_layer=None):
    """A Trainer of the paper's network and a batch of shifted MNIST digits (padded if larger)."""
    import model

    dataset = utils.load_dataset("mnist", ROOT / "data")
    images = dataset.x_train[:batch_size]
    edge = (image_size - 28) // 2
    images = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    data = model.Data(images, dataset.y_train[:batch_size], max_shift=2)
    net = model.CapsNet(data.canvas_shape(), 10, conv=conv)
    if digits_layer:
        net.digits = digits_layer(10, 16)
        net.digits.build(
            net.primary.compute_output_shape(
                net.conv1.compute_output_shape((None, *data.canvas_shape()))
            )
        )
    trainer = model.Trainer(
        net,
        data,
        None,
        model.Training(batch_size=batch_size),
        model.Folders(*[Path("unused")] * 3),
        {},
        jit,
    )
    batch = next(iter(model.batches(data, data.training_plan(0, 0), batch_size)))
    return trainer, batch


def make_inference(trainer, batch):
    """A call that gives the lengths of the digit capsules of a batch, its kernels prepared."""
    import tensorflow as tf

    import ops

    net, data = trainer.model, trainer.data
    images, _ = ops.compose(batch[0], batch[1], data.margin)

    @tf.function(jit_compile=trainer.jit, autograph=False)
    def lengths(images, spectra):
        return ops.length(net.capsules(images, spectra))

    spectra = net.spectra()
    return lambda: lengths(images, spectra).numpy()


def table(header, rows):
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)
