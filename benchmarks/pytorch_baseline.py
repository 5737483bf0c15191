"""This tool against a CapsNet in PyTorch: same network, loss and optimizer.

    pip install torch
    python benchmarks/pytorch_baseline.py [--rounds=7] [--steps=5] [--batch_size=64]

PyTorch is measured as people write it, and faster step by step: with the memory layout
channels_last, with votes and routing as products of matrices, compiled, and in bfloat16 where the
processor computes with it. Each variant and this tool run in a process of their own and take
turns. A ratio is the median over the rounds of the ratios within a round. Training is with data
deformation.
"""

import importlib.metadata
import importlib.util
import shutil
import sys

import numpy as np
import timing

import datasets
import errors
import runtime

PARAMETERS = 8_215_568
TRAIN, INFER = "train step, with deformation", "inference"
# What is measured: (name, keys of `pytorch_capsnet.Variant`).
VARIANTS = (
    ("PyTorch, plain", ()),
    ("channels_last", ("channels_last",)),
    ("products", ("einsum",)),
    ("products, channels_last", ("einsum", "channels_last")),
    ("products, compiled", ("einsum", "compiled")),
    ("products, channels_last, compiled", ("einsum", "channels_last", "compiled")),
    ("bfloat16, products, channels_last", ("bfloat16", "einsum", "channels_last")),
    ("bfloat16, products, compiled", ("bfloat16", "einsum", "compiled")),
    (
        "bfloat16, products, channels_last, compiled",
        ("bfloat16", "einsum", "channels_last", "compiled"),
    ),
)
TOOL = "this tool"
CALLS = {}  # of this process: what to time, by name


def pytorch(options, batch_size):
    """Return calls that train one step and classify one batch in PyTorch."""
    import pytorch_capsnet

    dataset = datasets.load_dataset("mnist", timing.ROOT / "data")
    variant = pytorch_capsnet.Variant(**dict.fromkeys(options, True))
    images, labels = dataset.x_train[:batch_size], dataset.y_train[:batch_size]
    train, infer, network = pytorch_capsnet.calls(variant, images, labels)
    check_size(sum(p.numel() for p in network.parameters()))
    return {TRAIN: train, INFER: infer}


def this_tool(batch_size):
    """Return calls that train one step and classify one batch with this tool."""
    runtime.start_tensorflow()
    trainer = timing.make_trainer(timing.load_digits(batch_size), batch_size)
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


def variants_here(units, compiler):
    """Return which VARIANTS can be measured, and a line on each kind that cannot.

    Args:
        units: names of the processor's bfloat16 units, see `runtime.bfloat16_units`.
        compiler: whether there is a C++ compiler, which torch.compile needs.
    """
    measured, lines = [], []
    for name, options in VARIANTS:
        if not (("bfloat16" in options and not units) or ("compiled" in options and not compiler)):
            measured.append((name, options))
    if not units:
        lines.append("Not measured: bfloat16, as this processor has no units for it.")
    if not compiler:
        lines.append("Not measured: torch.compile, as there is no C++ compiler (g++ or clang++).")
    return measured, lines


def compare(flags):
    """Let all take turns and print the tables."""
    if not importlib.util.find_spec("torch"):
        raise errors.UserError(
            "PyTorch is not installed, and not needed for anything else; pip install torch"
        )
    units = runtime.bfloat16_units()
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    measured, lines = variants_here(units, compiler)
    processes = {
        name: timing.new_process(prepare, (pytorch, options, flags.batch_size))
        for name, options in measured
    }
    processes[TOOL] = timing.new_process(prepare, (this_tool, flags.batch_size))
    times = {TRAIN: [], INFER: []}
    try:
        for _ in range(flags.rounds):
            for task, rounds in times.items():
                rounds.append(
                    {
                        name: process.submit(measure, task, flags.steps).result()
                        for name, process in processes.items()
                    }
                )
        memory = {name: p.submit(timing.peak_megabytes).result() for name, p in processes.items()}
    finally:
        for process in processes.values():
            process.shutdown()
    version = importlib.metadata.version("torch")
    print(
        f"{timing.machine()}, PyTorch {version}; bfloat16 units: {', '.join(units) or 'none'}; "
        f"batch {flags.batch_size}, {flags.rounds} rounds\n"
    )
    timing.print_table(["", f"{TRAIN}, ms", f"{INFER}, ms", "peak MB"], speeds(times, memory))
    float32 = [name for name, options in measured if "bfloat16" not in options]
    compared = (
        ("plain PyTorch", ["PyTorch, plain"]),
        ("the fastest PyTorch in float32", float32),
        ("the fastest PyTorch", list(processes)[:-1]),
    )
    header = ["this tool is faster than", *(f"{task}: ratio (range)" for task in times)]
    timing.print_table(header, [ratios(text, names, times) for text, names in compared])
    if lines:
        print("\n".join(lines))


def speeds(times, memory):
    """Return a row for each that was measured: median milliseconds and peak memory."""
    return [
        [
            name,
            *(
                f"{np.median([by_name[name] for by_name in rounds]):.0f}"
                for rounds in times.values()
            ),
            f"{memory[name]:.0f}",
        ]
        for name in memory
    ]


def ratios(text, names, times):
    """Return a row that compares this tool with the fastest of some variants.

    Args:
        text: first cell.
        names: of the variants; the fastest is the one with the lowest median of each task.
        times: for each task a list of the rounds' milliseconds by name.
    """
    cells = [text]
    for rounds in times.values():
        fastest = min(names, key=lambda name: np.median([by_name[name] for by_name in rounds]))
        each = np.array([by_name[fastest] / by_name[TOOL] for by_name in rounds])
        cells.append(f"{np.median(each):.2f} ({each.min():.2f} to {each.max():.2f}), {fastest}")
    return cells


if __name__ == "__main__":
    sys.exit(timing.run(sys.argv, __doc__, compare, rounds=7, steps=5, batch_size=64))
