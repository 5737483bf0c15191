"""Time and peak memory of a training step against batch size and image size.

    python benchmarks/scaling.py [--steps=3]

Every row is a process of its own, since a process never reports less memory than it once had.
"""

import argparse
import resource
import subprocess
import sys

import timing

import utils


def measure(batch_size, image_size, steps):
    utils.keep_big_buffers()
    trainer, batch = timing.make_trainer(batch_size, image_size=image_size)
    ms = timing.milliseconds(lambda: trainer.train_step(batch).numpy(), steps)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(ms, megabytes, trainer.model.count_params())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(*args.one, args.steps)
    print(timing.machine() + "\n")
    rows = []
    sizes = [(b, 28) for b in (16, 32, 64, 128, 256)] + [(64, s) for s in (36, 48, 64)]
    for batch_size, image_size in sizes:
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--one",
                str(batch_size),
                str(image_size),
                f"--steps={args.steps}",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        ms, megabytes, parameters = map(float, done.stdout.split())
        rows.append(
            [
                batch_size,
                f"{image_size}×{image_size}",
                f"{parameters / 1e6:.1f} M",
                f"{ms:.0f}",
                f"{1000 * batch_size / ms:.0f}",
                f"{megabytes:.0f}",
            ]
        )
    timing.table(["batch", "image", "parameters", "ms/step", "images/s", "peak MB"], rows)
    return None


if __name__ == "__main__":
    main()
