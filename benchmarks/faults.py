"""Break things on purpose and count what is lost: kills, damaged files, bad downloads, bad input.

    python benchmarks/faults.py [--kills=20] [--save_kills=20] [--inputs=400] [--seed=0]

Prints a table (tried, survived, lost); survived means that the run ended as if nothing had
happened, or that the fault was refused in one line and nothing was harmed. Exit code 1 if anything
was lost.
"""

import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
from benchmark_lib import faulty_server, timing

import download
from capsnet_core import config, errors
from inputs.readers import idx
from runtime import startup
from runtime.command_line import run_script

MAIN = timing.ROOT / "main.py"
SMALL_RUN = [
    "--n_conv=16",
    "--n_primary=4",
    "--train_size=1500",
    "--batch_size=16",
    "--epoch=2",
    "--save_steps=7",
    "--data_deformation",
    "--validation_check",
]
PAPER_RUN = ["--train_size=576", "--epoch=2", "--save_steps=2", "--data_deformation"]
DAMAGES = ("truncated", "with one byte changed", "emptied", "removed")
# Faults of the server that a download survives, and those that end it.
HARMLESS = ("ok", "recovering", "chunked")
HARMFUL = (
    "forbidden",
    "absent",
    "busy",
    "limited",
    "mute",
    "stall",
    "truncated",
    "open",
    "broken_chunks",
    "reset",
    "garbage",
    "wrong",
    "noise",
    "page",
    "loop",
    "file_redirect",
)
# Values of mutated flags.
VALUES = ("nan", "inf", "-1", "0", "1e999", "9" * 30, "0x10", "1.5", "true", "False", "None")
VALUES += ("", "x", "é", "-", "--", "a b", "%s", "../..")


# --- Kills in training ----------------------------------------------------------------------------


def start(folder, flags):
    """Start a training run in a folder and return its process."""
    return subprocess.Popen(
        [sys.executable, str(MAIN), "--train", f"--data_dir={timing.ROOT / 'data'}", *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_first_step(process):
    """Read the output of a training run up to its first step, or its resumption; return it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Resuming from step" in line or "step 1/" in line:
            break
    return "".join(lines)


def fingerprint(folder):
    """Return hashes of the state of a training run that finished in a folder, and of its events."""
    return hash_checkpoint(folder / "checkpoint" / "mnist"), hash_events(folder / "logs" / "mnist")


def hash_checkpoint(folder):
    """Return a hash of the newest checkpoint's weights, optimizer, sums, best loss and step."""
    import tensorflow as tf

    from training.checkpoints import saved_steps

    reader = tf.train.load_checkpoint(str(folder / f"ckpt-{saved_steps(folder)[0]}"))
    digest = hashlib.sha256()
    for name in sorted(reader.get_variable_to_shape_map()):
        if name.startswith(("weights/", "optimizer/", "sums/", "best/", "step/")):
            digest.update(name.encode() + np.asarray(reader.get_tensor(name)).tobytes())
    return digest.hexdigest()


def hash_events(folder):
    """Return a hash of all events: folder, tag, step and value."""
    import tensorflow as tf

    from training.events import event_files

    events = []
    for part in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        for _, records, _ in event_files(part):
            for event in map(tf.compat.v1.Event.FromString, records):
                events += [
                    (part.name, value.tag, event.step, value.tensor.SerializeToString())
                    for value in event.summary.value
                ]
    return hashlib.sha256(repr(sorted(events)).encode()).hexdigest()


def train(folder, flags, rng=None, latest=0.0):
    """Train in a new folder until a run ends by itself.

    Args:
        folder: to train in.
        flags: flags of the training run.
        rng: random.Random that draws when each run is killed; None kills none.
        latest: the latest moment of a kill, in seconds after the first step.

    Returns:
        Number of kills, and the seconds that the last run took from its first step to its end.
    """
    folder.mkdir()
    kills = 0
    while True:
        process = start(folder, flags)
        output, began = wait_for_first_step(process), time.monotonic()
        timer = threading.Timer(rng.uniform(0, latest) if rng else 0.0, process.kill)
        if rng:
            timer.start()
        output += process.stdout.read()
        timer.cancel()
        if process.wait() == 0:
            return kills, time.monotonic() - began
        if process.returncode != -signal.SIGKILL:
            raise errors.UserError(f"went wrong after {kills} kills: {output}")
        kills += 1


def kills_in_training(folder, rng, flags, kills):
    """Kill training runs at random moments after the first step, and compare how they end.

    Lost are all kills of a run that ended differently.
    """
    references = folder / "reference", folder / "again"
    seconds = [train(place, flags)[1] for place in references]
    reference, again = map(fingerprint, references)
    if again != reference:
        raise errors.UserError("two uninterrupted runs differ: no comparison is possible")
    done = lost = runs = 0
    while done < kills:
        place, runs = folder / f"killed_{runs}", runs + 1
        killed, _ = train(place, flags, rng, seconds[0])
        same = fingerprint(place) == reference
        done += killed
        lost += 0 if same else max(1, killed)  # any of the kills may be the cause
        end = "identical" if same else "DIFFERS"
        print(f"  run {runs}: {done} kills so far, end {end}", flush=True)
        shutil.rmtree(place)
    return done, lost


# --- Kills while saving ---------------------------------------------------------------------------


def paper_checkpoints(folder):
    """Return the Checkpoints of the paper's network in a folder, and a RunState of step 0."""
    from training.checkpoints import Checkpoints

    trainer = timing.make_trainer(timing.load_digits(1), batch_size=1)
    state = trainer.state
    return Checkpoints(folder, trainer.network, trainer.optimizer, len(state.sums)), state


def save_endlessly(folder, pipe):
    """Save a checkpoint again and again, and send the step after each; to be killed."""
    startup.start_tensorflow()
    from training.checkpoints import saved_steps

    checkpoints, state = paper_checkpoints(folder)
    newest = max(saved_steps(folder), default=None)
    checkpoints.prepare(newest)
    state.step = newest or 0
    while True:
        state.step += 1
        state.sums[:] = state.step
        checkpoints.save(state, {"step": state.step})
        pipe.send(state.step)


def kill_while_saving(folder, rng):
    """Kill a process that does nothing but save, and return the last step that it saved."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=save_endlessly, args=(folder, sender))
    process.start()
    sender.close()  # this process's copy: when the other one is killed, the pipe ends
    receiver.recv()
    began = time.monotonic()
    last = receiver.recv()
    seconds = time.monotonic() - began
    timer = threading.Timer(rng.uniform(0, 3 * seconds), process.kill)
    timer.start()
    with contextlib.suppress(EOFError):
        while True:
            last = receiver.recv()
    process.join()
    return last


def kills_in_saving(folder, rng, kills):
    """Kill processes while they save; the last step that they saved must be restored."""
    from training.checkpoints import newest_intact

    folder, lost = folder / "saves", 0
    checkpoints, _ = paper_checkpoints(folder)
    for _ in range(kills):
        last, complaints = kill_while_saving(folder, rng), []
        state, step = newest_intact(folder, checkpoints.restore, complaints.append)
        intact = state is not None and (state.sums == step).all() and step >= last
        lost += not intact or bool(complaints)
    return kills, lost


# --- Damaged files --------------------------------------------------------------------------------


def damage(path, kind, rng):
    """Damage a file in one of the ways of DAMAGES."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "with one byte changed":
        content[rng.randrange(len(content))] ^= 1 + rng.randrange(255)
        path.write_bytes(content)
    elif kind == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()


def small_trainer(folder):
    """Return a Trainer of a small network, which writes to a folder."""
    from model import CapsNet
    from training.folders import Folders
    from training.trainer import Device, Run, Trainer

    data = timing.load_digits(32)
    network = CapsNet(data.canvas_shape(), timing.CLASSES, 4, 2, 4, 4, decoder_units=(8,))
    folders = Folders(folder / "checkpoint", folder / "best", folder / "logs")
    training = config.TrainingConfig(batch_size=8)
    return Trainer(network, data, training, Run(folders), device=Device(jit=False))


def damaged_checkpoints(folder, rng, kind, tries=5):
    """Damage a file of the newest checkpoint; the run must resume, at worst from the older one."""
    from training.checkpoints import saved_steps

    lost = 0
    for number in range(tries):
        place = folder / str(number)
        small_trainer(place).fit(2, save_steps=2)
        checkpoints = place / "checkpoint"
        newest, older = saved_steps(checkpoints)
        files = [*sorted(checkpoints.glob(f"ckpt-{newest}.*")), checkpoints / "checkpoint"]
        damage(rng.choice(files), kind, rng)
        trainer = small_trainer(place)
        try:
            trainer.fit(3, save_steps=2)
        except errors.UserError:  # refused in one line, but there was an intact one
            lost += 1
            continue
        finished = trainer.state.step == 3 * trainer.steps_per_epoch
        lost += not finished or trainer.resumed_step < older
    return tries, lost


# --- Downloads and data files ---------------------------------------------------------------------


def bad_downloads(folder, rng):
    """Fetch a file from a server with each fault: it is there in the end, or one line says why."""
    lost, faults, labels = 0, (*HARMLESS, *HARMFUL), faulty_server.LABELS
    mnist = download.Source((), {labels: download.DATASETS["mnist"].sha256[labels]})
    with (
        faulty_server.serving() as server,
        mock.patch.multiple(download, TIMEOUT=0.5, BACKOFF=0.01),
        mock.patch.dict(download.DATASETS, mnist=mnist),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        server.handle_error = lambda *_: None  # some faults cut the connection on purpose
        for fault in faults:
            place, message = folder / fault, ""
            try:
                download.fetch("mnist", place, f"{server.url}{fault}/")
            except download.DownloadError as error:
                message = str(error)
            names = [path.name for path in place.rglob("*")]
            if fault in HARMLESS:
                lost += message != "" or names != ["mnist", labels]
            else:
                lost += message == "" or "\n" in message or names != []
    return len(faults), lost


def mutate(content, rng):
    """Change, delete or insert bytes at a few places of a file's content."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        # Half of the time within the header.
        place = rng.randrange(min(len(content), rng.choice((12, 10**6))))
        change = rng.randrange(3)
        if change == 0:
            content[place] = rng.randrange(256)
        elif change == 1:
            del content[place : place + rng.randrange(1, 50)]
        else:
            content[place:place] = rng.randbytes(rng.randrange(1, 50))
        content = content or bytearray(1)
    return content


def bad_readings(folder, rng, tries):
    """Read mutated data files: an array of what the header says, or one line."""
    whole = gzip.decompress(faulty_server.GOOD)
    count = 1992
    labels = whole[:4] + count.to_bytes(4, "big") + whole[8 : 8 + count]
    path, lost = folder / "mutated.gz", 0
    for _ in range(tries):
        content = mutate(labels if rng.random() < 0.5 else gzip.compress(labels), rng)
        compressed = content[:2] == b"\x1f\x8b" or rng.random() < 0.1
        path.write_bytes(content if compressed else gzip.compress(content))
        try:
            array = idx.read_idx(path)
            lost += array.dtype != np.uint8 or array.size > len(content) * 1032
        except errors.UserError as error:
            lost += "\n" in str(error)
        except Exception as error:  # anything else would be a traceback
            print(f"  {error!r}", flush=True)
            lost += 1
    return tries, lost


# --- Command lines --------------------------------------------------------------------------------


def run_main(arguments):
    """Run main.py and return the finished process."""
    return subprocess.run(
        [sys.executable, str(MAIN), *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


def flag_names(help_text):
    """Return the names of main.py's flags but its modes, from what `--help` prints."""
    _, _, other_groups = help_text.partition("\nWeights:")
    return re.findall(r"^  --(?:\[no\])?(\w+)", other_groups, re.MULTILINE)


def mutated_command_line(names, rng):
    """Return up to three flags of these names, some misspelt, with values that rarely fit."""
    words = []
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(names)
        if rng.random() < 0.2:
            name = name[: rng.randrange(len(name))] + rng.choice("aZ_- ")
        prefix, sign = rng.choice(("--", "-", "--no", "")), rng.choice(("=", "", " "))
        words.append(prefix + name + sign + rng.choice(VALUES))
    return words


def is_refused(process):
    """Return whether main.py refused a command line in one line, or found nothing to do in it."""
    nothing_to_do = process.stderr.startswith("Nothing to do")
    return process.returncode == 2 and (nothing_to_do or process.stderr.count("\n") == 1)


def bad_command_lines(folder, rng, tries):
    """Run mutated command lines without a mode: accepted as flags, or one line and exit code 2."""
    names = flag_names(run_main(["--help"]).stdout)
    lines = [mutated_command_line(names, rng) for _ in range(tries)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        processes = list(pool.map(run_main, lines))
    lost = [process for process in processes if not is_refused(process)]
    for process in lost:
        print(f"  {process.args}: {process.returncode}, {process.stderr[-300:]}", flush=True)
    return tries, len(lost)


# --- All of them ----------------------------------------------------------------------------------


def list_trials(flags):
    """Return all faults by what they are: functions of a folder and a random.Random.

    Each returns how many it tried, and how many of them were lost.
    """
    inputs, partial = max(1, flags.inputs // 2), functools.partial
    small_run = {"flags": SMALL_RUN, "kills": flags.kills}
    paper_run = {"flags": PAPER_RUN, "kills": max(1, flags.kills // 5)}
    kills, same_end = "kills in training", "bit-identical end"
    saving = partial(kills_in_saving, kills=flags.save_kills)
    resumes = {
        f"newest checkpoint {kind}: the run resumes": partial(damaged_checkpoints, kind=kind)
        for kind in DAMAGES
    }
    return {
        f"{kills}, small network: {same_end}": partial(kills_in_training, **small_run),
        f"{kills}, the paper's network: {same_end}": partial(kills_in_training, **paper_run),
        "kills in mid-save: newest checkpoint intact": saving,
        **resumes,
        "faults of a download server": bad_downloads,
        "mutated data files": partial(bad_readings, tries=inputs),
        "mutated command lines": partial(bad_command_lines, tries=inputs),
    }


def break_everything(flags):
    """Try all faults, print the table, and return 1 if anything was lost."""
    print(timing.conditions() + "\n", flush=True)
    rng, rows = random.Random(flags.seed), []
    with tempfile.TemporaryDirectory() as place:
        for number, (name, function) in enumerate(list_trials(flags).items()):
            print(name, flush=True)
            folder = Path(place, str(number))
            folder.mkdir()
            tried, lost = function(folder, rng)
            rows.append({"what": name, "tried": tried, "survived": tried - lost, "lost": lost})
    print()
    timing.print_table(rows)
    total = sum(row["lost"] for row in rows)
    print("Nothing lost." if not total else f"{total} lost.")
    return int(total > 0)


if __name__ == "__main__":
    definitions = timing.counts(kills=20, save_kills=20, inputs=400, seed=0)
    sys.exit(run_script(sys.argv, __doc__, definitions, break_everything))
