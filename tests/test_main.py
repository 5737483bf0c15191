import contextlib
import gzip
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from story import (
    QUICK,
    ROOT,
    SMALL,
    Story,
    assert_refused,
    files,
    load_all,
    run,
    save_checkpoint,
    save_exported,
    small_network,
)

import commands.data
import commands.devices
import commands.evaluate
import commands.export
import commands.pictures
import commands.predict
import commands.train
import commands.weights
import main
import model
import training.distribution
import utils
from capsnet_core import errors
from commands.devices import Devices
from inputs import datasets
from runtime import command_line, machine, messages, startup
from training.folders import claim, run_lock
from training.interrupt import Interrupted
from training.trainer import Trainer

pytest_plugins = ["story_fixtures"]

BOOLEANS = [
    *("train", "test", "reconstruction_test", "tweak_test", "pretrained", "multi_MNIST"),
    *("data_deformation", "validation_check", "restart", "deterministic", "none_of_the_above"),
]


# ---------------------------------------------------------------- help


def test_help_answers_without_importing_tensorflow():
    script = (
        "import runpy, sys\nsys.argv = ['main.py', '--help']\ntry:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    print(stop.code, 'tensorflow' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, text=True, capture_output=True
    )
    assert shown.stdout == main.help_text() + "\n0 False\n" and shown.stderr == ""


@pytest.mark.parametrize("word", ["--help", "-help", "-h"])
def test_help_is_shown_however_it_is_asked_for(tmp_path, word):
    result = run(tmp_path, "--train", word, "--nonsense")
    assert result == (0, main.help_text() + "\n", "")


def test_help_describes_every_flag_once_with_its_default_and_bounds():
    text = main.help_text()
    names = set(main.parse(["main.py"]))
    assert names >= {*BOOLEANS, "epoch", "logdir", "seed"} and len(names) > 30
    for name in names:
        assert len(re.findall(rf"^  --(?:\[no\])?{name}[ =\n]", text, re.MULTILINE)) == 1, name
    one_line = " ".join(text.split())
    for line in (
        "--[no]train train, or resume from the last checkpoint",
        "--batch_size=64 images per step, over all devices --learning_rate=0.001 ",
        "--learning_rate=0.001 initial learning rate (Adam) --decay_rate",
        "--routing_iterations=3 iterations of dynamic routing (1 to 100)",
        "--predict=PATTERN ",
        "--export=DIR write",
        "--logdir=logs folder for TensorBoard",
        "(default glorot)",
        "--strategy=auto|one|mirrored|multi_worker ",
        "--network=capsnet|cnn what to train",
        "--architecture=mnist|multi|affine|authors ",
        "--freeze=PARTS parts",
    ):
        assert line in one_line
    assert not re.search(r" $", text, re.MULTILINE)
    assert 80 < max(map(len, text.splitlines())) <= 100
    for example in ("--predict='my/*.png'", "--export=capsnet", "--dataset=photos"):
        assert re.search(rf"^  python main.py .*{re.escape(example)} ", text, re.MULTILINE)


def test_the_defaults_are_those_of_the_paper_and_of_the_recipe():
    values = main.parse(["main.py", "--train"])
    expected = {
        "epoch": 10,
        "batch_size": 64,
        "learning_rate": 0.001,
        "decay_rate": 0.7,
        "decay_steps": 1000,
        "reconstruction_weight": 0.0005,
        "averaging": 0.99,
        "initialization": "glorot",
        "recipe": "default",
        "seed": 0,
        "save_steps": 500,
        "n_conv": 256,
        "n_primary": 32,
        "primary_dim": 8,
        "digit_dim": 16,
        "routing_iterations": 3,
        "tweak_num": 5,
        "kernel_size": 9,
        "dataset": "mnist",
        "image_size": "",
        "initial_weights": "",
        "freeze": "",
        "network": "capsnet",
        "architecture": "mnist",
        "train_size": 0,
        "multi_test_pairs": 1,
        "multi_shift": 4,
        "variant": "paper",
        "conv": "auto",
        "jit": "auto",
        "strategy": "auto",
        "precision": "float32",
        "export": "",
        "predict": "",
        "data_dir": "data",
        "checkpoint_dir": "checkpoint",
        "val_checkpoint_dir": "val_checkpoint",
        "multi_checkpoint_dir": "multi_checkpoint",
        "sample_dir": "samples",
        "tweak_dir": "tweak",
        "logdir": "logs",
    }
    expected |= dict.fromkeys(BOOLEANS, False) | {"train": True}
    assert values.flag_values_dict() == expected


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_flag_is_switched_by_all_four_spellings(name):
    on = [f"--{name}", f"--{name}=True", f"--{name}=true"]
    off = [f"--no{name}", f"--{name}=False", f"--{name}=false"]
    needed = ["--train"] if name == "restart" else []
    for words, value in [([], False)] + [([w], True) for w in on] + [([w], False) for w in off]:
        assert getattr(main.parse(["main.py", *needed, *words]), name) is value


def changed_flags(*words):
    """Return the flags that more words change, with their values."""
    plain, other = main.parse(["main.py", "--train"]), main.parse(["main.py", "--train", *words])
    return {name: other[name].value for name in plain if plain[name].value != other[name].value}


AUTHORS = {
    "epoch": 640,
    "batch_size": 128,
    "decay_rate": 0.96,
    "decay_steps": 2000,
    # Halved and averaged over ten classes, the margin loss weighs 20 times less.
    "reconstruction_weight": 20 * 0.0005,
    "averaging": 0.0,
    "initialization": "authors",
    "variant": "authors",
    "data_deformation": True,
}
MULTI = {
    "epoch": 6,
    "batch_size": 32,
    "decay_steps": 1800,
    "reconstruction_weight": 0.005,
    "averaging": 0.998,
}


def test_the_recipe_of_the_authors_fills_in_only_the_flags_that_are_not_given():
    recipe = {"recipe": "authors"}
    assert changed_flags("--recipe=authors") == AUTHORS | recipe
    given = {"epoch": 10, "batch_size": 32, "initialization": "glorot"}
    words = [f"--{name}={value}" for name, value in given.items()]
    expected = {name: value for name, value in AUTHORS.items() if name not in given}
    assert changed_flags("--recipe=authors", *words) == expected | recipe | {"batch_size": 32}


def test_the_long_recipe_is_fifty_epochs_of_small_batches():
    assert changed_flags("--recipe=long", "--epoch=2") == {
        "recipe": "long",
        "epoch": 2,
        "batch_size": 32,
        "decay_rate": 0.9,
        "decay_steps": 60_000 // 32,  # once an epoch
        "averaging": 0.999,
        "data_deformation": True,
    }
    assert changed_flags("--recipe=long")["epoch"] == 50


def test_overlapping_digits_have_a_schedule_of_their_own_for_the_flags_that_are_not_given():
    pairs = {"multi_MNIST": True}
    assert changed_flags("--multi_MNIST") == MULTI | pairs
    expected = {name: value for name, value in MULTI.items() if name != "epoch"}
    assert changed_flags("--multi_MNIST", "--epoch=10") == expected | pairs
    both = changed_flags("--multi_MNIST", "--recipe=authors")
    theirs = {"decay_steps": 20000, "multi_shift": 6}
    assert both == AUTHORS | pairs | theirs | {"recipe": "authors"}
    given = changed_flags("--multi_MNIST", "--recipe=authors", "--multi_shift=3")
    assert given["multi_shift"] == 3
    for name, value in MULTI.items():
        assert f"--{name}={value}" in main.help_text()


def test_a_cnn_for_pairs_has_the_layers_of_section_6_and_no_reconstruction_loss():
    cnn = {"network": "cnn", "reconstruction_weight": 0.0}
    assert changed_flags("--network=cnn") == cnn
    pairs = changed_flags("--network=cnn", "--multi_MNIST")
    assert pairs == MULTI | cnn | {"multi_MNIST": True, "architecture": "multi"}
    assert changed_flags("--network=cnn", "--multi_MNIST", "--architecture=affine") == (
        pairs | {"architecture": "affine"}
    )


def test_without_a_mode_there_is_a_short_usage_and_exit_code_2(tmp_path):
    for words in [], ["--epoch=3"], ["--notrain", "--test=False"], ["--pretrained"]:
        result = run(tmp_path, *words)
        assert result.code == 2 and result.out == "" and 5 < result.err.count("\n") < 15
        for mode in (*main.MODES, "help"):
            assert f"--{mode}" in result.err
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    "words, named",
    [
        (["--train", "--epochs=3"], "--epochs, did you mean --epoch?"),
        (["--train", "--multi_shift=3"], "--multi_MNIST"),
        (["--train", "--multi_MNIST", "--multi_shift=9"], "0 to 8"),
        (["--train", "--multi_MNIST", "--recipe=long"], "--recipe=long"),
        (["--train", "--variant=x"], "variant"),
        (["--train", "--learning_rat", "0.1"], "did you mean --learning_rate?"),
        (["--train", "False"], "'False'"),
        (["train"], "'train', did you mean --train?"),
        (["--train", "--", "x"], "'x'"),
        (["--train=maybe"], "--train=maybe: expected True or False; see --help"),
        (["--train", "--epoch=ten"], "--epoch=ten: expected a whole number of at least 1; see"),
        (["--train", "--epoch=0x10"], "--epoch=0x10: expected a whole number of at least 1; see"),
        (["--train", "--epoch=1_0"], "--epoch=1_0: expected a whole number of at least 1; see"),
        (["--train", "--epoch=1000001"], "at most 1,000,000"),
        (["--notrain=True"], "train"),
        (["--train", "--epoch=0"], "--epoch=0"),
        (["--train", "--epoch=-1"], "--epoch=-1"),
        (["--train", "--epoch=1.5"], "1.5"),
        (["--train", "--epoch="], "epoch"),
        (["--train", "--epoch"], "epoch"),
        (["--train", "--batch_size=0"], "at least 1"),
        (["--train", "--learning_rate=nan"], "--learning_rate=nan"),
        (["--train", "--learning_rate=inf"], "--learning_rate=inf"),
        (["--train", "--learning_rate=0"], "--learning_rate=0"),
        (["--train", "--decay_rate=1.1"], "1.1"),
        (["--train", "--decay_rate=-inf"], "-inf"),
        (["--train", "--reconstruction_weight=nan"], "nan"),
        (["--train", "--averaging=1"], "--averaging=1"),
        (["--train", "--seed=-1"], "--seed=-1"),
        (["--train", "--seed=2147483648"], "--seed=2147483648"),
        (["--train", "--routing_iterations=0"], "1 to 100"),
        (["--train", "--routing_iterations=101"], "1 to 100"),
        (["--train", "--train_size=-5"], "--train_size=-5"),
        (["--train", "--dataset=cifar10"], "fashion_mnist"),
        (["--train", "--dataset="], "--dataset is empty"),
        (["--train", "--export="], "--export is empty"),
        (["--train", "--predict="], "--predict is empty"),
        (["--train", f"--logdir={os.fsdecode(b'x' + bytes([255]))}"], "is not in UTF-8"),
        (["--train", f"--export={os.fsdecode(b'x' + bytes([255]))}"], "is not in UTF-8"),
        (["--train", "--conv=fft"], "dft"),
        (["--train", "--logdir="], "--logdir is empty"),
        (["--train", "--logdir=./checkpoint"], "--checkpoint_dir and --logdir must differ"),
        (["--train", "--val_checkpoint_dir=logs"], "--val_checkpoint_dir and --logdir must"),
        (["--train", "--multi_MNIST", "--multi_checkpoint_dir=logs"], "must differ"),
        (["--test", "--restart"], "needs --train"),
        (["--restart"], "needs --train"),
        (["--test", "--multi_test_pairs=2"], "needs --multi_MNIST"),
        (["--train", "--multi_MNIST", "--multi_test_pairs=2"], "and --test"),
        (["--train", "--pretrained"], "cannot be combined with --train"),
        (["--train", "--pretrained"], "--initial_weights=pretrained/mnist"),
        (["--train", "--pretrained", "--multi_MNIST"], "pretrained/multi_mnist"),
        (["--test", "--initial_weights=a"], "needs --train"),
        (["--train", "--initial_weights=a", "--initialization=authors"], "give one of them"),
        (["--train", "--initial_weights="], "--initial_weights is empty"),
        (["--test", "--pretrained", "--validation_check"], "cannot be combined"),
        (["--train", "--validation_check", "--train_size=5"], "--train_size"),
        (["--train", "--é=\N{SNOWMAN}"], "é"),
        (["--flagfile=/nowhere/at/all"], "/nowhere/at/all"),
        (["--train", "--network=vgg"], "cnn"),
        (["--train", "--architecture=x"], "affine"),
        (["--train", "--freeze="], "--freeze is empty"),
        (["--test", "--freeze=conv1"], "needs --train"),
        (["--train", "--strategy=tpu"], "multi_worker"),
        (["--train", "--precision=float16"], "mixed_bfloat16"),
        pytest.param(
            ["--train", "--precision=mixed_bfloat16"],
            "expected --precision=float32",
            marks=pytest.mark.skipif(
                machine.multiplies_bfloat16(), reason="this machine can do it"
            ),
        ),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_with_exit_code_2(tmp_path, words, named):
    result = run(tmp_path, *words)
    assert_refused(result, 2, named)
    assert result.out == "" and files(tmp_path) == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--train", "--learning_rate=1e-9", "--decay_rate=1", "--averaging=0.99999"],
        ["--train", "--seed=2147483647", "--routing_iterations=100", "--train_size=0"],
        ["--train", "--validation_check", "--train_size=6"],
        ["--train", "--multi_checkpoint_dir=logs"],  # not used without --multi_MNIST
        ["--train", "--multi_MNIST", "--checkpoint_dir=logs"],
        ["--test", "--multi_MNIST", "--multi_test_pairs=1000"],
        ["--train", "--dataset=new.npz"],
        ["--test", "--pretrained", "--export=x"],
        ["--train", "--initial_weights=pretrained/mnist", "--recipe=long"],
    ],
)
def test_values_at_their_bounds_and_combinations_that_make_sense_are_accepted(words):
    main.parse(["main.py", *words])


def test_a_folder_of_images_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for name in (tmp_path / "mine", "~/mine"):
        assert main.parse(["main.py", f"--dataset={name}"]).dataset == f"{tmp_path}/mine"


@pytest.mark.parametrize(
    "flag, folder",
    [
        ("--nomulti_MNIST", "checkpoint/gone"),
        ("--multi_MNIST", "multi_checkpoint/multi_gone"),
        ("--validation_check", "val_checkpoint/gone"),
    ],
)
def test_a_folder_of_images_may_be_gone_once_there_are_weights(tmp_path, monkeypatch, flag, folder):
    monkeypatch.chdir(tmp_path)
    words = ["main.py", "--dataset=in/gone", "--predict=a.png", flag]
    with pytest.raises(errors.UsageError, match="--dataset=in/gone is unknown"):
        main.parse(words)
    Path(folder).mkdir(parents=True)
    assert main.parse(words).dataset == "in/gone"
    for mode in "train", "test":
        with pytest.raises(errors.UsageError, match="--dataset=in/gone is unknown"):
            main.parse([*words, f"--{mode}"])


# ---------------------------------------------------------------- dispatch and exit codes


def stub_modes(monkeypatch, chief=True):
    """Replace all modes; return what is called, and in which order."""
    calls = []

    def stub(name, result=None):
        def step(*args):
            calls.append(name)
            if name in (*main.MODES, "check_new"):
                print(f"printed by {name}")
            return result

        return step

    devices = Devices("strategy", chief, "direct", False, "float32")
    for module, name, result in (
        (commands.devices, "choose_devices", devices),
        (commands.data, "load_data", "data"),
        (commands.weights, "load", "weights"),
        (commands.weights, "check_data", None),
        (commands.weights, "find_exported", None),
        (commands.train, "train", None),
        (commands.evaluate, "test", None),
        (commands.pictures, "reconstruction_test", None),
        (commands.pictures, "tweak_test", None),
        (commands.export, "export", None),
        (commands.predict, "predict", None),
        (commands.predict, "matching_files", None),
        (commands.export, "check_new", None),
        (machine, "commit", None),
        (training.distribution, "barrier", None),
    ):
        monkeypatch.setattr(module, name, stub(name, result))
    return calls


def test_modes_run_in_their_order_after_what_can_be_refused_at_once(tmp_path, monkeypatch):
    calls = stub_modes(monkeypatch)
    words = ["--predict=x", "--export=y", "--tweak_test", "--reconstruction_test", "--test"]
    result = run(tmp_path, *words, "--train", "--initial_weights=z", "--logdir=a b")
    assert calls == [
        # The commit first: it may be another one after an hour of training.
        *("commit", "check_new", "matching_files", "find_exported", "choose_devices"),
        *("load_data", "train", "barrier", "load", "check_data"),
        *("test", "reconstruction_test", "tweak_test", "export", "predict", "barrier"),
    ]
    assert result.code == 0 and result.out.endswith("\nNext: tensorboard --logdir='a b'\n")


def test_only_the_modes_that_are_asked_for_run(tmp_path, monkeypatch):
    calls = stub_modes(monkeypatch)
    for mode in main.MODES:
        calls.clear()
        value = {"export": "=y", "predict": "=x"}.get(mode, "")
        result = run(tmp_path, f"--{mode}{value}")
        checks = {"export": ["check_new"], "predict": ["matching_files"]}.get(mode, [])
        steps = {
            "train": ["load_data", "train", "barrier"],
            "export": ["load", "export"],  # which need the weights alone
            "predict": ["load", "predict"],
        }.get(mode, ["load_data", "load", "check_data", mode])
        assert calls == ["commit", *checks, "choose_devices", *steps, "barrier"]
        assert ("tensorboard" in result.out) is (mode == "test")


def test_other_workers_than_the_chief_train_and_test_in_silence(tmp_path, monkeypatch):
    calls = stub_modes(monkeypatch, chief=False)
    words = ["--train", "--test", "--reconstruction_test", "--tweak_test", "--export=x"]
    result = run(tmp_path, *words)
    assert calls == [
        *("commit", "check_new", "choose_devices", "load_data", "train", "barrier"),
        *("load", "check_data", "test", "barrier"),
    ]
    assert result == (0, "printed by check_new\n", "")


@pytest.mark.parametrize(
    "words, quiet", [(["--test"], "2"), (["--test", "--strategy=multi_worker"], "3")]
)
def test_several_workers_say_less(tmp_path, monkeypatch, words, quiet):
    stub_modes(monkeypatch)
    asked = []

    def start_tensorflow(quiet):
        asked.append(quiet)
        return tf

    monkeypatch.setattr(startup, "start_tensorflow", start_tensorflow)
    assert run(tmp_path, *words).code == 0 and asked == [quiet]


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (Interrupted(2), 130, "Stopped, and saved. To resume: the same command again."),
        (Interrupted(15), 143, "Stopped, and saved. To resume: the same command again."),
        (errors.UsageError("wrong flag"), 2, "main.py: wrong flag"),
        (errors.UserError("wrong data"), 1, "main.py: wrong data"),
        (
            OSError(28, "No space left on device", "logs"),
            1,
            "main.py: logs: No space left on device; free some space, or choose a folder on "
            "another disk",
        ),
        (
            OSError(13, "Permission denied", "logs"),
            1,
            "main.py: logs: Permission denied; choose another folder, or make this one writable",
        ),
        (
            MemoryError(),
            1,
            "main.py: out of memory; try a smaller --batch_size or network",
        ),
        (
            tf.errors.ResourceExhaustedError(None, None, "OOM when allocating [Op:Conv2D]"),
            1,
            "main.py: out of memory; try a smaller --batch_size or network",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(tmp_path, monkeypatch, error, code, line):
    def fail(*arguments):
        raise error

    stub_modes(monkeypatch)
    monkeypatch.setattr(commands.data, "load_data", fail)
    assert run(tmp_path, "--train") == (code, "", f"{line}\n")


def test_after_a_restart_the_command_that_resumes_is_without_it(tmp_path, monkeypatch):
    def fail(*arguments):
        raise Interrupted(2)

    stub_modes(monkeypatch)
    monkeypatch.setattr(commands.train, "train", fail)
    line = "Stopped, and saved. To resume: the same command again, without --restart.\n"
    assert run(tmp_path, "--train", "--restart") == (130, "", line)


def test_an_error_of_the_program_itself_is_not_hidden(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    stub_modes(monkeypatch)
    monkeypatch.setattr(commands.data, "load_data", fail)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "--train")


def test_a_reader_of_the_output_may_go_away(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        [sys.executable, "main.py", "--help"],
        check=False,
        cwd=ROOT,
        env=environment,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_reader_of_what_a_mode_prints_may_go_away(monkeypatch, capsys, method):
    class Unread(io.StringIO):
        """An output without a reader, which a pipe notices when it writes its buffer."""

        def gone(self, *args):
            raise BrokenPipeError

    redirected = []
    stub_modes(monkeypatch)
    monkeypatch.setattr(Unread, method, Unread.gone)
    monkeypatch.setattr(os, "dup2", lambda source, target: redirected.append(target))
    with contextlib.redirect_stdout(Unread()):
        assert main.main(["main.py", "--train"]) == 1
    assert redirected.count(sys.__stdout__.fileno()) == 1 and capsys.readouterr().err == ""


def folder_of_images(folder, *names):
    """Write a data set of classes with these names; each has its bar elsewhere."""
    for split, count in (("train", 6), ("test", 2)):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            image = np.zeros((28, 28), np.uint8)
            image[5:20, 4 + 10 * number : 12 + 10 * number] = 255
            for copy in range(count):
                Image.fromarray(image).save(folder / split / name / f"{copy}.png")


TINY = ["--n_conv=4", "--n_primary=1", "--primary_dim=2", "--digit_dim=2", "--conv=direct"]
EXAMINE = ["--test", "--reconstruction_test", "--tweak_test", "--validation_check"]


def test_every_mode_works_with_any_name_of_folders_and_classes(tmp_path, monkeypatch):
    """Names could be patterns, or be none in the encoding of the terminal."""
    monkeypatch.chdir(tmp_path)
    name = "p[1]*?{a}\\"
    folder_of_images(tmp_path / name, "a[b]", "猫", os.fsdecode(b"\xff\n"))
    folders = ["checkpoint_dir", "val_checkpoint_dir", "sample_dir", "tweak_dir", "logdir"]
    words = ["--jit=off", "--batch_size=4", f"--dataset={name}"]
    words += [f"--{folder}={folder}{name}" for folder in folders]
    for epoch in (1, 2):
        training = ["--train", "--validation_check", f"--epoch={epoch}", *TINY]
        trained = run(tmp_path, *training, *words)
        assert trained.code == 0, trained
    assert "Resuming from step 4" in trained.out and "damaged" not in trained.out
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1251")
    predict = f"--predict={name}/test/a[b]/0.png"
    with contextlib.redirect_stdout(out):
        assert main.main(["main.py", *EXAMINE, f"--export=e{name}", predict, *words]) == 0
    out.flush()
    shown = out.buffer.getvalue()
    assert b"\nAccuracy per class: a[b] " in shown and b"%, \\u732b " in shown
    assert b"/test/a[b]/0.png (unchanged): " in shown
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{folder}{name}" for folder in folders),
        *(name, f"e{name}"),
    }
    assert (tmp_path / f"logdir{name}" / name / "test.json").exists()
    assert "a[b], 猫, \\xff\\n" in (tmp_path / f"e{name}/README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--predict=a", "--predict=b"], "--predict is given 2 times"),
        (["--train", "--epoch=1", "--seed=2", "--epoch=1"], "--epoch is given 2 times"),
        (["--train", "--train", "--notrain"], "--train is given 3 times"),
    ],
)
def test_a_flag_that_is_given_more_than_once_is_refused(capsys, words, problem):
    assert main.main(["main.py", *words]) == 2
    assert capsys.readouterr().err == f"main.py: {problem}, expected once, with one value\n"


def test_the_home_folder_is_written_as_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["dataset", "data_dir", "export", "predict", "sample_dir", "tweak_dir", "logdir"]
    names += ["checkpoint_dir", "val_checkpoint_dir", "multi_checkpoint_dir", "initial_weights"]
    values = main.parse(["main.py", "--train", *(f"--{name}=~/{name}.npz" for name in names)])
    for name in names:
        assert getattr(values, name) == f"{tmp_path}/{name}.npz"
    assert main.parse(["main.py", "--logdir=a~/b"]).logdir == "a~/b"


def test_help_is_printed_whatever_the_encoding_of_the_terminal(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(main, "__doc__", "9×9 \udcff")
    with contextlib.redirect_stdout(out):
        assert main.main(["main.py", "--help"]) == 0
    assert out.buffer.getvalue().startswith(b"9\\xd79 \xff\n")


# ---------------------------------------------------------------- advice


def small_images(folder, patch):
    part = datasets.load_dataset("mnist", None)
    small = part._replace(x_train=part.x_train[:, :16], x_test=part.x_test[:, :16])
    patch.setattr(datasets, "load_dataset", lambda *_, **__: small)


def damaged_checkpoint(folder, patch):
    save_checkpoint(folder / "checkpoint/mnist", small_network())
    for path in (folder / "checkpoint/mnist").glob("*.data*"):
        path.write_bytes(path.read_bytes()[:10])


def a_checkpoint_that_lacks_a_weight(folder, patch):
    network = small_network(decoder_units=(6,))
    save_checkpoint(folder / "checkpoint/mnist", network, shape=small_network().config.describe())


def weights_of_another_network(folder, patch):
    save_exported(folder / "export", small_network(decoder_units=(6,)))


def unfinished_run(folder, patch):
    save_checkpoint(folder / "checkpoint/mnist", small_network(), step=3, last_step=15)


def training_elsewhere(folder, patch):
    lock = run_lock([folder / "checkpoint/mnist"], print)
    lock.__enter__()
    patch.setattr(Story, "lock", lock, raising=False)  # held until the test ends


def taken_folder(folder, patch):
    (folder / "elsewhere").mkdir()
    claim(folder / "logs/mnist", folder / "elsewhere")


def not_a_number(folder, patch):
    build = model.build

    def spoiled(*args, **options):
        network = build(*args, **options)
        network.digits.W.assign(np.full(network.digits.W.shape, np.nan))
        return network

    patch.setattr(model, "build", spoiled)


def no_memory(folder, patch):
    def fail(*args, **options):
        raise MemoryError

    patch.setattr(Trainer, "fit", fail)


def nothing(folder, patch):
    pass


def none_included(folder, patch):
    patch.setattr(utils, "ROOT", folder)


def mixed_sizes(folder, patch):
    patch.setattr(datasets, "load_dataset", load_all)
    for number, (split, name) in enumerate(itertools.product(("train", "test"), "ab")):
        path = folder / "mixed" / split / name / "1.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (20, 20 + number)).save(path)


@pytest.mark.parametrize(
    "kind, prepare, words",
    [
        (errors.ImageSizesDiffer, mixed_sizes, ["--train", "--dataset=mixed"]),
        (errors.ImageTooSmall, small_images, ["--train"]),
        (errors.NoCheckpoint, nothing, ["--test"]),
        (errors.NoCheckpoint, nothing, ["--reconstruction_test"]),
        (errors.NoCheckpoint, nothing, ["--tweak_test", "--validation_check"]),
        (errors.DamagedCheckpoints, damaged_checkpoint, ["--test"]),
        (errors.DamagedCheckpoints, damaged_checkpoint, ["--train", "--validation_check"]),
        (errors.NetworkMismatch, a_checkpoint_that_lacks_a_weight, ["--test"]),
        (
            errors.PretrainedMismatch,
            weights_of_another_network,
            ["--train", "--initial_weights=export"],
        ),
        (errors.NoPretrainedWeights, none_included, ["--test", "--pretrained"]),
        (errors.RunMismatch, unfinished_run, ["--train"]),
        (errors.FolderInUse, training_elsewhere, ["--train"]),
        (errors.FolderTaken, taken_folder, ["--train"]),
        (errors.NotFinite, not_a_number, ["--train"]),
        (MemoryError, no_memory, ["--train"]),
    ],
)
def test_advice_follows_each_error_that_a_flag_can_help_against(
    tmp_path, few, monkeypatch, kind, prepare, words
):
    described = []
    describe = messages.describe_error

    def spy(error, *args):
        described.append(type(error))
        return describe(error, *args)

    monkeypatch.setattr(messages, "describe_error", spy)
    prepare(tmp_path, monkeypatch)
    settings = SMALL if "--train" in words else QUICK
    assert_refused(run(tmp_path, *settings, *words), 1, "; " + main.ADVICE[kind] + "\n")
    assert described == [kind]


def test_every_advice_is_for_an_error_of_that_test_and_names_flags_that_exist():
    (mark,) = test_advice_follows_each_error_that_a_flag_can_help_against.pytestmark
    assert {kind for kind, *_ in mark.args[1]} == main.ADVICE.keys()
    names = {name for name, *_ in main.ROWS}
    named = re.findall(r"--(\w+)", " ".join(main.ADVICE.values()))
    assert len(named) > 8 and set(named) <= names


def test_advice_for_files_of_a_data_set_is_to_download_it_to_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    advised = [
        ("data/a/file", "a", "run: python download.py a"),
        ("my data/a", "a", "run: python download.py a '--data_dir=my data'"),
        ("a.npz", None, "put a good copy in its place"),
    ]
    for place, name, expected in advised:
        assert (
            command_line.advice_for(errors.DataFileError(place, "bad", name), main.ADVICE)
            == expected
        )
    monkeypatch.chdir(tmp_path)
    there = errors.DataFileError(ROOT / "data/a/file", "bad", "a")
    expected = f"run: python {ROOT / 'download.py'} a --data_dir={ROOT / 'data'}"
    assert command_line.advice_for(there, main.ADVICE) == expected
    assert command_line.advice_for(errors.UserError("says it itself"), main.ADVICE) == ""


DOWNLOAD = ROOT / "download.py"


def test_missing_and_damaged_data_are_refused_naming_the_file_and_the_download(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets, "load_dataset", load_all)
    here = "--data_dir=data"
    missing = run(tmp_path, "--train", here)
    assert_refused(missing, 1, "train-images-idx3-ubyte.gz", f"; run: python {DOWNLOAD} mnist\n")
    missing = run(tmp_path, "--test", "--dataset=kmnist", here)
    assert_refused(missing, 1, f"python {DOWNLOAD} kmnist")
    folder, name = tmp_path / "data" / "mnist", "train-labels-idx1-ubyte.gz"
    shutil.copytree(ROOT / "data" / "mnist", folder)
    (folder / name).write_bytes(gzip.compress(gzip.decompress((folder / name).read_bytes())[:-1]))
    assert_refused(run(tmp_path, "--train"), 1, name, f"python {DOWNLOAD} mnist")


def test_a_refused_mode_writes_nothing(tmp_path, few):
    for mode in ("--test", "--reconstruction_test", "--tweak_test"):
        result = run(tmp_path, mode, *QUICK)
        assert_refused(result, 1, "no checkpoint in checkpoint/mnist", "--train")
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    "flag, words, below",
    [
        ("checkpoint_dir", ["--train"], ""),
        ("checkpoint_dir", ["--train"], "/below"),
        ("logdir", ["--train"], ""),
        ("logdir", ["--train"], "/below"),
        ("val_checkpoint_dir", ["--train", "--validation_check"], ""),
        ("multi_checkpoint_dir", ["--train", "--multi_MNIST"], "/below"),
        ("logdir", ["--test"], ""),
        ("sample_dir", ["--test"], ""),
        ("sample_dir", ["--reconstruction_test"], "/below"),
        ("tweak_dir", ["--tweak_test"], ""),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_refused_and_kept(tmp_path, few, flag, words, below):
    (tmp_path / "file").write_text("mine")
    if "--train" not in words:
        save_checkpoint(tmp_path / "checkpoint/mnist", small_network())
    settings = SMALL if "--train" in words else QUICK
    result = run(tmp_path, *words, *settings, f"--{flag}=file{below}")
    assert_refused(result, 1, "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- the documentation


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_usage_page_lists_every_flag_with_its_default():
    table = (ROOT / "docs" / "usage.md").read_text()
    for name, default, _, text in main.ROWS:
        shown = "off" if default is False else f"`{default}`" if default != "" else "none"
        assert f"| `--{name}` | {shown} | {text}" in table, name


def test_every_command_of_the_pages_is_one_that_is_accepted(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: True)  # their folders of images are examples
    text = "".join(page.read_text() for page in PAGES)
    words = re.findall(r"`?python main\.py ((?:--?[\w=./*'-]+ ?)+)", text)
    assert len(words) > 20
    for line in words:
        if "--help" not in line and "--strategy" not in line:
            main.parse(["main.py", *line.replace("'", "").split()])


def test_the_requirements_list_tensorboard_which_tensorflow_does_not_install():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[<>=~]", line)[0] for line in lines} >= {
        *("tensorflow", "tensorboard", "numpy", "scipy", "pillow", "matplotlib", "absl-py"),
        *("rich", "pytest"),
    }


def test_the_table_of_results_in_the_docs_is_the_one_made_from_the_results():
    shown = subprocess.run(
        [sys.executable, "benchmarks/results.py"],
        cwd=ROOT,
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    assert shown.count("\n") > 3 and shown in (ROOT / "docs" / "results.md").read_text()


def test_a_lack_of_memory_that_tensorflow_reports_gets_the_advice_for_a_lack_of_memory():
    short = tf.errors.ResourceExhaustedError(None, None, "Out of memory allocating 12 bytes")
    for error in short, MemoryError():
        assert command_line.advice_for(error, main.ADVICE) == main.ADVICE[MemoryError]
    full = tf.errors.ResourceExhaustedError(None, None, "a; No space left on device")
    assert command_line.advice_for(full, main.ADVICE) == ""
