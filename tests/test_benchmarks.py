"""The arithmetic of the benchmarks, and what their faults do; nothing is timed here."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faults
import faulty_server
import numpy as np
import pytest
import pytorch_baseline
import scaling_out
import speed
import timing

import download
import results

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "experiments")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# Run a script, then say whether it has imported TensorFlow.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("tensorflow" in sys.modules)
"""


def run_probe(path, *words):
    command = [sys.executable, "-c", PROBE, str(path), *words]
    return subprocess.run(command, capture_output=True, text=True)


# --- Command lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_what_it_does_without_tensorflow(path):
    done = run_probe(path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    *text, imported = done.stdout.splitlines()
    source = path.read_text()
    assert text[0] and f'"""{text[0]}' in source and imported == "False"
    usage = re.search(rf"^    python {path.parent.name}/{path.name}(.*)$", source, re.MULTILINE)
    shown = "\n".join(text[source.split('"""')[1].count("\n") :])
    for flag in re.findall(r"\[(--\w+=\d+)\]", usage[1]):  # with the defaults of the docstring
        assert f"  {flag} " in shown


def test_a_wrong_flag_of_a_benchmark_is_a_usage_error_without_tensorflow():
    done = run_probe(ROOT / "benchmarks" / "speed.py", "--rounds=0")
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == (
        "speed.py: flag --rounds=0: expected a whole number from 1 to 1,000,000,000; see --help\n"
    )


def test_a_terminal_that_lacks_a_character_gets_its_code():
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "table1.py"), "--rows=±"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 2 and done.stderr.startswith(b"table1.py: flag --rows=\\xb1: ")


def test_there_are_scripts_of_both_kinds():
    assert {"faults", "results", "speed", "table1"} <= {path.stem for path in SCRIPTS}


# --- The table of results -------------------------------------------------------------------------


def result(command, seed, wrong, minutes=10.4, date="2026-01-02"):
    return {
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
    assert results.rows(runs) == [
        ["`python main.py --train --test --epoch=3`", "0", "1,058 of 10,000", "10.58", "10",
         "2026-01-02"],
        ["`python main.py --train --test`", "0, 1, 2", "44, 42, 48 of 10,000", "0.447 ± 0.031",
         "10, 20", "2026-01-02, 2026-01-03"],
    ]  # fmt: skip


def test_the_table_is_made_from_the_files_in_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(result("main.py --train", 0, 50)))
    argv = ["results.py"]
    assert timing.run(argv, "Doc.", results.print_results, starts_tensorflow=False) == 0
    assert capsys.readouterr().out == (
        "| command | seeds | wrong | test error, % | minutes of training | date |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| `python main.py --train` | 0 | 50 of 10,000 | 0.50 | 10 | 2026-01-02 |\n\n"
        "a machine, Python 3.11, TensorFlow 2.21\n"
    )
    (tmp_path / "a.json").unlink()
    assert timing.run(argv, "Doc.", results.print_results, starts_tensorflow=False) == 1
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


def test_the_ratio_to_pytorch_is_the_median_of_the_ratios_within_a_round():
    pairs = np.array([[600.0, 100], [500, 200], [900, 300]])
    assert pytorch_baseline.row("step", pairs) == ["step", "600", "200", "3.00", "2.50 to 6.00"]


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
    assert scaling_out.row(2, double, single) == [
        2, "125", "0.80", "25", "20%", "0.0", "2.5e-01", "5.0e-01", "0.0e+00",
    ]  # fmt: skip
    assert scaling_out.row(1, single, single)[1:5] == ["100", "1.00", "0", "0%"]


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
    monkeypatch.setattr(faults.utils, "read_idx", lambda path: np.zeros(3, np.float32))
    assert faults.bad_readings(tmp_path, random.Random(0), 4) == (4, 4)

    def crash(path):
        raise ZeroDivisionError

    monkeypatch.setattr(faults.utils, "read_idx", crash)
    assert faults.bad_readings(tmp_path, random.Random(0), 4) == (4, 4)


def test_the_faults_of_the_download_server_are_all_known_to_it():
    for fault in (*faults.HARMLESS, *faults.HARMFUL):
        assert hasattr(faulty_server.Handler, f"answer_{fault}"), fault
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
        def function(folder, dice, *arguments):
            assert folder.is_dir()
            tried.append((name, arguments))
            return 3, lost

        return function

    monkeypatch.setattr(timing, "machine", lambda: "a machine")
    for name in ("kills_in_training", "kills_in_saving", "damaged_checkpoints", "bad_downloads",
                 "bad_readings", "bad_command_lines"):  # fmt: skip
        monkeypatch.setattr(faults, name, trial(name, 0))
    flags = SimpleNamespace(kills=10, save_kills=4, inputs=6, seed=0)
    assert faults.break_everything(flags) == 0
    assert "| mutated data files | 3 | 3 | 0 |" in capsys.readouterr().out
    assert tried[:3] == [
        ("kills_in_training", (faults.SMALL_RUN, 10)),
        ("kills_in_training", (faults.PAPER_RUN, 2)),
        ("kills_in_saving", (4,)),
    ]
    assert [parts[0] for name, parts in tried if name == "damaged_checkpoints"] == list(
        faults.DAMAGES
    )
    assert tried[-2:] == [("bad_readings", (3,)), ("bad_command_lines", (3,))]
    monkeypatch.setattr(faults, "bad_readings", trial("bad_readings", 1))
    assert faults.break_everything(flags) == 1
    assert "| mutated data files | 3 | 2 | 1 |" in capsys.readouterr().out
