"""`--train`: train, or resume from the last checkpoint."""

import math
import shlex
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import figures
import model
import utils
from capsnet import config
from commands.pictures import outputs_of
from commands.pretrained import find_exported, load_pretrained
from commands.session import fingerprint
from inputs.appearance import KEY, measure_appearance
from inputs.pipeline import split_validation
from runtime import machine
from runtime.terminal import Display, plural, report_written
from training.events import read_scalars
from training.trainer import Trainer

EXAMPLES = 20  # images in a picture of reconstructions


def train(session, other_modes):
    """Train, and print where the weights are and what to do next.

    Args:
        session: Session.
        other_modes: names of the modes that do something with what was trained.

    Raises:
        UserError: see `Trainer.fit`.
    """
    flags = session.flags
    announce(session)
    with Display() as display:
        trainer = make_trainer(session, display.report)
        began = time.perf_counter()
        trained = trainer.fit(
            flags.epoch,
            flags.save_steps,
            flags.restart,
            on_step=display.show_step,
            on_resume=lambda step: display.report(
                f"Resuming from step {step} ({session.folders.checkpoint})."
            ),
            texts={"flags": flag_table(flags), "command": shlex.join(session.argv)},
        )
    if trained:
        print(
            f"Trained to step {trainer.state.step} in {time.perf_counter() - began:.0f} s; "
            f"checkpoint in {session.folders.checkpoint}."
        )
    else:
        done = trainer.state.step // trainer.steps_per_epoch
        print(
            f"This run is finished: {plural(done, 'epoch')} in {session.folders.checkpoint}. "
            f"To train longer: --epoch={done + 10}; to start over: --restart."
        )
    curve = Path(flags.sample_dir) / "learning_curve.png"
    if session.chief and (trained or not curve.exists()):
        draw_learning_curves(session, curve, trainer.steps_per_epoch)
    if trained and not any(getattr(flags, mode) for mode in other_modes):
        print(next_command(flags, ("train", *other_modes)))


def announce(session):
    """Print what will be trained."""
    flags = session.flags
    if flags.multi_MNIST and flags.data_deformation and flags["data_deformation"].present:
        print(
            "--data_deformation adds nothing to --multi_MNIST, which shifts every digit by up to "
            f"{flags.multi_shift} pixels."
        )
    if session.chief:
        print("\n".join([machine.describe_device(), *describe(session)]), flush=True)


def next_command(flags, modes):
    """Return the command that examines what was trained.

    It has the flags of the training that say which network and which run. One machine is enough.

    Args:
        flags: values of the flags.
        modes: names of all modes.
    """
    left_out = (*modes, "epoch", "restart", "strategy", "initial_weights")
    same = [
        flags[name].serialize() for name in flags if flags[name].present and name not in left_out
    ]
    return "Next: python main.py --test --reconstruction_test --tweak_test " + shlex.join(same)


def describe(session):
    """Describe what will be trained, before it takes memory and time.

    Returns:
        Lines: the layers with their outputs and parameters, the data, the memory, and a warning if
        this machine has less.

    Raises:
        ImageTooSmall: two convolutions leave nothing of an image.
    """
    data, flags = session.train_data, session.flags
    splits = flags.validation_check and session.validation_data is None
    held_out = len(data.labels) // 6 if splits else 0
    images = len(data.labels) - held_out
    sizes = model.layer_sizes(data.canvas_shape(), len(data.class_names), session.network_config)
    data_bytes = data.images.nbytes
    if flags.validation_check:
        held_out_data = data if splits else session.validation_data
        data_bytes += held_out_data.images.nbytes
    replicas = session.strategy.num_replicas_in_sync
    memory = model.memory_needed(sizes, flags.batch_size / replicas, data_bytes)
    total = sum(count for *_, count in sizes)
    lines = [f"CapsNet                   output  {total:>12,} parameters"]
    for name, output, count in sizes:
        lines.append(f"  {name:<18}{' × '.join(map(str, output)):<16}{count:>10,}")
    shape = "×".join(map(str, data.canvas_shape()))
    pairs = " in pairs" if data.overlap else ""
    lines.append(
        f"{images:,} training images{pairs} of {shape}, {len(data.class_names)} classes; batches "
        f"of {flags.batch_size}, {plural(math.ceil(images / flags.batch_size), 'step')} an epoch; "
        f"training takes about {memory / 1e9:.1f} GB of memory"
    )
    available = machine.memory_size()
    if available and memory > available and not machine.has_gpu():
        fits = replicas * model.batch_that_fits(sizes, available, data_bytes)
        advice = f"at most --batch_size={fits} fits" if fits else "try a smaller network"
        lines.append(f"That is more than the {available / 1e9:.1f} GB of this machine: {advice}.")
    return lines


def make_trainer(session, report):
    """Make the Trainer of a session.

    Args:
        session: Session.
        report: takes a line of text for the user.

    Raises:
        UserError: the initial weights are missing or damaged, or those of another network.
    """
    flags, data, validation = session.flags, session.train_data, None
    if flags.validation_check and session.validation_data is not None:
        validation = session.validation_data
    elif flags.validation_check:
        trained, held_out = split_validation(len(data.labels), flags.seed)
        data, validation = data.subset(trained), data.subset(held_out)
    if flags.initial_weights:
        load_initial_weights(session, report)
    names = config.TrainingConfig._fields
    dataset = session.dataset
    appearance = measure_appearance(data, dataset.inverted, dataset.subtracted, dataset.white)
    return Trainer(
        session.network,
        data,
        config.TrainingConfig(**{name: getattr(flags, name) for name in names}),
        session.folders,
        run_metadata(session),
        validation=validation,
        jit=session.jit,
        strategy=session.strategy,
        report=report,
        draw=lambda: draw_examples(session.network, validation or data),
        summarize=lambda evaluation: summarize(evaluation, data),
        description={KEY: appearance.to_metadata()},
    )


def load_initial_weights(session, report):
    """Give the network of a session the weights that a new run starts with.

    Args:
        session: Session.
        report: takes a line of text for the user.

    Raises:
        UserError: they are missing or damaged, those of another network, or saw the test images.
    """
    flags, folder = session.flags, find_exported(session.flags.initial_weights)
    earlier = load_pretrained(session.network, folder)["training"]
    session.check_unseen(folder, earlier)
    report(f"The initial weights are those in {folder}.")
    if not session.has_images_of(earlier):
        return
    # What decides which images are held out, and the order, shifts and pairs of each epoch.
    now = flags.seed, session.train_size, flags.validation_check
    same = now == tuple(earlier.get(name) for name in ("seed", "train_size", "validation_check"))
    splits = flags.validation_check and session.validation_data is None
    if splits and not (same and "initial_weights" not in earlier):
        report("Images that are held out now may have trained them: validation may look too good.")
    if same:
        report(
            f"They were trained with seed {flags.seed} too, whose order, shifts and pairs repeat; "
            "another --seed draws new ones."
        )


def run_metadata(session):
    """Return what a resumed run must share with its beginning, besides the TrainingConfig."""
    flags = session.flags
    metadata = {
        "dataset": session.dataset.name,
        "train_size": session.train_size,
        "validation_check": flags.validation_check,
        "multi_MNIST": flags.multi_MNIST,
        "data_deformation": flags.data_deformation,
        "initialization": flags.initialization,
        "precision": flags.precision,
        "data": session.digest(session.train_size),
        "class_names": list(session.dataset.class_names),
    }
    if flags.multi_MNIST:  # whose digits are shifted in any case
        del metadata["data_deformation"]
    if flags.multi_MNIST and flags.multi_shift != config.MULTI_SHIFT:  # older runs do not name it
        metadata["multi_shift"] = flags.multi_shift
    # These too are named only where they matter, so that older runs resume.
    if flags.initial_weights:  # which the network has by now
        del metadata["initialization"]
        metadata["initial_weights"] = fingerprint(*session.network.get_weights())
    if flags.image_size:
        metadata["image_size"] = flags.image_size
    if session.dataset.inverted:
        metadata["inverted"] = True
    if session.dataset.held_out_seed is not None:
        metadata["held_out_seed"] = session.dataset.held_out_seed
    background = session.train_data.background
    if background is not None and background.any():  # shifts fill in with it
        metadata["ground"] = background.tolist()
    if flags.validation_check and session.validation_data is not None:
        metadata["validation_data"] = fingerprint(
            session.validation_data.images, session.validation_data.labels
        )
    return metadata


def draw_examples(network, data):
    """Draw reconstructions and tweaks of the first images: pictures by their tags."""
    outputs, labels = outputs_of(network, data, data.evaluation_plan().take(slice(EXAMPLES)))
    names, first = figures.drawable_names(data.class_names), outputs.predictions[:1, 0]
    reconstructions = figures.save_reconstructions(
        None,
        outputs.canvas,
        outputs.with_label,
        outputs.without_label,
        labels,
        outputs.predictions,
        names,
    )
    tweaked = network.tweak(outputs.capsules[:1], first)[:, 0]
    tweaks = figures.save_tweak_overview(None, tweaked, model.TWEAKS, names[first[0]])
    return {"reconstructions": reconstructions, "tweaks": tweaks}


def summarize(evaluation, data, path=None):
    """Write summaries of an Evaluation: the confusion matrix, the lengths of each class's capsule.

    Args:
        evaluation: Evaluation.
        data: Examples of the same classes.
        path: file that the confusion matrix goes to as well, or None.
    """
    names, labels = data.class_names, evaluation.labels
    if not data.overlap:
        matrix = figures.confusion_matrix(labels[:, 0], evaluation.predictions[:, 0], len(names))
        picture = figures.save_confusion_matrix(path, matrix, figures.drawable_names(names))
        tf.summary.image("confusion matrix", np.asarray(picture)[None])
    for number, name in enumerate(names):
        present = (labels == number).any(axis=1)
        lengths = evaluation.scores[:, number]
        tf.summary.histogram(f"where present, length of capsule/{name}", lengths[present])
        tf.summary.histogram(f"where absent, length of capsule/{name}", lengths[~present])


def draw_learning_curves(session, path, steps_per_epoch):
    """Draw losses and errors of training and validation from the events of a session's run."""
    logs = session.folders.logs
    curves = {name: read_scalars(logs / name)[0] for name in ("train", "validation")}
    curves = {name: scalars for name, scalars in curves.items() if "loss/total" in scalars}
    if curves:
        figures.save_learning_curves(path, curves, steps_per_epoch, session.name)
        report_written([path])


def flag_table(flags):
    """Format the flags as a Markdown table, for TensorBoard."""
    return "\n".join(utils.markdown_table(["flag", "value"], flags.flag_values_dict().items()))
