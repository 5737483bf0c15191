"""What the user sees of a running program: lines that any terminal can print, and progress."""

import codecs
import datetime
import math
import sys
import time


def escape_unencodable_output():
    """Make both standard streams print any text, also where the terminal lacks a character."""
    codecs.register_error("escape_unprintable", _escape_unprintable)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="escape_unprintable")


def _escape_unprintable(error):
    """Encode the bytes of odd file names as they are; escape characters that the encoding lacks.

    An error may be about several characters, of both kinds. Only the first is dealt with.
    """
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte, see os.fsdecode
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode(), error.start + 1


class Display:
    """Progress of long work: a bar on a terminal, elsewhere a plain line every PLAIN_SECONDS."""

    PLAIN_SECONDS = 30

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", table_column=Column()),  # may wrap
            console=self.console,
        )
        self.task, self.started, self.last_printed = None, time.monotonic(), -math.inf

    def __enter__(self):
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.console.is_terminal:
            self.bar.stop()

    def report(self, text):
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def show_step(self, progress):
        """Show the Progress of a training run; the end of an epoch always gets a plain line."""
        speed = ""
        if progress.images_per_second is not None:
            left = datetime.timedelta(seconds=round(progress.seconds_left))
            speed = f"{progress.images_per_second:.0f} images/s, {left} left, "
        head = f"Epoch {progress.epoch}/{progress.epochs} step {progress.step}/{progress.last_step}"
        losses = "".join(
            f"{name.replace('_', ' ')} loss {format_loss(value)}, "
            for name, value in progress.losses.items()
        )
        text = f"{speed}{losses}accuracy {100 * progress.accuracy:.2f}%"
        end_of_epoch = progress.step * progress.epochs % progress.last_step == 0
        self._show(head, text, progress.step, progress.last_step, end_of_epoch)

    def show_count(self, what, done, total):
        """Show how many of `total` are done; without a terminal, short work prints nothing."""
        self.last_printed = max(self.last_printed, self.started)
        self._show(what, f"{done:,} of {total:,}", done, total)

    def _show(self, head, text, done, total, due=False):
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task(head, text=text, total=total)
            self.bar.update(self.task, description=head, text=text, completed=done, total=total)
        elif due or time.monotonic() - self.last_printed > self.PLAIN_SECONDS:
            self.last_printed = time.monotonic()
            print(f"{head}: {text}", flush=True)


def format_loss(value):
    """Return a loss with four decimals, or two from 1 on."""
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def report_written(paths):
    """Print which files were written."""
    print("Wrote " + ", ".join(str(path) for path in paths))


def plural(count, word):
    """Return a count with its noun, such as "1 epoch" or "2 epochs"."""
    shown = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{shown} {word}" if count == 1 else f"{shown} {word}s"
