"""Train and examine a CapsNet (Sabour, Frosst, Hinton: Dynamic Routing Between Capsules, 2017).

Examples:
  python main.py --test --tweak_test --pretrained             try the trained network, included
  python main.py --train --test --epoch=1 --train_size=6000   a quick look, in a minute or two
  python main.py --train --data_deformation                   train on MNIST, or resume
  python main.py --train --validation_check                   keep the best by validation loss
  python main.py --test --reconstruction_test --tweak_test    examine what was trained
  python main.py --train --test --multi_MNIST                 overlapping digits
  python main.py --train --test --dataset=photos              own images, photos/train/CLASS/*.png
  python main.py --predict='my/*.png' --pretrained            classify image files
  python main.py --export=capsnet --pretrained                export a SavedModel and a .keras file
  tensorboard --logdir=./logs                                 curves and pictures
"""

import contextlib
import os
import shlex
import sys

from absl import flags

from capsnet_core import config, errors
from capsnet_core.errors import UsageError
from capsnet_core.networks import NETWORKS
from commands import checks
from runtime import command_line, machine, startup

TRAINING = config.TrainingConfig()
_MULTI = ", ".join(f"--{name}={value}" for name, value in config.MULTI_MNIST.items())

# Flags by purpose: name, default, bounds (or choices), help. The type is that of the default.
# fmt: off
FLAGS = {
    "Modes (at least one; they run in this order)": [
        ("train", False, None, "train, or resume from the last checkpoint"),
        ("test", False, None, "measure accuracy and losses on all test images"),
        ("reconstruction_test", False, None, "draw reconstructions, in --sample_dir"),
        ("tweak_test", False, None,
         "draw reconstructions of capsules changed step by step, in --tweak_dir"),
        ("export", "", None, "write the network to this new folder, for use without this program"),
        ("predict", "", None, "classify image files; quote the pattern, as in 'my/*.png'"),
    ],
    "Weights": [
        ("pretrained", False, None,
         "use the weights that come with this program, without training"),
        ("initial_weights", "", None,
         "start a new training run with the weights in this folder: an export, pretrained/mnist, "
         "or pretrained/multi_mnist; with other classes, with those of its convolutions"),
        ("freeze", "", None,
         "parts of the network that training leaves as they are, such as conv1,primary"),
    ],
    "Data": [
        ("dataset", "mnist", None,
         "mnist, fashion_mnist, kmnist, a .npz file, or a folder of images by class, with or "
         "without train and test folders"),
        ("image_size", "", None,
         "fit all images to this height and width in pixels, such as 32x48; needed if the images "
         "of a folder differ in size"),
        ("multi_MNIST", False, None,
         f"two overlapping digits in each image (section 6); changes the defaults to {_MULTI}"),
        ("multi_test_pairs", 1, (1, 1000),
         "test pairs for each test digit; the paper takes 1000"),
        ("multi_shift", config.MULTI_SHIFT, (0, 8),
         "largest shift of an overlapping digit, in pixels; the authors' public code: 6"),
        ("data_deformation", False, None,
         f"shift training images by up to {config.MAX_SHIFT} pixels (section 5)"),
        ("validation_check", False, None,
         "hold out a sixth of the training images; keep and test the weights with the lowest "
         "loss on them"),
        ("train_size", 0, (0, 10**9), "use only N training images (of MNIST the first); 0: all"),
        ("data_dir", "data", None, "folder of the data sets"),
    ],
    "Training": [
        ("epoch", config.EPOCHS, (1, 10**6),
         "total number of epochs, including those already done"),
        ("batch_size", TRAINING.batch_size, (1, 10**5), "images per step, over all devices"),
        ("learning_rate", TRAINING.learning_rate, (1e-9, 10.0), "initial learning rate (Adam)"),
        ("decay_rate", TRAINING.decay_rate, (1e-6, 1.0),
         "factor that multiplies the learning rate over --decay_steps steps, at most 1"),
        ("decay_steps", TRAINING.decay_steps, (1, 10**9),
         "steps over which --decay_rate multiplies the learning rate once"),
        ("reconstruction_weight", TRAINING.reconstruction_weight, (0.0, 1e6),
         "weight of the reconstruction loss, the sum of the squared pixel errors"),
        ("averaging", TRAINING.averaging, (0.0, 0.99999),
         "momentum of the running averages of the weights, which are used for tests; below 1; "
         "0: no averages"),
        ("initialization", config.INITIALIZATION, tuple(config.INITIALIZATIONS),
         "initial weights: Glorot's, or those of the authors' public code"),
        ("recipe", "default", tuple(config.RECIPES),
         "defaults of the other flags; authors: the settings of the authors' public code; long: "
         "50 epochs"),
        ("seed", TRAINING.seed, (0, 2**31 - 1),
         "seed of the initial weights, the order, the shifts and the pairs"),
        ("save_steps", config.SAVE_STEPS, (1, 10**9),
         "steps between checkpoints; every epoch ends with one too"),
        ("restart", False, None, "with --train: archive the earlier run and start over"),
    ],
    "Network": [
        ("network", "capsnet", tuple(NETWORKS),
         "what to train: the paper's network, or its convolutional baseline (table 1)"),
    ],
    **{
        f"Settings of --network={name}": [
            (field.name, field.default, field.metadata["bounds"], field.metadata["help"])
            for field in kind.settings()
        ]
        for name, kind in NETWORKS.items()
    },
    "Pictures": [
        ("tweak_num", 5, (1, 100), "number of test digits to tweak"),
    ],
    "Speed": [
        ("conv", "auto", ("auto", "direct", "dft"),
         "convolve directly, or by products of spectra (dft); auto: dft on a CPU"),
        ("jit", "auto", ("auto", "on", "off"),
         "compile with XLA; auto: on, except for direct convolution on a CPU"),
    ],
    "Devices": [
        ("strategy", "auto", ("auto", "one", "mirrored", "multi_worker"),
         "one device, all GPUs of this machine, or the machines in TF_CONFIG; auto: all GPUs"),
        ("precision", "float32", ("float32", "mixed_bfloat16"),
         "precision of matrix products; mixed_bfloat16 on accelerators, and in inference on a CPU "
         "with AMX or AVX512-BF16; norms, routing and losses stay float32"),
    ],
    "Reproducibility": [
        ("deterministic", False, None,
         "bit-identical runs on accelerators and with --conv=direct too; slower"),
    ],
    "Folders": [
        ("checkpoint_dir", "checkpoint", None,
         "folder for checkpoints; each run has its own folder in it"),
        ("val_checkpoint_dir", "val_checkpoint", None,
         "folder for the best checkpoint by validation loss"),
        ("multi_checkpoint_dir", "multi_checkpoint", None,
         "folder for checkpoints with --multi_MNIST"),
        ("sample_dir", "samples", None, "folder for pictures"),
        ("tweak_dir", "tweak", None, "folder for pictures of changed capsules"),
        ("logdir", "logs", None, "folder for TensorBoard events and test.json"),
    ],
}
# fmt: on
ROWS = [row for rows in FLAGS.values() for row in rows]
NAMES = [name for name, *_ in ROWS]
EMPTY = {
    "predict": "PATTERN",
    "export": "DIR",
    "initial_weights": "DIR",
    "freeze": "PARTS",
    "image_size": "HxW",
}  # what --help shows for flags that are empty
MODES = [name for name, *_ in next(iter(FLAGS.values()))]
WRITTEN = ["export", *(name for name, *_ in FLAGS["Folders"])]
PATHS = ["dataset", "data_dir", "predict", "initial_weights", *WRITTEN]

_OTHER_FOLDERS = "other folders (--checkpoint_dir, --val_checkpoint_dir, --logdir)"
# Which flag helps, by the type of the error; the other errors say it themselves.
ADVICE = {
    errors.ImageSizesDiffer: "give an --image_size=HxW that all images are made to fit",
    errors.ImageTooSmall: "give a --dataset of larger images, or a smaller --kernel_size",
    errors.NoCheckpoint: "train first (add --train; --validation_check needs a whole epoch), take "
    "the included weights (--pretrained), or name the folder of a trained network",
    errors.DamagedCheckpoints: "train again with --train --restart",
    errors.NetworkMismatch: "name another folder, or train again with --train --restart",
    errors.PretrainedMismatch: "leave these flags out, or train without these weights",
    errors.NoPretrainedWeights: "train first (--train), without --pretrained",
    errors.RunMismatch: "give the same flags, or --restart to move it aside, or " + _OTHER_FOLDERS,
    errors.FolderInUse: "wait for it, or give " + _OTHER_FOLDERS,
    errors.FolderTaken: "give another --logdir and --val_checkpoint_dir too",
    errors.NotFinite: "try a lower --learning_rate, with --restart",
    MemoryError: "try a smaller --batch_size or network",
}


def help_text():
    """Return the examples, then all flags by purpose."""
    lines = [__doc__.strip()]
    for group, rows in FLAGS.items():
        lines.append(f"\n{group}:")
        for name, default, bounds, text in rows:
            flag, note = command_line.describe_flag(name, default, bounds, EMPTY)
            lines += command_line.help_lines(flag, text + note)
    return "\n".join(line.rstrip() for line in lines)


def parse(argv):
    """Return the values of the flags. Raise UsageError if the command line is wrong."""
    values = flags.FlagValues()
    for name, default, bounds, text in ROWS:
        command_line.define_flag(values, name, default, bounds, text)
    if stray := command_line.read_values(values, argv):
        refuse_stray_word(stray[0], values.predict)
    for name in PATHS:
        setattr(values, name, os.path.expanduser(getattr(values, name)))
    checks.check(values, ROWS, WRITTEN)
    return values


def refuse_stray_word(word, pattern):
    """Raise UsageError for a word that is not a flag."""
    if pattern and os.path.exists(word):
        raise UsageError(
            f"unexpected argument {word!r}: the shell replaced the pattern of --predict by the "
            "files' names, expected a quoted one, such as --predict='*.png'"
        )
    raise UsageError(command_line.stray_word(word, NAMES))


def main(argv):
    """Run the command line (argv[0] is the program) and return its exit code."""
    return command_line.run_program(argv, help_text, lambda: run(argv), ADVICE)


def run(argv):
    """Run the modes of a command line in their order, and return the exit code."""
    values = parse(argv)
    modes = [name for name in MODES if getattr(values, name)]
    if not modes:
        print(short_usage(), file=sys.stderr)
        return 2
    # When one of several workers stops, all others say so; one line is enough.
    startup.start_tensorflow("3" if values.strategy == "multi_worker" else "2")
    dispatch(values, argv, modes)
    return 0


def short_usage():
    """Return what to type, for a command line without a mode."""
    modes = ", ".join(f"--{mode}" for mode in MODES)
    examples = __doc__.strip().split("\n\n", 1)[1]
    return f"Nothing to do. Give one or more of\n  {modes}\n{examples}\nAll flags: --help"


def dispatch(values, argv, modes):
    """Run each mode; workers that are not the chief print and draw nothing."""
    from commands import export, predict, train
    from commands.data import load_data
    from commands.devices import choose_devices
    from commands.weights import find_exported
    from training.distribution import barrier

    machine.commit()  # now: it may be another one after an hour of training
    if values.export:
        export.check_new(values.export)  # before an hour of training
    if values.predict:
        predict.matching_files(values.predict)
    if values.initial_weights:
        find_exported(values.initial_weights)
    devices = choose_devices(values)
    with contextlib.ExitStack() as stack:
        if not devices.chief:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        needs_data = any(mode in config.MODES_WITH_DATA for mode in modes)
        data = load_data(values, print) if needs_data else None
        if values.train:
            train.train(values, argv, devices, data, MODES[1:])
            barrier(devices.strategy)  # the chief has saved: all workers load the same weights
        if modes != ["train"]:
            use_weights(values, argv, devices, data)
        barrier(devices.strategy)  # a worker that ends must not leave the others alone
        if values.test:
            print(f"Next: tensorboard --logdir={shlex.quote(values.logdir)}")


def use_weights(values, argv, devices, data):
    """Load the weights, and run the modes that do something with them."""
    from commands import evaluate, export, pictures, predict
    from commands.weights import check_data, load

    weights = load(values, devices)
    if data:
        check_data(weights, data)
    functions = {
        "test": lambda: evaluate.test(values, argv, devices, data, weights),
        "reconstruction_test": lambda: pictures.reconstruction_test(values, data, weights),
        "tweak_test": lambda: pictures.tweak_test(values, data, weights),
        "export": lambda: export.export(values, weights),
        "predict": lambda: predict.predict(values, weights),
    }
    for mode, function in functions.items():
        if getattr(values, mode) and (devices.chief or mode == "test"):
            function()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
