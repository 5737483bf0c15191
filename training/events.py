"""TensorBoard's event files: write them, read them, and cut what a resumed training repeats."""

import contextlib
import math
import os
from pathlib import Path

import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.plugins.hparams import api as hparams

RECORD_OVERHEAD = 16  # bytes of a file around each event: its length, and two checksums


class EventLog:
    """The event files of a training run, in the folders `train` and `validation`.

    Args:
        folder: folder of the run; None writes nothing.
        step: the step from which training resumes, 0 at its start. Events after it are dropped.
        validation: whether there is a validation.
    """

    def __init__(self, folder, step=0, validation=False):
        names = ("train", "validation") if validation else ("train",)
        if folder is None:
            self._writers = {name: tf.summary.create_noop_writer() for name in names}
            return
        self._writers = {}
        for name in names:
            # A fresh start writes everything before step 1 again.
            cut_events(folder / name, step if step > 0 else -1)
            self._writers[name] = tf.summary.create_file_writer(str(folder / name))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for writer in self._writers.values():
            with contextlib.suppress(tf.errors.OpError):  # `flush` has written what counts
                writer.close()

    def flush(self):
        """Write everything to disk."""
        for writer in self._writers.values():
            writer.flush()

    def write_step(self, step, total, losses, accuracy, learning_rate):
        """Write the scalars of a training step."""
        with self._writers["train"].as_default(step=step):
            write_scalars(total, losses, accuracy)
            tf.summary.scalar("learning_rate", learning_rate)

    def writing(self, name, step):
        """Return a context in which summaries go to the events `name` at a step."""
        return self._writers[name].as_default(step=step)


def write_scalars(total, losses, accuracy):
    """Write the total loss, its terms by name, and the accuracy."""
    tf.summary.scalar("loss/total", total)
    for name, value in losses.items():
        tf.summary.scalar(f"loss/{name}", value)
    tf.summary.scalar("accuracy", accuracy)


def write_texts(texts):
    """Write texts by name."""
    for name, text in texts.items():
        tf.summary.text(name, valid_unicode(text))


def valid_unicode(text):
    """Return a text with the bytes of odd file names escaped: event files take UTF-8 only."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_settings(folder, settings):
    """Write a run's settings (name -> value) for TensorBoard's HParams tab."""
    shown = {
        name: value if isinstance(value, (int, float)) else valid_unicode(str(value))
        for name, value in settings.items()
        if name != "data"
    }
    with replacing_events(folder, "hparams", 0):
        hparams.hparams(shown)


@contextlib.contextmanager
def replacing_events(folder, name, step):
    """Send summaries to a new event file of this name, which replaces the one before it."""
    older = list(Path(folder).glob(f"events.out.tfevents.*.{name}"))
    writer = tf.summary.create_file_writer(str(folder), filename_suffix=f".{name}")
    try:
        with writer.as_default(step=step):
            yield
    finally:
        writer.close()
    for path in older:
        path.unlink()


def event_files(folder):
    """Yield each event file of a folder, the oldest first.

    Of each its path, the serialized events up to where a kill cut it, and whether it is whole.
    """
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        records = list(RawEventFileLoader(str(path)).Load())
        size = sum(len(record) + RECORD_OVERHEAD for record in records)
        yield path, records, size == path.stat().st_size


def read_scalars(folder, last_step=math.inf):
    """Read the scalars of a run, and how long it trained, up to a step.

    Returns:
        A dict of tag to (steps, values), and the seconds from the first to the last event of each
        file, summed: every start of a training run begins a file.
    """
    series, seconds = {}, 0.0
    for _, records, _ in event_files(folder):
        events = [tf.compat.v1.Event.FromString(record) for record in records]
        events = [event for event in events if event.step <= last_step]
        if events:
            seconds += events[-1].wall_time - events[0].wall_time
        for event in events:
            for value in event.summary.value:
                if value.tensor.dtype == tf.float32.as_datatype_enum:
                    number = float(tf.make_ndarray(value.tensor))
                    series.setdefault(value.tag, []).append((event.step, number))
    return {tag: tuple(zip(*points, strict=True)) for tag, points in series.items()}, seconds


def cut_events(folder, last_step):
    """Drop the events after `last_step`, and a half-written end."""
    for path in Path(folder).glob(".events*"):  # left by a kill while this function wrote
        path.unlink()
    for path, records, whole in event_files(folder):
        kept = [
            record for record in records if tf.compat.v1.Event.FromString(record).step <= last_step
        ]
        if not kept:
            path.unlink()
        elif not whole or len(kept) < len(records):
            temporary = path.with_name(f".{path.name}")
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for record in kept:
                    writer.write(record)
            os.replace(temporary, path)
