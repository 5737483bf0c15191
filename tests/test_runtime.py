import ctypes
import datetime
import faulthandler
import json
import os
import platform
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from capsnet_core import errors
from runtime import machine, messages, startup, terminal
from training.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
PROGRESS = Progress(
    epoch=2,
    epochs=3,
    step=11,
    last_step=30,
    images_per_second=1234.56,
    seconds_left=3723.4,
    losses={"margin": 0.123456, "reconstruction": 31.4159},
    accuracy=0.98765,
)


# --- The start of TensorFlow ----------------------------------------------------------------------


def output_of(code, **environment):
    """Run code in a process of its own, and return what it prints and what is on its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"} | environment,
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_the_allocator_and_the_log_level_are_set_before_tensorflow_is_imported():
    code = """
import os, sys
from runtime import startup
calls = []
startup.tune_malloc = lambda: calls.append("tensorflow" in sys.modules)

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow":
            print(len(calls), os.environ.get("TF_CPP_MIN_LOG_LEVEL"))

sys.meta_path.insert(0, Spy())
tf = startup.start_tensorflow(quiet="3")
print(tf.__name__, calls, tf.get_logger().level)
"""
    out, err = output_of(code)
    assert out == "1 3\ntensorflow [False] 40\n"
    assert err == ""


@pytest.mark.parametrize(
    "variable, value",
    [("KERAS_BACKEND", "jax"), ("TF_USE_LEGACY_KERAS", "1"), ("KERAS_HOME", "")],
)
def test_keras_computes_with_tensorflow_whatever_the_user_has_set(tmp_path, variable, value):
    settings = {"backend": "torch", "floatx": "float16", "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    code = """
from runtime import startup
tf = startup.start_tensorflow()
import keras
print(keras.backend.backend(), keras.config.floatx(), keras.config.image_data_format())
print(tf.keras.layers.Dense is keras.layers.Dense)
"""
    out, err = output_of(code, **{variable: value or str(tmp_path)})
    assert out == "tensorflow float32 channels_last\nTrue\n" and err == ""


def test_gpus_take_memory_as_they_need_it(monkeypatch):
    asked = []
    monkeypatch.setattr(startup, "tune_malloc", lambda: None)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind} 0", f"{kind} 1"])

    def set_memory_growth(*arguments):
        asked.append(arguments)
        raise RuntimeError("devices are in use")  # by an earlier call

    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", set_memory_growth)
    startup.start_tensorflow()
    assert asked == [("GPU 0", True), ("GPU 1", True)]


def test_the_device_is_the_gpus_that_tensorflow_sees_or_else_the_processor(monkeypatch):
    monkeypatch.setattr(machine, "gpu_names", lambda: [])
    monkeypatch.setattr(machine, "processor", lambda: "a processor")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    exists = Path.exists
    driver = Path("/proc/driver/nvidia/version")
    monkeypatch.setattr(Path, "exists", lambda path: path != driver and exists(path))
    assert machine.describe_device() == "Runs on a processor (4 cores)"
    monkeypatch.setattr(Path, "exists", lambda path: path == driver or exists(path))
    assert machine.describe_device() == (
        "Runs on a processor (4 cores); for the GPU of this machine: "
        "pip install 'tensorflow[and-cuda]'"
    )
    monkeypatch.setattr(machine, "gpu_names", lambda: ["one", "two"])
    assert machine.describe_device() == "Runs on one, two"


def test_the_memory_is_that_of_the_machine_or_the_limit_of_its_container(tmp_path, monkeypatch):
    kilobytes = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (tmp_path / "missing", limit))
    assert machine.memory_size() == 1024 * kilobytes
    for text, size in [("max\n", 1024 * kilobytes), ("123456\n", 123456)]:
        limit.write_text(text)
        assert machine.memory_size() == size
    monkeypatch.setattr(os, "sysconf", lambda name: int("no such name"))
    limit.unlink()
    assert machine.memory_size() is None


@pytest.mark.parametrize("before, after", [(None, "2"), ("0", "0")])
def test_a_log_level_in_the_environment_takes_precedence(monkeypatch, before, after):
    environment = {} if before is None else {"TF_CPP_MIN_LOG_LEVEL": before}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(startup, "tune_malloc", lambda: None)
    assert startup.start_tensorflow() is tf  # which was imported before
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == after


def test_signals_that_arrive_in_a_matrix_product_do_not_damage_the_heap():
    """oneDNN's product of this shape keeps its buffer at the stack pointer (with AVX-512)."""
    code = """
import os, signal, time
from runtime import startup
if hasattr(os, "sched_setaffinity"):  # on one core the main thread computes the product itself
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
tf = startup.start_tensorflow()
a, b = tf.ones((126, 25)), tf.ones((126, 2**18))
product = tf.function(lambda: tf.matmul(a, b, transpose_a=True), jit_compile=True)
product()
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
end = time.monotonic() + 3
while time.monotonic() < end:
    result = product()
signal.setitimer(signal.ITIMER_REAL, 0)
print(len(seen) > 10, float(tf.reduce_min(result)), float(tf.reduce_max(result)))
"""
    out, err = output_of(code)
    assert out == "True 126.0 126.0\n" and err == ""


@pytest.mark.skipif(platform.system() != "Linux", reason="reads Linux's structures")
def test_signals_have_a_stack_large_enough_for_the_processors_registers():
    code = """
import ctypes
from runtime import startup
startup.receive_signals_on_their_own_stack()

class Stack(ctypes.Structure):  # stack_t, signal.h
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

libc, stack = ctypes.CDLL(None), Stack()
assert libc.sigaltstack(None, ctypes.byref(stack)) == 0
libc.getauxval.restype = ctypes.c_ulong
least = libc.getauxval(51)  # AT_MINSIGSTKSZ, auxvec.h; 0 where the kernel does not say
print(stack.flags, stack.size > least, stack.start is not None)
"""
    assert output_of(code) == ("0 True True\n", "")


def test_a_fault_handler_that_is_on_is_left_alone(monkeypatch):
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: True)
    monkeypatch.setattr(faulthandler, "enable", lambda file: pytest.fail("enabled again"))
    startup.receive_signals_on_their_own_stack()


class Libc:
    """Stands in for the C library and writes down what is called."""

    HEAP = 5 * 2**21 + 16  # not at the beginning of a page

    def __init__(self, heap=HEAP):
        self.calls = []

        def function(name, result):
            def call(*arguments):
                self.calls.append((name, *arguments))
                return result

            return call

        for name, result in (("mallopt", 1), ("malloc", heap), ("madvise", 0), ("free", None)):
            setattr(self, name, function(name, result))


def calls_of_tune_malloc(monkeypatch, libc, name="glibc"):
    monkeypatch.setattr(platform, "libc_ver", lambda: (name, "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda library: libc)
    startup.tune_malloc.__wrapped__()
    return libc.calls


def test_glibc_is_told_to_keep_freed_memory_in_one_arena_of_huge_pages(monkeypatch):
    *options, allocate, advise, free = calls_of_tune_malloc(monkeypatch, Libc())
    # malloc.h: M_TRIM_THRESHOLD -1, M_TOP_PAD -2, M_MMAP_MAX -4, M_ARENA_MAX -8
    assert sorted(options) == [
        ("mallopt", -8, 1),
        ("mallopt", -4, 0),
        ("mallopt", -2, 67_108_864),
        ("mallopt", -1, 2_147_483_647),
    ]
    (_, size) = allocate
    assert allocate == ("malloc", size) and 1e9 < size < 2_147_483_647
    assert free == ("free", Libc.HEAP)
    name, start, length, advice = advise
    assert (name, advice) == ("madvise", 14)  # mman.h: MADV_HUGEPAGE
    assert start % 2**21 == 0 and 0 <= start - Libc.HEAP < 2**21
    assert length % 2**21 == 0 and size - 2**22 <= length
    assert start + length <= Libc.HEAP + size


def test_nothing_is_marked_or_freed_if_there_is_no_memory_to_grow_the_heap(monkeypatch):
    names = [name for name, *_ in calls_of_tune_malloc(monkeypatch, Libc(heap=None))]
    assert names == ["mallopt"] * 4 + ["malloc"]


def test_another_c_library_is_left_alone(monkeypatch):
    assert calls_of_tune_malloc(monkeypatch, Libc(), name="") == []


def test_the_allocator_is_set_once_however_often_it_is_asked_for(monkeypatch):
    libc = Libc()
    calls_of_tune_malloc(monkeypatch, libc)
    number = len(libc.calls)
    startup.tune_malloc.cache_clear()
    startup.tune_malloc()
    startup.tune_malloc()
    assert len(libc.calls) == 2 * number


def test_what_c_code_writes_to_stderr_is_silenced_and_only_while_asked_for(capfd):
    with pytest.raises(ZeroDivisionError), startup.silent_stderr():
        os.write(2, b"noise of C code\n")
        raise ZeroDivisionError
    os.write(2, b"an error\n")
    assert capfd.readouterr().err == "an error\n"


def test_silencing_leaves_no_file_open():
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for _ in range(5):
        with startup.silent_stderr():
            pass
    after = os.listdir("/proc/self/fd") if before else []
    assert len(after) == len(before)


def test_the_wait_for_workers_ends_after_a_while_and_at_ctrl_c(monkeypatch, capsys):
    timers = []
    monkeypatch.setattr(
        faulthandler,
        "dump_traceback_later",
        lambda *args, **options: timers.append((args, options)),
    )
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timers.append("off"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), startup.waiting_for_workers():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        ((seconds,), options), *others = timers
        assert seconds == 600 and options["exit"] is True and others == []
        raise ZeroDivisionError
    assert timers[1:] == ["off"] and signal.getsignal(signal.SIGINT) is handler
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "10 minutes" in out and "TF_CONFIG" in out


@pytest.mark.parametrize("gpus, method", [([], "dft"), (["GPU:0"], "direct")])
def test_gpus_convolve_directly_and_processors_by_spectra(monkeypatch, gpus, method):
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind: {"GPU": gpus, "CPU": ["CPU:0"]}[kind]
    )
    assert machine.has_gpu() is bool(gpus)
    assert machine.fastest_conv() == method


@pytest.mark.parametrize(
    "flags, units",
    [
        ("fpu avx512_bf16 amx_bf16 amx_tile", ["AMX", "AVX512-BF16"]),
        ("fpu avx512f avx512_bf16", ["AVX512-BF16"]),
        ("fpu avx512f amx_tile", []),
    ],
)
def test_units_for_bfloat16_are_named_by_the_flags_of_the_processor(monkeypatch, flags, units):
    cpuinfo = f"model name\t: amx_bf16\nflags\t\t: {flags}\nbugs\t: none\n"
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    assert machine.bfloat16_units() == units
    monkeypatch.setattr(Path, "read_text", lambda self: "Features\t: bf16\n")
    assert machine.bfloat16_units() == []


def test_a_system_that_says_nothing_about_its_processor_has_no_units_for_bfloat16(monkeypatch):
    def absent(self):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.bfloat16_units() == []


# --- Provenance -----------------------------------------------------------------------------------


def test_the_machine_is_named_with_its_processor_cores_and_gpus(monkeypatch):
    cpuinfo = "processor\t: 0\nmodel name\t: Fast: 3000\nflags\t: avx2\nmodel name\t: Other\n"
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert machine.describe_machine() == "Fast: 3000 (3 cores), no GPU"
    names = {"GPU:0": {"device_name": "A100"}, "GPU:1": {}}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(names))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", names.get)
    assert machine.describe_machine() == "Fast: 3000 (3 cores), A100, GPU"


def test_a_processor_without_cpuinfo_has_the_name_that_python_knows(monkeypatch):
    def missing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert machine.processor() == "riscv64"
    monkeypatch.setattr(platform, "processor", lambda: "i386")
    assert machine.processor() == "i386"


def git(folder, *words):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *settings, *words], cwd=folder, check=True, text=True, capture_output=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit, which has a tag, in place of the program's own."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "tag", "-m", "v1", "v1")
    return tmp_path


def test_the_commit_is_a_full_hash_and_marked_if_tracked_files_were_changed(repository):
    head = git(repository, "rev-parse", "HEAD")
    commit = machine.commit.__wrapped__
    assert re.fullmatch("[0-9a-f]{40}", head) and commit() == head
    (repository / "untracked").write_text("")
    assert commit() == head
    (repository / "a").write_text("2")
    assert commit() == head + "-dirty"


def test_the_commit_is_asked_for_once(repository):
    head = git(repository, "rev-parse", "HEAD")
    machine.commit.cache_clear()
    try:
        assert machine.commit() == head
        (repository / "a").write_text("2")
        assert machine.commit() == head
    finally:
        machine.commit.cache_clear()


def test_without_a_repository_or_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit.__wrapped__() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit.__wrapped__() is None


def test_the_provenance_has_machine_commit_date_and_versions(monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(machine, "describe_machine", lambda: "a machine")
    found = machine.provenance()
    assert list(found) == ["machine", "commit", "date", "versions"]
    assert (found["machine"], found["commit"]) == ("a machine", "abc")
    date = datetime.datetime.fromisoformat(found["date"])
    now = datetime.datetime.now(datetime.timezone.utc)
    assert date.utcoffset() == datetime.timedelta(0) and date.microsecond == 0
    assert 0 <= (now - date).total_seconds() < 60
    assert found["versions"] == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }


# --- Progress -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to: clock.seconds."""
    clock = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock.seconds)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return clock


def at(step, last_step=30, epochs=3):
    return PROGRESS._replace(step=step, last_step=last_step, epochs=epochs)


def test_a_step_is_shown_with_its_epoch_speed_time_left_losses_and_accuracy(clock, capsys):
    with terminal.Display() as display:
        display.show_step(PROGRESS)
    assert capsys.readouterr().out == (
        "Epoch 2/3 step 11/30: 1235 images/s, 1:02:03 left, margin loss 0.1235, "
        "reconstruction loss 31.42, accuracy 98.77%\n"
    )


def test_losses_are_shown_by_whatever_name_they_have(clock, capsys):
    with terminal.Display() as display:
        display.show_step(PROGRESS._replace(losses={"cross_entropy": 2.0}))
    assert "1:02:03 left, cross entropy loss 2.00, accuracy" in capsys.readouterr().out


def test_off_a_terminal_there_is_a_line_for_the_first_step_each_epoch_and_every_30_seconds(
    clock, capsys
):
    shown = []
    with terminal.Display() as display:
        for step in range(1, 31):
            clock.seconds += 7
            display.show_step(at(step))
            if capsys.readouterr().out:
                shown.append(step)
    # 7 seconds a step: the fifth step after a line is the first one that is more than 30 s later.
    assert shown == [1, 6, 10, 15, 20, 25, 30]


def test_a_line_comes_only_after_more_than_30_seconds(clock, capsys):
    with terminal.Display() as display:
        display.show_step(at(1))
        clock.seconds += 30
        display.show_step(at(2))
        assert capsys.readouterr().out.count("\n") == 1
        clock.seconds += 0.1
        display.show_step(at(3))
        assert capsys.readouterr().out.count("\n") == 1


def test_a_short_count_prints_nothing_and_a_long_one_how_far_it_is(clock, capsys):
    with terminal.Display() as display:
        display.show_count("Testing", 1000, 10000)
        clock.seconds += 29
        display.show_count("Testing", 2000, 10000)
        assert capsys.readouterr().out == ""
        clock.seconds += 2
        display.show_count("Testing", 3000, 10000)
        display.show_count("Testing", 4000, 10000)
        assert capsys.readouterr().out == "Testing: 3,000 of 10,000\n"
        clock.seconds += 31
        display.show_count("Testing", 5000, 10000)
        assert capsys.readouterr().out == "Testing: 5,000 of 10,000\n"


def test_a_step_whose_speed_is_not_known_yet_is_shown_without_it(clock, capsys):
    unknown = PROGRESS._replace(images_per_second=None, seconds_left=None)
    terminal.Display().show_step(unknown)
    assert capsys.readouterr().out == (
        "Epoch 2/3 step 11/30: margin loss 0.1235, reconstruction loss 31.42, accuracy 98.77%\n"
    )


def test_a_count_right_after_a_line_of_training_waits_its_30_seconds(clock, capsys):
    display = terminal.Display()
    clock.seconds += 100
    display.show_step(at(10))
    clock.seconds += 20
    display.show_count("Validation", 1, 2)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_report_is_printed_as_it_is_whatever_is_in_it(clock, capsys):
    text = "moved to [bold]runs/[1] " + "and a long name " * 20 + "12.5%"
    with terminal.Display() as display:
        display.report(text)
    assert capsys.readouterr().out == text + "\n"


def on_terminal(monkeypatch, capsys, use):
    """What is on a terminal after use(display), with and without its escape sequences."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.Display() as display:
        use(display)
    shown = capsys.readouterr().out
    return shown, " ".join(re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", shown).split())


def test_on_a_terminal_a_bar_shows_the_progress(clock, monkeypatch, capsys):
    def use(display):
        display.show_step(at(10))
        display.show_step(at(30))
        (task,) = display.bar.tasks
        assert (task.completed, task.total) == (30, 30)

    _, text = on_terminal(monkeypatch, capsys, use)
    assert re.search(r"Epoch 2/3 step 30/30 ━{20} 1235 images/s, 1:02:03 left, margin loss", text)


def test_on_a_terminal_counts_and_reports_are_shown_at_once(clock, monkeypatch, capsys):
    def use(display):
        display.show_count("Testing", 5000, 10000)
        display.report("a line above")
        (task,) = display.bar.tasks
        assert (task.completed, task.total) == (5000, 10000)

    _, text = on_terminal(monkeypatch, capsys, use)
    assert "a line above" in text and re.search("Testing ━+ ?╺?━* 5,000 of 10,000", text)


def test_the_numbers_in_a_report_are_not_coloured(clock, monkeypatch, capsys):
    text = "Trained to step 12 in 3.5 s: 'a.png', True"
    shown, _ = on_terminal(monkeypatch, capsys, lambda display: display.report(text))
    assert text in shown


def test_a_bar_is_removed_from_the_terminal_when_an_error_ends_the_work(clock, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(ZeroDivisionError), terminal.Display() as display:
        assert display.bar.live.is_started
        raise ZeroDivisionError
    assert not display.bar.live.is_started


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_honoured(clock, monkeypatch, capsys, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    shown, text = on_terminal(monkeypatch, capsys, lambda display: display.show_step(PROGRESS))
    assert "Epoch 2/3 step 11/30" in text
    assert bool(re.search(r"\x1b\[[0-9;]*m", shown)) is not no_color


# --- Messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "utf-8"])
def test_both_streams_print_any_text_in_any_encoding(encoding):
    code = """
import sys
from runtime import terminal
terminal.escape_unencodable_output()
for stream in (sys.stdout, sys.stderr):
    print("9\\u732b\\udcff", file=stream)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    expected = b"9" + "猫".encode(encoding, "backslashreplace") + b"\xff\n"
    assert done.stdout == done.stderr == expected


def test_written_files_are_listed_in_one_line(capsys):
    terminal.report_written([Path("samples") / "a.png", "b.csv"])
    assert capsys.readouterr().out == f"Wrote {Path('samples') / 'a.png'}, b.csv\n"


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 epochs"),
        (1, "1 epoch"),
        (2, "2 epochs"),
        (0.5, "0.5 epochs"),
        (1.0, "1 epoch"),
        (10**6, "1,000,000 epochs"),
    ],
)
def test_a_noun_agrees_with_its_number(count, text):
    assert terminal.plural(count, "epoch") == text


def tensorflow_error(kind, message):
    return kind(None, None, message)


def test_the_reason_of_a_tensorflow_error_is_one_line_without_names_of_its_graph():
    error = tensorflow_error(
        tf.errors.InvalidArgumentError,
        "{{function_node __wrapped__Add}} shapes\n  differ: {{node a/b}} [Op:AddV2] name: add",
    )
    assert messages.reason(error) == "shapes differ:"


def test_the_reason_of_an_error_in_a_graph_is_its_message_alone():
    @tf.function
    def divide(number):
        tf.debugging.assert_greater(number, 0, "the number is not positive")

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        divide(tf.constant(0))
    assert "Graph execution error" in str(caught.value) and __file__ in str(caught.value)
    line = messages.reason(caught.value)
    assert "the number is not positive" in line
    assert not re.search(r"Graph execution|Detected at|File |\[\[", line)


SAVED = "; earlier checkpoints are unchanged"
FULL = "free some space, or choose a folder on another disk"
LOST = (
    "another worker stopped or cannot be reached; start all workers again, they resume from the "
    "last checkpoint"
)


@pytest.mark.parametrize(
    "error, advice, line",
    [
        (errors.UserError("no good"), "", "no good"),
        (errors.UserError("no good"), "try that", "no good; try that"),
        (errors.NoCheckpoint("a"), "train first", "no checkpoint in a; train first"),
        (
            PermissionError(13, "Permission denied", "a/b"),
            "",
            "a/b: Permission denied; choose another folder, or make this one writable",
        ),
        (
            OSError(28, "No space left on device"),
            "",
            "No space left on device; " + FULL,
        ),
        (
            OSError("something else"),
            "",
            "something else",
        ),
        (MemoryError(), "", "out of memory; try a smaller batch or network"),
        (MemoryError(), "try this", "out of memory; try this"),
        (
            tensorflow_error(tf.errors.ResourceExhaustedError, "OOM when\nallocating"),
            "",
            "out of memory; try a smaller batch or network",
        ),
        (
            tensorflow_error(tf.errors.ResourceExhaustedError, "a; No space left on device"),
            "",
            "a; No space left on device; " + FULL + SAVED,
        ),
        (  # a graph error that happens to name an allocator
            tensorflow_error(tf.errors.ResourceExhaustedError, "allocated No space left on device"),
            "",
            "allocated No space left on device; " + FULL + SAVED,
        ),
        (tensorflow_error(tf.errors.UnavailableError, "a socket"), "", "a socket" + SAVED),
    ],
)
def test_an_error_becomes_one_line_with_what_to_do(error, advice, line):
    assert messages.describe_error(error, advice) == line


@pytest.mark.parametrize("kind", ["Unavailable", "Aborted", "Cancelled", "DeadlineExceeded"])
def test_among_several_workers_a_lost_connection_is_a_lost_worker(monkeypatch, kind):
    error = tensorflow_error(getattr(tf.errors, f"{kind}Error"), "a socket")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert messages.describe_error(error) == "a socket" + SAVED
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert messages.describe_error(error) == LOST


def test_among_several_workers_other_errors_are_described_as_always(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    error = tensorflow_error(tf.errors.InvalidArgumentError, "shapes differ")
    assert messages.describe_error(error) == "shapes differ" + SAVED
    assert messages.describe_error(errors.UserError("no good"), "try that") == "no good; try that"


def test_errors_of_the_user_the_system_and_tensorflow_are_no_bugs():
    of_tensorflow = tensorflow_error(tf.errors.InvalidArgumentError, "shapes differ")
    for error in errors.UserError("a"), OSError("b"), MemoryError(), of_tensorflow:
        assert messages.is_expected(error)
    for error in KeyError("a"), ValueError("b"), errors.UsageError("c"):
        assert not messages.is_expected(error)
