"""Train and examine a CapsNet (Sabour, Frosst, Hinton: Dynamic Routing Between Capsules, 2017).

Examples:
  python main.py --test --reconstruction_test --tweak_test --pretrained
                                                                 see what it does, without training
  python main.py --train --test --epoch=1 --train_size=6000      a quick look, in a minute or two
  python main.py --train --data_deformation                      train on MNIST
  python main.py --test --tweak_test --reconstruction_test       examine what was trained
  python main.py --train --validation_check                      keep the best by validation
  python main.py --train --test --multi_MNIST                    overlapping digits
  tensorboard --logdir=./logs                                    curves and pictures
"""

import contextlib
import datetime
import faulthandler
import glob
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

import utils
from utils import UserError

# The authors' public code: 300,000 steps, the margin loss halved and averaged over ten classes too.
AUTHORS = {"epoch": 640, "batch_size": 128, "decay_rate": 0.96, "decay_steps": 2000,
           "reconstruction_weight": 0.01, "averaging": 0.0, "initialization": "authors"}
# The default schedule of --multi_MNIST, for an hour on two cores: batch, rate, averages and weight are
# those with the lowest error on pairs of held-out training digits, in shorter trainings.
MULTI_MNIST = {"epoch": 6, "batch_size": 32, "decay_steps": 1800, "reconstruction_weight": 0.005,
               "averaging": 0.998}

# Flags by purpose: name, default, bounds (or choices), help. The type is that of the default.
FLAGS = {
    "Modes (at least one; they run in this order)": [
        ("train", False, None, "train, or go on from the last checkpoint"),
        ("test", False, None, "accuracy and losses over all test images"),
        ("reconstruction_test", False, None, "pictures of reconstructions, to --sample_dir"),
        ("tweak_test", False, None, "pictures of capsules changed step by step, to --tweak_dir"),
        ("export", "", None, "write the network to this new folder, for use without this program"),
        ("predict", "", None, "say what is on these image files, a quoted pattern such as 'my/*.png'"),
    ],
    "Weights": [
        ("pretrained", False, None,
         "examine or export the weights that come with this program, without training"),
    ],
    "Data": [
        ("dataset", "mnist", None,
         "mnist, fashion_mnist, kmnist, a .npz file, or a folder of images by class"),
        ("multi_MNIST", False, None, "two overlapping digits in each image (paper, section 6); default then "
         + ", ".join(f"--{name}={value}" for name, value in MULTI_MNIST.items())),
        ("multi_test_pairs", 1, (1, 1000),
         "pairs to test in which each test digit is the first; the paper takes 1000"),
        ("data_deformation", False, None, "shift training images by up to 2 pixels (section 5)"),
        ("validation_check", False, None,
         "hold out a sixth of the training images; keep, and test, the best weights by their loss"),
        ("train_size", 0, (0, 10**9), "only the first N training images, for a quick look; 0: all"),
        ("data_dir", "data", None, "folder of the data sets"),
    ],
    "Training": [
        ("epoch", 10, (1, 10**6), "epochs in all, those already done included"),
        ("batch_size", 64, (1, 10**5), "images in a step"),
        ("learning_rate", 0.001, (1e-9, 10.0), "of Adam, at the first step"),
        ("decay_rate", 0.7, (1e-6, 1.0), "factor of the learning rate over --decay_steps steps"),
        ("decay_steps", 1000, (1, 10**9), "steps in which the learning rate falls by --decay_rate"),
        ("reconstruction_weight", 0.0005, (0.0, 1e6), "of the summed squared pixel errors"),
        ("averaging", 0.99, (0.0, 0.99999),
         "momentum of running averages of the weights, which are what is tested; 0: none"),
        ("initialization", "glorot", ("glorot", "authors"), "of the weights"),
        ("recipe", "default", ("default", "authors"),
         "authors: their public code's settings, for the flags of them not given"),
        ("seed", 0, (0, 2**31 - 1), "of the first weights, the order, the shifts and the pairs"),
        ("save_steps", 500, (1, 10**9), "steps between checkpoints (one an epoch besides)"),
        ("restart", False, None, "with --train: move an earlier run aside and begin anew"),
    ],
    "Network": [
        ("n_conv", 256, (1, 4096), "filters of the first convolution"),
        ("n_primary", 32, (1, 1024), "types of primary capsules"),
        ("primary_dim", 8, (1, 1024), "dimension of a primary capsule"),
        ("digit_dim", 16, (1, 1024), "dimension of a digit capsule"),
        ("routing_iterations", 3, (1, 100), "iterations of dynamic routing (procedure 1)"),
    ],
    "Pictures": [
        ("tweak_num", 5, (1, 100), "test digits to tweak"),
    ],
    "Speed": [
        ("conv", "auto", ("auto", "direct", "dft"),
         "convolve directly or by products of spectra; auto: dft on a CPU"),
        ("jit", "auto", ("auto", "on", "off"),
         "compile with XLA; auto: but for direct convolution on a CPU, which XLA does slowly"),
    ],
    "Devices": [
        ("strategy", "auto", ("auto", "one", "mirrored", "multi_worker"),
         "one device, all GPUs of this machine, or the machines in TF_CONFIG; auto: all GPUs"),
        ("precision", "float32", ("float32", "mixed_bfloat16"),
         "of products; mixed_bfloat16 on accelerators only, norms, routing and losses stay float32"),
    ],
    "Reproducibility": [
        ("deterministic", False, None,
         "bit-identical runs on accelerators and with --conv=direct too, at some cost in speed"),
    ],
    "Folders": [
        ("checkpoint_dir", "checkpoint", None, "of checkpoints, one folder a run"),
        ("val_checkpoint_dir", "val_checkpoint", None, "of the best by validation"),
        ("multi_checkpoint_dir", "multi_checkpoint", None, "of checkpoints with --multi_MNIST"),
        ("sample_dir", "samples", None, "of pictures"),
        ("tweak_dir", "tweak", None, "of tweaked reconstructions"),
        ("logdir", "logs", None, "of TensorBoard events and test.json"),
    ],
}
MODES = [name for name, *_ in next(iter(FLAGS.values()))]
GRID_IMAGES = 64
WORKERS_SECONDS = 600


class UsageError(Exception):
    """The command line is wrong: one line for the user, exit code 2."""


def help_text():
    """Examples, then all flags by purpose."""
    lines = [__doc__.strip()]
    for group, rows in FLAGS.items():
        lines.append(f"\n{group}:")
        for name, default, bounds, text in rows:
            if isinstance(default, bool):
                shown, note = f"--[no]{name}", ""
            elif isinstance(default, str):
                empty = {"predict": "PATTERN", "export": "DIR"}
                shown = f"--{name}=" + ("|".join(bounds) if bounds else default or empty[name])
                note = f" (default {default})" if bounds else ""
            else:
                low, high = (f"{b:,}" if isinstance(b, int) else f"{b:g}" for b in bounds)
                shown, note = f"--{name}={default}", f" ({low} to {high})"
            lines.append(f"  {shown:<44} {text}{note}" if len(shown) < 44
                         else f"  {shown}\n{'':<47}{text}{note}")
    return "\n".join(lines)


def parse(argv):
    """Values of the flags. Raises UsageError."""
    values = flags.FlagValues()
    for rows in FLAGS.values():
        for name, default, bounds, text in rows:
            if isinstance(default, str) and bounds:
                flags.DEFINE_enum(name, default, bounds, text, flag_values=values)
            else:
                define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer,
                          float: flags.DEFINE_float, str: flags.DEFINE_string}[type(default)]
                define(name, default, text, flag_values=values)
    try:
        stray = values(argv)[1:]
    except (flags.Error, ValueError) as error:  # ValueError: --noflag=value
        raise UsageError(" ".join(str(error).split()) + "; see --help") from None
    if stray and values.predict and os.path.exists(stray[0]):
        raise UsageError(f"stray word {stray[0]!r}: the shell replaced the pattern of --predict by the "
                         "files' names, expected a quoted one, such as --predict='*.png'")
    if stray:
        raise UsageError(f"stray word {stray[0]!r}, expected only flags: write --flag=value, and "
                         "--noflag to switch one off")
    for name, default, bounds, _ in (row for rows in FLAGS.values() for row in rows):
        value = getattr(values, name)
        if type(default) in (int, float) and not bounds[0] <= value <= bounds[1]:  # nan: neither
            raise UsageError(f"--{name}={value} is out of bounds, expected {bounds[0]:g} to "
                             f"{bounds[1]:g}")
        if isinstance(default, str) and default and not value:
            raise UsageError(f"--{name} is empty, expected a name")
    others = AUTHORS if values.recipe == "authors" else MULTI_MNIST if values.multi_MNIST else {}
    for name, value in others.items():
        if not values[name].present:
            setattr(values, name, value)
    if values.dataset not in utils.CLASS_NAMES and not (
            values.dataset.endswith(".npz") or os.path.isdir(os.path.expanduser(values.dataset))):
        raise UsageError(f"--dataset={values.dataset} is unknown, expected one of "
                         f"{', '.join(utils.CLASS_NAMES)}, a .npz file, or a folder with "
                         "train/CLASS/* and test/CLASS/*")
    if values.restart and not values.train:
        raise UsageError("--restart begins a training anew and needs --train")
    if values.multi_test_pairs > 1 and not (values.multi_MNIST and values.test):
        raise UsageError("--multi_test_pairs needs --multi_MNIST and --test")
    if values.predict and values.multi_MNIST:
        raise UsageError("--predict takes images of single digits, without --multi_MNIST")
    if values.pretrained and (values.train or values.validation_check):
        raise UsageError("--pretrained takes the weights that come with the program and cannot be "
                         "combined with --train or --validation_check")
    folder = values.multi_checkpoint_dir if values.multi_MNIST else values.checkpoint_dir
    if len({os.path.realpath(f) for f in (folder, values.val_checkpoint_dir, values.logdir)}) < 3:
        raise UsageError("the folders of checkpoints, of the best by validation and of events are "
                         "the same, expected three different ones")
    if 0 < values.train_size < 6 and values.validation_check:
        raise UsageError("--validation_check holds out a sixth and needs --train_size of 6 or more")
    return values


@contextlib.contextmanager
def without_remarks():
    """Keep TensorFlow's C++ remarks (no GPU here, logging not set up) off the user's terminal.

    They are written straight to file descriptor 2 before any setting is read.
    """
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


@contextlib.contextmanager
def waiting_for_workers():
    """End the program if the wait is long, or at Ctrl-C: TensorFlow waits an hour and hears nothing.

    It does not let Python run meanwhile, so that only what is in C works.
    """
    print("Waiting for the other workers of TF_CONFIG; if they do not all come, this one ends after "
          f"{WORKERS_SECONDS / 60:g} minutes.", flush=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(WORKERS_SECONDS, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGINT, handler)


class Display:
    """Progress of training: a bar on a terminal, elsewhere a plain line now and then."""

    PLAIN_SECONDS = 30

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20),
                            TextColumn("{task.fields[text]}", table_column=Column()),  # may wrap
                            console=self.console)
        self.task, self.printed, self.began = None, -math.inf, time.monotonic()

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:
            self.bar.stop()

    def report(self, text):
        self.console.print(text, markup=False)

    def step(self, at):
        left = datetime.timedelta(seconds=round(at["seconds_left"]))
        head = f"Epoch {at['epoch']}/{at['epochs']} step {at['step']}/{at['last_step']}"
        text = (f"{at['images_per_second']:.0f} images/s, {left} left, margin loss "
                f"{at['margin_loss']:.4f}, reconstruction loss {at['reconstruction_loss']:.2f}, "
                f"accuracy {100 * at['accuracy']:.2f}%")
        self._show(head, text, at["step"], at["last_step"],
                   due=at["step"] * at["epochs"] % at["last_step"] == 0)

    def count(self, what, done, total):
        """Progress of anything that is counted; short work leaves no line."""
        self.printed = max(self.printed, self.began)
        self._show(what, f"{done:,} of {total:,}", done, total)

    def _show(self, head, text, done, total, due=False):
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task(head, text=text, total=total)
            self.bar.update(self.task, description=head, text=text, completed=done, total=total)
        elif due or time.monotonic() - self.printed > self.PLAIN_SECONDS:
            self.printed = time.monotonic()
            print(f"{head}: {text}", flush=True)


class Run:
    """What all modes share: the flags, the data, the network and the folders."""

    def __init__(self, values, argv):
        import tensorflow as tf

        import model

        self.flags, self.argv, self.library = values, argv, model
        self.commit = commit()  # now: it may be another one after an hour of training
        gpu = bool(tf.config.list_physical_devices("GPU"))
        if values.precision != "float32" and not gpu:
            raise UsageError("--precision=mixed_bfloat16 is for accelerators and there is none here, "
                             "expected --precision=float32, which is several times faster on a CPU")
        if values.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.strategy = model.choose_strategy(values.strategy, waiting_for_workers())
        self.chief = model.is_chief(self.strategy)
        data_dir = values.data_dir
        if not values["data_dir"].present and not os.path.isdir(data_dir):
            data_dir = Path(__file__).parent / data_dir  # this program's, from wherever it is called
        self.dataset = utils.load_dataset(values.dataset, data_dir)
        overlap = values.multi_MNIST
        margin = 4 if overlap else 0  # section 6
        self.name = "multi_" * overlap + self.dataset.name
        if values.train_size >= len(self.dataset.x_train):
            values.train_size = 0  # all: no other run than one without this flag
        size = values.train_size or None
        self.train_data = model.Data(
            self.dataset.x_train[:size], self.dataset.y_train[:size], margin,
            4 if overlap else 2 * values.data_deformation, overlap, self.dataset.class_names)
        self.test_data = self.train_data._replace(
            images=self.dataset.x_test, labels=self.dataset.y_test, max_shift=margin)
        folder = values.multi_checkpoint_dir if overlap else values.checkpoint_dir
        self.folders = model.Folders(*(
            Path(path) / self.name for path in (folder, values.val_checkpoint_dir, values.logdir)))
        if values.pretrained:  # not among the figures of a run of the user's own
            self.folders = self.folders._replace(
                logs=Path(values.logdir) / f"{self.name}_pretrained")
        conv = model.fastest_conv() if values.conv == "auto" else values.conv
        self.jit = values.jit == "on" or (values.jit == "auto" and (gpu or conv == "dft"))
        shape, classes = self.train_data.canvas_shape(), len(self.dataset.class_names)
        network = (values.n_conv, values.n_primary, values.primary_dim, values.digit_dim)
        tf.keras.utils.set_random_seed(values.seed)
        try:
            if values.train and self.chief:
                sizes = model.layer_sizes(shape, classes, *network)
                print("\n".join(self.describe(sizes, model.memory_needed(
                    sizes, values.batch_size / self.strategy.num_replicas_in_sync,
                    self.train_data.images.nbytes * (1 + values.validation_check)))), flush=True)
            with self.strategy.scope():
                self.model = model.CapsNet(
                    shape, classes, *network, values.routing_iterations, conv=conv,
                    initialization=values.initialization, dtype=values.precision)
        except ValueError as error:
            raise UserError(f"{values.dataset}: {error}") from None

    def describe(self, sizes, memory):
        """Lines: layers with their outputs and parameters, the data, and the memory (bytes)."""
        data, values = self.train_data, self.flags
        images = len(data.labels) - len(data.labels) // 6 * values.validation_check
        shape = "×".join(map(str, data.canvas_shape()))
        lines = [f"CapsNet                   output  {sum(n for *_, n in sizes):>12,} parameters"]
        lines += [f"  {name:<18}{' × '.join(map(str, output)):<16}{count:>10,}"
                  for name, output, count in sizes]
        lines.append(f"{images:,} training images{' in pairs' * data.overlap} of {shape}, "
                     f"{len(data.class_names)} classes; batches of {values.batch_size}, "
                     f"{math.ceil(images / values.batch_size):,} steps an epoch; training takes "
                     f"about {memory / 1e9:.1f} GB of memory")
        return lines

    def load(self):
        """Restore the weights to be examined, and say which."""
        values = self.flags
        if values.pretrained:
            known = values.dataset in utils.CLASS_NAMES
            folder = Path(__file__).parent / "pretrained" / (
                self.name if known else values.dataset.replace(os.sep, "_"))
            self.facts = self.library.load_pretrained(self.model, folder)
        else:
            folder = self.folders.best if values.validation_check else self.folders.checkpoint
            self.facts = self.library.load_weights(self.model, folder, print)
            if self.chief and (values.test or values.reconstruction_test or values.tweak_test
                               or values.export):  # what is there is of one run
                self.library.claim(self.folders.logs, self.folders.checkpoint)
        training, names = self.facts["training"], list(self.dataset.class_names)
        if training.get("class_names", names) != names:
            raise UserError(f"{folder} was trained on other classes: {training['class_names']} there "
                            f"and {names} here; give the --dataset that it was trained on")
        if training["data"] != self.digest(training["train_size"]):
            print("These weights were trained on other images than those of --dataset.")
        averaged = ", averaged over the last steps" * bool(training.get("averaging"))
        print(f"Weights of step {self.facts['step']} from {folder}{averaged}")

    def digest(self, train_size):
        """A fingerprint of the training images that a run uses."""
        digest = hashlib.sha256()
        for part in (self.dataset.x_train, self.dataset.y_train):
            digest.update(np.ascontiguousarray(part[:train_size or None]))
        return digest.hexdigest()[:16]

    def log_picture(self, name, picture):
        """Show a picture (H, W, 3) in TensorBoard too, in place of that of an earlier command."""
        with self.library.replacing_events(self.folders.logs / "test", name, self.facts["step"]):
            self.library.tf.summary.image(name, picture[None])


def train(run):
    """Train or go on; prints where the weights are and what to do next. Raises UserError."""
    values, model = run.flags, run.library
    if values.multi_MNIST and values.data_deformation:
        print("--data_deformation adds nothing to --multi_MNIST, which shifts every digit by up to "
              "4 pixels.")
    data, validation = run.train_data, None
    if values.validation_check:
        kept, held_out = utils.split_validation(len(data.labels), values.seed)
        data, validation = data.subset(kept), data.subset(held_out)
    facts = {"dataset": run.dataset.name} | {name: getattr(values, name) for name in (
        "train_size", "validation_check", "multi_MNIST", "data_deformation",
        "initialization", "precision")}
    if values.multi_MNIST:
        del facts["data_deformation"]
    facts |= {"data": run.digest(values.train_size), "class_names": list(run.dataset.class_names)}
    how = model.Training(**{name: getattr(values, name) for name in model.Training._fields})
    with Display() as display:
        trainer = model.Trainer(run.model, data, validation, how, run.folders, facts, run.jit,
                                display.report, run.strategy)
        began = time.perf_counter()
        trained = trainer.fit(
            values.epoch, values.save_steps, values.restart, display.step,
            on_resume=lambda step: display.report(f"Going on from step {step} "
                                                  f"({run.folders.checkpoint})."),
            texts={"flags": flag_table(values), "command": shlex.join(run.argv)})
    if not trained:
        done = trainer.step // trainer.steps_per_epoch
        print(f"This run is finished: {done} epoch{'s' * (done > 1)} in {run.folders.checkpoint}. To train longer: "
              f"--epoch={done + 10}; to begin anew: --restart.")
        if run.chief and not (Path(values.sample_dir) / "learning_curve.png").exists():
            draw_learning_curves(run, trainer.steps_per_epoch)
        return
    print(f"Trained to step {trainer.step} in {time.perf_counter() - began:.0f} s; checkpoint in "
          f"{run.folders.checkpoint}.")
    if run.chief:
        draw_learning_curves(run, trainer.steps_per_epoch)
    if not any(getattr(values, mode) for mode in MODES[1:]):
        # The same flags, since they say which network and which run; one machine is enough.
        kept = [values[name].serialize() for name in values if values[name].present
                and name not in (*MODES, "epoch", "restart", "strategy")]
        print("Next: python main.py --test --reconstruction_test --tweak_test "
              + shlex.join(kept))


def draw_learning_curves(run, steps_per_epoch):
    """Draw losses and errors of training and validation from the events of the run."""
    curves = {name: run.library.read_scalars(run.folders.logs / name)[0]
              for name in ("train", "validation")}
    curves = {name: scalars for name, scalars in curves.items() if "loss/total" in scalars}
    if curves:
        path = Path(run.flags.sample_dir) / "learning_curve.png"
        utils.save_learning_curves(path, curves, steps_per_epoch)
        say_written([path])


def flag_table(values):
    """The flags as a Markdown table, for TensorBoard."""
    rows = [f"| {name} | {value} |" for name, value in values.flag_values_dict().items()]
    return "\n".join(["| flag | value |", "|---|---|", *rows])


def machine():
    """The processor, how many of it, and the accelerators, in a line."""
    import tensorflow as tf

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
            for gpu in tf.config.list_physical_devices("GPU")]
    return ", ".join([f"{name} ({os.cpu_count()} cores)", *(gpus or ["no GPU"])])


def commit():
    """The commit of this program, with "-dirty" if files were changed since; None without git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(words, cwd=Path(__file__).parent, check=True, text=True,
                              capture_output=True).stdout.strip()


def training_seconds(run):
    """How long the weights were trained, by the events of the training; None if these are gone."""
    if "seconds" in run.facts:
        return run.facts["seconds"]
    step = run.facts["step"]
    scalars, seconds = run.library.read_scalars(run.folders.logs / "train", step)
    steps = scalars.get("loss/total", ([],))[0]
    return seconds if steps and (steps[0], steps[-1]) == (1, step) else None


def test(run):
    """Measure all test images; prints it, writes LOGDIR/RUN/test.json and pictures of errors."""
    import keras
    import tensorflow as tf

    data, names = run.test_data, run.dataset.class_names
    plan = data.evaluation_plan(run.flags.multi_test_pairs)
    compiled = run.library.compile_forward(run.model, data, run.jit, run.strategy)
    first = plan.take(slice(run.library.EVALUATION_BATCH))
    run.library.evaluate(compiled, data, first)  # compiles, so that the speed below is without
    began = time.perf_counter()
    with Display() as display:
        found = run.library.evaluate(
            compiled, data, plan, lambda done: display.count("Testing", done, len(plan.index)))
    seconds = time.perf_counter() - began
    if not run.chief:
        return
    labels, predictions, correct = found["labels"], found["predictions"], found["correct"]
    wrong = int(np.sum(~correct))
    # A digit counts as found if its class is among the predicted ones.
    hit = (labels[:, :, None] == predictions[:, None]).any(axis=2)
    per_class = {name: float(hit[labels == number].mean()) if (labels == number).any() else None
                 for number, name in enumerate(names)}
    weight = run.facts["training"]["reconstruction_weight"]
    total = found["margin_loss"] + weight * found["reconstruction_loss"]
    result = {
        "accuracy": found["accuracy"], "error_percent": 100 * wrong / len(correct),
        "wrong": wrong, "images": len(correct), "digit_accuracy": float(hit.mean()),
        "margin_loss": found["margin_loss"], "reconstruction_loss": found["reconstruction_loss"],
        "total_loss": total, "accuracy_per_class": per_class,
        "images_per_second": len(correct) / seconds, "dataset": run.name,
        "checkpoint_step": run.facts["step"], "seed": run.facts["training"]["seed"],
        "training": run.facts["training"], "training_seconds": training_seconds(run),
        "machine": machine(), "commit": run.commit, "flags": run.flags.flag_values_dict(),
        "command": shlex.join(run.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__,
                     "keras": keras.__version__, "numpy": np.__version__},
    }
    digits = f" (both digits right; of single digits {100 * hit.mean():.2f}%)"
    print(f"Test accuracy {100 * found['accuracy']:.2f}%{digits * data.overlap}, error "
          f"{result['error_percent']:.2f}%, {wrong} of {len(correct)} "
          f"{'pairs ' * data.overlap}wrong")
    print(f"Margin loss {found['margin_loss']:.5f}, reconstruction loss "
          f"{found['reconstruction_loss']:.3f}, total {total:.5f}; "
          f"{result['images_per_second']:.0f} images/s")
    print("Accuracy per class: " + ", ".join(
        f"{name} {100 * share:.2f}%" for name, share in per_class.items() if share is not None))
    utils.write_json(run.folders.logs / "test.json", result)
    samples = Path(run.flags.sample_dir)
    with run.library.replacing_events(run.folders.logs / "test", "evaluation", run.facts["step"]):
        run.library.summarize(data, found, total, samples / "confusion_matrix.png")
    written = [run.folders.logs / "test.json"]
    if data.overlap:
        written.append(save_multi_sheet(run, plan, found))
    else:
        written += [samples / "confusion_matrix.png", samples / "misclassified.png"]
        utils.save_misclassified(
            written[2], data.images[plan.index[:, 0]][~correct], plan.index[~correct, 0],
            labels[~correct, 0], predictions[~correct, 0], found["lengths"][~correct], names)
    say_written(written)


def save_multi_sheet(run, plan, found):
    """Figure 5 of the paper: of the first pairs some right ones, then some wrong ones."""
    right, wrong = (np.flatnonzero(found["correct"] == value) for value in (True, False))
    chosen = np.concatenate([right[:14], wrong[:6]])
    title = (f"Overlapping digits: {len(wrong):,} of {len(found['correct']):,} pairs wrong; the first "
             f"{len(right[:14])} right ones, then the first {len(wrong[:6])} wrong ones")
    seen = examine(run, plan.take(chosen))
    path = Path(run.flags.sample_dir) / "multi_MNIST.png"
    utils.save_multi(path, title, seen["canvas"], seen["without_label"], found["labels"][chosen],
                     found["predictions"][chosen], run.dataset.class_names)
    return path


def examine(run, plan):
    """`CapsNet.examine` of the test examples of a plan, and their labels, as arrays."""
    batch = next(iter(run.library.batches(run.test_data, plan, len(plan.index))))
    seen = run.model.examine(run.test_data, batch, run.model.spectra())
    return {name: value.numpy() for name, value in seen.items()} | {"labels": batch[2].numpy()}


def reconstruction_test(run):
    """Draw one batch of test images and its reconstructions with both masks (section 4.1)."""
    seen = examine(run, run.test_data.evaluation_plan().take(slice(GRID_IMAGES)))
    folder = Path(run.flags.sample_dir)
    grids = {"samples_arrange": seen["canvas"],
             "recon_samples_with_label_arrange": utils.merge(seen["with_label"]),
             "recon_samples_without_label_arrange": utils.merge(seen["without_label"])}
    for name, images in grids.items():
        utils.save_grid(folder / f"{name}.png", images)
    sheet = utils.save_reconstructions(
        folder / "reconstruction.png", seen["canvas"], seen["with_label"], seen["without_label"],
        seen["labels"], seen["predictions"], run.dataset.class_names)
    run.log_picture("reconstructions", sheet)
    say_written([folder / f"{name}.png" for name in (*grids, "reconstruction")])


def tweak_test(run):
    """Draw the reconstructions of capsules changed in one dimension (section 5.1, figure 4)."""
    names, folder = run.dataset.class_names, Path(run.flags.tweak_dir)
    deltas = run.library.TWEAKS
    seen = examine(run, run.test_data.evaluation_plan().take(slice(run.flags.tweak_num)))
    chosen = seen["predictions"][:, 0]
    images = run.library.tweak(run.model, seen["capsules"], chosen)  # (D, digits, steps, H, W, C)
    shown = [names[c] for c in chosen]
    for dim, decoded in enumerate(images):
        utils.save_tweak(folder / f"tweak_result_{dim}.png", decoded, deltas, dim, shown)
    overview = utils.save_tweak_overview(folder / "overview.png", images[:, 0], deltas, shown[0])
    utils.save_sweep(folder / "sweep.gif", images, deltas, shown)
    run.log_picture("tweaks", overview)
    say_written([folder / f"tweak_result_0.png to _{len(images) - 1}.png",
                 folder / "overview.png", folder / "sweep.gif"])


def matching_files(pattern):
    """Files of a pattern, sorted; raises UserError if there is none."""
    path = os.path.expanduser(pattern)
    found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    files = [path for path in found if os.path.isfile(path)]
    if os.path.isdir(path):
        raise UserError(f"--predict={pattern} is a folder, expected image files; give a quoted pattern, "
                        f"such as '{os.path.join(pattern, '*')}'")
    if not files:
        raise UserError(f"--predict={pattern} matches no file, expected image files; quote a "
                        "pattern, and ** stands for folders in folders")
    return files


def predict(run):
    """Say what a network sees on image files; prints it, writes a CSV file and a sheet.

    Raises UserError: no file matches, or some cannot be read; the others are predicted then.
    """
    paths = matching_files(run.flags.predict)
    names, shape = run.dataset.class_names, run.test_data.canvas_shape()
    trained = run.train_data.images[::max(1, len(run.train_data.images) // 1000)]
    # Photographs are light or dark at their edges by chance: only what always is one way is turned.
    share = np.mean([utils.is_dark_on_light(image) for image in trained])
    turned = shape[-1] == 1 and (share < 0.05 or share > 0.95)
    kept, images, failed = [], [], []
    for path in paths:
        try:
            image = utils.read_image(path)
        except UserError as error:
            failed.append(str(error))
            continue
        inverted = turned and utils.is_dark_on_light(image) != (share > 0.5)
        image, done = utils.fit_image(image, shape, inverted)
        kept.append((path, done))
        images.append(image)
    rows, shown, captions = [], [], []
    for start in range(0, len(kept), run.library.ROUTED_AT_ONCE):
        part = np.stack(images[start:start + run.library.ROUTED_AT_ONCE])
        lengths, capsules = run.model(part / np.float32(255))
        mask = np.eye(len(names), dtype=np.float32)[np.argmax(lengths, axis=1)][:, None]
        shown.extend(run.model.decoder(capsules, mask).numpy()[:, 0])
        for (path, done), found in zip(kept[start:], lengths.numpy()):
            best = [(names[k], float(found[k])) for k in np.argsort(-found)[:3]]
            print(f"{path} ({done}): " + ", ".join(f"{name}: {value:.3f}" for name, value in best))
            rows.append([path, done, *(cell for pair in best for cell in pair)])
            lines = [f"{name}: {value:.2f}" for name, value in best]
            if max(map(len, names)) < 4:  # short names have place beside each other
                lines = ["  ".join(lines)]
            captions.append([os.path.basename(path), *lines])
    if rows:
        folder = Path(run.flags.sample_dir)
        heads = [f"{what}_{n}" for n in range(1, 1 + min(3, len(names))) for what in
                 ("class", "length")]
        utils.write_csv(folder / "predictions.csv", ["file", "done", *heads], rows)
        utils.save_predictions(folder / "predictions.png", images, shown, captions)
        say_written([folder / "predictions.csv", folder / "predictions.png"])
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} files could not be read: {failed[0]}")


def export(run):
    """Write the network to a new folder, with a card that says what it is. Raises UserError."""
    folder, result = Path(run.flags.export), None
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((run.folders.logs / "test.json").read_text())
    facts = run.facts | {"seconds": training_seconds(run)}
    run.library.export(run.model, folder, facts, model_card(run, facts, result),
                       1 + run.test_data.overlap)
    say_written([folder / name for name in (
        "capsnet.keras", "saved_model", "weights.npz", "README.md")])


def model_card(run, facts, result):
    """What a network is, what it was trained on, what it reaches and how to load it: Markdown.

    `result` is what `test` wrote, or None; it is quoted if it is of these weights.
    """
    training, (height, width, channels) = facts["training"], facts["shape"]["image_shape"]
    if result and (result["checkpoint_step"], result["training"]) == (facts["step"], training):
        figures = (f"{result['error_percent']:.2f}% error ({result['wrong']:,} of "
                   f"{result['images']:,} wrong), {result['date'][:10]}, TensorFlow "
                   f"{result['versions']['tensorflow']}.")
    else:
        figures = "Not measured: these weights were exported without a test of them."
    seconds = f" in {facts['seconds'] / 60:.0f} minutes" if facts["seconds"] else ""
    return (Path(__file__).parent / "assets" / "model_card.md").read_text("utf-8").format(
        name=run.name, parameters=f"{run.model.count_params():,}", steps=f"{facts['step']:,}",
        seconds=seconds, height=height, width=width, channels=channels, figures=figures,
        dims=facts["shape"]["digit_dim"], shown=1 + run.test_data.overlap,
        classes=len(run.dataset.class_names), names=", ".join(run.dataset.class_names),
        settings="\n".join(f"| {name} | {value} |"
                           for name, value in (facts["shape"] | training).items()))


def say_written(paths):
    print("Wrote " + ", ".join(str(path) for path in paths))


def main(argv):
    """Run the command line (argv[0] is the program) and return its exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files may have bytes that are no characters
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        if any(word in ("--help", "-help", "-h") for word in argv[1:]):
            print(help_text(), flush=True)
            return 0
        values = parse(argv)
        modes = [name for name in MODES if getattr(values, name)]
        if not modes:
            print("Nothing to do: give one or more of " + ", ".join(f"--{m}" for m in MODES)
                  + ".\n" + __doc__.strip().split("\n\n", 1)[1] + "\nAll flags: --help",
                  file=sys.stderr)
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


def problem(error, several_workers=False):
    """An error of the world outside in one line: what is wrong, and what to do."""
    import tensorflow as tf

    from model import reason

    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
            tf.errors.DeadlineExceededError)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return (f"{place}{error.strerror or error}; choose another folder, or make this one "
                "writable")
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch_size or network"
    if several_workers and isinstance(error, lost):
        return ("another worker stopped or cannot be reached; start all workers again, they go on "
                "from the last checkpoint")
    return f"{reason(error)}; what was saved before is as it was"


def run_modes(values, argv, modes):
    utils.keep_big_buffers()
    # Of several workers, all say of one that stops what is said below in one line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "23"[values.strategy == "multi_worker"])
    with without_remarks():
        import tensorflow as tf

        from model import Interrupted, check_new, over_workers

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")

    try:
        if values.export:
            check_new(values.export)  # before an hour of training
        if values.predict:
            matching_files(values.predict)
        run = Run(values, argv)
        with contextlib.ExitStack() as stack:
            if not run.chief:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            if values.train:
                train(run)
            if modes != ["train"]:
                run.load()
            for mode in (test, reconstruction_test, tweak_test, export, predict):
                if mode.__name__ in modes and (run.chief or mode is test):
                    mode(run)
            over_workers(run.strategy, 0)  # one that ends leaves no other alone
            if values.test:
                print(f"Next: tensorboard --logdir={shlex.quote(values.logdir)}")
        return 0
    except Interrupted as stop:
        print("Stopped, and saved. To go on: the same command again"
              + ", without --restart" * values.restart + ".", file=sys.stderr)
        return 128 + stop.args[0]
    except BrokenPipeError:
        raise
    except (UserError, OSError, MemoryError, tf.errors.OpError) as error:
        print(f"main.py: {problem(error, values.strategy == 'multi_worker')}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
