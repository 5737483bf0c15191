"""The command line of a script: flags with bounds, errors in one line, exit codes as main.py's.

Importing it makes the modules of the program importable, which are one folder up.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from capsnet import errors
from capsnet.errors import UsageError, UserError
from runtime import command_line, machine, messages, startup, terminal
from training.interrupt import Interrupted

MOST = 10**9  # epochs, images and the like


class Flag(NamedTuple):
    """A flag of a script."""

    name: str
    default: object
    parse: Callable  # text -> value; raises ValueError with what was expected
    help: str


def number(kind, low, high):
    """Return a parser of numbers of a type, int or float, from `low` to `high`."""

    def parse(text):
        try:
            plain = kind is float or str(text).isdecimal()  # int() takes "1_000" too
            value = kind(text) if plain else math.nan
        except ValueError:
            value = math.nan  # which is within no bounds
        if not low <= value <= high:
            raise ValueError("expected " + command_line.expected_number(kind, low, high, value))
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


DATA_DIR = Flag("data_dir", str(utils.ROOT / "data"), path_name, "folder of the data sets")


class _Parser(flags.ArgumentParser):
    """What absl calls to parse the value of a flag."""

    def __init__(self, parse):
        self.parse = parse


def parse(argv, definitions):
    """Return the values of the flags. Raise UsageError if the command line is wrong."""
    values = flags.FlagValues()
    for flag in definitions:
        flags.DEFINE(_Parser(flag.parse), flag.name, flag.default, flag.help, flag_values=values)
    names = [flag.name for flag in definitions]
    try:
        stray = values(argv)[1:]
    except (flags.Error, ValueError) as error:  # ValueError: --noflag=value
        raise UsageError(command_line.describe_problem(error, names)) from None
    if stray:
        raise UsageError(command_line.stray_word(stray[0], names))
    repeated = next((flag.name for flag in definitions if values[flag.name].present > 1), None)
    if repeated:
        raise UsageError(f"--{repeated} is given more than once, expected one value")
    return values


def help_text(doc, definitions):
    """Return the docstring of a script, then its flags with their defaults."""
    lines = [doc.strip()]
    for flag in definitions:
        shown = f"--{flag.name}" if flag.default is None else f"--{flag.name}={flag.default}"
        lines += command_line.help_lines(shown, flag.help)
    return "\n".join([lines[0], "", *lines[1:]])


def run_script(argv, doc, definitions, function, advice=None, starts_tensorflow=True):
    """Parse a command line, call the function that does the work, and return the exit code.

    Args:
        argv: the command line; argv[0] is the program.
        doc: docstring of the script, for `--help`.
        definitions: list of Flag.
        function: takes the values of the flags; returns an exit code, None for 0.
        advice: dict of type of error to what the user can do, see `command_line.advice_for`.
        starts_tensorflow: whether the function needs TensorFlow.
    """
    terminal.escape_unencodable_output()
    program = Path(argv[0]).name
    if any(word in ("--help", "-help", "-h") for word in argv[1:]):
        print(help_text(doc, definitions))
        return 0
    problems = (UserError, OSError, MemoryError)
    try:
        values = parse(argv, definitions)
        machine.commit()  # now: it may be another one after an hour of training
        if starts_tensorflow:
            problems += (startup.start_tensorflow().errors.OpError,)
        code = function(values) or 0
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return code
    except UsageError as error:
        print(f"{program}: {error}{command_line.see_help(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        return 1
    except problems as error:
        advice = {errors.FolderInUse: "wait for it"} | (advice or {})
        helps = command_line.advice_for(error, advice, messages.is_out_of_memory(error))
        line = messages.describe_error(error, helps)
        print(f"{program}: {line}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print("Stopped, and saved. To resume: the same command again.", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
