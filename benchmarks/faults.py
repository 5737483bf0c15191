"""Break things on purpose and count what is lost: kills, damaged files, bad downloads, bad input.

    python benchmarks/faults.py [--kills=20] [--save_kills=20] [--inputs=400] [--seed=0]

Prints a table (tried, survived, lost); survived means that the run ended as if nothing had
happened, or that the fault was refused in one line and nothing was harmed. Exit code 1 if anything
was lost.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import timing

import download
import main as command_line
import utils

sys.path.insert(0, str(timing.ROOT / "tests"))
import test_download

MAIN = timing.ROOT / "main.py"
SMALL = ["--n_conv=16", "--n_primary=4", "--train_size=1500", "--batch_size=16", "--epoch=2",
         "--save_steps=7", "--data_deformation", "--validation_check"]
WHOLE = ["--train_size=576", "--epoch=2", "--save_steps=2", "--data_deformation"]
DOWNLOAD_FAULTS = {  # answer of the server -> whether the file is there in the end
    "ok": True, "recovering": True, "chunked": True, "forbidden": False, "absent": False,
    "busy": False, "limited": False, "mute": False, "stall": False, "truncated": False,
    "open": False, "broken_chunks": False, "reset": False, "garbage": False, "wrong": False,
    "noise": False, "page": False, "loop": False, "file_redirect": False,
}


def start(folder, flags):
    return subprocess.Popen(
        [sys.executable, str(MAIN), "--train", f"--data_dir={timing.ROOT / 'data'}", *flags],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(folder, run="mnist"):
    """Hashes of the final weights and optimizer, and of all events: tag, step, value."""
    import tensorflow as tf

    import model

    checkpoints = folder / "checkpoint" / run
    newest = f"ckpt-{model.saved_steps(checkpoints)[0]}"
    reader = tf.train.load_checkpoint(str(checkpoints / newest))
    weights = hashlib.sha256()
    for name in sorted(reader.get_variable_to_shape_map()):
        if name.startswith(("weights/", "optimizer/", "sums/", "best/", "step/")):
            weights.update(name.encode() + np.asarray(reader.get_tensor(name)).tobytes())
    events = []
    for path in (folder / "logs" / run).rglob("events.out.tfevents.*"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                if value.tag != "command":  # the folder of the data is in it, always the same
                    events.append((path.parent.name, value.tag, event.step,
                                   value.tensor.SerializeToString()))
    return weights.hexdigest(), hashlib.sha256(repr(sorted(events)).encode()).hexdigest()


def kills_in_training(kills, flags, dice, folder):
    """Kill at random moments after the first step, start again, compare the end."""
    began = time.monotonic()
    for name in ("reference", "again"):
        (folder / name).mkdir()
        child = start(folder / name, flags)
        for line in child.stdout:
            if "step 1/" in line:
                began = time.monotonic()
        if child.wait():
            raise SystemExit(f"the run that is not killed failed: {line}")
        training_time = time.monotonic() - began
    reference = outcome(folder / "reference")
    if reference != outcome(folder / "again"):
        raise SystemExit("two uninterrupted runs differ: no comparison is possible")
    done = lost = runs = 0
    while done < kills:
        place, runs = folder / f"killed_{runs}", runs + 1
        place.mkdir()
        while True:
            child = start(place, flags)
            for line in child.stdout:
                if "Going on" in line or "step 1/" in line:
                    break
            timer = threading.Timer(dice.uniform(0, training_time), child.kill)
            timer.start()
            rest = child.stdout.read()
            timer.cancel()
            if child.wait() == 0:
                break
            if child.returncode != -signal.SIGKILL:
                raise SystemExit(f"went wrong after {done} kills: {line}{rest}")
            done += 1
        same = outcome(place) == reference
        lost += not same
        print(f"  run {runs}: {done} kills so far, end {'identical' if same else 'DIFFERS'}",
              flush=True)
        shutil.rmtree(place)
    return done, lost


def endless_saves(folder):
    """Save the paper's network again and again (in a process of its own, to be killed)."""
    import model

    trainer, _ = timing.make_trainer(1)
    steps = model.saved_steps(folder)
    trainer.step = steps[0] if steps else 0
    manager = trainer._open_manager(folder, 2, trainer.step if steps else None)
    while True:
        trainer.step += 1
        trainer.sums = np.full(4, trainer.step, float)
        trainer._write(manager, 10**9)
        print(trainer.step, flush=True)


def kills_in_saving(kills, dice, folder):
    """Kill a process that does nothing but save, and read what it left."""
    import model

    trainer, _ = timing.make_trainer(1)
    folder, lost, seconds = folder / "saves", 0, 0.5
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, __file__, "--endless_saves", str(folder)],
                                 stdout=subprocess.PIPE, text=True)
        last = int(child.stdout.readline())
        began = time.monotonic()
        last = int(child.stdout.readline())
        seconds = time.monotonic() - began
        timer = threading.Timer(dice.uniform(0, 3 * seconds), child.kill)
        timer.start()
        for line in child.stdout:
            last = int(line)
        child.wait()

        def read(step):
            model._restore(trainer._checkpoint, folder, step)
            return int(trainer._state["sums"].numpy()[0])

        complaints = []
        value, step = model.newest_readable(folder, read, complaints.append)
        lost += not (value == step and step >= last and not complaints)
    print(f"  one save takes {seconds:.2f} s", flush=True)
    return kills, lost


def damage(path, kind, dice):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "flipped byte":
        content[dice.randrange(len(content))] ^= 1 + dice.randrange(255)
        path.write_bytes(content)
    elif kind == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()


def damaged_checkpoints(kind, tries, dice, folder):
    """Damage one file of the newest checkpoint: the training must go on and end the same."""
    import model

    data = model.Data(*_few_images())
    lost = 0

    def trainer():
        net = model.CapsNet(data.canvas_shape(), 10, 4, 2, 4, 4, decoder_units=(8,), conv="direct")
        place = model.Folders(folder / "c", folder / "b", folder / "l")
        return model.Trainer(net, data, None, model.Training(batch_size=8), place, {}, jit=False,
                             report=lambda _: None)

    for _ in range(tries):
        shutil.rmtree(folder, ignore_errors=True)
        first = trainer()
        first.fit(2, save_steps=2)
        steps = model.saved_steps(folder / "c")
        files = sorted((folder / "c").glob(f"ckpt-{steps[0]}.*")) + [folder / "c" / "checkpoint"]
        damage(dice.choice(files), kind, dice)
        second = trainer()
        try:
            second.fit(3, save_steps=2)
            whole = second.step == 3 * second.steps_per_epoch and second.restored >= steps[1]
        except utils.UserError:  # refused in one line is not lost, but one more was kept
            whole = False
        lost += not whole
    return tries, lost


def _few_images():
    dataset = utils.load_dataset("mnist", timing.ROOT / "data")
    return dataset.x_train[:32], dataset.y_train[:32]


def bad_downloads(folder):
    """Each fault of a server: the good file is fetched, or one line says why not."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), test_download.Handler)
    server.paths, server.over = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    download.TIMEOUT, download.BACKOFF = 0.5, 0.01
    known = download.DATASETS["mnist"]
    labels = [file for file in known.files if file.name == test_download.LABELS]
    download.DATASETS["mnist"] = known._replace(mirrors=(), files=labels)
    lost = 0
    for fault, expected in DOWNLOAD_FAULTS.items():
        place = folder / fault
        try:
            download.fetch("mnist", place, f"http://127.0.0.1:{server.server_port}/{fault}/",
                           lambda *_: None)
            fetched = True
        except download.DownloadError as error:
            fetched = False
            lost += "\n" in str(error)
        names = sorted(path.name for path in place.rglob("*") if path.is_file())
        lost += fetched != expected or names != [test_download.LABELS] * expected
    server.over.set()
    server.shutdown()
    download.DATASETS["mnist"] = known
    return len(DOWNLOAD_FAULTS), lost


def bad_readings(tries, dice, folder):
    """Mutated data files: an array of what the header says, or one line."""
    good = gzip.decompress(test_download.GOOD)[:2000]
    good = good[:4] + (len(good) - 8).to_bytes(4, "big") + good[8:]
    path, lost = folder / "mutated.gz", 0
    folder.mkdir(exist_ok=True)
    for _ in range(tries):
        content = bytearray(good if dice.random() < 0.5 else gzip.compress(good))
        for _ in range(dice.randrange(1, 5)):
            where = dice.randrange(min(len(content), dice.choice((12, 10**6))))
            change = dice.randrange(3)
            if change == 0:
                content[where] = dice.randrange(256)
            elif change == 1:
                del content[where : where + dice.randrange(1, 50)]
            else:
                content[where:where] = dice.randbytes(dice.randrange(1, 50))
            content = content or bytearray(1)
        compressed = content[:2] == b"\x1f\x8b" or dice.random() < 0.1
        path.write_bytes(content if compressed else gzip.compress(content))
        try:
            array = utils.read_idx(path)
            lost += not (array.dtype == np.uint8 and array.size <= len(content) * 1032)
        except utils.UserError as error:
            lost += "\n" in str(error)
        except Exception as error:  # noqa: BLE001 - anything else is a traceback
            print(f"  {error!r}", flush=True)
            lost += 1
    return tries, lost


def bad_command_lines(tries, dice):
    """Mutated command lines without a mode: accepted as flags, or one line and exit code 2."""
    names = [row[0] for rows in command_line.FLAGS.values() for row in rows]
    values = ["nan", "inf", "-1", "0", "1e999", "", "true", "False", "x", "9" * 30, "0x10", "1.5",
              "None", "../..", "é", "-", "--", "a b", "%s", "\x00"]
    lost = 0
    for _ in range(tries):
        argv = ["main.py"]
        for _ in range(dice.randrange(1, 4)):
            name = dice.choice([n for n in names if n not in command_line.MODES])
            if dice.random() < 0.2:
                name = name[: dice.randrange(len(name))] + dice.choice("aZ_-= ")
            argv.append(dice.choice(["--", "-", "--no", ""]) + name
                        + dice.choice(["=", "", " "]) + dice.choice(values))
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = command_line.main(argv)
            text = errors.getvalue()
            lost += code != 2 or not ("Nothing to do" in text or text.count("\n") == 1)
        except Exception as error:  # noqa: BLE001 - as above
            print(f"  {argv}: {error!r}", flush=True)
            lost += 1
    return tries, lost


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--save_kills", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endless_saves", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.endless_saves:
        return endless_saves(Path(args.endless_saves))
    utils.keep_big_buffers()
    dice, rows = random.Random(args.seed), []
    print(timing.machine() + "\n", flush=True)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)

        def run(name, function, *values):
            print(name, flush=True)
            folder = place / str(len(rows))
            folder.mkdir()
            tried, lost = function(*values, folder)
            rows.append([name, tried, tried - lost, lost])

        run("kills in training, small network: bit-identical end", kills_in_training,
            args.kills, SMALL, dice)
        run("kills in training, the paper's network: bit-identical end", kills_in_training,
            max(1, args.kills // 5), WHOLE, dice)
        run("kills in mid-save: newest checkpoint whole", kills_in_saving, args.save_kills, dice)
        for kind in ("truncated", "flipped byte", "emptied", "removed"):
            run(f"file of the newest checkpoint {kind}: the run goes on", damaged_checkpoints,
                kind, 5, dice)
        run("faults of a download server", bad_downloads)
        run("mutated data files", bad_readings, args.inputs // 2, dice)
        run("mutated command lines", lambda n, d, _: bad_command_lines(n, d),
            args.inputs // 2, dice)
    print()
    timing.table(["what", "tried", "survived", "lost"], rows)
    print(json.dumps({name: lost for name, _, _, lost in rows if lost}) if any(
        row[3] for row in rows) else "Nothing lost.")
    return int(any(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
