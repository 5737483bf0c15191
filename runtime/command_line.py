"""The command line: flags and their values, lines of `--help`, what is wrong, what helps.

`main.py` and the scripts of experiments/ and benchmarks/ share it.
"""

import difflib
import math
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags

from capsnet_core.errors import DataFileError, FolderInUse, Interrupted, UsageError
from runtime import machine, messages, startup, terminal
from utils import ROOT

WIDTH = 96  # columns of the help
COLUMN = 28  # where the descriptions of the flags begin
COMMON = 10_000  # the largest bound of whole numbers that is worth naming
SMALLEST = 0.001  # smaller bounds are named "above 0"
KINDS = {int: "a whole number", float: "a number"}
MOST = 10**9  # epochs, images and the like


# --- Values ---------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A flag of a script."""

    name: str
    default: object
    parse: Callable  # text -> value; raises ValueError with what was expected
    help: str


class Parser(flags.ArgumentParser):
    """What absl calls to parse the value of a flag, made of a function such as `Flag.parse`."""

    def __init__(self, parse):
        self.parse = parse


def number(kind, low, high):
    """Return a parser of numbers of a type, int or float, from `low` to `high`."""

    def parse(text):
        plain = str(text)
        # What int() and float() take besides, such as 1_000, is no number here.
        usual = plain.isdecimal() if kind is int else "_" not in plain
        try:
            value = kind(text) if usual and plain.isascii() else math.nan
        except ValueError:
            value = math.nan  # which is within no bounds
        if not low <= value <= high:
            raise ValueError("expected " + expected_number(kind, low, high, value))
        return value

    return parse


def one_of(names):
    """Return a parser of one of these names."""

    def parse(text):
        if text not in names:
            raise ValueError(f"{text!r}, expected {', '.join(names)}")
        return text

    return parse


def distinct(parse_word):
    """Return a parser of a list of different values, with commas between them."""

    def parse(text):
        values = [parse_word(word) for word in text.split(",")]
        if len(set(values)) < len(values):
            raise ValueError("expected each of them only once")
        return values

    return parse


def path_name(text):
    """Parse the name of a file or folder."""
    if not text:
        raise ValueError("expected a name")
    return os.path.expanduser(text)


def parse_size(text):
    """Return the (H, W) that a text such as "32x48" says, None if it says none."""
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    return tuple(map(int, sides.groups())) if sides else None


def define_flag(values, name, default, bounds, text):
    """Define a flag whose type is that of its default."""
    if isinstance(default, bool):
        flags.DEFINE_boolean(name, default, text, flag_values=values)
    elif isinstance(default, str) and bounds:
        flags.DEFINE_enum(name, default, bounds, text, flag_values=values)
    elif isinstance(default, str):
        flags.DEFINE_string(name, default, text, flag_values=values)
    else:
        parser = Parser(number(type(default), *bounds))
        serializer = flags.ArgumentSerializer()
        flags.DEFINE(parser, name, default, text, flag_values=values, serializer=serializer)


# --- Help and problems ----------------------------------------------------------------------------


def help_lines(flag, text):
    """Describe in lines of at most WIDTH columns what a flag, written as "--epoch=10", sets."""
    head = f"  {flag}"
    # The flag is alone on its line if two spaces no longer fit between it and its description.
    alone = len(head) > COLUMN - 2
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * COLUMN if alone else f"{head:<{COLUMN}}",
        subsequent_indent=" " * COLUMN,
        break_on_hyphens=False,
    )
    return [head, *lines] if alone else lines


def describe_flag(name, default, bounds, empty):
    """Return how to write a flag, and a note on its default or on bounds that one may meet.

    `bounds` are (lowest, highest) number, or the choices of a text, or None; `empty` is a dict of
    flag to what is shown for an empty default.
    """
    if isinstance(default, bool):
        return f"--[no]{name}", ""
    if isinstance(default, str):
        if bounds:
            note = "" if default == "default" else f" (default {default})"
            return f"--{name}={'|'.join(bounds)}", note
        return f"--{name}={default or empty.get(name, 'TEXT')}", ""
    low, high = bounds
    common = isinstance(default, int) and high <= COMMON
    return f"--{name}={default}", f" ({low:,} to {high:,})" if common else ""


def expected_number(kind, low, high, value=None):
    """Say which numbers are expected instead of a value, without bounds that nobody meets."""
    if high > COMMON:
        if value is not None and value > high:
            return f"{KINDS[kind]} of at most {high:,.0f}"
        return f"{KINDS[kind]} of at least {low:,}"
    if kind is float and 0 < low < SMALLEST:
        return f"{KINDS[kind]} above 0, at most {high:g}"
    return f"{KINDS[kind]} from {low:,} to {high:,}"


def nearest(word, names):
    """Return the name of a flag that a mistyped word is close to, None if there is none."""
    plain = {name.lower(): name for name in names}
    word = word.lstrip("-–—").partition("=")[0].lower()
    if word in plain:
        return plain[word]
    begun = [name for name in sorted(plain) if len(word) > 2 and name.startswith(word)]
    found = begun or difflib.get_close_matches(word, plain, n=1, cutoff=0.7)
    return plain[found[0]] if found else None


def stray_word(word, names):
    """Say that a word of a command line is no flag, and which one may be meant."""
    meant = nearest(word, names)
    if meant:
        return f"unexpected argument {word!r}, did you mean --{meant}?"
    return (
        f"unexpected argument {word!r}, expected only flags: write --flag=value, and --noflag to "
        "switch one off"
    )


def describe_problem(error, names):
    """Say in one line what absl found wrong with a command line that has flags of these names.

    The error is a flags.Error, or the ValueError of `--noflag=value`.
    """
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        meant = nearest(error.flagname, names)
        return f"unknown flag --{error.flagname}" + (f", did you mean --{meant}?" if meant else "")
    if missing := re.fullmatch(r"Missing value for flag --(\w+)", text):
        return f"--{missing[1]} has no value, expected --{missing[1]}=VALUE"
    if isinstance(error, flags.IllegalFlagValueError):
        given, _, problem = str(error).removeprefix("flag ").rpartition(": ")
        if choices := re.fullmatch(r"value should be one of <(.*)>", problem):
            *others, last = choices[1].split("|")
            problem = f"expected {', '.join(others)} or {last}"
        elif "Non-boolean" in problem:
            problem = "expected True or False"
        return " ".join(f"{given}: {problem}".split())
    return text.removeprefix("ERROR:: ")


def advice_for(error, table):
    """Return what the user can do against an error, "" if the error says so itself.

    `table` is a dict of type of error to advice; an error without its own gets that of its base.
    """
    if isinstance(error, DataFileError):
        if error.dataset is None:
            return "put a good copy in its place"
        return f"run: {download_command(error)}"
    kinds = (MemoryError,) if messages.is_out_of_memory(error) else type(error).__mro__
    return next((table[kind] for kind in kinds if kind in table), "")


def download_command(error):
    """Return the command that fetches the files of a DataFileError to where they were missed."""
    program, place = ROOT / "download.py", Path(error.place)
    folder = place if place.name == error.dataset else place.parent
    words = [program.name if program.parent == Path.cwd() else str(program), error.dataset]
    if folder.parent.resolve() != Path("data").resolve():  # the default of download.py
        words.append(f"--data_dir={folder.parent}")
    return shlex.join(["python", *words])


def see_help(problem):
    """Return what to add to a problem: where the flags are listed, unless it ends in a question."""
    return "" if str(problem).endswith("?") else "; see --help"


# --- Scripts --------------------------------------------------------------------------------------


def parse(argv, definitions):
    """Return the values of the flags of a script. Raise UsageError if its command line is wrong."""
    values = flags.FlagValues()
    for flag in definitions:
        flags.DEFINE(Parser(flag.parse), flag.name, flag.default, flag.help, flag_values=values)
    names = [flag.name for flag in definitions]
    if stray := read_values(values, argv):
        problem = stray_word(stray[0], names)
        raise UsageError(problem + see_help(problem))
    return values


def help_text(doc, definitions):
    """Return the docstring of a script, then its flags with their defaults."""
    lines = [doc.strip(), ""]
    for flag in definitions:
        shown = f"--{flag.name}" if flag.default is None else f"--{flag.name}={flag.default}"
        lines += help_lines(shown, flag.help)
    return "\n".join(lines)


def run_script(argv, doc, definitions, function, advice=None, starts_tensorflow=True):
    """Parse a command line, call the function that does the work, and return the exit code.

    Args:
        argv: the command line; argv[0] is the program.
        doc: docstring of the script, for `--help`.
        definitions: list of Flag.
        function: takes the values of the flags; returns an exit code, None for 0.
        advice: dict of type of error to what the user can do, see `advice_for`.
        starts_tensorflow: whether the function needs TensorFlow.
    """

    def run():
        values = parse(argv, definitions)
        machine.commit()  # now: it may be another one after an hour of training
        if starts_tensorflow:
            startup.start_tensorflow()
        return function(values)

    advice = {FolderInUse: "wait for it"} | (advice or {})
    return run_program(argv, lambda: help_text(doc, definitions), run, advice)


# --- Programs -------------------------------------------------------------------------------------


def read_values(values, argv):
    """Read a command line into absl's values, and return the words that are no flags.

    Raise UsageError if a flag is unknown, given twice, or has a wrong value.
    """
    try:
        stray = values(argv)[1:]
    except (flags.Error, ValueError) as error:  # ValueError: --noflag=value
        problem = describe_problem(error, list(values))
        raise UsageError(problem + see_help(problem)) from None
    for name in values:  # all but the last of several would be ignored
        if values[name].present > 1:
            raise UsageError(
                f"--{name} is given {values[name].present} times, expected once, with one value"
            )
    return stray


def run_program(argv, help_text, function, advice):
    """Print the help, or call the function that does the work, and return the exit code.

    `help_text` returns the text of `--help`; for the others see `run_script`.
    """
    terminal.escape_unencodable_output()
    program = Path(argv[0]).name
    try:
        if any(word in ("--help", "-help", "-h") for word in argv[1:]):
            print(help_text(), flush=True)
            return 0
        code = function() or 0
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return code
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return 1
    except Interrupted as stop:
        without = ", without --restart" if "--restart" in argv else ""
        print(f"Stopped, and saved. To resume: the same command again{without}.", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        if not messages.is_expected(error):
            raise
        line = messages.describe_error(error, advice_for(error, advice))
        print(f"{program}: {line}", file=sys.stderr)
        return 1
