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

import numpy as np
import pytest
import tensorflow as tf
from test_model import SCALARS, blobs, events, state, trainer_in

import model
from utils import Plan, UserError

ROOT = Path(__file__).parent.parent
# ---------------------------------------------------------------- replicas on logical CPUs


def train_on_replicas(count, folder):
    """In a process of its own: save what a training on so many logical CPUs computes, on 1 without a
    strategy.

    Batches of 6, the last of an epoch 3, so that a replica gets none; 63 images to test.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = model.choose_strategy("one" if count == 1 else "mirrored")
    assert strategy.num_replicas_in_sync == count and model.is_chief(strategy)
    data = blobs(21, overlap=True, seed=2)
    plan = Plan(*(np.arange(a.size).reshape(a.shape) for a in data.training_plan(0, 0)))
    plan = plan._replace(index=plan.index % 21)
    parts = [[value.numpy() for value in values] for batch in model.batches(
        data, plan, 6, 1, strategy) for values in zip(*map(strategy.experimental_local_results,
                                                           batch))]
    np.savez(folder / "parts.npz", **{
        name: np.concatenate([values[number][values[3] > 0] for values in parts])
        for number, name in enumerate(["digits", "shift", "labels", "weight"])})

    trainer = trainer_in(folder / "first", validation=False, strategy=strategy, batch_size=6)
    plan = trainer.data.training_plan(0, 0)
    batch = next(iter(model.batches(trainer.data, plan, 6, strategy=strategy)))
    metrics = trainer.train_step(batch).numpy()
    # After one step Adam's first moment is a tenth of the gradient.
    moments = {v.path.replace("/", "_"): 10 * v.numpy() for v in trainer.optimizer.variables
               if v.path.endswith("_momentum")}
    np.savez(folder / "first.npz", metrics=metrics, **moments)

    data = blobs(63, seed=2)
    compiled = model.compile_forward(trainer.model, data, False, strategy)
    np.savez(folder / "test.npz", **model.evaluate(compiled, data, data.evaluation_plan()))

    for epochs in 1, 3:  # the second goes on from what the first saved
        trainer = trainer_in(folder, n=21, strategy=strategy, batch_size=6)
        trainer.fit(epochs, save_steps=3)
    assert trainer.restored == 4
    np.savez(folder / "weights.npz", *state(trainer))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of what was trained without a strategy and on two replicas."""
    folders = {count: tmp_path_factory.mktemp(f"replicas{count}") for count in (1, 2)}
    code = ("import pathlib, sys; sys.path[:0] = sys.argv[3:]; import test_distribution as t; "
            "t.train_on_replicas(int(sys.argv[1]), pathlib.Path(sys.argv[2]))")
    children = [subprocess.Popen(
        [sys.executable, "-c", code, str(count), folder, ROOT, ROOT / "tests"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for count, folder in folders.items()]
    for child in children:
        out, _ = child.communicate(timeout=240)
        assert child.returncode == 0, out
    return folders


def test_every_number_of_replicas_sees_the_same_examples_in_the_same_order(trained):
    expected = np.load(trained[1] / "parts.npz")
    found = np.load(trained[2] / "parts.npz")
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])
    assert len(expected["labels"]) == 21 - 6
    np.testing.assert_allclose(expected["weight"][[0, -1]], [1 / 6, 1 / 3], rtol=1e-6)


def test_loss_and_gradients_of_the_first_step_do_not_depend_on_the_replicas(trained):
    one, several = (np.load(trained[count] / "first.npz") for count in (1, 2))
    assert set(one.files) == set(several.files) and len(one.files) == 10
    for name in one.files:
        largest = np.abs(one[name]).max()
        assert largest > 0
        np.testing.assert_allclose(several[name], one[name], rtol=0, atol=1e-6 * largest)


def test_a_training_on_replicas_ends_like_one_without_also_if_it_was_broken_off(trained):
    one, several = (np.load(trained[count] / "weights.npz") for count in (1, 2))
    for name in one.files:
        np.testing.assert_allclose(several[name], one[name], rtol=0,
                                   atol=2e-5 * np.abs(one[name]).max())
    expected, found = (events(trained[count] / "logs") for count in (1, 2))
    assert set(expected) == set(found)
    for run in ("train", "validation"):
        for name in SCALARS:
            np.testing.assert_allclose(found[run, name], expected[run, name], rtol=1e-4, atol=1e-6)


def test_an_evaluation_on_replicas_counts_every_example_once(trained):
    one, several = (np.load(trained[count] / "test.npz") for count in (1, 2))
    assert len(one["correct"]) == 63
    for name in one.files:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- several processes

SMALL = ["--n_conv=4", "--n_primary=2", "--digit_dim=4", "--train_size=120", "--batch_size=10",
         "--data_deformation", "--epoch=3", "--save_steps=5", "--jit=off", "--deterministic"]


def environment(config):
    there = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return there | {"TF_CONFIG": json.dumps(config)}


class Cluster:
    """Workers that are started with one command, on free ports of this machine."""

    def __init__(self, folder, count, *words, **different):
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        folder.mkdir(exist_ok=True)
        self.workers = []
        for index in range(count):
            config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
            more = different.get(f"worker{index}", [])
            self.workers.append(subprocess.Popen(
                [sys.executable, ROOT / "main.py", "--strategy=multi_worker",
                 f"--data_dir={ROOT / 'data'}", *words, *more], cwd=folder, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=environment(config)))

    def wait_for_checkpoint(self, folder):
        deadline = time.monotonic() + 120
        while not model.saved_steps(folder / "checkpoint/mnist"):
            assert time.monotonic() < deadline
            assert all(worker.poll() is None for worker in self.workers), self.ends()
            time.sleep(0.05)

    def ends(self, timeout=120):
        """Exit codes, output and errors of all workers."""
        try:
            said = [worker.communicate(timeout=timeout) for worker in self.workers]
        finally:
            for worker in self.workers:
                worker.kill()
        return [(worker.returncode, *texts) for worker, texts in zip(self.workers, said)]


def checkpoint(folder, step):
    """All arrays of a checkpoint."""
    reader = tf.train.load_checkpoint(str(folder / f"checkpoint/mnist/ckpt-{step}"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()
            if name.startswith(("weights", "optimizer"))}


def test_two_workers_whose_chief_is_killed_go_on_and_end_as_if_nothing_had_happened(tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cluster = Cluster(cut, 2, "--train", *SMALL)
    cluster.wait_for_checkpoint(cut)
    cluster.workers[0].kill()
    killed = time.monotonic()
    other = Cluster(whole, 2, "--train", *SMALL)
    (victim, *_), (code, _, said) = cluster.ends()
    assert time.monotonic() - killed < 60
    assert (code, victim) == (1, -signal.SIGKILL)
    assert said == ("main.py: another worker stopped or cannot be reached; start all workers again,"
                    " they go on from the last checkpoint\n")
    step = model.saved_steps(cut / "checkpoint/mnist")[0]
    assert step < 36
    for code, out, said in other.ends():
        assert (code, said) == (0, "")
    cluster = Cluster(cut, 2, "--train", "--test", *SMALL)
    (code, out, said), (code1, out1, said1) = cluster.ends()
    assert (code, said, code1, out1, said1) == (0, "", 0, out1, "")
    assert f"Going on from step {step} (" in out and "Trained to step 36" in out
    assert len(out1.splitlines()) == 1  # that it waited: only the chief speaks
    one, other = checkpoint(whole, 36), checkpoint(cut, 36)
    assert len(one) > 30 and all(np.array_equal(one[name], other[name]) for name in one)
    logged = [{name: value for name, value in events(folder / "logs/mnist").items()
               if name[0] == "train"} for folder in (cut, whole)]
    assert len(logged[0]) > 4 and logged[0] == logged[1]
    files = [sorted(path.name for path in (folder / "logs/mnist/train").iterdir())
             for folder in (cut, whole)]
    assert len(files[1]) == 1  # only the chief writes
    result = json.loads((cut / "logs/mnist/test.json").read_text())
    assert result["images"] == 10_000 and f"{result['wrong']} of 10000 wrong" in out

    # Another number of workers may go on, and a signal to any one stops all.
    cluster = Cluster(whole, 3, "--train", *SMALL, "--epoch=100")
    for line in cluster.workers[0].stdout:
        if line.startswith("Epoch"):
            break
    cluster.workers[1].send_signal(signal.SIGTERM)
    for code, _, said in cluster.ends():
        assert (code, said) == (143, "Stopped, and saved. To go on: the same command again.\n")
    assert 36 < model.saved_steps(whole / "checkpoint/mnist")[0] < 1200


def test_workers_with_different_flags_all_stop_before_they_train(tmp_path):
    cluster = Cluster(tmp_path, 2, "--train", *SMALL, worker1=["--learning_rate=0.01"])
    for code, _, said in cluster.ends():
        assert code == 1 and said.count("\n") == 1
        assert said.startswith("main.py: the workers were started with different flags or differe")
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "logs").exists()


GOOD = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}


@pytest.mark.parametrize("config", [
    None, "", "{", "[]", "3", json.dumps({"cluster": {}}), json.dumps(GOOD | {"task": None}),
    json.dumps(GOOD | {"task": {"type": "worker", "index": 2}}),
    json.dumps(GOOD | {"task": {"type": "worker", "index": "x"}}),
    json.dumps(GOOD | {"task": {"type": "ps", "index": 0}}),
    json.dumps({"cluster": {"worker": ["h:1"], "ps": ["h:2"]}, "task": {"type": "ps", "index": 0}}),
])
def test_a_tf_config_that_names_no_worker_is_refused_in_one_line(tmp_path, config, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match="TF_CONFIG does not say which worker.*expected JSON") as e:
        model.choose_strategy("multi_worker")
    assert "\n" not in str(e.value)


def test_a_worker_whose_others_do_not_come_ends_as_it_said(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import main; "
            "main.WORKERS_SECONDS = 3; main.main(sys.argv)")
    alone = subprocess.run(
        [sys.executable, "-c", code, "--train", "--strategy=multi_worker",
         f"--data_dir={ROOT / 'data'}"], cwd=tmp_path, text=True, capture_output=True, timeout=60,
        env=environment(GOOD), check=False)
    assert alone.returncode == 1
    assert alone.stderr == "" and alone.stdout == (
        "Waiting for the other workers of TF_CONFIG; if they do not all come, this one ends after "
        "0.05 minutes.\n")
    assert not list(tmp_path.iterdir())
