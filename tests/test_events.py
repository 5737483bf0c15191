"""TensorBoard's files, read back with TensorBoard's own reader."""

import os

import numpy as np
import pytest
import tensorflow as tf
from engine import SCALARS, Crash, events

from training.events import (
    EventLog,
    cut_events,
    read_scalars,
    replacing_events,
    write_settings,
    write_texts,
)


def write_events(path, steps, wall_times=None):
    """Write a file of events, each with a scalar "value" of 10 times its step."""
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number, step in enumerate(steps):
            event = tf.compat.v1.Event(
                step=step, wall_time=wall_times[number] if wall_times else number
            )
            value = event.summary.value.add(tag="value")
            value.tensor.CopyFrom(tf.make_tensor_proto(np.float32(10 * step)))
            writer.write(event.SerializeToString())


def write_note(log, text="a text"):
    with log.writing("train", 0):
        write_texts({"note": text})


def steps_in(path):
    records = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    return [tf.compat.v1.Event.FromString(record).step for record in records]


def test_a_log_writes_steps_texts_and_validation_to_their_own_folders(tmp_path):
    with EventLog(tmp_path, validation=True) as log:
        write_note(log)
        log.write_step(1, 0.5, {"one": 0.25, "other": 2.0}, 0.75, 0.001)
        with log.writing("validation", 7):
            tf.summary.scalar("accuracy", 0.5)
    assert events(tmp_path) == {
        ("train", "note"): [(0, b"a text")],
        ("train", "loss/total"): [(1, 0.5)],
        ("train", "loss/one"): [(1, 0.25)],
        ("train", "loss/other"): [(1, 2.0)],
        ("train", "accuracy"): [(1, 0.75)],
        ("train", "learning_rate"): [(1, np.float32(0.001))],
        ("validation", "accuracy"): [(7, 0.5)],
    }


def test_flushed_events_are_on_disk_while_the_log_is_still_open(tmp_path):
    with EventLog(tmp_path) as log:
        log.write_step(1, 0.5, {}, 0.75, 0.001)
        log.flush()
        assert read_scalars(tmp_path / "train")[0]["loss/total"] == ((1,), (0.5,))


def test_a_log_without_a_folder_takes_everything_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EventLog(None, validation=True) as log:
        write_note(log)
        log.write_step(1, 0.5, {"one": 0.25}, 0.75, 0.001)
        with log.writing("validation", 7):
            tf.summary.scalar("accuracy", 0.5)
        log.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step, train, validation", [(0, [], []), (2, [0, 1, 2], [2])])
def test_a_log_drops_the_events_after_the_step_it_resumes_from(tmp_path, step, train, validation):
    with EventLog(tmp_path, validation=True) as log:
        write_note(log)
        for number in (1, 2, 3):
            log.write_step(number, 0.5, {}, 0.5, 0.5)
        for number in (2, 4):
            with log.writing("validation", number):
                tf.summary.scalar("accuracy", 0.5)
    EventLog(tmp_path, step, validation=True).__exit__()
    steps = {"train": set(), "validation": set()}
    for (run, _), values in events(tmp_path).items():
        steps[run] |= {number for number, _ in values}
    assert steps == {"train": set(train), "validation": set(validation)}


def test_settings_are_written_as_text_where_they_are_no_numbers_and_without_the_data(tmp_path):
    for _ in range(2):  # the second file replaces the first
        write_settings(tmp_path, {"rate": 0.5, "units": (3, 4), "name": "x", "data": "digest"})
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents.") and file.name.endswith(".hparams")
    content = file.read_bytes()
    assert b"(3, 4)" in content and b"rate" in content and b"name" in content
    assert b"digest" not in content


def test_replaced_events_are_those_of_the_same_name_and_no_others(tmp_path):
    for name, value in ("tweaks", 1.0), ("evaluation", 2.0), ("tweaks", 3.0):
        with replacing_events(tmp_path / "test", name, 7):
            tf.summary.scalar(name, value)
    expected = {("test", "tweaks"): [(7, 3.0)], ("test", "evaluation"): [(7, 2.0)]}
    assert events(tmp_path) == expected
    with pytest.raises(Crash), replacing_events(tmp_path / "test", "tweaks", 8):
        raise Crash
    assert events(tmp_path)["test", "tweaks"] == [(7, 3.0)]  # what was there is not lost


def test_the_scalars_read_back_are_those_of_tensorboards_reader(finished_run):
    folder = finished_run.folder / "logs"
    for run in ("train", "validation"):
        scalars, _ = read_scalars(folder / run)
        expected = {tag: value for (name, tag), value in events(folder).items() if name == run}
        assert set(scalars) == {*SCALARS, *(["learning_rate"] if run == "train" else [])}
        for tag, (steps, values) in scalars.items():
            assert list(zip(steps, values, strict=True)) == expected[tag]
    assert read_scalars(folder / "nowhere") == ({}, 0.0)


def test_scalars_are_read_up_to_the_last_step_and_with_it(tmp_path):
    write_events(tmp_path / "events.out.tfevents.1.v2", [1, 2, 3], [100, 101, 103])
    write_events(tmp_path / "events.out.tfevents.2.v2", [4, 5, 6], [500, 502, 507])
    for last_step, seconds in (2, 1), (3, 3), (4, 3), (5, 5), (6, 10), (100, 10):
        steps = tuple(range(1, min(last_step, 6) + 1))
        values = tuple(10.0 * step for step in steps)
        assert read_scalars(tmp_path, last_step) == ({"value": (steps, values)}, seconds)
    assert read_scalars(tmp_path, 0) == ({}, 0)


def test_pictures_and_texts_are_no_scalars(tmp_path):
    with EventLog(tmp_path) as log:
        write_note(log)
        with log.writing("train", 1):
            tf.summary.image("picture", np.zeros((1, 2, 2, 3), np.uint8))
    assert read_scalars(tmp_path / "train")[0] == {}


def test_training_time_is_that_of_every_start_without_the_pauses_between(tmp_path):
    write_events(tmp_path / "events.out.tfevents.1.v2", [0, 0, 0], [100, 101.5, 103])
    write_events(tmp_path / "events.out.tfevents.2.v2", [0, 0], [500, 500.25])
    assert read_scalars(tmp_path)[1] == 3.25


def test_cutting_keeps_the_last_step_and_leaves_files_alone_that_have_nothing_to_drop(tmp_path):
    early, late, last = (tmp_path / f"events.out.tfevents.{n}.v2" for n in (1, 2, 3))
    write_events(early, [1, 2])
    write_events(late, [3, 4, 5])
    write_events(last, [6, 7])
    (tmp_path / ".events.out.tfevents.2.v2").write_bytes(b"left by a kill")
    before = early.stat().st_mtime_ns, early.read_bytes()
    cut_events(tmp_path, 4)
    assert steps_in(early) == [1, 2] and steps_in(late) == [3, 4]
    assert (early.stat().st_mtime_ns, early.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [early, late]
    cut_events(tmp_path, 4)
    assert steps_in(late) == [3, 4]
    cut_events(tmp_path, -1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", [1, 7, 30])
def test_half_an_event_at_the_end_is_dropped_and_the_whole_ones_stay(tmp_path, lost):
    path = tmp_path / "events.out.tfevents.1.v2"
    write_events(path, [1, 2, 3])
    os.truncate(path, path.stat().st_size - lost)
    cut_events(tmp_path, 100)
    assert steps_in(path) == [1, 2]


def test_a_kill_while_events_are_cut_loses_none_that_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "events.out.tfevents.1.v2"
    write_events(path, [1, 2, 3])

    def killed(source, target):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr("training.events.os.replace", killed)
        cut_events(tmp_path, 2)
    assert steps_in(path) == [1, 2, 3]
    cut_events(tmp_path, 2)
    assert steps_in(path) == [1, 2] and list(tmp_path.iterdir()) == [path]


def test_texts_and_settings_may_have_the_bytes_of_odd_file_names(tmp_path):
    odd = os.fsdecode(b"a\xff")
    with EventLog(tmp_path) as log:
        write_note(log, odd)
    write_settings(tmp_path, {"dataset": odd, "class_names": [odd]})
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert text.count(b"a\\udcff") >= 2
