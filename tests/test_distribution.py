"""Several replicas in one process, and several processes, against one device."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import story
import tensorflow as tf
from engine import SCALARS, blobs, events, folders_in, same, state, trainer_in

import training.evaluation
from capsnet_core.config import TrainingConfig
from capsnet_core.errors import UserError
from inputs.datasets import load_dataset
from inputs.pipeline import Plan, batches
from model import CapsNet
from training.checkpoints import saved_steps
from training.distribution import (
    all_equal,
    barrier,
    choose_strategy,
    count_workers,
    is_chief,
    sum_over_workers,
)
from training.evaluation import Evaluator
from training.trainer import Device, Run, Trainer

ROOT = Path(__file__).parent.parent

# --- Replicas on logical CPUs ---------------------------------------------------------------------


def save_batches(strategy, path):
    """Save the real examples of all batches but the first, replica after replica."""
    data = blobs(21, overlap=True, seed=2)
    plan = Plan(*(np.arange(a.size).reshape(a.shape) for a in data.training_plan(0, 0)))
    plan = plan._replace(index=plan.index % 21)
    parts = [
        [value.numpy() for value in values]
        for batch in batches(data, plan, 6, 1, strategy)
        for values in zip(*map(strategy.experimental_local_results, batch), strict=True)
    ]
    names = ["digits", "shift", "labels", "weight"]
    np.savez(
        path,
        **{
            name: np.concatenate([values[number][values[3] > 0] for values in parts])
            for number, name in enumerate(names)
        },
    )


def save_first_step_and_evaluation(strategy, folder):
    """Save what a capsule network computes: gradients of a step, then an evaluation."""
    data = blobs(45)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        net = CapsNet((8, 8, 1), 3, 5, 2, 3, 4, 2, 3, (6,), conv="dft")
        net.digits.W.assign(10 * net.digits.W)
    config = TrainingConfig(batch_size=6)
    run = Run(folders_in(folder / "first"))
    trainer = Trainer(net, data, config, run, device=Device(strategy, jit=False))
    batch = next(iter(batches(data, data.training_plan(0, 0), 6, strategy=strategy)))
    metrics = trainer.train_step(batch).numpy()
    # After one step Adam's first moment is a tenth of the gradient.
    moments = {
        v.path.replace("/", "_"): 10 * v.numpy()
        for v in trainer.optimizer.variables
        if v.path.endswith("_momentum")
    }
    np.savez(folder / "first.npz", metrics=metrics, **moments)

    data = blobs(63, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        # Of two replicas one gets 8 and the other 7 and a filler.
        patch.setattr(training.evaluation, "BATCH_SIZE", 15)
        evaluation = Evaluator(net, False, strategy).evaluate(data, data.evaluation_plan())
    arrays = evaluation._asdict()
    np.savez(folder / "test.npz", **arrays.pop("losses"), **arrays)


def train_on_two_replicas(folder):
    """In a process of its own: save what a training run on two logical CPUs computes."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = choose_strategy("mirrored")
    assert strategy.num_replicas_in_sync == 2 and is_chief(strategy)
    train_with(strategy, folder)


def train_with(strategy, folder):
    """Save what a training run with a strategy computes.

    The last batch of an epoch has 3 examples for 6 places, so one of two replicas gets none; 63
    images to evaluate.
    """
    save_batches(strategy, folder / "parts.npz")
    save_first_step_and_evaluation(strategy, folder)
    for epochs in 1, 3:  # the second resumes from what the first saved
        trainer = trainer_in(folder, n=21, strategy=strategy, batch_size=6)
        trainer.fit(epochs, save_steps=3)
    assert trainer.resumed_step == 4
    np.savez(folder / "weights.npz", *state(trainer))


def test_one_device_needs_no_strategy():
    assert not tf.config.list_logical_devices("GPU")
    for name in "auto", "one":
        assert choose_strategy(name) is tf.distribute.get_strategy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of what was trained without a strategy and on two replicas."""
    folders = {count: tmp_path_factory.mktemp(f"replicas{count}") for count in (1, 2)}
    code = (
        "import pathlib, sys; sys.path[:0] = sys.argv[2:]; import test_distribution as t; "
        "t.train_on_two_replicas(pathlib.Path(sys.argv[1]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, folders[2], ROOT, ROOT / "tests"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    train_with(choose_strategy("one"), folders[1])
    out, _ = child.communicate(timeout=240)
    assert child.returncode == 0, out
    return folders


def test_every_number_of_replicas_gets_the_same_examples_in_the_same_order(trained):
    expected = np.load(trained[1] / "parts.npz")
    actual = np.load(trained[2] / "parts.npz")
    for name in expected.files:
        np.testing.assert_array_equal(actual[name], expected[name])
    assert len(expected["labels"]) == 21 - 6
    np.testing.assert_allclose(expected["weight"][[0, -1]], [1 / 6, 1 / 3], rtol=1e-6)


def test_loss_and_gradients_of_the_first_step_do_not_depend_on_the_replicas(trained):
    one, several = (np.load(trained[count] / "first.npz") for count in (1, 2))
    assert set(one.files) == set(several.files) and len(one.files) == 10
    for name in one.files:
        largest = np.abs(one[name]).max()
        assert largest > 0
        np.testing.assert_allclose(several[name], one[name], rtol=0, atol=1e-6 * largest)


def test_a_run_on_replicas_that_was_resumed_ends_like_one_without_them(trained):
    one, several = (np.load(trained[count] / "weights.npz") for count in (1, 2))
    for name in one.files:
        limit = 2e-5 * np.abs(one[name]).max()
        np.testing.assert_allclose(several[name], one[name], rtol=0, atol=limit)
    expected, actual = (events(trained[count] / "logs") for count in (1, 2))
    assert set(expected) == set(actual)
    for run in ("train", "validation"):
        for name in SCALARS:
            np.testing.assert_allclose(actual[run, name], expected[run, name], rtol=1e-4, atol=1e-6)


def test_an_evaluation_on_replicas_counts_every_example_once(trained):
    one, several = (np.load(trained[count] / "test.npz") for count in (1, 2))
    assert len(one["correct"]) == 63 and {"margin", "reconstruction"} < set(one.files)
    for name in one.files:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-4, atol=1e-6)


# --- A worker that is not the chief ---------------------------------------------------------------


class Cluster(SimpleNamespace):
    """A resolver of a cluster, as `strategy.cluster_resolver`."""

    def cluster_spec(self):
        return tf.train.ClusterSpec(self.jobs)


def strategy_of(jobs, task_type, task_id):
    return SimpleNamespace(
        cluster_resolver=Cluster(jobs=jobs, task_type=task_type, task_id=task_id)
    )


WORKERS = {"worker": ["a:1", "b:1", "c:1"]}


@pytest.mark.parametrize(
    "jobs, task, chief, count",
    [
        (WORKERS, ("worker", 0), True, 3),
        (WORKERS, ("worker", 1), False, 3),
        (WORKERS | {"chief": ["d:1"]}, ("worker", 0), False, 4),
        (WORKERS | {"chief": ["d:1"]}, ("chief", 0), True, 4),
        ({}, ("", 0), True, 1),
    ],
)
def test_the_chief_is_the_task_of_that_name_or_else_the_first_worker(jobs, task, chief, count):
    strategy = strategy_of(jobs, *task)
    assert is_chief(strategy) is chief and count_workers(strategy) == count


def test_a_single_process_is_the_chief_and_agrees_with_itself():
    strategy = tf.distribute.get_strategy()
    assert is_chief(strategy) and count_workers(strategy) == 1
    assert sum_over_workers(strategy, 7) == 7 and all_equal(strategy, 7)
    barrier(strategy)


@pytest.fixture
def not_chief(monkeypatch):
    """Make Trainers think that another worker is the chief; return what it says in `resume`."""
    chief = SimpleNamespace(step=0, own_steps=[])

    def sum_steps(strategy, own):
        chief.own_steps.append(own)
        return own + chief.step

    for module in ("trainer", "resume"):
        monkeypatch.setattr(f"training.{module}.is_chief", lambda strategy: False)
    monkeypatch.setattr("training.resume.sum_over_workers", sum_steps)
    return chief


def test_a_worker_that_is_not_the_chief_computes_the_same_and_writes_nothing(
    tmp_path, finished_run, not_chief
):
    trainer = trainer_in(tmp_path, on_epoch_end=lambda epoch: tf.summary.scalar("drawn", epoch))
    assert trainer.fit(2, 5)
    assert same(state(trainer), finished_run.state) and trainer.state.best_loss < np.inf
    assert not list(tmp_path.iterdir())


def test_a_worker_resumes_from_the_step_that_the_chief_names(run_copy, finished_run, not_chief):
    def contents():
        return {path: path.stat().st_mtime_ns for path in run_copy.rglob("*")}

    before, not_chief.step = contents(), 10
    trainer = trainer_in(run_copy)
    assert trainer.fit(2, 5) and trainer.resumed_step == 10
    assert same(state(trainer), finished_run.state)
    not_chief.step = 12
    assert not trainer.fit(2, 5) and trainer.state.step == 12
    assert not_chief.own_steps == [0, 0]
    # It does not archive either.
    other = trainer_in(run_copy, seed=9)
    not_chief.step = 0
    assert other.fit(1 / 6, 500, restart=True) and other.resumed_step is None
    assert contents() == before


def test_a_worker_without_the_checkpoint_of_the_chief_says_that_the_disk_must_be_shared(
    run_copy, not_chief
):
    not_chief.step = 11
    with pytest.raises(UserError, match="does not hold the checkpoint of step 11.*disk"):
        trainer_in(run_copy).fit(2, 5)


def test_workers_look_for_signals_together_every_tenth_step(tmp_path, monkeypatch):
    trainer, asked = trainer_in(tmp_path), []

    def sum_signals(strategy, own):
        asked.append(own)
        return own + 1  # another worker got one

    monkeypatch.setattr("training.trainer.sum_over_workers", sum_signals)
    trainer.strategy = strategy_of(WORKERS, "worker", 1)
    stopping = []
    for step in range(1, 21):
        trainer.state.step = step
        stopping.append(trainer._stopping(SimpleNamespace(number=15 if step > 12 else None)))
    assert [step for step, stop in enumerate(stopping, 1) if stop] == [10, 20]
    assert asked == [0, 1]


# --- Several processes ----------------------------------------------------------------------------

SMALL = [
    "--n_conv=4",
    "--n_primary=2",
    "--digit_dim=4",
    "--train_size=120",
    "--batch_size=10",
    "--data_deformation",
    "--epoch=3",
    "--save_steps=5",
    "--jit=off",
    "--deterministic",
]


def environment(config):
    names = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return names | {"TF_CONFIG": json.dumps(config), "PYTHONPATH": str(ROOT)}


# Runs main.py, which notices a dead worker after seconds and not after a minute.
IMPATIENT = """
import functools, sys
import main
from runtime import startup
start_tensorflow = startup.start_tensorflow
def start(quiet):
    tf = start_tensorflow(quiet)
    from tensorflow.python.eager.context import Context
    Context.configure_coordination_service = functools.partialmethod(
        Context.configure_coordination_service, heartbeat_timeout_in_ms=10_000
    )
    return tf
startup.start_tensorflow = start
sys.exit(main.main([main.__file__, *sys.argv[1:]]))
"""


class Workers:
    """Workers that are started with one command, on free ports of this machine."""

    def __init__(self, folder, count, *words, program=(ROOT / "main.py",), **different):
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        folder.mkdir(exist_ok=True)
        self.processes = []
        for index in range(count):
            config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
            data = f"--data_dir={ROOT / 'data'}"
            more = different.get(f"worker{index}", [])
            self.processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, *program, "--strategy=multi_worker", data),
                        *story.last_values([*words, *more]),
                    ],
                    cwd=folder,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=environment(config),
                )
            )

    def wait_for_checkpoint(self, folder):
        deadline = time.monotonic() + 120
        while not saved_steps(folder / "checkpoint/mnist"):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), self.results()
            time.sleep(0.05)

    def results(self, timeout=300):
        """Exit codes, output and errors of all workers."""
        try:
            texts = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        codes = [process.returncode for process in self.processes]
        return [(code, *text) for code, text in zip(codes, texts, strict=True)]


def saved_variables(folder, step):
    """All weights and variables of the optimizer in a checkpoint."""
    reader = tf.train.load_checkpoint(str(folder / f"checkpoint/mnist/ckpt-{step}"))
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith(("weights", "optimizer"))
    }


def training_events(folder):
    logged = events(folder / "logs/mnist")
    return {name: value for name, value in logged.items() if name[0] == "train"}


def write_digits(path, n_train, n_test):
    """Write the first images of MNIST to a file of arrays."""
    digits = load_dataset("mnist", ROOT / "data")
    train, test = slice(n_train), slice(n_test)
    images = {"x_train": digits.x_train[train], "x_test": digits.x_test[test]}
    np.savez(path, **images, y_train=digits.y_train[train], y_test=digits.y_test[test])


def test_two_workers_whose_chief_is_killed_resume_and_end_as_if_nothing_had_happened(tmp_path):
    cut, whole, digits = tmp_path / "cut", tmp_path / "whole", tmp_path / "mnist.npz"
    write_digits(digits, 120, 400)
    settings = [*SMALL, f"--dataset={digits}"]
    workers = Workers(cut, 2, "--train", *settings, program=("-c", IMPATIENT))
    workers.wait_for_checkpoint(cut)
    workers.processes[0].kill()
    others = Workers(whole, 2, "--train", *settings)
    (victim, *_), (code, _, error) = workers.results()
    assert (code, victim) == (1, -signal.SIGKILL)
    assert error == (
        "main.py: another worker stopped or cannot be reached; start all workers again, they "
        "resume from the last checkpoint\n"
    )
    step = saved_steps(cut / "checkpoint/mnist")[0]
    assert step < 36
    for code, _, error in others.results():
        assert (code, error) == (0, "")
    (code, out, error), (code1, out1, error1) = Workers(
        cut, 2, "--train", "--test", *settings
    ).results()
    assert (code, error, code1, error1) == (0, "", 0, "")
    assert f"Resuming from step {step} (" in out and "Trained to step 36" in out
    assert len(out1.splitlines()) == 1  # that it waited: only the chief prints
    one, other = saved_variables(whole, 36), saved_variables(cut, 36)
    assert len(one) > 30 and all(np.array_equal(one[name], other[name]) for name in one)
    logged = training_events(cut), training_events(whole)
    assert len(logged[0]) > 4 and logged[0] == logged[1]
    assert len(list((whole / "logs/mnist/train").iterdir())) == 1  # only the chief writes
    result = json.loads((cut / "logs/mnist/test.json").read_text())
    assert result["images"] == 400 and f"{result['wrong']} of 400 wrong" in out
    # All workers tested the weights of the last step, as one process does.
    alone = story.run(cut, "--test", *settings, "--nodeterministic")
    assert alone.code == 0 and f", {result['wrong']} of 400 wrong" in alone.out

    # Another number of workers may resume, and a signal to any one stops all.
    workers = Workers(whole, 3, "--train", *settings, "--epoch=100")
    for line in workers.processes[0].stdout:
        if line.startswith("Epoch"):
            break
    workers.processes[1].send_signal(signal.SIGTERM)
    for code, _, error in workers.results():
        assert code == 143
        assert error == "Stopped, and saved. To resume: the same command again.\n"
    assert 36 < saved_steps(whole / "checkpoint/mnist")[0] < 1200


def test_workers_with_different_flags_all_stop_before_they_train(tmp_path):
    workers = Workers(tmp_path, 2, "--train", *SMALL, worker1=["--learning_rate=0.01"])
    for code, _, error in workers.results():
        assert code == 1 and error.count("\n") == 1
        assert error.startswith("main.py: the workers were started with different settings or dif")
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "logs").exists()


GOOD = {
    "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
    "task": {"type": "worker", "index": 0},
}


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "{",
        "[]",
        "3",
        json.dumps({"cluster": {}}),
        json.dumps(GOOD | {"task": None}),
        json.dumps(GOOD | {"task": {"type": "worker", "index": 2}}),
        json.dumps(GOOD | {"task": {"type": "worker", "index": "x"}}),
        json.dumps(GOOD | {"task": {"type": "ps", "index": 0}}),
        json.dumps(
            {"cluster": {"worker": ["h:1"], "ps": ["h:2"]}, "task": {"type": "ps", "index": 0}}
        ),
    ],
)
def test_a_tf_config_that_names_no_worker_is_refused_in_one_line(config, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG does not say which worker.*expected JSON") as e:
        choose_strategy("multi_worker")
    assert "\n" not in str(e.value)


def test_a_worker_whose_others_do_not_come_ends_after_the_time_that_it_printed(tmp_path):
    code = (
        "import main, sys; from runtime import startup; startup.WORKERS_SECONDS = 3; "
        "main.main(sys.argv)"
    )
    alone = subprocess.run(
        [
            *(sys.executable, "-c", code, "--train", "--strategy=multi_worker"),
            f"--data_dir={ROOT / 'data'}",
        ],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=240,
        env=environment(GOOD),
        check=False,
    )
    assert alone.returncode == 1
    assert alone.stderr == "" and alone.stdout.count("\n") == 1
    assert alone.stdout.startswith("Waiting for the other workers of TF_CONFIG")
    assert alone.stdout.endswith(" 0.05 minutes.\n")
    assert not list(tmp_path.iterdir())
