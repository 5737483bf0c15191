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
import timing

from capsnet import errors
from inputs import datasets
from runtime import machine, startup

PARAMETERS = 8_215_568
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
    """Return what can be measured on this machine.

    Args:
        bfloat16: whether the processor has units for it.
        compiler: whether there is a C++ compiler.

    Returns:
        The options of PyTorch and the precisions of this tool, both by name.
    """
    lacking = {"bfloat16": not bfloat16, "compiled": not compiler}
    pytorch_options = {
        name: options
        for name, options in PYTORCH.items()
        if not any(lacking.get(option) for option in options)
    }
    precisions = {
        name: precision
        for name, precision in THIS_TOOL.items()
        if bfloat16 or precision == "float32"
    }
    return pytorch_options, precisions


def pytorch(options, batch_size):
    """Return calls that train one step and classify one batch, in PyTorch.

    Args:
        options: names of fields of `pytorch_capsnet.Options`.
        batch_size: images in a step.
    """
    import pytorch_capsnet
    import torch

    network = pytorch_capsnet.CapsNet(pytorch_capsnet.Options(**dict.fromkeys(options, True)))
    check_size(sum(p.numel() for p in network.parameters()))
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
    check_size(trainer.network.count_params())
    return {
        TRAIN: lambda: trainer.train_step(batch).numpy(),
        INFER: timing.make_inference(trainer.network, batch),
    }


def check_size(parameters):
    """Raise RuntimeError if a network does not have the paper's number of parameters."""
    if parameters != PARAMETERS:
        raise RuntimeError(f"{parameters:,} parameters, expected {PARAMETERS:,}")


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
    options, precisions = contestants(bool(units), bool(compiler))
    times, memory = take_turns(options, precisions, flags)
    version = importlib.metadata.version("torch")
    print(f"{timing.conditions()}, PyTorch {version}")
    print(f"Batch {flags.batch_size}, {flags.rounds} rounds.")
    if not units:
        print("bfloat16 is not measured: the processor has no units for it.")
    if not compiler:
        print("torch.compile is not measured: there is no C++ compiler (g++, clang++ or $CXX).")
    print()
    for name, milliseconds in times.items():
        header = [f"{name}, batch {flags.batch_size}", "ms", *rivals(milliseconds), "peak MB"]
        timing.print_table(header, rows(milliseconds, memory))


def find_compiler():
    """Return the path of the C++ compiler that torch.compile finds, None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def take_turns(options, precisions, flags):
    """Measure all contestants.

    Returns:
        Milliseconds by what is timed, then by name of the contestant, (rounds,) each; and the peak
        MB of the contestants' processes by name.
    """
    with contextlib.ExitStack() as stack:
        make = {name: (pytorch, each) for name, each in options.items()}
        make |= {name: (this_tool, each) for name, each in precisions.items()}
        processes = {}
        for name, (function, setting) in make.items():
            process = timing.new_process(prepare, (function, setting, flags.batch_size))
            processes[name] = stack.enter_context(process)
        times = {what: {name: [] for name in make} for what in (TRAIN, INFER)}
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
    """Return what all are compared with, by the heading of its column: names of contestants.

    Args:
        milliseconds: (rounds,) by name of the contestant.
    """

    def fastest(names):
        return min(names, key=lambda name: np.median(milliseconds[name]))

    measured = {name: options for name, options in PYTORCH.items() if name in milliseconds}
    float32 = [name for name, options in measured.items() if "bfloat16" not in options]
    return {
        "× plain": PLAIN,
        "× PyTorch's best in float32": fastest(float32),
        "× PyTorch's best": fastest(measured),
    }


def rows(milliseconds, memory):
    """Return the cells of the contestants: medians, and medians of ratios within a round.

    Args:
        milliseconds: (rounds,) by name of the contestant.
        memory: peak MB by name of the contestant.
    """
    compared = [milliseconds[rival] for rival in rivals(milliseconds).values()]
    return [
        [
            name,
            f"{np.median(values):.0f}",
            *(f"{np.median(rival / values):.2f}" for rival in compared),
            f"{memory[name]:.0f}",
        ]
        for name, values in milliseconds.items()
    ]


if __name__ == "__main__":
    sys.exit(timing.run(sys.argv, __doc__, compare, rounds=5, steps=3, batch_size=64))
