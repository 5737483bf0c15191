"""The pages of the documentation: their links, their code, and what they say about the program."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "tour.ipynb",
    *sorted((ROOT / "assets").glob("model_card_*.md")),
    *sorted((ROOT / "pretrained").glob("*/README.md")),
    *sorted((ROOT / "data").glob("*/README.md")),
]
# Phrases that read like a translation; no page may use them.
BANNED = ("anew", "goes on", "one's own", "for want of", "made of", "stands twice", "beside")


def text_of(page):
    """The text of a page; of a notebook, that of its cells of text."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def prose_of(page):
    """The text of a page without code, tables and links."""
    lines = text_of(page).splitlines()
    lines = [line for line in lines if not line.startswith(("    ", "|", "```"))]
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", "\n".join(lines))


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def links_of(page):
    """The targets of all links and pictures of a page, also of the style [text]: target."""
    text = re.sub(r"^(    .*)$", "", text_of(page), flags=re.MULTILINE)
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    html = re.findall(r'(?:src|href)="([^"]+)"', text)
    return inline + html + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_every_page_leads_to_a_file_that_is_tracked_and_to_a_heading(page):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = set(subprocess.check_output(command, cwd=ROOT, text=True).splitlines())
    for target in links_of(page):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        name = path.relative_to(ROOT).as_posix()
        assert name in tracked or any(other.startswith(f"{name}/") for other in tracked), target
        assert not anchor or anchor in anchors_of(path), target


def names_defined_in(path):
    """Return the names of all functions, classes and variables of a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_a_link_from_a_name_leads_to_the_module_that_defines_it():
    links = [
        (page, name, target)
        for page in PAGES
        for name, target in re.findall(r"\[`([\w.]+)`\]\(([\w/.]+\.py)\)", text_of(page))
    ]
    assert len(links) > 15
    for page, name, target in links:
        assert name.split(".")[-1] in names_defined_in(page.parent / target), (name, target)


def test_pages_and_links_are_found():
    assert len(PAGES) > 15
    assert len(links_of(README)) > 25 and "docs/data.md#predicting-image-files" in links_of(README)
    assert "how-it-works.md" in links_of(ROOT / "docs" / "tour.ipynb")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_written_in_plain_words_and_lines_of_readable_length(page):
    prose = prose_of(page)
    for phrase in BANNED:
        assert not re.search(rf"\b{phrase}\b", prose, re.IGNORECASE), phrase
    for line in text_of(page).splitlines():
        # Neither tables nor pictures nor the rows of a code example can be wrapped.
        if not line.startswith(("|", "!", "<", "    ", "[")) and "](" not in line:
            assert len(line) <= 130, line


def test_the_readme_is_short_and_in_its_order():
    text = text_of(README)
    assert text.count("\n") <= 200
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    order = ["Quick start", "Results", "What it does", "Your own data", "From Python"]
    order += ["How it works", "Differences from the paper", "Known limits", "Documentation"]
    assert headings == order
    before, _, _ = text.partition("## Quick start")
    assert "assets/sweep.gif" in before and "Not tested on a GPU" in before
    for page in (ROOT / "docs").iterdir():
        assert f"(docs/{page.name})" in text, page


def test_every_page_of_the_docs_begins_with_what_it_answers():
    for page in (ROOT / "docs").glob("*.md"):
        title, blank, first, *_ = text_of(page).splitlines()
        assert title.startswith("# ") and blank == "" and re.match(r"[A-Z]\w+ ", first), page


def code_of(page, beginning):
    """The code example of a page that begins with a line."""
    text = text_of(page)
    start = text.index(f"    {beginning}")
    lines = text[start:].split("\n")
    code = []
    for line in lines:
        if line and not line.startswith("    "):
            break
        code.append(line[4:])
    return "\n".join(code)


def test_the_examples_in_python_run_as_written_and_print_what_they_say(monkeypatch, capsys):
    first, second = code_of(README, "import numpy as np"), code_of(README, "import keras")
    expected = re.search(r"print\(.*\) +# (.*)$", first, re.MULTILINE)[1]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(f"{first}\n{second}", names)
    assert capsys.readouterr().out == f"{expected}\n"
    assert names["classifier"].output_shape == (None, 10)


def test_the_figures_of_the_readme_are_those_of_the_results_and_of_the_benchmarks():
    text = text_of(README)
    results, performance = (text_of(ROOT / "docs" / f"{n}.md") for n in ("results", "performance"))
    table = text[text.index("| task | epochs |") :].split("\n\n")[0].splitlines()[2:]
    errors = [row.split("|")[3].split("(")[0].strip() for row in table]
    assert len(errors) > 2 and all(f"| {error} |" in results for error in errors)
    headline = re.search(r"^\| MNIST, test error \| (.*?)%", text, re.MULTILINE)[1]
    pairs = re.search(r"^\| MultiMNIST.*? \| (.*?)%", text, re.MULTILINE)[1]
    assert {headline, pairs} <= set(errors)
    speed = re.search(r"^\| training step.*$", text, re.MULTILINE)[0]
    compared = performance[performance.index("| train step, with deformation,") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in compared.split("\n")]
    milliseconds = {name: ms for _, name, ms, *_ in rows}
    best = "PyTorch, channels_last, einsum, "
    names = "this tool, float32", "PyTorch, plain", f"{best}torch.compile"
    numbers = [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?= ms|, in| \|)", speed)]
    assert [milliseconds[name] for name in (*names, f"{best}bfloat16, torch.compile")] == numbers
