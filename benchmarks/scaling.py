"""Time and peak memory of a training step against batch size and image size.

    python benchmarks/scaling.py [--steps=3]

Each row is measured in its own process, since a process never reports less memory than it once had.
"""

import sys

from benchmark_lib import timing

from runtime.command_line import run_script

SIZES = [(16, 28), (32, 28), (64, 28), (128, 28), (256, 28), (64, 36), (64, 48), (64, 64)]


def measure(batch_size, image_size, steps):
    """Return milliseconds of a step, peak memory of this process in MB, and parameters."""
    trainer = timing.make_trainer(timing.load_digits(batch_size, image_size), batch_size)
    batch = timing.first_batch(trainer)
    step_ms = timing.milliseconds(lambda: trainer.train_step(batch).numpy(), steps)
    megabytes = timing.peak_megabytes()
    return step_ms, megabytes, trainer.network.count_params()


def measure_all(flags):
    """Measure all sizes and print the table."""
    print(timing.conditions() + "\n", flush=True)
    rows = []
    for batch_size, image_size in SIZES:
        with timing.new_process() as process:
            measurement = process.submit(measure, batch_size, image_size, flags.steps)
            step_ms, megabytes, parameters = measurement.result()
        rows.append(
            {
                "batch": batch_size,
                "image": f"{image_size}×{image_size}",
                "parameters": f"{parameters / 1e6:.1f} M",
                "ms/step": f"{step_ms:.0f}",
                "images/s": f"{1000 * batch_size / step_ms:.0f}",
                "peak MB": f"{megabytes:.0f}",
            }
        )
    timing.print_table(rows)


if __name__ == "__main__":
    sys.exit(run_script(sys.argv, __doc__, timing.counts(steps=3), measure_all))
