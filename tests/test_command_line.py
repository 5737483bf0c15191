import errno
import re
from pathlib import Path

import pytest
import tensorflow as tf
from absl import flags

import main
from capsnet_core import errors
from capsnet_core.errors import Interrupted, UsageError
from runtime import command_line
from runtime.command_line import Flag

DOWNLOAD = Path(__file__).parent.parent / "download.py"
NAMES = ["train", "test", "epoch", "learning_rate", "multi_MNIST", "multi_shift", "dataset"]


def test_a_description_is_wrapped_and_every_word_is_kept():
    text = "a text of --some_flags, " * 20
    for flag in ("--n=1", "--" + "x" * 24, "--" + "x" * 25):
        head, *others = command_line.help_lines(flag, text)
        assert max(map(len, [head, *others])) <= command_line.WIDTH
        assert (
            head.startswith(f"  {flag}") and " ".join([head, *others]).split()[1:] == text.split()
        )
        for line in others:
            assert re.match(rf" {{{command_line.COLUMN}}}\S", line)
        # A flag that would touch its description has a line of its own.
        assert (head == f"  {flag}") is (len(flag) + 4 > command_line.COLUMN)


@pytest.mark.parametrize(
    "kind, low, high, value, text",
    [
        (int, 1, 100, 0, "a whole number from 1 to 100"),
        (int, 1, 100, 101, "a whole number from 1 to 100"),
        (int, 0, 4096, -1, "a whole number from 0 to 4,096"),
        (int, 1, 10**9, 0, "a whole number of at least 1"),
        (int, 1, 10**9, 10**9 + 1, "a whole number of at most 1,000,000,000"),
        (int, 1, 10**9, None, "a whole number of at least 1"),
        (float, 1e-9, 10.0, float("nan"), "a number above 0, at most 10"),
        (float, 0.0, 1e6, -1.0, "a number of at least 0.0"),
        (float, 0.0, 0.99999, 1.0, "a number from 0.0 to 0.99999"),
    ],
)
def test_expected_numbers_have_the_bounds_that_somebody_may_meet(kind, low, high, value, text):
    assert command_line.expected_number(kind, low, high, value) == text


@pytest.mark.parametrize(
    "word, name",
    [
        ("train", "train"),
        ("-train", "train"),
        ("—train", "train"),
        ("trian", "train"),
        ("TEST", "test"),
        ("epochs", "epoch"),
        ("epoch=3", "epoch"),
        ("learning_rat", "learning_rate"),
        ("multi_mnist", "multi_MNIST"),
        ("lea", "learning_rate"),
        ("le", None),
        ("False", None),
        ("0.1", None),
        ("", None),
    ],
)
def test_the_nearest_flag_is_the_one_that_was_meant(word, name):
    assert command_line.nearest(word, NAMES) == name


def parse(*words):
    values = flags.FlagValues()
    for name, kind in (("epoch", int), ("rate", float)):
        parser = command_line.Parser(command_line.number(kind, 1, 10))
        flags.DEFINE(parser, name, kind(1), "", flag_values=values)
    flags.DEFINE_boolean("train", False, "", flag_values=values)
    flags.DEFINE_enum("conv", "dft", ["auto", "dft", "direct"], "", flag_values=values)
    values(["x", *words])
    return values


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--epoch=ten"], "--epoch=ten: expected a whole number from 1 to 10"),
        (["--epoch=1.5"], "--epoch=1.5: expected a whole number from 1 to 10"),
        (["--epoch="], "--epoch=: expected a whole number from 1 to 10"),
        (["--rate=a: b\n"], "--rate=a: b : expected a number from 1 to 10"),
        (["--train=maybe"], "--train=maybe: expected True or False"),
        (["--conv=fft"], "--conv=fft: expected auto, dft or direct"),
        (["--epoch"], "--epoch has no value, expected --epoch=VALUE"),
        (["--epochs=3"], "unknown flag --epochs, did you mean --epoch?"),
        (["--zzz"], "unknown flag --zzz"),
        (["--notrain=True"], "--notrain=True does not take an argument"),
        (
            ["--flagfile=/nowhere"],
            "Unable to open flagfile: [Errno 2] No such file or directory: '/nowhere'",
        ),
    ],
)
def test_what_is_wrong_with_a_command_line_is_said_in_one_line(words, problem):
    with pytest.raises((flags.Error, ValueError)) as caught:
        parse(*words)
    assert (
        command_line.describe_problem(caught.value, ["epoch", "rate", "train", "conv"]) == problem
    )


SCRIPT = [
    Flag("epoch", 1, command_line.number(int, 1, 10**6), ""),
    Flag("learning_rate", 0.1, command_line.number(float, 1e-9, 10), ""),
]


@pytest.mark.parametrize("parse", [main.parse, lambda argv: command_line.parse(argv, SCRIPT)])
def test_the_program_and_the_scripts_read_numbers_alike(parse):
    values = parse(["x.py", "--epoch", "16", "--learning_rate=1e-3"])
    assert (values.epoch, values.learning_rate) == (16, 0.001)
    for word in (
        *("--epoch=0x10", "--epoch=1_0", "--epoch=1.0", "--epoch=+1", "--epoch= 1", "--epoch=１"),
        *("--epoch=0", "--epoch=-1", "--epoch=nan", "--epoch=", "--epoch=1000001"),
        *("--learning_rate=1_0", "--learning_rate=nan", "--learning_rate=inf", "--learning_rate=x"),
        *("--learning_rate=0", "--learning_rate=0x1", "--learning_rate=１"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(word)}: expected a (whole )?number "):
            parse(["x.py", word])


@pytest.mark.parametrize("parse", [main.parse, lambda argv: command_line.parse(argv, SCRIPT)])
def test_a_flag_is_given_once(parse):
    with pytest.raises(UsageError, match="--epoch is given 2 times, expected once"):
        parse(["x.py", "--epoch=1", "--epoch=1"])


def test_a_question_is_not_followed_by_more():
    assert command_line.see_help("did you mean --train?") == ""
    assert command_line.see_help(ValueError("wrong")) == "; see --help"


# --- Scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, said",
    [
        (errors.UserError("bad luck"), 1, "x.py: bad luck"),
        (errors.FolderInUse("f"), 1, "x.py: another run is training in f; wait for it"),
        (errors.NoCheckpoint("f"), 1, "x.py: no checkpoint in f; train first"),
        (errors.DataFileError("f", "gone"), 1, "x.py: f: gone; put a good copy in its place"),
        (
            errors.DataFileError("data/mnist/f", "gone", "mnist"),
            1,
            f"x.py: data/mnist/f: gone; run: python {DOWNLOAD} mnist\n",
        ),
        (OSError(errno.EACCES, "denied", "f"), 1, "x.py: f: denied; choose another folder"),
        (MemoryError(), 1, "x.py: out of memory; "),
        (tf.errors.InternalError(None, None, "no\nluck"), 1, "x.py: no luck; "),
        (Interrupted(15), 143, "Stopped, and saved. To resume: the same command again."),
        (Interrupted(2), 130, "Stopped, and saved. To resume: the same command again."),
        (KeyboardInterrupt(), 130, "Stopped."),
    ],
)
def test_errors_are_one_line_and_an_exit_code(error, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where a download of the program goes to ./data

    def fail(flags):
        raise error

    advice = {errors.NoCheckpoint: "train first"}
    assert command_line.run_script(["a/x.py"], "Doc.", [], fail, advice) == code
    line = capsys.readouterr().err
    assert line.startswith(said) and line.count("\n") == 1


def test_a_fault_of_the_program_is_not_hidden():
    def fail(flags):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command_line.run_script(["x.py"], "Doc.", [], fail)


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_what_the_function_returns(result, code):
    values = []
    definitions = [Flag("n", 3, command_line.number(int, 1, 9), "a number")]

    def work(flags):
        values.append(flags.n)
        return result

    assert command_line.run_script(["x.py", "--n=4"], "Doc.", definitions, work) == code
    assert values == [4]


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_the_docstring_and_every_flag_with_its_default(word, capsys):
    def fail(flags):
        raise AssertionError

    definitions = [
        Flag("n", 3, command_line.number(int, 1, 9), "how many"),
        Flag("place", None, command_line.path_name, "where to"),
    ]
    assert command_line.run_script(["x.py", "--n=0", word], "What it does.", definitions, fail) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["What it does.", ""]
    assert [line.split() for line in lines[2:]] == [
        ["--n=3", "how", "many"],
        ["--place", "where", "to"],
    ]
