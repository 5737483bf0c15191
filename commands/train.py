"""`--train`: train, or resume from the last checkpoint."""

import math
import shlex
import time
from pathlib import Path

import tensorflow as tf

import model
import utils
from capsnet_core.config import TrainingConfig
from capsnet_core.errors import UserError
from capsnet_core.networks import NETWORKS
from commands.data import fingerprint, run_folders, run_name
from commands.reports import outputs_of, summarize
from commands.weights import build_network, check_unseen, find_exported, start_with
from figures import examples, files, plots, tweaks
from figures.pages import drawable_names
from inputs.appearance import KEY
from runtime import machine
from runtime.terminal import Display, plural, report_written
from training.callbacks import Callback, Printing
from training.events import read_scalars, write_texts
from training.trainer import Device, Run, Trainer

EXAMPLES = 20  # images in a picture of reconstructions


def train(flags, argv, devices, data, other_modes):
    """Train, and print where the weights are and what to do next.

    `other_modes` names the modes that do something with what was trained. Raise as `Trainer.fit`.
    """
    folders = run_folders(flags)
    config = network_config(flags, data)
    announce(flags, config, devices, data)
    with Display() as display:
        trainer = make_trainer(flags, config, devices, data, display.report)
        trainer.callbacks.append(Printing(display, folders.checkpoint))
        if devices.chief:
            texts = {"flags": flag_table(flags), "command": shlex.join(argv)}
            trainer.callbacks.append(TensorBoard(trainer.network, data, texts))
        began = time.perf_counter()
        trained = trainer.fit(flags.epoch, flags.save_steps, flags.restart)
    if trained:
        print(
            f"Trained to step {trainer.state.step} in {time.perf_counter() - began:.0f} s; "
            f"checkpoint in {folders.checkpoint}."
        )
    else:
        done = trainer.state.step // trainer.steps_per_epoch
        print(
            f"This run is finished: {plural(done, 'epoch')} in {folders.checkpoint}. "
            f"To train longer: --epoch={done + 10}; to start over: --restart."
        )
    curve = Path(flags.sample_dir) / "learning_curve.png"
    if devices.chief and (trained or not curve.exists()):
        draw_learning_curves(folders.logs, curve, trainer.steps_per_epoch, run_name(flags))
    if trained and not any(getattr(flags, mode) for mode in other_modes):
        print(next_command(flags, ("train", *other_modes)))


def network_config(flags, data):
    """Return the config of the network that the flags and the data ask for.

    Raise UserError if the network does not fit the images.
    """
    kind = NETWORKS[flags.network]
    settings = {field.name: getattr(flags, field.name) for field in kind.settings()}
    if "n_digits" in kind.__dataclass_fields__:
        settings["n_digits"] = data.train.digits_per_example
    try:
        return kind(data.train.canvas_shape(), len(data.class_names), **settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def announce(flags, config, devices, data):
    """Print what will be trained."""
    if flags.multi_MNIST and flags.data_deformation and flags["data_deformation"].present:
        print(
            "--data_deformation adds nothing to --multi_MNIST, which shifts every digit by up to "
            f"{flags.multi_shift} pixels."
        )
    if devices.chief:
        lines = [machine.describe_device(), *describe(flags, config, devices, data)]
        print("\n".join(lines), flush=True)


def next_command(flags, modes):
    """Return the command that examines what was trained; `modes` are the names of all modes.

    It has the flags of the training run that say which run. The weights say which network they are
    for, and one machine is enough.
    """
    of_networks = {field.name for kind in NETWORKS.values() for field in kind.settings()}
    left_out = {*modes, *of_networks, "network", "initialization", "freeze"}
    left_out |= {"epoch", "restart", "strategy", "initial_weights"}
    same = [
        flags[name].serialize() for name in flags if flags[name].present and name not in left_out
    ]
    of_capsules = " --reconstruction_test --tweak_test" if flags.network == "capsnet" else ""
    return f"Next: python main.py --test{of_capsules} " + shlex.join(same)


def describe(flags, config, devices, data):
    """Return lines that describe what will be trained, before it takes memory and time.

    They are the layers with their outputs and parameters, the data, the memory, and a warning if
    this machine has less.
    """
    images, sizes = len(data.train.labels), config.sizes()
    data_bytes = data.train.images.nbytes
    if data.held_out:  # all training images once more, in two parts
        data_bytes += data.train.images.nbytes + 2 * data.validation.images.nbytes
    elif data.validation:
        data_bytes += data.validation.images.nbytes
    replicas = devices.strategy.num_replicas_in_sync
    memory = config.memory(flags.batch_size / replicas, data_bytes)
    total = sum(count for *_, count in sizes)
    title = model.CLASSES[config.network].__name__
    lines = [f"{title:<26}output  {total:>12,} parameters"]
    for name, output, count in sizes:
        lines.append(f"  {name:<18}{' × '.join(map(str, output)):<16}{count:>10,}")
    shape = "×".join(map(str, data.train.canvas_shape()))
    pairs = " in pairs" if data.train.overlap else ""
    lines.append(
        f"{images:,} training images{pairs} of {shape}, {len(data.class_names)} classes; batches "
        f"of {flags.batch_size}, {plural(math.ceil(images / flags.batch_size), 'step')} an epoch; "
        f"training takes about {memory / 1e9:.1f} GB of memory"
    )
    available = machine.memory_size()
    if available and memory > available and not machine.has_gpu():
        fits = replicas * config.batch_that_fits(available, data_bytes)
        advice = f"at most --batch_size={fits} fits" if fits else "try a smaller network"
        lines.append(f"That is more than the {available / 1e9:.1f} GB of this machine: {advice}.")
    return lines


class TensorBoard(Callback):
    """Writes texts (a dict by name) at the start of a run, and pictures after each epoch."""

    def __init__(self, network, data, texts):
        self.network, self.data, self.texts = network, data, texts

    def on_train_begin(self, step):
        """Write the texts, unless a run is resumed."""
        if step == 0:
            write_texts(self.texts)

    def on_epoch_end(self, epoch):
        """Draw the first images for validation, or for training if there are none."""
        shown = self.data.validation or self.data.train
        for tag, picture in draw_examples(self.network, shown).items():
            tf.summary.image(tag, picture[None])

    def on_test_end(self, validation):
        """Summarize the Evaluation of the validation."""
        summarize(validation.evaluation, self.data.train, self.network.config.score)


def make_trainer(flags, config, devices, data, report):
    """Make the Trainer of a command. Raise UserError if the initial weights are unusable."""
    network = build_network(config, flags.seed, devices, flags.initialization, frozen(flags))
    if flags.initial_weights:
        start_with_weights(flags, network, data, report)
    description = {KEY: data.appearance().to_metadata()}
    return Trainer(
        network,
        data.train,
        TrainingConfig(**{name: getattr(flags, name) for name in TrainingConfig._fields}),
        Run(run_folders(flags), run_metadata(flags, network, data), description),
        data.validation,
        Device(devices.strategy, devices.jit),
    )


def frozen(flags):
    """Return the names of the parts of the network that training leaves as they are, sorted."""
    return sorted(set(flags.freeze.split(","))) if flags.freeze else []


def start_with_weights(flags, network, data, report):
    """Give a network the weights that a new run starts with.

    Raise UserError if they are unusable, or saw the test images.
    """
    folder = find_exported(flags.initial_weights)
    metadata, kept = start_with(network, data.class_names, folder)
    earlier = metadata["training"]
    check_unseen(folder, earlier, data)
    report(f"The initial weights are those in {folder}: {kept}.")
    if not data.trained(earlier):
        return
    # What decides which images are held out, and the order, shifts and pairs of each epoch.
    now = flags.seed, data.train_size, flags.validation_check
    same = now == tuple(earlier.get(name) for name in ("seed", "train_size", "validation_check"))
    if data.held_out and not (same and not earlier["initial_weights"]):
        report("Images that are held out now may have trained them: validation may look too good.")
    if same:
        report(
            f"They were trained with seed {flags.seed} too, whose order, shifts and pairs repeat; "
            "another --seed draws new ones."
        )


def run_metadata(flags, network, data):
    """Return what a resumed run must share with its beginning, besides the TrainingConfig."""
    background, validation = data.train.background, data.validation
    own_validation = validation is not None and not data.held_out
    return {
        "dataset": data.dataset.name,
        "train_size": data.train_size,
        "validation_check": flags.validation_check,
        "multi_MNIST": flags.multi_MNIST,
        # Overlapping digits are shifted in any case.
        "data_deformation": flags.data_deformation and not flags.multi_MNIST,
        "multi_shift": flags.multi_shift if flags.multi_MNIST else None,
        "initialization": None if flags.initial_weights else flags.initialization,
        "initial_weights": fingerprint(*network.get_weights()) if flags.initial_weights else None,
        "freeze": frozen(flags),
        "precision": flags.precision,
        "data": data.digest(data.train_size, flags.seed),
        "class_names": list(data.class_names),
        "image_size": flags.image_size or None,
        "inverted": data.dataset.inverted,
        "held_out_seed": data.dataset.held_out_seed,
        # Shifts fill in with it.
        "ground": background.tolist() if background is not None and background.any() else None,
        "validation_data": (
            fingerprint(validation.images, validation.labels) if own_validation else None
        ),
    }


def draw_examples(network, data):
    """Draw reconstructions and tweaks of the first images: pictures by their tags."""
    if network.config.network != "capsnet":
        return {}
    outputs, labels = outputs_of(network, data, data.evaluation_plan().take(slice(EXAMPLES)))
    names, first = drawable_names(data.class_names), outputs.predictions[:1, 0]
    reconstructions = examples.draw_reconstructions(outputs, labels, names)
    tweaked = network.tweak(outputs.capsules[:1], first)[:, 0]
    overview = tweaks.draw_tweak_overview(tweaked, model.TWEAKS, names[first[0]])
    return {"reconstructions": reconstructions, "tweaks": overview}


def draw_learning_curves(logs, path, steps_per_epoch, name):
    """Draw losses and errors of training and validation from the events of a run."""
    curves = {name: read_scalars(logs / name)[0] for name in ("train", "validation")}
    curves = {name: scalars for name, scalars in curves.items() if "loss/total" in scalars}
    if curves:
        files.write_png(path, plots.draw_learning_curves(curves, steps_per_epoch, name))
        report_written([path])


def flag_table(flags):
    """Format the flags as a Markdown table, for TensorBoard."""
    return "\n".join(utils.markdown_table(["flag", "value"], flags.flag_values_dict().items()))
