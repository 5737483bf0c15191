"""Texts about the command line: lines of `--help`, what is wrong with it, what helps.

`main.py` and the scripts of experiments/ and benchmarks/ share them.
"""

import difflib
import re
import shlex
import textwrap
from pathlib import Path

from absl import flags

from capsnet.errors import DataFileError

WIDTH = 96  # columns of the help
COLUMN = 28  # where the descriptions of the flags begin
COMMON = 10_000  # the largest bound of whole numbers that is worth naming
SMALLEST = 0.001  # smaller bounds are named "above 0"
KINDS = {int: "a whole number", float: "a number"}


def help_lines(flag, text):
    """Describe a flag in lines of at most WIDTH columns.

    Args:
        flag: how it is written, for example "--epoch=10".
        text: what it sets.
    """
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


class NumberParser(flags.ArgumentParser):
    """Parses the value of a flag that is a number, and says what was expected if it is none.

    Args:
        kind: int or float.
    """

    def __init__(self, kind):
        self.syntactic_help = KINDS[kind]
        self._parser = flags.IntegerParser() if kind is int else flags.FloatParser()

    def parse(self, argument):
        """Return the number. Raise ValueError if the argument is none."""
        try:
            return self._parser.parse(argument)
        except (ValueError, TypeError):
            raise ValueError(f"expected {self.syntactic_help}") from None

    def flag_type(self):
        """Return the name of the type."""
        return self._parser.flag_type()


def expected_number(kind, low, high, value=None):
    """Say which numbers are expected, without bounds that nobody meets.

    Args:
        kind: int or float.
        low: the smallest number.
        high: the largest number.
        value: the number that was given, if any.
    """
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
    """Say in one line what absl found wrong with a command line.

    Args:
        error: flags.Error, or the ValueError of `--noflag=value`.
        names: names of all flags.
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


def advice_for(error, table, out_of_memory=False):
    """Return what the user can do against an error, "" if the error says so itself.

    Args:
        error: the error.
        table: dict of type of error to advice; an error without its own gets that of its base.
        out_of_memory: whether it says that memory is short.
    """
    if isinstance(error, DataFileError):
        if error.dataset is None:
            return "put a good copy in its place"
        return f"run: {download_command(error)}"
    kinds = (MemoryError,) if out_of_memory else type(error).__mro__
    return next((table[kind] for kind in kinds if kind in table), "")


def download_command(error):
    """Return the command that fetches the files of a DataFileError to where they were missed."""
    program, place = Path(__file__).resolve().with_name("download.py"), Path(error.place)
    folder = place if place.name == error.dataset else place.parent
    words = [program.name if program.parent == Path.cwd() else str(program), error.dataset]
    if folder.parent.resolve() != Path("data").resolve():  # the default of download.py
        words.append(f"--data_dir={folder.parent}")
    return shlex.join(["python", *words])


def parse_size(text):
    """Return the (H, W) that a text such as "32x48" says, None if it says none."""
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    return tuple(map(int, sides.groups())) if sides else None


def see_help(problem):
    """Return what to add to a problem: where the flags are listed, unless it ends in a question."""
    return "" if str(problem).endswith("?") else "; see --help"
