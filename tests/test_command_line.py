import re

import pytest
from absl import flags

from runtime import command_line

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
    serializer = flags.ArgumentSerializer()
    for name, kind in (("epoch", int), ("rate", float)):
        parser = command_line.NumberParser(kind)
        flags.DEFINE(parser, name, kind(1), "", flag_values=values, serializer=serializer)
    flags.DEFINE_boolean("train", False, "", flag_values=values)
    flags.DEFINE_enum("conv", "dft", ["auto", "dft", "direct"], "", flag_values=values)
    values(["x", *words])
    return values


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--epoch=ten"], "--epoch=ten: expected a whole number"),
        (["--epoch=1.5"], "--epoch=1.5: expected a whole number"),
        (["--epoch="], "--epoch=: expected a whole number"),
        (["--rate=a: b\n"], "--rate=a: b : expected a number"),
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


def test_numbers_are_parsed_and_written_as_absl_does():
    values = parse("--epoch=0x10", "--rate", "1e-3")
    assert (values.epoch, values.rate) == (16, 0.001)
    assert values["rate"].serialize() == "--rate=0.001" and values["epoch"].flag_type() == "int"


def test_a_question_is_not_followed_by_more():
    assert command_line.see_help("did you mean --train?") == ""
    assert command_line.see_help(ValueError("wrong")) == "; see --help"
