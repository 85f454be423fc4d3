"""The pages are true: every block and command runs, every quotation and link is right."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import docs_blocks
import pytest
from docs_blocks import LANGUAGES, ROOT, Block, blocks_of
from markdown_it import MarkdownIt

TEXTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench/README.md", ROOT / "data/README.md"]
)
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PAGES = [page for page in TEXTS if page.name != "CHANGELOG.md"]
LONG = ("equations", "glossary", "inspect", "life-of-a-run", "parameters", "presets", "recipes", "tour")
LONG_PAGES = {"README.md", *(f"docs/{name}.md" for name in LONG)}
"""Pages whose blocks train for more than some seconds."""
SECONDS_PER_PAGE, SECONDS_PER_CELL = 1800, 1800


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_to_run() -> list:
    return [
        pytest.param(
            page, block.place, id=f"{name_of(page)}:{block.place}",
            marks=pytest.mark.slow if name_of(page) in LONG_PAGES else (),
        )
        for page in PAGES
        for block in blocks_of(page.read_text("utf-8"))
        if is_run(block)
    ]  # fmt: skip


def is_run(block: Block) -> bool:
    return bool(block.mark == "output" or block.commands or (block.kind == "python" and not block.mark))


# blocks that are run ------------------------------------------------------------------------------------


@functools.cache
def outcomes_of(page: Path) -> dict[str, list[str]]:
    """Run a page in a new folder and a separate process -> outcome by place."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results, cwd = Path(folder) / "results.json", Path(folder) / "reader"
        cwd.mkdir()
        command = [sys.executable, str(ROOT / "tests/docs_blocks.py"), str(page), str(results)]
        try:
            done = subprocess.run(
                command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", errors="replace",
                timeout=SECONDS_PER_PAGE, env=docs_blocks.environment(),
            )  # fmt: skip
            end = f"exit code {done.returncode}\n{done.stderr[-3000:]}"
        except subprocess.TimeoutExpired:
            end = f"the page takes more than {SECONDS_PER_PAGE} seconds"
        found = json.loads(results.read_text("utf-8")) if results.exists() else {}
        return {**found, "end": ["failed", end]}


@pytest.mark.parametrize(("page", "place"), blocks_to_run())
def test_block(page, place):
    """It runs after all blocks before it and prints the output that the page shows."""
    judge(page, place)


def judge(page: Path, place: str) -> None:
    """Pass, fail or skip, according to the block's outcome."""
    found = outcomes_of(page)
    if place not in found and any(outcome == "failed" for at, (outcome, _) in found.items() if at != "end"):
        pytest.skip("a block before it failed")
    outcome, reason = found.get(place, found["end"])
    if outcome == "skipped":
        pytest.skip(reason)
    assert outcome == "passed", f"{page.name}, the block of line {place}:\n{reason}"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook(run_notebook, notebook):
    """Every cell runs, in order, in a new kernel."""
    if "matplotlib" in notebook.read_text("utf-8"):
        pytest.importorskip("matplotlib")
    run_notebook(notebook)


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Run a notebook in a separate folder, without keeping its outputs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # without the user's kernels and settings, and without a writable home folder
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONUTF8", "1")

    def run(notebook: Path) -> None:
        place = {"metadata": {"path": str(tmp_path)}}
        client = nbclient.NotebookClient(
            nbformat.read(notebook, 4), timeout=SECONDS_PER_CELL, kernel_name="python3", resources=place
        )
        client.execute()

    return run


# blocks that are not run --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_known_kind(page):
    """So that none is silently left out."""
    assert faults_of(page.read_text("utf-8")) == []


def faults_of(text: str) -> list[str]:
    faults, ran = [], False
    for block in blocks_of(text):
        where = f"line {block.line}: "
        if block.kind not in LANGUAGES | {"indented", "inline"}:
            faults.append(
                f"{where}a block of {block.kind or 'no language'}; known: {', '.join(sorted(LANGUAGES))}"
            )
        if block.kind == "indented" and re.search(r"^(import |from \S+ import |>>> )", block.text, re.MULTILINE):
            faults.append(f"{where}Python in an indented block is not run; fence it")
        if block.mark == "output" and not (ran and block.kind in ("text", "indented")):
            faults.append(f"{where}output is a text after a block that runs")
        if block.mark and block.mark != "output" and not block.mark.startswith("code: "):
            faults.append(f"{where}no such mark: {block.mark!r}")
        ran = block.mark != "output" and is_run(block)
    return faults


def quotations() -> list:
    return [
        pytest.param(block, id=f"{name_of(page)}:{block.line}")
        for page in PAGES
        for block in blocks_of(page.read_text("utf-8"))
        if block.mark.startswith("code:")
    ]


@pytest.mark.parametrize("block", quotations())
def test_quotation(block):
    """Code that a page quotes is in the named file, word for word."""
    path = ROOT / block.mark.removeprefix("code:").strip()
    assert path.is_file(), f"{path} is not there"
    assert is_quoted(block.text, path.read_text("utf-8")), f"not in {path.name} word for word:\n{block.text}"


def is_quoted(quotation: str, source: str) -> bool:
    return "\n" + quotation.strip("\n") + "\n" in f"\n{source}\n"


# links --------------------------------------------------------------------------------------------------


def tokens_of(path: Path) -> list:
    """The Markdown of a page or a notebook, parsed: blocks, and what is in each."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [one for token in MarkdownIt().parse(text) for one in (token, *(token.children or ()))]


def links_of(path: Path) -> list[str]:
    attributes = [token.attrs.get("href") or token.attrs.get("src") for token in tokens_of(path)]
    return [unquote(link) for link in attributes if link]


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page, and those that it names itself."""
    anchors, tokens = set(), tokens_of(path)
    for before, heading in pairwise(tokens):
        if before.type == "heading_open":
            plain = "".join(one.content for one in heading.children).lower()
            name = anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            number = 0
            while name in anchors:
                number += 1
                name = f"{anchor}-{number}"
            anchors.add(name)
    html = "".join(token.content for token in tokens if token.type.startswith("html_"))
    return anchors | set(re.findall(r'<a (?:id|name)="([^"]+)"', html))


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in links_of(path):
        if re.match(r"[a-z]+:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (path.parent / where).resolve() if where else path
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and (target.suffix not in (".md", ".ipynb") or anchor not in anchors_of(target)):
            broken.append(f"{link}: no such heading")
    return broken


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=name_of)
def test_links_have_targets(path):
    assert broken_links(path) == []


def test_the_index_has_every_page():
    index = ROOT / "docs/README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links_of(index)}
    pages = {page for page in [*TEXTS, *NOTEBOOKS] if ROOT / "docs" in page.parents} - {index}
    assert sorted(map(name_of, pages - linked)) == []


# the tables ---------------------------------------------------------------------------------------------


def all_commands() -> list[str]:
    found = [block for page in PAGES for block in blocks_of(page.read_text("utf-8"))]
    return [part.strip() for block in found for command in block.commands for part in command.text.split("&&")]


@pytest.mark.parametrize("beginning", [row[0] for row in (*docs_blocks.SHORTER, *docs_blocks.HELP)])
def test_every_row_of_shorter_commands_is_used(beginning):
    pattern = rf"python -m {re.escape(beginning)}{'' if beginning.endswith('.') else '( |$)'}"
    assert any(re.match(pattern, command) for command in all_commands())


@pytest.mark.parametrize("text", [row[0] for row in docs_blocks.SHORTER_PYTHON])
def test_every_row_of_shorter_python_is_used(text):
    pages = [block for page in PAGES for block in blocks_of(page.read_text("utf-8"))]
    assert any(text in block.text for block in pages if block.kind == "python")


# the checks themselves ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a page made up for a test, in this process -> the outcomes."""
    (tmp_path / "reader").mkdir()
    monkeypatch.chdir(tmp_path / "reader")
    monkeypatch.setattr(docs_blocks, "_started", {"baby_xp", "bench"})
    monkeypatch.syspath_prepend(ROOT)

    def outcomes(text: str) -> dict[str, list[str]]:
        page, results = tmp_path / "page.md", tmp_path / "results.json"
        page.write_text(text, "utf-8")
        docs_blocks.run_page(page, results)
        return json.loads(results.read_text("utf-8"))

    return outcomes


def test_blocks_share_names_and_a_folder(run):
    text = (
        "```python\nx = 2\nopen('a', 'w').close()\n```\n\n"
        '```sh\npython -c \'open("b", "w").close()\'\n```\n\n'
        "```python\nimport os\nprint(x, sorted(os.listdir()))\n```\n<!-- output -->\n```text\n2 ['a', 'b']\n```\n"
    )
    assert {outcome for outcome, _ in run(text).values()} == {"passed"}
    assert len(run(text)) == 4


PASSED, NETWORK = ["passed", ""], ["skipped", "needs a network"]
SKIPPING, OUTPUT = "```sh\npip install nothing\n```\n", "<!-- output -->\n```text\n1\n```\n"


@pytest.mark.parametrize(("text", "outcomes"), [
    ("Say `pip install x` or `python -V`.\n", {"1": NETWORK, "1b": PASSED}),
    (f"{SKIPPING}\n    pip install . && python -c 'print(1)'\n", {"2": NETWORK, "5": PASSED}),
    # the output of a block that is skipped is not compared with what some block before that printed
    (f"```python\nprint(2)\n```\n\n{SKIPPING}{OUTPUT}", {"2": PASSED, "6": NETWORK, "10": NETWORK}),
], ids=["two in a line", "two joined", "output"])  # fmt: skip
def test_each_block_has_a_verdict(run, text, outcomes):
    assert run(text) == outcomes


def test_commands_may_continue_on_the_next_line():
    text = "```sh\n# first\npython a.py \\\n  --b\npython -m c [--d 1]\n            [--e]\n\npython f.py\n```\n"
    (block,) = blocks_of(text)
    assert [(command.line, command.text) for command in block.commands] == [
        (3, "python a.py  --b"), (5, "python -m c [--d 1] [--e]"), (8, "python f.py"),
    ]  # fmt: skip


def test_an_error_names_the_line_of_the_page_and_ends_the_page(run):
    outcomes = run("Words.\n\n```python\nx = 1\nx / 0\n```\n\n```python\nx = 2\n```\n")
    assert list(outcomes) == ["4"]
    assert outcomes["4"][0] == "failed"
    assert "line 5, in <module>\n    x / 0" in outcomes["4"][1]
    assert "ZeroDivisionError" in outcomes["4"][1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```python\nprint(1.25)\n```\n<!-- output -->\n```text\n1.23\n```\n", "what is printed is '1.25'"),
        ("```python\nraise SystemExit\n```\n", "SystemExit"),
        ("```sh\npython -c 'import sys; sys.exit(3)'\n```\n", "exit code 3"),
        ("```sh\nmake\n```\n", "no rule for the program"),
        ("```console\n$ python -c 'print(1)'\n2\n```\n", "the page says '2'"),
        ("Words `python -c 'x'`.\n", "NameError"),
        ("    $ python -c 'x'\n", "NameError"),
        ("    python -m baby_xp babble    no such command\n", "unknown command"),
        ("```sh\npython -m bench.train --fast\n```\n", "does not know --fast"),
    ],
)
def test_failing_blocks_are_reported(run, text, reason):
    outcome, said = next(reversed(run(text).values()))
    assert outcome == "failed"
    assert reason in said


def test_notebooks_run_and_fail(run_notebook, tmp_path):
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for source in ("x = 1\nopen('here', 'w').close()", "assert x == 1\ny")
    ]
    notebook = tmp_path / "one.ipynb"
    notebook.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}), "utf-8")
    with pytest.raises(Exception, match="name 'y' is not defined"):
        run_notebook(notebook)
    assert (tmp_path / "here").exists()


def test_an_outcome_becomes_a_verdict(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "    pip install x\n\n```python\nx = 1\n```\n\n```python\ny\n```\n\n```python\nx = 1\n```\n", "utf-8"
    )
    judge(page, "4")
    with pytest.raises(pytest.skip.Exception, match="needs a network"):
        judge(page, "1")
    with pytest.raises(AssertionError, match="NameError"):
        judge(page, "8")
    with pytest.raises(pytest.skip.Exception, match="a block before it failed"):
        judge(page, "12")


def test_a_page_that_kills_its_process_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport os\nos._exit(7)\n```\n", "utf-8")
    with pytest.raises(AssertionError, match="exit code 7"):
        judge(page, "2")


SKIPPED = [
    ("python -m baby_xp estimate 24-months", "needs shakespeare.txt"),
    ("python -m baby_xp train nanogpt-cpu", "needs shakespeare.txt"),
    ('baby_xp.train("nanogpt-cpu")', "needs shakespeare.txt"),
    ("python -m baby_xp finetune last --data shakespeare", "needs shakespeare.txt"),
    ("python -m baby_xp train nanogpt-cpu --data my.txt", ""),
    ("python -m baby_xp train", ""),
    ("python -m baby_xp train --backend cupy", "needs a GPU"),
    ('registry.load("cupy"); baby_xp.train(backend="cupy")', "needs a GPU"),
    ("nvidia-smi", "needs a GPU"),
    ("pip install -e .", "needs a network"),
    ("python -m pytest -m gpu", "these are the tests"),
    ("python -m baby_xp train --backend no_such_library", ""),
    ("python -m baby_xp backends", ""),
]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    docs_blocks.no_gpu.cache_clear()
    yield
    docs_blocks.no_gpu.cache_clear()


@pytest.mark.parametrize(("text", "reason"), SKIPPED)
def test_the_rules_for_what_is_skipped(monkeypatch, no_gpu, text, reason):
    monkeypatch.delenv("BABY_XP_DATA", raising=False)
    found = docs_blocks.skipped(text)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_blocks_that_need_a_missing_library_are_skipped(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "jax") else find(name))
    assert docs_blocks.skipped("python -m baby_xp train --backend torch") == "needs torch"
    assert docs_blocks.skipped("import jax") == "needs jax"


@pytest.mark.parametrize("holds", [True, False])
def test_shakespeare_is_available_if_the_folder_has_it(tmp_path, monkeypatch, holds):
    monkeypatch.setenv("BABY_XP_DATA", str(tmp_path))
    if holds:
        (tmp_path / "shakespeare.txt").touch()
    assert bool(docs_blocks.skipped("python -m baby_xp train nanogpt-cpu")) != holds


def test_commands_are_shortened(tmp_path, monkeypatch):
    monkeypatch.setenv("BABY_XP_DATA", str(tmp_path))
    (tmp_path / "shakespeare.txt").touch()
    (train,) = docs_blocks.plans("python -m baby_xp train nanogpt-cpu --num-steps 5000")
    assert train.arguments[train.arguments.index("--num-steps") + 1] == "20"
    assert train.changed
    (equations,) = docs_blocks.plans("python -m baby_xp train equations")
    assert equations.arguments == ["-m", "baby_xp", "train", "equations"]
    (other,) = docs_blocks.plans("python -m baby_xp train equations-2")
    assert "--num-steps" in other.arguments
    (generate,) = docs_blocks.plans("python -m baby_xp generate RUN --greedy  # until it stops")
    assert generate.arguments == ["-m", "baby_xp", "generate", "last", "--greedy"]


@pytest.mark.slow
def test_files_that_a_page_expects_are_made(run):
    text = "```sh\npython -c 'open(\"my.txt\")'\n```\n\n    python -m baby_xp evaluate RUN   measures\n"
    assert {outcome for outcome, _ in run(text).values()} == {"passed"}


AGREE = [
    ("a  b 3", "a b   3"), ("loss 1.23", "loss 1.2349"), ("loss 1.23", "loss 1.22"),
    ("error 3.1e-11", "error 8e-12"), ("first\n...\nlast 1", "first\nsecond\nthird\nlast 1"),
    ("first\n...", "first\nsecond"), ("[ 0.5 -0.1]", "[0.5  -0.1]"), ("[0. 1.]", "[-0.  1.]"),
]  # fmt: skip
DIFFER = [
    ("loss 1.23", "loss 1.2"), ("loss 1.23", "lost 1.23"), ("3 steps", "4 steps"),
    ("error 3.1e-11", "error 2e-6"), ("error 3.1e-5", "error 3.4e-5"), ("[1.]", "[2.]"), ("a", "a\nb"),
    ("a\nb", "a"), ("a\n...\nc", "a\nb"), ("[0.5 0.1]", "[0.5 -0.1]"),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "found"), [*AGREE, *DIFFER])
def test_outputs_agree_or_differ(expected, found):
    assert bool(docs_blocks.difference(expected, found)) == ((expected, found) in DIFFER)


@pytest.mark.parametrize(
    "text",
    [
        "```\nx\n```\n",
        "```ruby\nx\n```\n",
        "    import baby_xp\n    baby_xp.train()\n",
        "<!-- output -->\n```text\n1\n```\n",
        "```python\nx\n```\n<!-- output -->\n```python\n1\n```\n",
        "<!-- do not run -->\n```python\nx\n```\n",
    ],
)
def test_blocks_that_are_not_allowed(text):
    assert len(faults_of(text)) == 1


def test_blocks_that_are_allowed():
    text = "```python\nx\n```\n\n<!-- output -->\n```text\n1\n```\n\n<!-- code: a.py -->\n```python\nx\n```\n"
    assert faults_of(text) == []
    assert [is_run(block) for block in blocks_of(text)] == [True, True, False]
    text = "```sh\npython -V\n```\n\n    python -V\n\nOr `python -V`.\n\n    a tree\n\n```text\npython -V\n```\n"
    assert [is_run(block) for block in blocks_of(text)] == [True, True, True, False, False]


def test_quotations_are_whole_lines():
    source = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert is_quoted("def f():\n    return 1\n", source)
    assert not is_quoted("def f():\n    return 2\n", source)
    assert not is_quoted("def f():\n    return", source)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One two\n\n## `code` and *more*: yes\n\n# One two\n", "utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two) [c](other.md#code-and-more-yes) [d](other.md#one-two-1)\n"
        "[e](https://example.org) `[f](nowhere)` [g](#here)\n\n# Here\n\n"
        "[h](nowhere.md) [i](other.md#three) [j](#there) ![k](picture.png)\n",
        "utf-8",
    )
    assert broken_links(page) == [
        "nowhere.md: no such file", "other.md#three: no such heading", "#there: no such heading",
        "picture.png: no such file",
    ]  # fmt: skip


def test_flags_replace_existing_ones():
    words = ["train", "--num-steps", "5000", "--lr=1", "--greedy"]
    assert docs_blocks.with_flags(words, {"--num-steps": "2", "--lr": "3", "--no-measure": None}) == [
        "train", "--greedy", "--num-steps", "2", "--lr", "3", "--no-measure",
    ]  # fmt: skip
