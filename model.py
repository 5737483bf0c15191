"""The network of the paper and the loop that trains it."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams

import ops
import utils
from utils import UserError, evaluation_plan, training_plan

try:
    import fcntl
except ImportError:  # Windows has no flock: there two trainings in one folder are not noticed
    fcntl = None

KEPT_CHECKPOINTS = 2
AGREEING_STEPS = 10  # after so many, workers ask each other whether one is to stop
ROUTED_AT_ONCE = 16  # images, where weights rest on a CPU: their votes fit in its cache
EVALUATION_BATCH = 128
EVALUATED = ("lengths", "predictions", "margin", "reconstruction", "correct")
TWEAKS = np.linspace(-0.25, 0.25, 11)  # section 5.1
INITIALIZATIONS = {  # of conv1, and of primary capsules and decoder; see `ops.initializers`
    "glorot": ({}, {}),
    "authors": ({"stddev": 0.05, "first_bias": 0.1}, {"stddev": 0.1, "first_bias": 0.1}),
}
READ_ERRORS = (tf.errors.OpError, ValueError, KeyError, IndexError, AssertionError)


@ops.register
class CapsNet(keras.Model):
    """Conv → primary capsules → routed digit capsules → masked decoder (section 4, figures 1, 2).

    Args:
        image_shape: (H, W, C) of the images.
        n_classes: J, one digit capsule for each.
        n_conv: filters of the first convolution.
        n_primary, primary_dim: types of primary capsules and their dimension.
        digit_dim: dimension of the digit capsules.
        routing_iterations: of procedure 1.
        kernel_size: pixels, of both convolutions.
        decoder_units: widths of the decoder's hidden layers.
        conv: "direct" or "dft", how both convolutions are computed (see `ops.Convolution`).
        initialization: "glorot", uniform with biases of 0, or "authors", the truncated normals of
            the paper's authors' public code with biases of 0.1.
        dtype: policy of Keras. Under "mixed_bfloat16" products are, but those of routing and of
            spectra; squash, routing, lengths and losses stay float32.

    Raises:
        ValueError: the image is too small for two convolutions.
    """

    def __init__(self, image_shape, n_classes, n_conv=256, n_primary=32, primary_dim=8,
                 digit_dim=16, routing_iterations=3, kernel_size=9, decoder_units=(512, 1024),
                 conv="direct", initialization="glorot", **kwargs):
        super().__init__(**kwargs)
        layer_sizes(image_shape, n_classes, kernel_size=kernel_size)  # raises if it is too small
        self.settings = {
            "image_shape": tuple(image_shape), "n_classes": n_classes, "n_conv": n_conv,
            "n_primary": n_primary, "primary_dim": primary_dim, "digit_dim": digit_dim,
            "routing_iterations": routing_iterations, "kernel_size": kernel_size,
            "decoder_units": tuple(decoder_units), "conv": conv,
            "initialization": initialization,
        }
        first, others = INITIALIZATIONS[initialization]
        self.conv1 = ops.Convolution(n_conv, kernel_size, relu=True, method=conv, name="conv1",
                                     dtype=self.dtype_policy, **first)
        self.primary = ops.PrimaryCapsules(n_primary, primary_dim, kernel_size, method=conv,
                                           name="primary_capsules", dtype=self.dtype_policy,
                                           **others)
        self.digits = ops.DigitCapsules(n_classes, digit_dim, routing_iterations,
                                        name="digit_capsules", dtype=self.dtype_policy)
        self.decoder = ops.Decoder(image_shape, decoder_units, name="decoder",
                                   dtype=self.dtype_policy, **others)
        shape = (None, *image_shape)
        for layer in (self.conv1, self.primary, self.digits, self.decoder):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)
        self.built = True

    def capsules(self, images, spectra=(None, None)):
        """The digit capsules: (B, H, W, C) in [0, 1] -> (B, J, D)."""
        u = self.primary(self.conv1(images, spectra[0]), spectra[1])
        return self.digits(u, at_once=None if spectra[1] is None else ROUTED_AT_ONCE)

    def spectra(self):
        """The transformed kernels, which `capsules` takes when the weights rest."""
        return self.conv1.spectrum(), self.primary.spectrum()

    def call(self, images):
        """(B, H, W, C) -> lengths (B, J) and capsules (B, J, D)."""
        capsules = self.capsules(images)
        return ops.length(capsules), capsules

    def examine(self, data, batch, spectra=(None, None), step=None):
        """Everything the network says of a batch; what the Trainer and `evaluate` need of a model.

        Args:
            data: Data that the batch is of.
            batch: of `batches`.
            spectra: of `spectra`, when the weights rest.
            step: number of the training step, for networks that draw random numbers in training;
                None when tested. Here nothing is random.

        Returns:
            dict: canvas (B, H, W, C), digits (B, K, H, W, C), capsules (B, J, D), lengths (B, J),
            predictions (B, K), with_label and without_label, the reconstructions (B, K, H, W, C)
            with the mask of the labels and with that of the longest capsules, margin and
            reconstruction, the losses (B,), and correct (B,), whether exactly the labels' capsules
            are the longest.
        """
        digits, shift, labels, _ = batch
        canvas, shifted = ops.compose(digits, shift, data.margin)
        capsules = self.capsules(canvas, spectra)
        lengths = ops.length(capsules)
        predictions = ops.longest(lengths, labels.shape[1])
        mask = ops.label_mask(labels, lengths.shape[1])
        guess = ops.label_mask(predictions, lengths.shape[1])
        present = tf.reduce_max(mask, axis=1)
        with_label = self.decoder(capsules, mask)
        return {
            "canvas": canvas, "digits": shifted, "capsules": capsules, "lengths": lengths,
            "predictions": predictions, "with_label": with_label,
            "without_label": self.decoder(capsules, guess),
            "margin": ops.margin_loss(lengths, present),
            "reconstruction": ops.reconstruction_loss(shifted, with_label),
            "correct": tf.reduce_all(tf.reduce_max(guess, axis=1) == present, axis=1),
        }

    def get_config(self):
        return super().get_config() | self.settings


def fastest_conv():
    """The method of `ops.Convolution` that is the fastest on the devices of this machine."""
    return "direct" if tf.config.list_physical_devices("GPU") else "dft"


def layer_sizes(image_shape, n_classes, n_conv=256, n_primary=32, primary_dim=8, digit_dim=16,
                kernel_size=9, decoder_units=(512, 1024)):
    """What a CapsNet of these settings will have, before anything of it is made.

    Returns:
        list of (layer, shape of its output for an image, number of parameters).

    Raises:
        ValueError: the image is too small for two convolutions.
    """
    smallest = 2 * kernel_size - 1
    if min(image_shape[:2]) < smallest:
        raise ValueError(f"two {kernel_size}×{kernel_size} convolutions need images of at least"
                         f" {smallest}×{smallest} pixels. Received: image_shape={image_shape}")
    area, channels = kernel_size**2, n_primary * primary_dim
    first = [n - kernel_size + 1 for n in image_shape[:2]]
    second = [(n - kernel_size) // 2 + 1 for n in first]
    lower = math.prod(second) * n_primary
    widths = [n_classes * digit_dim, *decoder_units, math.prod(image_shape)]
    return [
        ("conv1", (*first, n_conv), (area * image_shape[2] + 1) * n_conv),
        ("primary capsules", (lower, primary_dim), (area * n_conv + 1) * channels),
        ("digit capsules", (n_classes, digit_dim), lower * primary_dim * n_classes * digit_dim),
        ("decoder", tuple(image_shape), sum((a + 1) * b for a, b in itertools.pairwise(widths))),
    ]


def memory_needed(sizes, batch_size, data_bytes=0):
    """Bytes that training will take at its peak, about: fitted to benchmarks/scaling.py on a CPU.

    Args:
        sizes: of `layer_sizes`.
        batch_size: images in a step on one device.
        data_bytes: of all images; the benchmark has few.
    """
    parameters = sum(count for *_, count in sizes)
    (lower, _), (upper, dim) = sizes[1][1], sizes[2][1]
    per_image = math.prod(sizes[0][1]) + lower * upper * dim  # conv1 and the votes
    return 900e6 + 20 * parameters + 11.2 * batch_size * per_image + data_bytes


class Data(NamedTuple):
    """Images and how they are composed: what the Trainer needs of a data set or a part of it."""

    images: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray  # (N,)
    margin: int = 0  # pixels of canvas around a digit
    max_shift: int = 0  # pixels, drawn for each digit
    overlap: bool = False  # two digits laid over each other
    class_names: tuple = tuple("0123456789")  # by label

    def canvas_shape(self):
        """(H', W', C) of the composed images."""
        _, height, width, channels = self.images.shape
        return (height + 2 * self.margin, width + 2 * self.margin, channels)

    def subset(self, indices):
        """The same with only these images."""
        return self._replace(images=self.images[indices], labels=self.labels[indices])

    def training_plan(self, seed, epoch):
        """Plan of an epoch, see `utils.training_plan`."""
        return training_plan(self.labels, seed, epoch, self.max_shift, self.overlap)

    def evaluation_plan(self, pairs_per_image=1):
        """Plan of an evaluation, see `utils.evaluation_plan`."""
        return evaluation_plan(self.labels, self.max_shift, self.overlap, pairs_per_image)


def batches(data, plan, batch_size, start=0, strategy=None):
    """The batches of a plan from number `start` on, prepared ahead of their use.

    The last one is filled up with images of weight zero, so that all have one shape; the weights of
    the others are 1 / their number, so that a weighted sum is the mean. A strategy's replicas get
    consecutive parts of each batch, the last of them filled up in the same way.

    Returns:
        what iterates over (digits (B, K, H, W, C) uint8, shift (B, K, 2), labels (B, K),
        weight (B,)), under a strategy of several replicas with PerReplica values.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replicas, n = strategy.num_replicas_in_sync, len(plan.index)
    part, steps = -(-batch_size // replicas), -(-n // batch_size)
    row = np.full((steps, replicas * part), n)
    row[:, :batch_size] = np.arange(steps * batch_size).reshape(steps, batch_size)
    weight = (row < n) / (row < n).sum(axis=1, keepdims=True)
    row = np.where(row < n, row, 0)[start:]

    def pipeline(context):
        local = replicas // context.num_input_pipelines
        mine = slice(local * part * context.input_pipeline_id,
                     local * part * (context.input_pipeline_id + 1))
        rows = row[:, mine].reshape(-1, part)
        weights = weight[start:, mine].reshape(-1, part).astype(np.float32)
        with tf.device("cpu"):
            images, labels = tf.constant(data.images), tf.constant(data.labels)

        def gather(index, shift, weight):
            return tf.gather(images, index), shift, tf.gather(labels, index), weight

        parts = (*(a[rows] for a in plan), weights)
        return tf.data.Dataset.from_tensor_slices(parts).map(gather).prefetch(2 * local)

    return strategy.distribute_datasets_from_function(pipeline)


def tweak(model, capsules, chosen, deltas=TWEAKS):
    """Reconstructions of capsules changed in one dimension at a time (section 5.1).

    Args:
        capsules: (N, J, D).
        chosen: (N,), which of the J capsules is shown of each example.
        deltas: (S,), what is added to a dimension.

    Returns:
        array (D, N, S, H, W, C).
    """
    n, classes, dims = capsules.shape
    mask = np.eye(classes, dtype=np.float32)[chosen].repeat(len(deltas), axis=0)  # (N * S, J)
    images = []
    for dim in range(dims):
        moved = capsules[:, None].repeat(len(deltas), axis=1)  # (N, S, J, D)
        moved[np.arange(n), :, chosen, dim] += deltas
        decoded = model.decoder(moved.reshape(-1, classes, dims), mask[:, None]).numpy()
        images.append(decoded.reshape(n, len(deltas), *decoded.shape[2:]))
    return np.stack(images)


def compile_forward(model, data, jit, strategy=None):
    """What `evaluate` calls: batch, spectra -> what it keeps; the spectra; and the strategy."""
    strategy = strategy or tf.distribute.get_strategy()

    def run(function, *arguments):
        compiled = tf.function(function, jit_compile=jit, autograph=False)
        # In a function of Python: `run` would make one program of all replicas of a tf.function.
        return strategy.run(lambda *parts: compiled(*parts), arguments)

    def keep(batch, spectra):
        seen = model.examine(data, batch, spectra)
        seen["correct"] = tf.cast(seen["correct"], tf.int32)  # truth values cannot be gathered
        return {name: seen[name] for name in EVALUATED}

    @tf.function(autograph=False)
    def forward(batch, spectra):
        seen = run(keep, batch, spectra)
        return {name: strategy.gather(value, axis=0) for name, value in seen.items()}

    return forward, tf.function(lambda: run(model.spectra), autograph=False), strategy


def evaluate(compiled, data, plan, on_batch=None):
    """Lengths, predictions and losses of all examples of a plan, every one counted once.

    Args:
        compiled: of `compile_forward`.
        data, plan: Data and a Plan for it.
        on_batch: called after each batch with the number of examples done.

    Returns:
        dict: lengths (N, J), predictions (N, K), labels (N, K), correct (N,) and the means
        margin_loss, reconstruction_loss and accuracy.
    """
    forward, spectra_of, strategy = compiled
    size, n, spectra = min(EVALUATION_BATCH, len(plan.index)), len(plan.index), spectra_of()
    parts = []
    for batch in batches(data, plan, size, strategy=strategy):
        seen = forward(batch, spectra)
        parts.append({name: value.numpy()[:size] for name, value in seen.items()})
        if on_batch:
            on_batch(min(len(parts) * size, n))
    whole = {name: np.concatenate([part[name] for part in parts])[:n] for name in EVALUATED}
    correct = whole["correct"].astype(bool)
    return {
        "lengths": whole["lengths"], "predictions": whole["predictions"],
        "labels": data.labels[plan.index], "correct": correct,
        "margin_loss": float(whole["margin"].mean(dtype=np.float64)),
        "reconstruction_loss": float(whole["reconstruction"].mean(dtype=np.float64)),
        "accuracy": float(correct.mean()),
    }


# --- Several devices and machines ----------------------------------------------------------------


def choose_strategy(name, waiting=None):
    """The tf.distribute.Strategy of a name; to be called before anything is computed.

    Args:
        name: "one" device; "mirrored", on all GPUs (or logical CPUs) of this machine;
            "multi_worker", on the machines of the cluster in TF_CONFIG; or "auto", mirrored where
            there are several GPUs.
        waiting: context manager, entered while a worker waits for the others.

    Raises:
        UserError: TF_CONFIG does not describe a cluster and this worker's place in it.
    """
    if name == "multi_worker":
        try:
            config = json.loads(os.environ.get("TF_CONFIG", ""))
            task, cluster = config["task"], config["cluster"]
            cluster[task["type"]][int(task["index"])]
            known = task["type"] in ("chief", "worker")
        except (ValueError, KeyError, IndexError, TypeError):
            known = False
        if not known:
            raise UserError(
                "TF_CONFIG does not say which worker of which cluster this is, expected JSON such "
                """as {"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": """
                """"worker", "index": 0}}, the index another one on each host""")
        with waiting or contextlib.nullcontext():
            return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def is_chief(strategy):
    """Whether this process is the one that writes files."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    return resolver.task_type == "chief" or (
        resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs)


def count_workers(strategy):
    """Processes of a strategy."""
    if strategy.cluster_resolver is None:
        return 1
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return sum(len(cluster.get(job, ())) for job in ("chief", "worker")) or 1


def over_workers(strategy, number):
    """The sum of an integer over the processes of a strategy, which wait for each other here."""
    workers = count_workers(strategy)
    if workers == 1:
        return number
    local = strategy.num_replicas_in_sync // workers

    def of_replica(context):
        first = context.replica_id_in_sync_group % local == 0
        return tf.constant(number if first else 0, tf.int64)

    numbers = strategy.experimental_distribute_values_from_function(of_replica)
    return int(strategy.reduce("SUM", numbers, axis=None))


# --- Checkpoints ---------------------------------------------------------------------------------


def saved_steps(folder):
    """Steps of the checkpoints in a folder, the newest first."""
    found = (re.fullmatch(r"ckpt-(\d+)\.index", path.name) for path in Path(folder).glob("ckpt-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_facts(folder, step):
    """The facts (JSON) that a checkpoint was saved with. Raises READ_ERRORS if it is damaged."""
    reader = tf.train.load_checkpoint(str(Path(folder) / f"ckpt-{step}"))
    return json.loads(reader.get_tensor("facts/.ATTRIBUTES/VARIABLE_VALUE"))


def newest_readable(folder, read, report):
    """What `read(step)` gives for the newest checkpoint that is whole, and its step.

    Returns:
        (None, None) if there is no checkpoint.

    Raises:
        UserError: there are some, and all are damaged.
    """
    damaged = False
    for step in saved_steps(folder):
        for path in Path(folder).glob(f"ckpt-{step}.*"):
            path.open("rb").close()  # one that may not be read is no damaged one: OSError
        try:
            return read(step), step
        except READ_ERRORS:
            if (Path(folder) / f"ckpt-{step}_temp").is_dir():
                continue  # a kill in mid-save: it was never whole
            damaged = True
            report(f"Checkpoint {folder}/ckpt-{step} is damaged; trying the one before.")
    if damaged:
        raise UserError(f"{folder}: every checkpoint is damaged, expected a whole one; "
                        "train again with --train --restart")
    return None, None


def differences(old, new):
    """Names of the entries in which two dicts differ, with both values."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return ", ".join(f"{name} is {old.get(name)} there and {new.get(name)} here"
                     for name in sorted(old | new) if old.get(name) != new.get(name))


def shape_of(model):
    """What must agree for weights to fit, and nothing that does not matter for it."""
    return {name: value for name, value in model.settings.items()
            if name not in ("conv", "initialization")}


def load_weights(model, folder, report):
    """Restore the newest whole checkpoint of a folder and return its facts.

    If the training kept averages of the weights, the model gets these.

    Raises:
        UserError: there is none, all are damaged, or it is of another network.
    """

    def read(step):
        facts = read_facts(folder, step)
        differing = differences(facts["shape"], shape_of(model))
        if differing:
            raise UserError(f"{folder}/ckpt-{step} holds another network: {differing}; give the "
                            "flags that it was trained with, or another folder")
        _restore(tf.train.Checkpoint(weights=_by_path(model.variables)), folder, step)
        if facts["training"].get("averaging"):
            averages = {f"adam/{v.path.replace('/', '_')}_average": v.value
                        for v in model.variables}
            _restore(tf.train.Checkpoint(optimizer=averages), folder, step)
        return facts

    facts, _ = newest_readable(folder, read, report)
    if facts is None:
        raise UserError(f"no checkpoint in {folder}; train first (add --train), or name the folder "
                        "of a trained network")
    return facts


def reason(error):
    """What an error of TensorFlow says, in one line, without the name of the graph's node."""
    return re.sub(r"{{.*?}}|\[Op:.*", "", " ".join(str(error).split())).strip()


def _by_path(variables):
    return {v.path: v.value for v in variables}


def _restore(checkpoint, folder, step):
    status = checkpoint.read(str(Path(folder) / f"ckpt-{step}"))
    status.assert_existing_objects_matched()
    status.expect_partial()


def event_files(folder):
    """For each event file of a folder, the oldest first: its path, what it holds, if it is whole.

    What it holds are the serialized events, up to where a kill in mid-write left half of one.
    """
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        records, whole = [], True
        try:
            records.extend(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
        except tf.errors.DataLossError:
            whole = False
        yield path, records, whole


def read_scalars(folder, last_step=math.inf):
    """The scalars in the event files of a run, and how long it trained until a step.

    Returns:
        dict of tag to (steps, values), and the seconds from the first to the last event of each
        file, summed: every start of a training begins a file.
    """
    series, seconds = {}, 0.0
    for _, records, _ in event_files(folder):
        events = [tf.compat.v1.Event.FromString(record) for record in records]
        events = [event for event in events if event.step <= last_step]
        seconds += events[-1].wall_time - events[0].wall_time if events else 0
        for event in events:
            for value in event.summary.value:
                if value.tensor.dtype == tf.float32.as_datatype_enum:
                    series.setdefault(value.tag, []).append(
                        (event.step, float(tf.make_ndarray(value.tensor))))
    return {tag: tuple(zip(*points)) for tag, points in series.items()}, seconds


@contextlib.contextmanager
def replacing_events(folder, name, step):
    """Within it summaries go to an event file of this name, which replaces the one before it."""
    older = list(Path(folder).glob(f"events.out.tfevents.*.{name}"))
    writer = tf.summary.create_file_writer(str(folder), filename_suffix=f".{name}")
    try:
        with writer.as_default(step=step):
            yield
    finally:
        writer.close()
    for path in older:
        path.unlink()


def _write_scalars(total, margin, reconstruction, accuracy):
    tf.summary.scalar("loss/total", total)
    tf.summary.scalar("loss/margin", margin)
    tf.summary.scalar("loss/reconstruction", reconstruction)
    tf.summary.scalar("accuracy", accuracy)


def summarize(data, found, total, path=None):
    """Summaries of what `evaluate` found: losses, confusion matrix, lengths of each class's capsule.

    The confusion matrix goes to the file `path` too.
    """
    _write_scalars(total, found["margin_loss"], found["reconstruction_loss"], found["accuracy"])
    if not data.overlap:
        matrix = utils.confusion_matrix(
            found["labels"][:, 0], found["predictions"][:, 0], len(data.class_names))
        picture = utils.save_confusion_matrix(path, matrix, data.class_names)
        tf.summary.image("confusion matrix", picture[None])
    for number, name in enumerate(data.class_names):
        present = (found["labels"] == number).any(axis=1)
        lengths = found["lengths"][:, number]
        tf.summary.histogram(f"where present, length of capsule/{name}", lengths[present])
        tf.summary.histogram(f"where absent, length of capsule/{name}", lengths[~present])


def cut_events(folder, last_step):
    """Drop what event files say of steps after `last_step`, and a half-written end."""
    for path in Path(folder).glob(".events*"):  # a kill while this function wrote
        path.unlink()
    for path, records, whole in event_files(folder):
        kept = [record for record in records
                if tf.compat.v1.Event.FromString(record).step <= last_step]
        whole = whole and len(kept) == len(records)
        if not kept:
            path.unlink()
        elif not whole:
            temporary = path.with_name(f".{path.name}")
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for record in kept:
                    writer.write(record)
            os.replace(temporary, path)


@contextlib.contextmanager
def only_one(folder):
    """Keep a second training out of a folder; the system frees the lock of a process that ends.

    Raises:
        UserError: another process trains there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another training runs in {folder}; wait for it, or give other "
                                "folders (--checkpoint_dir, --val_checkpoint_dir, --logdir)"
                                ) from None
        yield


def claim(folder, checkpoint):
    """Note in a folder which run writes to it.

    Raises:
        UserError: another run does, whose checkpoints are elsewhere.
    """
    note, mine = folder / "run", os.path.relpath(checkpoint, folder)
    owner = note.read_text().strip() if note.exists() else ""
    if owner not in ("", mine) and (folder / owner).exists():  # "": a kill while it was written
        raise UserError(f"{folder} belongs to the run in {folder / owner}; give another --logdir "
                        "and --val_checkpoint_dir too")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(mine + "\n")


def move_aside(folders):
    """Rename the folders that exist to the first free ….1, ….2, … and return that ending."""
    number = 1
    while any(folder.with_name(f"{folder.name}.{number}").exists() for folder in folders):
        number += 1
    for folder in reversed(folders):  # the checkpoints last: until they go, a kill changes nothing
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
    return f".{number}"


# --- Networks to take along ----------------------------------------------------------------------


def check_new(folder):
    """Raises UserError if a folder is there and not empty, or is a file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, expected a new or empty folder; give another "
                        "name")


def export(model, folder, facts, card, shown=1):
    """Write a network to a new folder, all of it or nothing.

    Args:
        model: CapsNet; it is written with direct convolutions, which run on any machine.
        folder: gets capsnet.keras (needs ops and model to be imported), saved_model (needs only
            TensorFlow), weights.npz (float16, for `load_pretrained`) and README.md.
        facts: of the checkpoint.
        card: text of README.md.
        shown: K, how many digits are in an image.

    Raises:
        UserError: the folder is there and not empty, or cannot be written.
    """
    check_new(folder)
    folder = Path(folder)
    portable = CapsNet(**model.settings | {"conv": "direct"}, dtype="float32")
    portable.set_weights(model.get_weights())

    def serve(images):
        lengths, capsules = portable(images)
        mask = ops.label_mask(ops.longest(lengths, shown), lengths.shape[1])
        return {"lengths": lengths, "capsules": capsules,
                "reconstructions": portable.decoder(capsules, mask)}

    archive = keras.export.ExportArchive()
    archive.track(portable)
    shape = (None, *model.settings["image_shape"])
    archive.add_endpoint("serve", serve, [tf.TensorSpec(shape, tf.float32, name="images")])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as outer:
        whole = Path(outer, folder.name)
        archive.write_out(str(whole / "saved_model"), verbose=False)
        portable.save(whole / "capsnet.keras")
        halves = {path: value.numpy().astype(np.float16)
                  for path, value in _by_path(model.variables).items()}
        np.savez_compressed(whole / "weights.npz", facts=json.dumps(facts), **halves)
        (whole / "README.md").write_text(card, encoding="utf-8")
        os.replace(whole, folder)


def load_pretrained(model, folder):
    """Give a model the weights that `export` wrote to a folder, and return their facts.

    Raises:
        UserError: there are none, they are damaged, or of another network.
    """
    path = Path(folder) / "weights.npz"
    if not path.exists():
        others = ", ".join(sorted(p.parent.name for p in path.parent.parent.glob("*/weights.npz")))
        raise UserError(f"no pretrained weights for {path.parent.name}, there are some for: "
                        f"{others or 'none'}; train first (--train), without --pretrained")
    try:
        with np.load(path) as file:
            facts = json.loads(str(file["facts"]))
            if differing := differences(facts["shape"], shape_of(model)):
                raise UserError(f"{path} is of another network: {differing}; leave these flags out, "
                                "or train first, without --pretrained")
            values = [file[v.path] for v in model.variables]
    except (KeyError, *utils.NPZ_ERRORS) as error:
        raise UserError(f"{path} is damaged ({error}); put back the original") from None
    for variable, value in zip(model.variables, values):
        variable.assign(value)
    return facts


# --- Training ------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal asked the training to stop, and it has saved; args: the signal's number."""


class Training(NamedTuple):
    """How to train: what a run must share with the one that it continues."""

    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.001
    decay_rate: float = 0.7
    decay_steps: int = 1000
    reconstruction_weight: float = 0.0005
    averaging: float = 0.99  # see `AveragingAdam`; 0: no averages are kept


class Folders(NamedTuple):
    """Where a run keeps what it writes; each is its own, named for the run."""

    checkpoint: Path
    best: Path
    logs: Path


class AveragingAdam(keras.optimizers.Adam):
    """Adam whose running averages soon forget the first weights: after t steps their momentum is
    at most (1 + t) / (10 + t), as in `tf.train.ExponentialMovingAverage`."""

    @property
    def ema_momentum(self):
        steps = tf.cast(self.iterations, tf.float32)
        return tf.minimum(self.largest_momentum, (1 + steps) / (10 + steps))

    @ema_momentum.setter
    def ema_momentum(self, value):
        self.largest_momentum = value


class Trainer:
    """Trains a CapsNet; see `fit`.

    Args:
        model: CapsNet.
        data: Data to train on.
        validation: Data to choose the best weights by, or None.
        how: Training.
        folders: Folders.
        facts: what else a continued run must share with its beginning (flags' names and values).
        jit: whether XLA compiles the step.
        report: takes a line of text for the user.
        strategy: tf.distribute.Strategy in whose scope the model was made, or None.
    """

    def __init__(self, model, data, validation, how, folders, facts, jit=True, report=print,
                 strategy=None):
        self.model, self.data, self.validation, self.how = model, data, validation, how
        self.folders, self.jit, self.report = folders, jit, report
        self.strategy = strategy or tf.distribute.get_strategy()
        self.chief = is_chief(self.strategy)
        # Steps to begin before the result of one is read: an accelerator is not to wait for Python.
        self.ahead = int(bool(tf.config.list_logical_devices("GPU")))
        self.steps_per_epoch = math.ceil(len(data.labels) / how.batch_size)
        self.facts = {"shape": shape_of(model), "training": how._asdict() | facts}
        schedule = keras.optimizers.schedules.ExponentialDecay(
            how.learning_rate, how.decay_steps, how.decay_rate)
        with self.strategy.scope():
            self.optimizer = AveragingAdam(
                schedule, name="adam", use_ema=how.averaging > 0, ema_momentum=how.averaging)
            self.optimizer.build(model.trainable_variables)
        self.step = 0  # how many are done
        self.sums = np.zeros(4)  # margin, reconstruction, correct and images of this epoch so far
        self.best = math.inf  # the lowest validation loss
        self.restored = None  # the step of the checkpoint that training went on from
        self._state = {name: tf.Variable(value) for name, value in self._host_state(0).items()}
        self._checkpoint = tf.train.Checkpoint(
            weights=_by_path(model.variables), optimizer=_by_path(self.optimizer.variables),
            **self._state)
        # Made later, as is usual, it would be restored then, from a checkpoint found damaged.
        self._checkpoint.save_counter.assign(0)
        self._stop_signal = None
        self.train_step = self._compile()  # batch -> margin loss, reconstruction loss, accuracy
        if validation:
            self._validate = compile_forward(model, validation, jit, self.strategy)
            self._validation_plan = validation.evaluation_plan()

    def _compile(self):
        """batch -> (margin loss, reconstruction loss, accuracy), after one step of the optimizer.

        The weights of a batch make its losses means over the whole batch, wherever its parts are.
        """
        variables = self.model.trainable_variables

        def gradients(batch):
            weight = batch[-1]
            with tf.GradientTape() as tape:
                step = tf.cast(self.optimizer.iterations, tf.int32)
                seen = self.model.examine(self.data, batch, step=step)
                margin, reconstruction, correct = (
                    tf.reduce_sum(weight * tf.cast(seen[name], tf.float32))
                    for name in ("margin", "reconstruction", "correct"))
                loss = margin + self.how.reconstruction_weight * reconstruction
            values = [v.value for v in variables]
            return tape.gradient(loss, values), tf.stack([margin, reconstruction, correct])

        def step(batch):
            found, metrics = gradients(batch)
            self.optimizer.apply(found, variables)  # of the sums over all replicas
            return metrics

        if self.strategy is tf.distribute.get_strategy():  # one device: all in one program
            return tf.function(step, jit_compile=self.jit, autograph=False)
        gradients = tf.function(gradients, jit_compile=self.jit, autograph=False)

        def step_of_all(batch):
            return self.strategy.reduce("SUM", self.strategy.run(step, (batch,)), axis=None)

        return tf.function(step_of_all, autograph=False)

    # What a checkpoint holds besides weights and the optimizer's variables.

    def _host_state(self, last_step):
        facts = self.facts | {"step": self.step, "last_step": last_step}
        return {"facts": json.dumps(facts), "sums": np.asarray(self.sums, np.float64),
                "best": np.float64(self.best), "step": np.int64(self.step)}

    def save(self, last_step):
        """Write a checkpoint beside the older ones, then drop the oldest; the chief does."""
        if not self.chief:
            return
        self._check_finite("a weight is", self.step, *self.model.get_weights())
        for writer in self._writers.values():
            writer.flush()
        self._write(self._manager, last_step)

    def _check_finite(self, what, step, *arrays):
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(f"{what} not finite at step {step}; the checkpoints before it are "
                            "kept: try a lower --learning_rate, with --restart")

    def _write(self, manager, last_step):
        for name, value in self._host_state(last_step).items():
            self._state[name].assign(value)
        try:
            manager.save(checkpoint_number=self.step, check_interval=False)
        except (tf.errors.OpError, OSError) as error:
            raise UserError(f"cannot save to {manager.directory}: {reason(error)}; the "
                            "checkpoints there are as they were: make room and run the same "
                            "command again") from error

    def _open_manager(self, folder, keep, good):
        """A CheckpointManager; what came after step `good` goes: it is damaged, or cut by a kill."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        older = [s for s in reversed(saved_steps(folder)) if good is not None and s <= good]
        for path in (*folder.glob("ckpt-*"), *folder.glob("checkpoint.tmp*")):
            part = re.fullmatch(r"ckpt-(\d+)(_temp|\.index|\.data-\d+-of-\d+)", path.name)
            if path.name.startswith("checkpoint.tmp") or (part and part[2] != "_temp"
                                                          and int(part[1]) not in older):
                path.unlink()
            elif part and part[2] == "_temp":
                shutil.rmtree(path)
        state = folder / "checkpoint"  # what the manager believes; it may be damaged too
        state.unlink(missing_ok=True)
        if older:
            listed = "".join(f'all_model_checkpoint_paths: "ckpt-{s}"\n'
                             "all_model_checkpoint_timestamps: 1\n" for s in older)
            state.write_text(f'model_checkpoint_path: "ckpt-{older[-1]}"\n{listed}')
        return tf.train.CheckpointManager(self._checkpoint, str(folder), max_to_keep=keep)

    def resume(self, restart=False):
        """Restore the newest whole checkpoint, if there is one of this run.

        Raises:
            UserError: an unfinished run of other settings is there.
        """
        folder = self.folders.checkpoint
        mine = self.facts["shape"] | self.facts["training"]

        def read(step):
            facts = read_facts(folder, step)
            differing = differences(facts["shape"] | facts["training"], mine)
            if not differing:
                _restore(self._checkpoint, folder, step)
            return facts, differing

        aside = restart and bool(saved_steps(folder))
        if not aside:
            found, _ = newest_readable(folder, read, self.report)
            if found is None:
                return
            facts, aside = found
            if aside and facts["step"] < facts["last_step"]:
                raise UserError(f"{folder} holds an unfinished run (step {facts['step']} of "
                                f"{facts['last_step']}) of other settings: {aside}; give the same "
                                "flags, or --restart to move it aside, or other folders "
                                "(--checkpoint_dir, --val_checkpoint_dir, --logdir)")
        if aside:
            ending = move_aside(self.folders)
            self.report(f"Moved the earlier run aside: {folder}{ending}, "
                        f"{self.folders.logs}{ending}")
            return
        self._take_state()

    def fit(self, epochs, save_steps=500, restart=False, on_step=None, on_resume=None, texts=None):
        """Train until `epochs` epochs are done, from the last checkpoint if there is one.

        Args:
            epochs: in all, those of earlier calls included; of a fraction the first steps.
            save_steps: steps between checkpoints; one is written after each epoch as well.
            restart: move an earlier run aside and begin.
            on_step: called after each step with a dict of progress.
            on_resume: called with the step of the checkpoint that training goes on from.
            texts: dict of name to text for TensorBoard.

        Returns:
            False if all epochs were done before.

        Raises:
            UserError: see `resume`; a loss that is not finite; a folder that cannot be written;
                workers that differ in flags or data.
            Interrupted: a signal came; the state is saved.
        """
        mine = zlib.crc32(json.dumps([self.facts, epochs, save_steps]).encode())
        if over_workers(self.strategy, mine) != mine * count_workers(self.strategy):
            raise UserError("the workers were started with different flags or different data, "
                            "expected the same everywhere; nothing was changed")
        with contextlib.ExitStack() as stack:
            for folder in self.folders * self.chief:
                stack.enter_context(only_one(folder))
            stack.enter_context(self._signals())
            if self.chief:
                self.resume(restart)
            step = over_workers(self.strategy, self.step)  # the others have 0
            if not self.chief and step:
                self._restore(step)
            over_workers(self.strategy, 0)  # only then may the chief change what is in the folders
            last_step = math.ceil(epochs * self.steps_per_epoch)
            if self.step >= last_step:
                return False
            if self.restored and on_resume:
                on_resume(self.restored)
            self._writers = {}
            if self.chief:
                self._open_folders(texts or {})
            try:
                while self.step < last_step:
                    self._train_epoch(last_step, save_steps, on_step)
            finally:
                for writer in self._writers.values():
                    with contextlib.suppress(tf.errors.OpError):  # `save` flushed what counts
                        writer.close()
            return True

    def _restore(self, step):
        """What `resume` does, on a worker that is told the step by the chief."""
        try:
            _restore(self._checkpoint, self.folders.checkpoint, step)
        except READ_ERRORS:
            raise UserError(f"{self.folders.checkpoint} does not hold the checkpoint of step {step}"
                            ", from which the chief goes on; all workers need the same folder, on "
                            "a disk that they share") from None
        self._take_state()

    def _take_state(self):
        self.step = self.restored = int(self._state["step"].numpy())
        self.sums = self._state["sums"].numpy()
        self.best = float(self._state["best"].numpy())

    def _open_folders(self, texts):
        """Clear away what came after the step to go on from, and open checkpoints and events."""
        folders = self.folders
        claim(folders.logs, folders.checkpoint)
        self._manager = self._open_manager(folders.checkpoint, KEPT_CHECKPOINTS, self.restored)
        if self.validation:
            claim(folders.best, folders.checkpoint)
            self._best_manager = self._open_manager(folders.best, 1, self._newest_best())
        for name in ("train", "validation") if self.validation else ("train",):
            # Before the first checkpoint there is nothing that a new start would not repeat.
            cut_events(folders.logs / name, -1 if self.restored is None else self.step)
            self._writers[name] = tf.summary.create_file_writer(str(folders.logs / name))
        if self.step == 0:
            settings = self.facts["shape"] | self.facts["training"]
            with replacing_events(folders.logs, "hparams", 0):
                hparams.hparams({name: value if isinstance(value, (int, float, str)) else str(value)
                                 for name, value in settings.items() if name != "data"})
            with self._writers["train"].as_default(step=0):
                for name, text in texts.items():
                    tf.summary.text(name, text)

    def _newest_best(self):
        """Step of the best weights, or None: then the next validation gives the best there are."""
        best, step = self.folders.best, None
        with contextlib.suppress(UserError):
            values = tf.train.Checkpoint(weights={
                path: tf.Variable(v) for path, v in _by_path(self.model.variables).items()})
            _, step = newest_readable(best, lambda s: _restore(values, best, s), self.report)
        if step is None:
            self.best = math.inf
        return step

    def _train_epoch(self, last_step, save_steps, on_step):
        epoch, start = divmod(self.step, self.steps_per_epoch)
        plan = self.data.training_plan(self.how.seed, epoch)
        size, n = self.how.batch_size, len(plan.index)
        began, untimed = time.perf_counter(), start
        waiting = []  # numbers and results of steps whose results are still to be read

        def note(number, metrics):
            nonlocal began, untimed
            metrics = metrics.numpy().astype(np.float64)
            step = epoch * self.steps_per_epoch + number + 1
            self._check_finite("the loss is", step, metrics)
            self.sums += np.append(metrics, 1) * min(size, n - number * size)
            if self.chief:
                self._log_step(step, metrics)
            if on_step:
                speed = (number + 1 - untimed) * size / (time.perf_counter() - began)
                if number == start:  # the first step compiles, or waits for its first batch
                    began, untimed = time.perf_counter(), start + 1
                means = self.sums / self.sums[3]
                on_step({"epoch": epoch + 1, "epochs": -(-last_step // self.steps_per_epoch),
                         "step": step, "last_step": last_step, "images_per_second": speed,
                         "seconds_left": (last_step - step) * size / speed,
                         "margin_loss": means[0], "reconstruction_loss": means[1],
                         "accuracy": means[2]})

        feed = batches(self.data, plan, size, start, self.strategy)
        for number, batch in enumerate(feed, start):
            waiting.append((number, self.train_step(batch)))
            self.step += 1
            last = number + 1 == self.steps_per_epoch
            saving = last or self.step == last_step or self.step % save_steps == 0
            while len(waiting) > (0 if saving else self.ahead):
                note(*waiting.pop(0))
            stopping = self._stopping()
            while stopping and waiting:
                note(*waiting.pop(0))
            if last:
                self._end_epoch(last_step)
            if saving or stopping:
                self.save(last_step)
            if stopping:
                raise Interrupted(self._stop_signal or signal.SIGTERM)
            if self.step == last_step:
                return

    def _stopping(self):
        """Whether to stop after this step; several workers do it all together, or none does."""
        if self.strategy.cluster_resolver is None:
            return bool(self._stop_signal)
        return (self.step % AGREEING_STEPS == 0
                and over_workers(self.strategy, int(bool(self._stop_signal))) > 0)

    def _log_step(self, step, metrics):
        margin, reconstruction, accuracy = metrics
        how = self.how
        rate = how.learning_rate * how.decay_rate ** ((step - 1) / how.decay_steps)
        with self._writers["train"].as_default(step=step):
            _write_scalars(self._total(margin, reconstruction), margin, reconstruction, accuracy)
            tf.summary.scalar("learning_rate", rate)

    def _total(self, margin, reconstruction):
        return margin + self.how.reconstruction_weight * reconstruction

    def _end_epoch(self, last_step):
        """Pictures, validation, and the best weights so far; all before the epoch's checkpoint."""
        self.sums = np.zeros(4)
        with self.averaged():
            if self.chief:
                self._draw_examples()
            if not self.validation:
                return
            found = evaluate(self._validate, self.validation, self._validation_plan)
        loss = self._total(found["margin_loss"], found["reconstruction_loss"])
        improved = loss < self.best
        self.report(f"Validation after step {self.step}: loss {loss:.5f}, "
                    f"accuracy {100 * found['accuracy']:.2f}%" + (", the best so far" * improved))
        self.best = min(loss, self.best)
        if not self.chief:
            return
        with self._writers["validation"].as_default(step=self.step):
            summarize(self.validation, found, loss)
        if improved:
            self._write(self._best_manager, last_step)

    @contextlib.contextmanager
    def averaged(self):
        """Within it the model has the averages of its weights, if they are kept."""
        weights = self.model.get_weights()
        self.optimizer.finalize_variable_values(self.model.trainable_variables)
        try:
            yield
        finally:
            self.model.set_weights(weights)

    def _draw_examples(self):
        """Reconstructions and tweaks of the first images, validation's if there are any."""
        data = self.validation or self.data
        plan = data.evaluation_plan().take(slice(20))
        batch = next(iter(batches(data, plan, len(plan.index))))
        seen = {name: value.numpy() for name, value in self.model.examine(data, batch).items()}
        if "with_label" not in seen:
            return  # a network that draws nothing
        labels, chosen = batch[2].numpy(), seen["predictions"][:1, 0]
        names = data.class_names
        with self._writers["validation" if self.validation else "train"].as_default(step=self.step):
            tf.summary.image("reconstructions", utils.save_reconstructions(
                None, seen["canvas"], seen["with_label"], seen["without_label"], labels,
                seen["predictions"], names)[None])
            tf.summary.image("tweaks", utils.save_tweak_overview(
                None, tweak(self.model, seen["capsules"][:1], chosen)[:, 0], TWEAKS,
                names[chosen[0]])[None])

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and Ctrl-C stop after the running step; a second one at once."""
        self._stop_signal, previous = None, {}

        def note(number, frame):
            self._stop_signal = number
            signal.signal(number, previous[number])

        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                previous[number] = signal.getsignal(number)
                signal.signal(number, note)
        try:
            yield
            if self._stop_signal:  # it came when there was nothing left to train
                raise Interrupted(self._stop_signal)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
