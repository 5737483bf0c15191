"""This tool against PyTorch, plain and as fast as its options make it: same network and optimizer.

    pip install torch
    python benchmarks/pytorch_baseline.py [--rounds=5] [--steps=3] [--batch_size=64]

Each runs in a separate process, and they take turns. A ratio is the median over the rounds of the
ratios within a round. Training is with data deformation. bfloat16 is measured on processors that
have units for it, torch.compile where there is a C++ compiler.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys

import numpy as np
from benchmark_lib import timing

from capsnet_core import errors
from inputs import datasets
from runtime import machine, startup
from runtime.command_line import run_script

TRAIN, INFER = "train step, with deformation", "inference"
# The names of the options of `pytorch_capsnet.Options`, by what they are together.
PLAIN = "PyTorch, plain"
FAST = ("channels_last", "einsum")
PYTORCH = {
    PLAIN: (),
    "PyTorch, channels_last": ("channels_last",),
    "PyTorch, channels_last, einsum": FAST,
    "PyTorch, channels_last, einsum, torch.compile": (*FAST, "compiled"),
    "PyTorch, channels_last, einsum, bfloat16": (*FAST, "bfloat16"),
    "PyTorch, channels_last, einsum, bfloat16, torch.compile": (*FAST, "bfloat16", "compiled"),
    "PyTorch, einsum, torch.compile": ("einsum", "compiled"),
    "PyTorch, einsum, bfloat16, torch.compile": ("einsum", "bfloat16", "compiled"),
}
THIS_TOOL = {"this tool, float32": "float32", "this tool, mixed_bfloat16": "mixed_bfloat16"}
CALLS = {}  # what this process times, by name


def contestants(bfloat16, compiler):
    """Return what can be measured on this machine: by name, a function and its first argument.

    Args:
        bfloat16: whether the processor has units for it.
        compiler: whether there is a C++ compiler.
    """
    contestants = {name: (pytorch, options) for name, options in PYTORCH.items()}
    contestants |= {name: (this_tool, precision) for name, precision in THIS_TOOL.items()}
    present = {"bfloat16": bfloat16, "torch.compile": compiler}
    lacking = [option for option, there in present.items() if not there]
    return {
        name: contestant
        for name, contestant in contestants.items()
        if not any(option in name for option in lacking)
    }


def pytorch(options, batch_size):
    """Return calls that train one step and classify one batch, in PyTorch with some options."""
    import torch
    from benchmark_lib import pytorch_capsnet

    network = pytorch_capsnet.CapsNet(pytorch_capsnet.Options(**dict.fromkeys(options, True)))
    dataset = datasets.load_dataset("mnist", timing.ROOT / "data")
    images = torch.tensor(dataset.x_train[:batch_size, None, :, :, 0]).float() / 255
    labels = torch.eye(timing.CLASSES)[torch.tensor(dataset.y_train[:batch_size]).long()]
    train, infer = pytorch_capsnet.make_calls(network, images, labels)
    return {TRAIN: train, INFER: infer}


def this_tool(precision, batch_size):
    """Return calls that train one step and classify one batch with this tool."""
    startup.start_tensorflow()
    data = timing.load_digits(batch_size)
    trainer = timing.make_trainer(data, batch_size, precision=precision)
    batch = timing.first_batch(trainer)
    return {
        TRAIN: lambda: trainer.train_step(batch).numpy(),
        INFER: timing.make_inference(trainer.network, batch),
    }


def prepare(make, *arguments):
    """Make what this process times."""
    CALLS.update(make(*arguments))


def measure(name, steps):
    """Return the median milliseconds of a call of this process."""
    return timing.milliseconds(CALLS[name], steps)


def compare(flags):
    """Let all take turns and print the tables."""
    if not importlib.util.find_spec("torch"):
        raise errors.UserError(
            "PyTorch is not installed, and not needed for anything else; pip install torch"
        )
    units, compiler = machine.bfloat16_units(), find_compiler()
    times, memory = take_turns(contestants(bool(units), bool(compiler)), flags)
    version = importlib.metadata.version("torch")
    print(f"{timing.conditions()}, PyTorch {version}")
    print(f"Batch {flags.batch_size}, {flags.rounds} rounds.")
    if not units:
        print("bfloat16 is not measured: the processor has no units for it.")
    if not compiler:
        print("torch.compile is not measured: there is no C++ compiler (g++, clang++ or $CXX).")
    print()
    for name, milliseconds in times.items():
        timing.print_table(rows(f"{name}, batch {flags.batch_size}", milliseconds, memory))


def find_compiler():
    """Return the path of the C++ compiler that torch.compile finds, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def take_turns(contestants, flags):
    """Measure all contestants.

    Returns:
        Milliseconds by what is timed, then by name of the contestant, (rounds,) each; and the peak
        MB of the contestants' processes by name.
    """
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, contestant in contestants.items():
            process = timing.new_process(prepare, (*contestant, flags.batch_size))
            processes[name] = stack.enter_context(process)
        times = {what: {name: [] for name in contestants} for what in (TRAIN, INFER)}
        for _ in range(flags.rounds):
            for what, milliseconds in times.items():
                for name, process in processes.items():
                    milliseconds[name].append(process.submit(measure, what, flags.steps).result())
        memory = {name: p.submit(timing.peak_megabytes).result() for name, p in processes.items()}
    arrays = {
        what: {name: np.array(values) for name, values in milliseconds.items()}
        for what, milliseconds in times.items()
    }
    return arrays, memory


def rivals(milliseconds):
    """Return whom all are compared with, by the heading of the column."""

    def fastest(names):
        return min(names, key=lambda name: np.median(milliseconds[name]))

    measured = {name: options for name, options in PYTORCH.items() if name in milliseconds}
    float32 = [name for name, options in measured.items() if "bfloat16" not in options]
    return {
        "× plain": PLAIN,
        "× PyTorch's best in float32": fastest(float32),
        "× PyTorch's best": fastest(measured),
    }


def rows(title, milliseconds, memory):
    """Return the cells of the contestants: medians, and medians of ratios within a round.

    Args:
        title: heading of their names.
        milliseconds: (rounds,) by name of the contestant.
        memory: peak MB by name of the contestant.
    """
    compared = {head: milliseconds[rival] for head, rival in rivals(milliseconds).items()}
    return [
        {
            title: name,
            "ms": f"{np.median(values):.0f}",
            **{head: f"{np.median(rival / values):.2f}" for head, rival in compared.items()},
            "peak MB": f"{memory[name]:.0f}",
        }
        for name, values in milliseconds.items()
    ]


if __name__ == "__main__":
    definitions = timing.counts(rounds=5, steps=3, batch_size=64)
    sys.exit(run_script(sys.argv, __doc__, definitions, compare))
