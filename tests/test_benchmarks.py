"""The arithmetic of the benchmarks, what they time, and what their faults do, on tiny networks."""

import dataclasses
import functools
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
import pytorch_baseline
import scaling
import scaling_out
import speed
from benchmark_lib import faulty_server, timing

import download
import results
from capsnet_core import errors
from inputs import pipeline
from runtime.command_line import run_script
from training.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent
SCRIPTS = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
# Run scripts one after the other, and say of each its exit code, what it printed, and whether
# TensorFlow is imported then.
PROBE = """
import contextlib, io, json, os, runpy, sys
answers = []
for path, *words in json.loads(sys.argv[1]):
    sys.argv = [path, *words]
    sys.path.insert(0, os.path.dirname(path))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            answers.append([end.code, out.getvalue(), err.getvalue(), "tensorflow" in sys.modules])
        else:
            answers.append([None, out.getvalue(), err.getvalue(), "tensorflow" in sys.modules])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers():
    """What each script answers to --help, and speed.py to a wrong flag, in one process."""
    lines = [[str(path), "--help"] for path in SCRIPTS]
    lines.append([str(ROOT / "benchmarks" / "speed.py"), "--rounds=0"])
    command = [sys.executable, "-c", PROBE, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {" ".join(line): each for line, each in zip(lines, json.loads(done.stdout), strict=True)}


# --- Command lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_does_without_tensorflow(answers, path):
    code, printed, complaint, imported = answers[f"{path} --help"]
    assert (code, complaint, imported) == (0, "", False)
    text, source = printed.splitlines(), path.read_text()
    assert text[0] and f'"""{text[0]}' in source
    usage = re.search(rf"^    python {path.parent.name}/{path.name}(.*)$", source, re.MULTILINE)
    shown = "\n".join(text[source.split('"""')[1].count("\n") :])
    for flag in re.findall(r"\[(--\w+=\d+)\]", usage[1]):  # with the defaults of the docstring
        assert f"  {flag} " in shown


def test_a_wrong_flag_of_a_benchmark_is_a_usage_error_without_tensorflow(answers):
    assert answers[f"{ROOT / 'benchmarks' / 'speed.py'} --rounds=0"] == [
        2,
        "",
        "speed.py: --rounds=0: expected a whole number of at least 1; see --help\n",
        False,
    ]


def test_a_terminal_that_lacks_a_character_gets_its_code():
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "table1.py"), "--rows=±"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 2 and done.stderr.startswith(b"table1.py: --rows=\\xb1: ")


def test_there_are_scripts_of_both_kinds():
    assert {"faults", "results", "speed", "table1"} <= {path.stem for path in SCRIPTS}


# --- The table of results -------------------------------------------------------------------------


def result(command, seed, wrong, minutes=10.4, date="2026-01-02", dataset="mnist"):
    return {
        "dataset": dataset,
        "command": command,
        "seed": seed,
        "wrong": wrong,
        "images": 10000,
        "error_percent": wrong / 100,
        "training_seconds": None if minutes is None else 60 * minutes,
        "date": f"{date}T03:04:05+00:00",
        "machine": "a machine",
        "versions": {"python": "3.11", "tensorflow": "2.21"},
    }


def test_runs_of_one_command_but_for_its_seed_are_a_row_with_mean_and_deviation():
    runs = [
        result("/tmp/a/main.py --train --test --seed=2", 2, 48, 20),
        result("main.py --train --test", 0, 44),
        result("./main.py --train --seed 1 --test", 1, 42, None, "2026-01-03"),
        result("main.py --train --test --epoch=3", 0, 1058),
    ]
    # Of 0.44, 0.42 and 0.48: mean 0.4467, deviations -0.0067, -0.0267 and 0.0333.
    assert [list(row.values()) for row in results.rows(runs)] == [
        ["`python main.py --train --test --epoch=3`", "0", "1,058 of 10,000", "10.58",
         "0.25 ± 0.005", "0.31", "10", "2026-01-02"],
        ["`python main.py --train --test`", "0, 1, 2", "44, 42, 48 of 10,000", "0.447 ± 0.031",
         "0.25 ± 0.005", "0.31", "10, –, 20", "2026-01-02, 2026-01-03"],
    ]  # fmt: skip


def test_mnist_comes_first_then_overlapping_digits_and_each_has_its_papers_figure():
    runs = [
        result("main.py --dataset=kmnist", 0, 900, dataset="kmnist"),
        result("main.py --multi_MNIST", 0, 1000, dataset="multi_mnist"),
        result("main.py --epoch=9", 0, 50),
        result("main.py --dataset=kmnist --multi_MNIST", 0, 7000, dataset="multi_kmnist"),
    ]
    rows = [list(row.values()) for row in results.rows(runs)]
    shown = [(row[0].split("main.py ")[1], row[4]) for row in rows]
    assert shown == [
        ("--epoch=9`", "0.25 ± 0.005"),
        ("--multi_MNIST`", "5.2"),
        ("--dataset=kmnist --multi_MNIST`", "–"),
        ("--dataset=kmnist`", "–"),
    ]


def test_the_table_is_made_from_the_files_in_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(result("main.py --train", 0, 50)))
    script = ["results.py"], "Doc.", [], results.print_results
    assert run_script(*script, starts_tensorflow=False) == 0
    assert capsys.readouterr().out == (
        "| command | seeds | wrong | test error, % | the paper, % | best replication, % | minutes "
        "of training | date |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n| `python "
        "main.py --train` | 0 | 50 of 10,000 | 0.50 | 0.25 ± 0.005 | 0.31 | 10 | 2026-01-02 |\n\n"
        "a machine, Python 3.11, TensorFlow 2.21\n"
    )
    (tmp_path / "a.json").unlink()
    assert run_script(*script, starts_tensorflow=False) == 1
    assert capsys.readouterr().err.startswith(f"results.py: no results in {tmp_path}")


# --- Times ----------------------------------------------------------------------------------------


def fake_clock(monkeypatch, seconds):
    """Let each call of the function returned take the next of some seconds."""
    now, durations = [0.0], iter(seconds)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work():
        now[0] += next(durations)

    return work


def test_a_time_is_the_median_without_the_first_call(monkeypatch):
    work = fake_clock(monkeypatch, [100, 3, 1, 2])
    assert timing.milliseconds(work, 3) == 2000
    work = fake_clock(monkeypatch, [100, 0.003, 0.001])
    assert timing.milliseconds(work, 2) == pytest.approx(2)


def test_the_gemm_peak_is_the_rate_of_the_fastest_product(monkeypatch):
    peak = timing.GemmPeak.__new__(timing.GemmPeak)
    peak.products = [(2000.0, "slow"), (2000.0, "fast"), (100.0, "small")]  # 2 GFLOP, 0.1 GFLOP
    monkeypatch.setattr(
        timing, "milliseconds", lambda call, repeats: {"slow": 20, "fast": 10, "small": 1}[call]
    )
    assert peak.measure() == 200  # GFLOP/s: 2 GFLOP in 10 ms


def test_the_ratios_of_speed_are_medians_of_ratios_within_a_round():
    train = {speed.LITERAL: np.array([800.0, 1000, 4000]), "fast": np.array([200.0, 200, 1000])}
    infer = {speed.LITERAL: np.array([300.0, 400, 500]), "fast": np.array([100.0, 100, 250])}
    floor = np.array([100.0, 300, 500])
    assert speed.row("fast", train, infer, floor, 64) == [
        "fast", "200", "320", "4.00", "0.50", "640", "3.00",
    ]  # fmt: skip


def test_pytorch_is_compared_at_its_plainest_its_best_in_float32_and_its_best():
    names = list(pytorch_baseline.PYTORCH)
    compiled, half = names[3], names[4]
    milliseconds = {
        pytorch_baseline.PLAIN: np.array([600.0, 500, 900]),
        compiled: np.array([300.0, 310, 350]),  # medians 310 and 300: not the first round decides
        half: np.array([400.0, 300, 290]),
        "this tool, float32": np.array([100.0, 200, 300]),
    }
    rivals = pytorch_baseline.rivals(milliseconds)
    assert list(rivals.values()) == [pytorch_baseline.PLAIN, compiled, half]
    rows = pytorch_baseline.rows("a step", milliseconds, dict.fromkeys(milliseconds, 1000.4))
    assert list(rows[0]) == ["a step", "ms", *rivals, "peak MB"]
    table = [list(row.values()) for row in rows]
    assert table[0] == [pytorch_baseline.PLAIN, "600", "1.00", "0.50", "0.60", "1000"]
    assert table[3] == ["this tool, float32", "200", "3.00", "1.55", "1.50", "1000"]


@pytest.mark.parametrize(
    "bfloat16, compiler, absent",
    [
        (True, True, []),
        (False, True, ["bfloat16"]),
        (True, False, ["compile"]),
        (False, False, ["bfloat16", "compile"]),
    ],
)
def test_what_a_machine_cannot_do_is_not_measured(bfloat16, compiler, absent):
    contestants = pytorch_baseline.contestants(bfloat16, compiler)
    expected = [
        name
        for name in (*pytorch_baseline.PYTORCH, *pytorch_baseline.THIS_TOOL)
        if not any(word in name for word in absent)
    ]
    assert list(contestants) == expected
    assert contestants[pytorch_baseline.PLAIN] == (pytorch_baseline.pytorch, ())
    assert contestants["this tool, float32"] == (pytorch_baseline.this_tool, "float32")


@pytest.mark.parametrize("present, found", [("g++", "/bin/g++"), ("clang++", "/bin/clang++")])
def test_a_compiler_is_found_by_its_name_or_by_the_environment(monkeypatch, present, found):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == present else None)
    monkeypatch.delenv("CXX", raising=False)
    assert pytorch_baseline.find_compiler() == found
    monkeypatch.setenv("CXX", "icpx")
    assert pytorch_baseline.find_compiler() == (found if present == "clang++" else None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert pytorch_baseline.find_compiler() == "/opt/icpx"


def test_the_machine_is_named_with_its_units_for_bfloat16(monkeypatch):
    monkeypatch.setattr(timing.machine, "describe_machine", lambda: "Fast (2 cores), no GPU")
    monkeypatch.setattr(timing.machine, "bfloat16_units", lambda: ["AVX512-BF16"])
    said = "Fast (2 cores), no GPU, without AMX, with AVX512-BF16, Python 3."
    assert timing.conditions().startswith(said)


def test_replicas_are_compared_with_one_in_units_of_each_arrays_largest_value():
    single = {
        "step": 100.0,
        "all-reduce": 1.0,
        "loss": np.array([2.0, -4.0]),
        "gradients": {"a": np.array([1.0, 0], np.float32), "b": np.array([100.0], np.float32)},
        "weights": {"a": np.array([5.0])},
    }
    double = single | {
        "step": 125.0,
        "all-reduce": 25.0,
        "loss": np.array([2.0, -3.0]),
        "gradients": {"a": np.array([1.0, 0.5], np.float32), "b": np.array([99.0], np.float32)},
    }
    # Two replicas send each gradient once: 3 float32.
    assert scaling_out.megabytes(single) == 12e-6
    assert list(scaling_out.row(2, double, single, 9).values()) == [
        2, "125", "0.80", "25", "20%", "0.0", "2.5e-01", "5.0e-01", "0.0e+00",
    ]  # fmt: skip
    alone = list(scaling_out.row(1, single, single, 9).values())
    assert alone[1:5] == ["100", "1.00", "0", "0%"]


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", faults.DAMAGES)
def test_damage_is_what_its_name_says(kind, tmp_path):
    content, lengths = bytes(range(50)), set()
    for seed in range(20):
        path = tmp_path / "file"
        path.write_bytes(content)
        faults.damage(path, kind, random.Random(seed))
        if kind == "removed":
            assert not path.exists()
            continue
        damaged = path.read_bytes()
        lengths.add(len(damaged))
        if kind == "truncated":
            assert len(damaged) < 50 and content.startswith(damaged)
        elif kind == "emptied":
            assert damaged == b""
        else:
            assert len(damaged) == 50
            assert sum(a != b for a, b in zip(content, damaged, strict=True)) == 1
    assert kind != "truncated" or len(lengths) > 5


def test_mutations_change_a_few_bytes_within_and_after_the_header():
    content = bytes(200)
    mutated = [faults.mutate(content, random.Random(seed)) for seed in range(60)]
    changed = [each for each in mutated if each != content]
    assert len(changed) > 40 and len({len(each) for each in mutated}) > 10
    first = [next((i for i, byte in enumerate(each) if byte), 200) for each in changed]
    assert min(first) < 12 and max(first) > 12
    assert faults.mutate(b"a", random.Random(0)) is not None  # however short


def test_damaged_data_files_are_counted_and_a_wrong_array_is_a_loss(tmp_path, monkeypatch):
    assert faults.bad_readings(tmp_path, random.Random(0), 40) == (40, 0)
    monkeypatch.setattr(faults.idx, "read_idx", lambda path: np.zeros(3, np.float32))
    assert faults.bad_readings(tmp_path, random.Random(0), 4) == (4, 4)

    def crash(path):
        raise ZeroDivisionError

    monkeypatch.setattr(faults.idx, "read_idx", crash)
    assert faults.bad_readings(tmp_path, random.Random(0), 4) == (4, 4)


def test_the_faults_of_the_download_server_are_all_known_to_it():
    for fault in (*faults.HARMLESS, *faults.HARMFUL):
        known = fault in faulty_server.ANSWERS
        assert known or hasattr(faulty_server.Handler, f"answer_{fault}"), fault
    assert not set(faults.HARMLESS) & set(faults.HARMFUL)


def test_a_bad_file_that_a_download_accepts_is_a_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "HARMLESS", ("ok", "wrong"))
    monkeypatch.setattr(faults, "HARMFUL", ("absent", "chunked"))
    mnist = download.DATASETS["mnist"]
    assert faults.bad_downloads(tmp_path, random.Random(0)) == (4, 2)  # wrong, chunked
    assert download.DATASETS["mnist"] is mnist


def test_the_labels_of_the_server_are_a_file_of_mnist():
    assert len(gzip.decompress(faulty_server.GOOD)) == 60008


def test_mutated_command_lines_have_the_flags_of_the_program_but_no_mode():
    done = faults.run_main(["--help"])
    names = faults.flag_names(done.stdout)
    assert {"dataset", "pretrained", "restart", "logdir", "epoch"} <= set(names)
    assert not {"train", "test", "export", "predict", "tweak_test"} & set(names)
    assert len(names) == len(set(names)) > 30
    lines = [faults.mutated_command_line(names, random.Random(seed)) for seed in range(300)]
    assert {len(line) for line in lines} == {1, 2, 3}
    words = [word for line in lines for word in line]
    known = [word for word in words if re.split("[= ]", word.lstrip("-"))[0] in names]
    assert 0.4 < len(known) / len(words) < 0.9
    modes = re.compile("--?(train|test|reconstruction_test|tweak_test|export|predict)(=|$)")
    assert not any(modes.match(word) for word in words)


@pytest.mark.parametrize(
    "code, stderr, refused",
    [
        (2, "main.py: --epoch=0 is out of bounds\n", True),
        (2, "Nothing to do: give one or more of --train.\nExamples:\n", True),
        (1, "main.py: --epoch=0 is out of bounds\n", False),
        (0, "", False),
        (2, "Traceback:\nTypeError\n", False),
    ],
)
def test_a_refusal_is_exit_code_2_and_one_line(code, stderr, refused):
    assert faults.is_refused(SimpleNamespace(returncode=code, stderr=stderr)) == refused


def test_the_exit_code_tells_whether_anything_was_lost(monkeypatch, capsys):
    tried = []

    def trial(name, lost):
        def function(folder, rng, **arguments):
            assert folder.is_dir()
            tried.append((name, arguments))
            return 3, lost

        return function

    monkeypatch.setattr(timing, "conditions", lambda: "a machine")
    for name in ("kills_in_training", "kills_in_saving", "damaged_checkpoints", "bad_downloads",
                 "bad_readings", "bad_command_lines"):  # fmt: skip
        monkeypatch.setattr(faults, name, trial(name, 0))
    flags = SimpleNamespace(kills=10, save_kills=4, inputs=6, seed=0)
    assert faults.break_everything(flags) == 0
    assert "| mutated data files | 3 | 3 | 0 |" in capsys.readouterr().out
    assert tried[:3] == [
        ("kills_in_training", {"flags": faults.SMALL_RUN, "kills": 10}),
        ("kills_in_training", {"flags": faults.PAPER_RUN, "kills": 2}),
        ("kills_in_saving", {"kills": 4}),
    ]
    kinds = [parts["kind"] for name, parts in tried if name == "damaged_checkpoints"]
    assert kinds == list(faults.DAMAGES)
    assert tried[-2:] == [("bad_readings", {"tries": 3}), ("bad_command_lines", {"tries": 3})]
    monkeypatch.setattr(faults, "bad_readings", trial("bad_readings", 1))
    assert faults.break_everything(flags) == 1
    assert "| mutated data files | 3 | 2 | 1 |" in capsys.readouterr().out


# --- What is measured -----------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Let the benchmarks build a tiny network in place of the paper's, and compile it without XLA.

    Returns:
        list of the argument `jit_compile` of each `tf.function`.
    """
    import tensorflow as tf

    import model

    sizes = {"n_conv": 4, "n_primary": 2, "primary_dim": 4, "digit_dim": 4, "decoder_units": (8,)}
    monkeypatch.setattr(model, "CapsNet", functools.partial(model.CapsNet, **sizes))
    function, compiled = tf.function, []

    def compile_plainly(*arguments, jit_compile=None, **more):
        compiled.append(jit_compile)
        return function(*arguments, **more)

    monkeypatch.setattr(tf, "function", compile_plainly)
    return compiled


def test_the_literal_layer_routes_as_the_fast_one():
    import ops

    rng = np.random.default_rng(0)
    u = rng.normal(size=(3, 7, 5)).astype(np.float32)
    fast, literal = ops.DigitCapsules(4, 6), speed.literal_layer()(4, 6)
    expected = fast(u)
    literal.build(u.shape)
    literal.W.assign(fast.W)
    np.testing.assert_allclose(literal(u), expected, atol=1e-6)


def test_every_call_that_is_timed_computes_what_its_name_says(tiny):
    train, infer, alone = speed.make_calls(3)
    assert tiny[-5:] == [True] * 5  # the stages: four layers and Adam
    assert set(train) == set(infer) == {speed.LITERAL, speed.DIRECT, speed.DEFAULT}
    for name in train:
        margin, reconstruction, accuracy = train[name]()
        assert margin > 0 and reconstruction > 0 and 0 <= accuracy <= 1
        lengths = infer[name]()
        assert lengths.shape == (3, 10) and (lengths > 0).all() and (lengths < 1).all()
    shapes = {name: [g.shape.as_list() for g in call()] for name, call in alone.items() if call()}
    assert shapes["conv1"] == [[9, 9, 1, 4], [4]]
    assert shapes["primary capsules"] == [[9, 9, 4, 8], [8], [3, 20, 20, 4]]
    assert shapes["digit capsules, routing"] == [[10, 72, 4, 4], [3, 72, 4]]
    assert "decoder" in shapes and "Adam" in alone


def test_inference_is_timed_on_the_shifted_digits_of_the_batch(tiny):
    trainer = timing.make_trainer(timing.load_digits(3), 3, conv="direct", jit=False)
    batch = timing.first_batch(trainer)
    lengths = timing.make_inference(trainer.network, batch, jit=False)()
    np.testing.assert_allclose(lengths, trainer.network.outputs(batch).lengths, atol=1e-6)


def test_products_are_timed_without_and_with_the_compiler(monkeypatch):
    import tensorflow as tf

    compiled = []
    monkeypatch.setattr(
        tf, "function", lambda f, jit_compile, autograph: compiled.append(jit_compile) or f
    )
    monkeypatch.setattr(tf.random, "normal", lambda shape: tf.fill((2, 2), float(shape[0])))
    peak = timing.GemmPeak()
    assert compiled == [False, True] * 3
    assert [mflop for mflop, _ in peak.products] == [
        2e-6 * n**3 for n in (1024,) * 2 + (2048,) * 2 + (4096,) * 2
    ]
    assert [float(call()[0, 0]) for _, call in peak.products] == [
        2 * n * n for n in (1024.0,) * 2 + (2048.0,) * 2 + (4096.0,) * 2
    ]


def test_digits_are_padded_to_larger_images_on_all_sides():
    small, large = timing.load_digits(2), timing.load_digits(2, 36)
    assert large.images.shape == (2, 36, 36, 1) and len(timing.load_digits().images) == 60_000
    np.testing.assert_array_equal(large.images[:, 4:-4, 4:-4], small.images)
    assert large.images.sum() == small.images.sum()


def test_a_step_is_measured_with_memory_and_parameters(tiny):
    import model

    milliseconds, megabytes, parameters = scaling.measure(2, 28, 1)
    assert milliseconds > 0 and 100 < megabytes < 50_000
    assert parameters == model.CapsNet((28, 28, 1), 10).count_params()


class InThisProcess:
    """An executor that runs what it is given at once."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*arguments))


def test_the_table_of_sizes_has_a_row_for_each(monkeypatch, capsys):
    monkeypatch.setattr(timing, "conditions", lambda: "a machine")
    monkeypatch.setattr(timing, "new_process", InThisProcess)
    monkeypatch.setattr(scaling, "measure", lambda batch, side, steps: (2.0 * batch, side, 5e6))
    scaling.measure_all(SimpleNamespace(steps=3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "| 16 | 28×28 | 5.0 M | 32 | 500 | 28 |"
    sizes = [(int(line.split()[1]), line.split()[3]) for line in lines[4:] if line]
    assert sizes == [*((n, "28×28") for n in (16, 32, 64, 128, 256)),
                     (64, "36×36"), (64, "48×48"), (64, "64×64")]  # fmt: skip


def test_one_replica_trains_as_the_trainer_does(tiny, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "set_logical_device_configuration", lambda *_: None)
    data = timing.load_digits(8)
    monkeypatch.setattr(timing, "load_digits", lambda: data)
    result = scaling_out.train(1, 2, 4)
    tf.keras.utils.set_random_seed(0)
    trainer = timing.make_trainer(data, 4)
    plan = data.training_plan(seed=0, epoch=0)
    first, second = pipeline.batches(data, plan, 4)
    with tf.GradientTape() as tape:
        outputs = trainer.network.outputs(first)
        terms = trainer.network.loss_terms(outputs)
        loss = tf.reduce_mean(trainer.config.total_loss(terms))
    gradients = tape.gradient(loss, [v.value for v in trainer.network.trainable_variables])
    margin = float(tf.reduce_mean(terms["margin"]))
    assert float(result["loss"][0]) == pytest.approx(margin, rel=1e-4)
    for actual, expected in zip(result["gradients"].values(), gradients, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    for batch in (first, second):
        trainer.train_step(batch)
    for variable in trainer.network.trainable_variables:
        np.testing.assert_allclose(result["weights"][variable.path], variable, atol=1e-4)
    assert result["step"] > 0 and result["all-reduce"] > 0
    variables = trainer.network.trainable_variables
    strategy = tf.distribute.get_strategy()
    assert scaling_out.all_reduce_alone(strategy, variables)() == len(variables)


def test_replicas_are_trained_in_processes_of_their_own_and_compared(monkeypatch, capsys):
    def train(replicas, steps, batch_size):
        assert (steps, batch_size) == (5, 8)
        gradients = {"a": np.array([1.0, replicas], np.float32)}
        return {"step": 100.0 * replicas, "all-reduce": 10.0, "loss": np.array([1.0]),
                "gradients": gradients, "weights": {"a": np.array([2.0])}}  # fmt: skip

    monkeypatch.setattr(timing, "conditions", lambda: "a machine")
    monkeypatch.setattr(timing, "new_process", InThisProcess)
    monkeypatch.setattr(scaling_out, "train", train)
    scaling_out.compare(SimpleNamespace(steps=5, batch_size=8))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a machine, batch 8, 5 steps"
    assert lines[4].startswith("| 1 | 100 | 1.00 | 0 | 0% | 0.0 | 0 | 0 | 0 |")
    assert lines[5].startswith("| 2 | 200 | 0.50 | 10 | 5% | 0.0 | 0.0e+00 | 1.0e+00 |")
    assert lines[6].startswith("| 4 | 400 | 0.25 | 10 | 2% |")


def test_without_pytorch_the_comparison_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match="PyTorch is not installed.*pip install torch"):
        pytorch_baseline.compare(SimpleNamespace(batch_size=1, rounds=1, steps=1))


class FakeProcess(InThisProcess):
    """An executor whose process is asked for times and memory, and answers by its own."""

    def __init__(self, initializer, arguments):
        _, setting, batch_size = arguments
        assert (initializer, batch_size) == (pytorch_baseline.prepare, 8)
        self.answers = {pytorch_baseline.measure: 100.0, timing.peak_megabytes: 700.0}
        if setting == "float32":
            self.answers[pytorch_baseline.measure] = 50.0

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: self.answers[function])


def test_all_contestants_take_turns_and_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(pytorch_baseline.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(timing, "conditions", lambda: "a machine")
    monkeypatch.setattr(timing, "new_process", FakeProcess)
    monkeypatch.setattr(pytorch_baseline.machine, "bfloat16_units", lambda: [])
    monkeypatch.setattr(pytorch_baseline, "find_compiler", lambda: None)
    pytorch_baseline.compare(SimpleNamespace(batch_size=8, rounds=2, steps=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a machine, PyTorch 9.9", "Batch 8, 2 rounds."]
    assert [line.split(" is not")[0] for line in lines[2:4]] == ["bfloat16", "torch.compile"]
    assert lines[5].startswith("| train step, with deformation, batch 8 | ms | × plain |")
    assert "| PyTorch, channels_last | 100 | 1.00 | 1.00 | 1.00 | 700 |" in lines
    assert lines.count("| this tool, float32 | 50 | 2.00 | 2.00 | 2.00 | 700 |") == 2


# --- Kills ----------------------------------------------------------------------------------------


def test_the_first_step_is_waited_for_and_no_longer():
    for line in ("Epoch 1/2 step 1/30: 5 images/s\n", "Resuming from step 7 (checkpoint).\n"):
        output = iter(["a\n", line, "later\n"])
        assert faults.wait_for_first_step(SimpleNamespace(stdout=output)) == "a\n" + line
        assert list(output) == ["later\n"]


# A training that counts its starts and needs three of them: it ends, or waits to be killed.
STAND_IN = """
import pathlib, sys, time
starts = pathlib.Path("starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
print("step 1/9" if number == 0 else "Resuming from step 3", flush=True)
time.sleep(0 if number == 2 else 60)
"""


def test_a_run_that_is_killed_is_started_again_until_it_ends(tmp_path, monkeypatch):
    def start(folder, flags):
        words = [sys.executable, "-c", STAND_IN]
        return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(faults, "start", start)
    kills, seconds = faults.train(tmp_path / "a", [], random.Random(0), 0.05)
    assert (kills, (tmp_path / "a/starts").read_text()) == (2, "xxx") and 0 <= seconds < 60


def test_all_kills_of_a_run_that_ends_differently_are_counted(tmp_path, monkeypatch):
    def train(folder, flags, rng=None, latest=0.0):
        folder.mkdir()
        assert latest == (8.0 if rng else 0.0)  # the time that the first run took
        return (2, 1.0) if rng else (0, 8.0)

    monkeypatch.setattr(faults, "train", train)
    fingerprints = iter(["same", "same", "same", "other", "same"])
    monkeypatch.setattr(faults, "fingerprint", lambda folder: next(fingerprints))
    assert faults.kills_in_training(tmp_path, random.Random(0), [], 5) == (6, 2)


@pytest.fixture(scope="module")
def few_digits():
    return timing.load_digits(32)


@pytest.fixture
def quick_digits(monkeypatch, few_digits):
    """The digits of `faults.small_trainer`, read once."""
    monkeypatch.setattr(timing, "load_digits", lambda count: few_digits)


def test_fingerprints_are_equal_for_equal_states_and_events_only(tmp_path, quick_digits):
    trainers = {name: faults.small_trainer(tmp_path / name) for name in ("a", "b")}
    hashes, events = {}, {}
    for name, trainer in trainers.items():
        trainer.fit(1 / 4, save_steps=1)
        hashes[name] = faults.hash_checkpoint(tmp_path / name / "checkpoint")
        events[name] = faults.hash_events(tmp_path / name / "logs")
    assert hashes["a"] != hashes["b"]  # the networks have other first weights
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert faults.hash_checkpoint(tmp_path / "copy/checkpoint") == hashes["a"]
    assert faults.hash_events(tmp_path / "copy/logs") == events["a"]
    trainers["a"].fit(2 / 4, save_steps=1)
    assert faults.hash_checkpoint(tmp_path / "a/checkpoint") != hashes["a"]
    assert faults.hash_events(tmp_path / "a/logs") != events["a"]


def test_a_checkpoint_older_than_the_last_save_is_a_loss(tmp_path, monkeypatch, quick_digits):
    """The stand-in for the killed process saves step 3 and says what the real one would."""
    trainer = faults.small_trainer(tmp_path / "small")

    def checkpoints_of(folder):
        state = dataclasses.replace(trainer.state)
        return Checkpoints(folder, trainer.network, trainer.optimizer, len(state.sums)), state

    def save(said, sums):
        def kill_while_saving(folder, rng):
            checkpoints, state = checkpoints_of(folder)
            state.step, state.sums = 3, np.full_like(state.sums, sums)
            checkpoints.save(state, {"step": 3})
            return said

        return kill_while_saving

    monkeypatch.setattr(faults, "paper_checkpoints", checkpoints_of)
    for number, (said, sums, lost) in enumerate([(3, 3, 0), (4, 3, 2), (3, 5, 2), (2, 3, 0)]):
        monkeypatch.setattr(faults, "kill_while_saving", save(said, sums))
        folder = tmp_path / str(number)
        folder.mkdir()
        assert faults.kills_in_saving(folder, random.Random(0), 2) == (2, lost)


def test_a_run_that_resumes_from_a_damaged_checkpoint_is_no_loss(tmp_path, quick_digits):
    assert faults.damaged_checkpoints(tmp_path, random.Random(1), "truncated", tries=1) == (1, 0)


def test_a_run_that_is_not_resumed_from_an_intact_checkpoint_is_a_loss(
    tmp_path, monkeypatch, quick_digits
):
    def destroy(path, kind, rng):
        for file in path.parent.glob("ckpt-*"):
            file.write_bytes(b"")

    monkeypatch.setattr(faults, "damage", destroy)
    assert faults.damaged_checkpoints(tmp_path, random.Random(0), "emptied", tries=1) == (1, 1)


def test_the_data_file_that_is_mutated_is_a_valid_one(tmp_path, monkeypatch):
    files = []

    def keep(content, rng):
        files.append(bytes(content))
        return bytearray(content)

    monkeypatch.setattr(faults, "mutate", keep)
    faults.bad_readings(tmp_path, random.Random(0), 20)
    for content in files:
        labels = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        assert int.from_bytes(labels[4:8], "big") == len(labels) - 8 == 1992
        assert labels[8:] == gzip.decompress(faulty_server.GOOD)[8:2000]


def test_a_new_server_has_answered_nothing():
    with faulty_server.serving() as server:
        assert (server.paths, server.flooded, server.over.is_set()) == ([], 0, False)
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
