"""Time from the command to the first trained step, and to the first answer of `--predict`.

    python benchmarks/startup.py [--rounds=3]

Each time is that of a new process of main.py, until it prints what is waited for: of a first run,
and of one that finds what an earlier training compiled (`xla_cache.py`). The table of the parts has
the times of one process, which compiles.
"""

import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import timing

import runtime

TRAIN = ["--train", "--data_deformation"]
PREDICT = ["--pretrained", f"--predict={runtime.ROOT / 'assets' / 'digits' / '3.png'}"]
# What is waited for: the words of a command line, and the beginning of the line that ends the wait.
COMMANDS = {
    "first trained step": (TRAIN, "Epoch 1/"),
    "first answer of --predict": (PREDICT, PREDICT[-1].split("=")[1]),
}


def seconds_until(words, beginning, folder, **environment):
    """Return the seconds from the start of main.py until it prints a line that begins so.

    Args:
        words: words of the command line.
        beginning: how the line begins.
        folder: to work in.
        **environment: variables.

    Raises:
        RuntimeError: the program ended before.
    """
    command = [sys.executable, str(runtime.ROOT / "main.py"), *words]
    # TensorFlow's messages, which this process may have set, would switch the cache off.
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=inherited | {"PYTHONUNBUFFERED": "1"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith(beginning):
                    return time.perf_counter() - began
        finally:
            process.terminate()  # a killed run keeps nothing of what it compiled
    raise RuntimeError(f"main.py {' '.join(words)} ended without a line that begins {beginning!r}")


def measure(rounds):
    """Measure all commands in turn, each in an empty folder.

    Returns:
        Seconds by the name of what is waited for, (rounds, 2): of a first and of a later run.
    """
    seconds = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as cache:
        for round_number in range(rounds + 1):  # the first one fills the cache
            for name, (words, beginning) in COMMANDS.items():
                pair = []
                for kept in ("", cache):
                    with tempfile.TemporaryDirectory() as folder:
                        pair.append(seconds_until(words, beginning, folder, CAPSNET_CACHE=kept))
                if round_number:
                    seconds[name].append(pair)
    return {name: np.array(pairs) for name, pairs in seconds.items()}


def parts():
    """Return the seconds of the parts of a first run until its first trained step, by name."""
    times = {}

    def timed(name, function, *arguments):
        began = time.perf_counter()
        result = function(*arguments)
        times[name] = time.perf_counter() - began
        return result

    timed("import of TensorFlow and Keras", runtime.start_tensorflow)
    data = timed("data set", timing.load_digits)
    trainer = timed("network and optimizer", timing.make_trainer, data, 64)
    batch = timed("first batch", timing.first_batch, trainer)
    timed("trace of the step", trainer.train_step.get_concrete_function, batch)
    timed("compilation by XLA, and the step", lambda: trainer.train_step(batch).numpy())
    return times


def print_times(flags):
    """Measure and print the tables."""
    with timing.new_process(initializer=None, arguments=()) as process:
        times = process.submit(parts).result()
    seconds = measure(flags.rounds)
    print(timing.machine() + "\n", flush=True)
    timing.print_table(
        ["", "first run, s", "later runs, s"], [row(*each) for each in seconds.items()]
    )
    timing.print_table(
        ["part of the start of a training run", "s"],
        [[name, f"{value:.2f}"] for name, value in times.items()],
    )


def row(name, pairs):
    """Return the cells of what was waited for: the medians of seconds (rounds, 2)."""
    return [name, *(f"{value:.2f}" for value in np.median(pairs, axis=0))]


if __name__ == "__main__":
    sys.exit(timing.run(sys.argv, __doc__, print_times, rounds=3))
