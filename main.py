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
import itertools
import os
import shlex
import sys

from absl import flags

import config
import datasets
import errors
import runtime
import usage
from errors import UsageError, UserError

NETWORK, TRAINING = config.NetworkConfig(), config.TrainingConfig()
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
         "start a new training with the weights in this folder: an export, pretrained/mnist, or "
         "pretrained/multi_mnist"),
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
        ("train_size", 0, (0, 10**9), "use only the first N training images; 0: all"),
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
        ("w_stddev", TRAINING.w_stddev, (1e-6, 10.0), "standard deviation of the first W"),
        ("target", "shifted", ("shifted", "unshifted"), "the image that is reconstructed"),
        ("fractional_shift", 0.0, (0.0, 8.0), "shift by fractions of a pixel up to this; 0: whole"),
        ("routing_gradient", "all", ("all", "last"), "iterations with gradients"),
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
        ("n_conv", NETWORK.n_conv, (1, 4096), "filters of the first convolution"),
        ("n_primary", NETWORK.n_primary, (1, 1024), "types of primary capsules"),
        ("primary_dim", NETWORK.primary_dim, (1, 1024), "dimension of a primary capsule"),
        ("digit_dim", NETWORK.digit_dim, (1, 1024), "dimension of a digit capsule"),
        ("routing_iterations", NETWORK.routing_iterations, (1, 100),
         "iterations of dynamic routing"),
        ("kernel_size", NETWORK.kernel_size, (1, 99),
         "side of the kernels of both convolutions, in pixels; images need at least twice as many "
         "minus 1"),
        ("variant", NETWORK.variant, config.VARIANTS,
         "the paper's network, or that of the authors' public code, which has biases in routing "
         "and weaker primary capsules"),
    ],
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
LARGEST_SIDE = 1024  # pixels of --image_size
EMPTY = {
    "predict": "PATTERN",
    "export": "DIR",
    "initial_weights": "DIR",
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
    errors.NetworkMismatch: "give the flags that it was trained with, or another folder",
    errors.PretrainedMismatch: "leave these flags out, or train without these weights",
    errors.NoPretrainedWeights: "train first (--train), without --pretrained",
    errors.RunMismatch: "give the same flags, or --restart to move it aside, or " + _OTHER_FOLDERS,
    errors.FolderInUse: "wait for it, or give " + _OTHER_FOLDERS,
    errors.FolderTaken: "give another --logdir and --val_checkpoint_dir too",
    errors.NotFinite: "try a lower --learning_rate, with --restart",
    MemoryError: "try a smaller --batch_size or network",
}


def advice(error):
    """Return which flag or command helps against an error, "" if the error says so itself."""
    return usage.advice_for(error, ADVICE, runtime.is_out_of_memory(error))


def help_text():
    """Return the examples, then all flags by purpose, in lines of at most `usage.WIDTH` columns."""
    lines = [__doc__.strip()]
    for group, rows in FLAGS.items():
        lines.append(f"\n{group}:")
        for name, default, bounds, text in rows:
            flag, note = describe_flag(name, default, bounds)
            lines += usage.help_lines(flag, text + note)
    return "\n".join(line.rstrip() for line in lines)


def describe_flag(name, default, bounds):
    """Return how to write a flag, and a note on its default or on bounds that one may meet."""
    if isinstance(default, bool):
        return f"--[no]{name}", ""
    if isinstance(default, str):
        if bounds:
            note = "" if default == "default" else f" (default {default})"
            return f"--{name}={'|'.join(bounds)}", note
        return f"--{name}={default or EMPTY.get(name, 'TEXT')}", ""
    low, high = bounds
    common = isinstance(default, int) and high <= usage.COMMON
    return f"--{name}={default}", f" ({low:,} to {high:,})" if common else ""


def parse(argv):
    """Return the values of the flags. Raise UsageError if the command line is wrong."""
    values = flags.FlagValues()
    for name, default, bounds, text in ROWS:
        define_flag(values, name, default, bounds, text)
    try:
        stray = values(argv)[1:]
    except (flags.Error, ValueError) as error:  # ValueError: --noflag=value
        problem = usage.describe_problem(error, NAMES)
        raise UsageError(problem + usage.see_help(problem)) from None
    if stray:
        refuse_stray_word(stray[0], values.predict)
    refuse_repeats(values)
    for name in PATHS:
        setattr(values, name, os.path.expanduser(getattr(values, name)))
    check_values(values)
    fill_in(values)
    check_combinations(values)
    check_weights(values)
    return values


def define_flag(values, name, default, bounds, text):
    """Define a flag whose type is that of its default."""
    if isinstance(default, bool):
        flags.DEFINE_boolean(name, default, text, flag_values=values)
    elif isinstance(default, str) and bounds:
        flags.DEFINE_enum(name, default, bounds, text, flag_values=values)
    elif isinstance(default, str):
        flags.DEFINE_string(name, default, text, flag_values=values)
    else:
        parser, serializer = usage.NumberParser(type(default)), flags.ArgumentSerializer()
        flags.DEFINE(parser, name, default, text, flag_values=values, serializer=serializer)


def refuse_stray_word(word, pattern):
    """Raise UsageError for a word that is not a flag."""
    if pattern and os.path.exists(word):
        raise UsageError(
            f"unexpected argument {word!r}: the shell replaced the pattern of --predict by the "
            "files' names, expected a quoted one, such as --predict='*.png'"
        )
    raise UsageError(usage.stray_word(word, NAMES))


def refuse_repeats(values):
    """Raise UsageError for a flag that is given more than once: all but the last are ignored."""
    for name in values:
        if values[name].present > 1:
            raise UsageError(
                f"--{name} is given {values[name].present} times, expected once, with one value"
            )


def check_values(values):
    """Raise UsageError if a number is out of bounds or a name is empty."""
    for name, default, bounds, _ in ROWS:
        value = getattr(values, name)
        number = type(default) in (int, float)
        if number and not bounds[0] <= value <= bounds[1]:  # absl's own bounds let nan pass
            expected = usage.expected_number(type(default), *bounds, value)
            raise UsageError(f"--{name}={value}: expected {expected}")
        if isinstance(default, str) and not value and (default or values[name].present):
            raise UsageError(f"--{name} is empty, expected a value")
        if name in WRITTEN and not is_utf8(value):
            raise UsageError(
                f"--{name}={value} is not in UTF-8, expected a name that is: TensorFlow cannot "
                "write to others"
            )
    dataset = values.dataset
    files = dataset.endswith(".npz") or os.path.isdir(dataset)
    if dataset not in datasets.CLASS_NAMES and not files and not weights_suffice(values):
        raise UsageError(
            f"--dataset={dataset} is unknown, or no such folder, expected {datasets.FORMS}"
        )
    refuse_bad_size(values)


def refuse_bad_size(values):
    """Raise UsageError if --image_size is given and is not a size."""
    sides = usage.parse_size(values.image_size)
    given = values["image_size"].present
    if given and not (sides and all(1 <= side <= LARGEST_SIDE for side in sides)):
        raise UsageError(
            f"--image_size={values.image_size}, expected height and width in pixels, 1 to "
            f"{LARGEST_SIDE}, such as 32x48"
        )


def is_utf8(name):
    """Tell whether the name of a file is in UTF-8. Python keeps other bytes as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def weights_suffice(values):
    """Tell whether no mode needs the data set, and there are weights under its name."""
    if any(getattr(values, mode) for mode in config.MODES_WITH_DATA):
        return False
    name = datasets.dataset_name(values.dataset)
    if values.multi_MNIST:
        return os.path.isdir(os.path.join(values.multi_checkpoint_dir, f"multi_{name}"))
    return os.path.isdir(os.path.join(values.checkpoint_dir, name))


def fill_in(values):
    """Give flags that are not given the values of the recipe, or of MultiMNIST's schedule."""
    preset = config.RECIPES[values.recipe]
    if values.multi_MNIST and values.recipe == "authors":
        preset = preset | config.AUTHORS_MULTI_MNIST
    elif values.multi_MNIST and values.recipe == "default":
        preset = config.MULTI_MNIST
    for name, value in preset.items():
        if not values[name].present:
            setattr(values, name, value)


def check_combinations(values):
    """Raise UsageError if flags contradict each other."""
    if values.recipe == "long" and values.multi_MNIST:
        raise UsageError("--recipe=long is for single digits, without --multi_MNIST")
    if values["multi_shift"].present and not values.multi_MNIST:
        raise UsageError("--multi_shift needs --multi_MNIST")
    if values.restart and not values.train:
        raise UsageError("--restart starts training over and needs --train")
    if values.multi_test_pairs > 1 and not (values.multi_MNIST and values.test):
        raise UsageError("--multi_test_pairs needs --multi_MNIST and --test")
    checkpoints = "multi_checkpoint_dir" if values.multi_MNIST else "checkpoint_dir"
    for one, other in itertools.combinations((checkpoints, "val_checkpoint_dir", "logdir"), 2):
        if os.path.realpath(getattr(values, one)) == os.path.realpath(getattr(values, other)):
            raise UsageError(f"--{one} and --{other} must differ")
    if values.validation_check and 0 < values.train_size < 6:
        raise UsageError("--validation_check holds out a sixth and needs --train_size of 6 or more")


def check_weights(values):
    """Raise UsageError if the flags about weights contradict others."""
    if values.pretrained and (values.train or values.validation_check):
        hint = ""
        if values.train and values.dataset == "mnist":
            folder = "pretrained/multi_mnist" if values.multi_MNIST else "pretrained/mnist"
            hint = f"; to train them further: --initial_weights={folder}"
        raise UsageError(
            "--pretrained takes the weights that come with the program and cannot be combined "
            "with --train or --validation_check" + hint
        )
    if values.initial_weights and not values.train:
        raise UsageError("--initial_weights starts training from these weights and needs --train")
    if values.initial_weights and values["initialization"].present:
        raise UsageError("--initial_weights takes the place of --initialization; give one of them")


def main(argv):
    """Run the command line (argv[0] is the program) and return its exit code."""
    runtime.escape_what_streams_lack()
    try:
        if any(word in ("--help", "-help", "-h") for word in argv[1:]):
            print(help_text(), flush=True)
            return 0
        values = parse(argv)
        modes = [name for name in MODES if getattr(values, name)]
        if not modes:
            print(short_usage(), file=sys.stderr)
            return 2
        code = run_modes(values, argv, modes)
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return code
    except UsageError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return 1


def short_usage():
    """Return what to type, for a command line without a mode."""
    modes = ", ".join(f"--{mode}" for mode in MODES)
    examples = __doc__.strip().split("\n\n", 1)[1]
    return f"Nothing to do. Give one or more of\n  {modes}\n{examples}\nAll flags: --help"


def run_modes(values, argv, modes):
    """Run the modes of a command line in their order, and return the exit code."""
    several_workers = values.strategy == "multi_worker"
    # When one of several workers stops, all others say so; the line printed below is enough.
    # Only a training run compiles for seconds.
    tf = runtime.start_tensorflow("3" if several_workers else "2", keep_compiled=values.train)
    from training.interrupt import Interrupted

    try:
        dispatch(values, argv, modes)
        return 0
    except Interrupted as stop:
        without = ", without --restart" if values.restart else ""
        print(f"Stopped, and saved. To resume: the same command again{without}.", file=sys.stderr)
        return 128 + stop.number
    except BrokenPipeError:
        raise
    except (UserError, OSError, MemoryError, tf.errors.OpError) as error:
        line = runtime.describe_error(error, advice(error), several_workers)
        print(f"main.py: {line}", file=sys.stderr)
    return 1


def dispatch(values, argv, modes):
    """Run each mode; workers that are not the chief print and draw nothing."""
    from commands.evaluate import test
    from commands.export import check_new, export
    from commands.pictures import reconstruction_test, tweak_test
    from commands.predict import matching_files, predict
    from commands.pretrained import find_exported
    from commands.session import Session
    from commands.train import train
    from training.distribution import barrier

    if values.export:
        check_new(values.export)  # before an hour of training
    if values.predict:
        matching_files(values.predict)
    if values.initial_weights:
        find_exported(values.initial_weights)
    session = Session(values, argv)
    with contextlib.ExitStack() as stack:
        if not session.chief:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if values.train:
            train(session, MODES[1:])
            barrier(session.strategy)  # the chief has saved: all workers load the same weights
        if modes != ["train"]:
            session.load()
        for mode in (test, reconstruction_test, tweak_test, export, predict):
            if mode.__name__ in modes and (session.chief or mode is test):
                mode(session)
        barrier(session.strategy)  # a worker that ends must not leave the others alone
        if values.test:
            print(f"Next: tensorboard --logdir={shlex.quote(values.logdir)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
