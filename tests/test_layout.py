"""The order of the modules: what may import what, and who may know the command line.

The modules are read with `ast`, not imported.
"""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A module may import modules of lower levels, never of its own or a higher one.
LEVELS = [
    {"capsnet_core", "download"},
    {"utils"},
    {"runtime", "ops"},
    {"networks as Keras models", "inputs", "figures"},
    {"model"},
    {"training"},
    {"commands"},
    {"main"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
# Files of a folder that stand on another level than the rest of it.
ABOVE = {
    "capsnet_core/base.py": "networks as Keras models",
    "capsnet_core/cnn.py": "networks as Keras models",
}
# A mode takes what another one needs too from the files that they share.
MODES = {f"commands/{name}.py" for name in ("train", "evaluate", "pictures", "predict", "export")}
# Besides, these import only what is listed here and their own files.
ONLY = {
    "training": {"capsnet_core", "utils", "runtime", "inputs"},
    "download": set(),
}
# Folders of scripts: a script imports its own folder and all modules except main and the tests, and
# nothing imports it.
SCRIPTS = {"experiments", "benchmarks"}
# What may name a flag of the command line. (`download.py` is a command of its own.)
COMMAND_LINES = {"main", "runtime", "commands", "experiments", "benchmarks", "tests", "download"}
# Common parts of the standard library that Python 3.10 does not have yet.
NEWER_THAN_3_10 = {
    "asyncio.TaskGroup",
    "asyncio.timeout",
    "contextlib.chdir",
    "datetime.UTC",
    "enum.StrEnum",
    "ExceptionGroup",
    "hashlib.file_digest",
    "itertools.batched",
    "tomllib",
    "typing.override",
    "typing.Self",
}
# Test files that are not about one module or one folder of modules.
OTHER_TESTS = {"layout", "readme"}


@cache
def sources():
    """Source of each Python file that git tracks or would track, by its path."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).split("\n")
    paths = sorted({path for path in listed if path and (ROOT / path).exists()})
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def module_of(path):
    """Name under which a file is imported: utils, training.events, affine (in experiments/)."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] in SCRIPTS | {"tests"}:
        parts = parts[1:]
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def room_of(path):
    """The folder of a file, or the module itself at the top level: training, experiments, utils."""
    return Path(path).parts[0].removesuffix(".py")


def place_of(path):
    """What a file belongs to in the order of the levels: a name of LEVELS, scripts or tests."""
    return ABOVE.get(path, room_of(path))


@cache
def nodes_of(source):
    """All nodes of a source's syntax tree, if it is valid Python 3.10."""
    return list(ast.walk(ast.parse(source, feature_version=(3, 10))))


@cache
def imports(source):
    """Names of all modules that a source imports, also inside functions: 'os.path', 'utils'."""
    names = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: a relative import")
            names.add(node.module)
            # `from training import events` imports training.events.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and name_of(node.func) == "import_module":
            if not isinstance(node.args[0], ast.Constant):
                raise ValueError(f"line {node.lineno}: an import of a computed name")
            names.add(node.args[0].value)
    return names


def name_of(function):
    """The last part of a function's name: import_module for importlib.import_module."""
    return getattr(function, "attr", getattr(function, "id", None))


def own_imports(path, source, known):
    """Paths of the project's files that a file imports."""
    by_module = {module_of(other): other for other in known}
    imported = {name for name in imports(source) if name in by_module}
    packages = {name.rpartition(".")[0] for name in imported}  # of training.events: training
    return {by_module[name] for name in imported - packages} - {path}


def may_import(importer, imported):
    """Whether a file may import another one, both by their paths."""
    here, there = place_of(importer), place_of(imported)
    if {importer, imported} <= MODES:
        return False
    if here == "tests":
        return True
    if there in {"main", "tests"}:
        return False
    if there in SCRIPTS:
        return here == there
    if here in SCRIPTS:
        return True
    if here == there:
        return True  # within readers/, training/ or commands/
    if here in ONLY and there not in ONLY[here]:
        return False
    return LEVEL[there] < LEVEL[here]


def forbidden_imports(files):
    """'a.py imports b.py' for each import that may not be."""
    return [
        f"{path} imports {imported}"
        for path, source in files.items()
        for imported in sorted(own_imports(path, source, files))
        if not may_import(path, imported)
    ]


def cycle_in(files):
    """A list of files each of which imports the next, the last one the first; [] if none."""
    graph = {path: own_imports(path, source, files) for path, source in files.items()}
    while graph:
        leaves = [path for path, imported in graph.items() if not imported & set(graph)]
        if not leaves:
            break
        for path in leaves:
            del graph[path]
    if not graph:
        return []
    trail = [min(graph)]  # each one left imports another one left
    while trail.count(trail[-1]) == 1:
        trail.append(min(graph[trail[-1]] & set(graph)))
    return trail[trail.index(trail[-1]) : -1]


def flags_named(source):
    """Strings, other than docstrings and arguments of git, in which a flag is named.

    What begins with --tf_ is a flag of TensorFlow.
    """
    passed_over = set()
    for node in nodes_of(source):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed_over.add(node.value)
        elif isinstance(node, ast.List) and node.elts and is_string(node.elts[0], "git"):
            passed_over |= set(node.elts)
    return [
        node.value
        for node in nodes_of(source)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in passed_over
        and re.search(r"--(?!tf_)[a-z]", node.value)
    ]


def names_used(source):
    """Names, those with one dot as a whole, and everything that is imported."""
    names = set(imports(source))
    for node in nodes_of(source):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    return names


def is_string(node, value):
    return isinstance(node, ast.Constant) and node.value == value


# --- The project ----------------------------------------------------------------------------------


def test_every_module_has_a_place_in_the_order():
    places = {place_of(path) for path in sources()}
    assert places - set(LEVEL) - SCRIPTS == {"tests"}
    assert set(LEVEL) <= places
    assert {*ABOVE, *MODES} <= set(sources())


def test_modules_import_only_what_lies_below_them():
    assert forbidden_imports(sources()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle_in(sources()) == []


def test_two_files_are_not_imported_under_the_same_name():
    modules = [module_of(path) for path in sources()]
    assert sorted(modules) == sorted(set(modules))


def test_only_what_reads_the_command_line_names_its_flags():
    library = {path: s for path, s in sources().items() if room_of(path) not in COMMAND_LINES}
    named = {path: flags_named(source) for path, source in library.items()}
    assert {path: flags for path, flags in named.items() if flags} == {}


def test_every_file_is_valid_python_3_10():
    for path, source in sources().items():
        assert not names_used(source) & NEWER_THAN_3_10, path


def test_each_test_file_is_about_a_module_or_a_folder_of_modules():
    subjects = {room_of(path) for path in sources()}
    for path in sources():
        if room_of(path) != "tests":
            name = module_of(path)  # training.events: tested by test_events or test_training_events
            subjects |= {name.split(".")[-1], name.replace(".", "_")}
    tests = {Path(path).stem for path in sources() if room_of(path) == "tests"}
    tested = {name.removeprefix("test_") for name in tests if name.startswith("test_")}
    assert tested - subjects == OTHER_TESTS & tested


# --- The checks themselves ------------------------------------------------------------------------

MADE_UP = {
    "capsnet_core/__init__.py": "",
    "capsnet_core/errors.py": "class UserError(Exception): pass\n",
    "capsnet_core/base.py": "import ops\nfrom capsnet_core.errors import UserError\n",
    "capsnet_core/cnn.py": "import ops\nfrom capsnet_core.base import Network\n",
    "utils.py": "import os\nfrom capsnet_core.errors import UserError\n",
    "ops.py": "import utils\nfrom capsnet_core import errors\n",
    "model.py": "import ops\nfrom capsnet_core import base, cnn\n",
    "training/__init__.py": "",
    "training/events.py": "import utils\n",
    "training/trainer.py": "from training import events\nfrom capsnet_core import errors\n",
    "commands/data.py": "import utils\n",
    "commands/predict.py": "from commands import data\n",
    "commands/train.py": "import model\nfrom training import trainer\nimport commands.data\n",
    "main.py": "import commands.train\n",
    "experiments/shared/trial.py": "import model\nimport commands.train\n",
    "experiments/table.py": "from shared import trial\n",
    "benchmarks/timing.py": "import model\n",
    "tests/test_main.py": "import main\nimport shared.trial\n",
}


def test_allowed_imports_are_no_complaint():
    assert forbidden_imports(MADE_UP) == []
    assert cycle_in(MADE_UP) == []


@pytest.mark.parametrize(
    "path, source, imported",
    [
        ("capsnet_core/errors.py", "import utils", "utils.py"),
        ("capsnet_core/errors.py", "import ops", "ops.py"),
        ("capsnet_core/errors.py", "from capsnet_core import base", "capsnet_core/base.py"),
        ("capsnet_core/base.py", "import model", "model.py"),
        ("ops.py", "from capsnet_core.base import Network", "capsnet_core/base.py"),
        ("utils.py", "import capsnet_core.cnn", "capsnet_core/cnn.py"),
        ("training/events.py", "from capsnet_core import cnn", "capsnet_core/cnn.py"),
        ("commands/predict.py", "from commands.train import fit", "commands/train.py"),
        ("utils.py", "def f():\n    import model", "model.py"),
        ("utils.py", "try:\n    from training import events\nexcept ImportError: pass",
         "training/events.py"),
        ("ops.py", "import importlib\nimportlib.import_module('model')", "model.py"),
        ("model.py", "from training.trainer import Trainer", "training/trainer.py"),
        ("training/trainer.py", "import model", "model.py"),
        ("training/events.py", "from ops import squash", "ops.py"),
        ("training/events.py", "import commands.train", "commands/train.py"),
        ("commands/train.py", "from main import FLAGS", "main.py"),
        ("commands/train.py", "from shared.trial import run", "experiments/shared/trial.py"),
        ("experiments/table.py", "import main", "main.py"),
        ("experiments/table.py", "from test_main import run", "tests/test_main.py"),
        ("benchmarks/timing.py", "import test_main", "tests/test_main.py"),
        ("benchmarks/timing.py", "from shared import trial", "experiments/shared/trial.py"),
        ("main.py", "import test_main", "tests/test_main.py"),
    ],
)  # fmt: skip
def test_a_forbidden_import_is_noticed(path, source, imported):
    assert forbidden_imports(MADE_UP | {path: source}) == [f"{path} imports {imported}"]


def test_imports_that_cannot_be_followed_are_refused():
    for source in ("from . import events", "import importlib\nimportlib.import_module(name)"):
        with pytest.raises(ValueError, match="line"):
            imports(source)


def test_a_circle_is_noticed():
    files = MADE_UP | {"training/events.py": "from training import trainer"}
    assert sorted(cycle_in(files)) == ["training/events.py", "training/trainer.py"]


def test_a_flag_in_an_error_is_noticed_and_one_in_a_docstring_is_not():
    source = '''
"""A module that main.py gives its --seed."""

def f(seed):
    """Check what --seed says."""
    if seed < 0:
        raise ValueError(f"{seed} is too small; give another --seed={0}")
    subprocess.run(["git", "describe", "--dirty"])
    # ------------------------------------------------
    return "a -- b"
'''
    assert flags_named(source) == [" is too small; give another --seed="]
    assert flags_named('run(["ls", "--all"])') == ["--all"]


@pytest.mark.parametrize(
    "source", ["x = datetime.UTC", "from datetime import UTC", "import tomllib", "ExceptionGroup"]
)
def test_a_part_of_a_later_standard_library_is_noticed(source):
    assert len(names_used(source) & NEWER_THAN_3_10) == 1
    assert not names_used("import datetime\ndatetime.timezone.utc") & NEWER_THAN_3_10


def test_names_of_modules_are_those_under_which_they_are_imported():
    assert module_of("utils.py") == "utils"
    assert module_of("training/events.py") == "training.events"
    assert module_of("training/__init__.py") == "training"
    assert module_of("benchmarks/timing.py") == "timing"
    assert room_of("utils.py") == "utils" and room_of("training/events.py") == "training"
