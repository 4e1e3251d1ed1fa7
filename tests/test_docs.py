"""The documentation: links lead somewhere, commands exist, every page is listed, and generated pages are up to date."""

import re
import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from repflow.monitor.cli import app
from tests import quantity_pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to a file, or a heading, that is not there."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        there = target.is_file() and target.resolve().is_relative_to(ROOT.resolve())
        if not there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_links_that_lead_nowhere_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A_b & c!\n[](page.md#a_b--c) [](#a_b--c) [](#b) [](other.md) [](../..) [](https://x.org)\n")
    assert broken_links(page) == ["#b", "other.md", "../.."]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path):
    assert broken_links(page) == []


def test_the_index_lists_every_page():
    links = re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8"))
    listed = {str((DOCS / link).relative_to(DOCS)) for link in links}
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"}


def test_quantities_have_their_pages_and_stand_in_the_readme():
    texts = {page.name: page.read_text(encoding="utf-8") for page in quantity_pages.FOLDER.iterdir()}
    assert texts == quantity_pages.pages()
    assert set(re.findall(r"\(docs/quantities/(\w+\.md)\)", README)) == set(texts)


def commands(page: Path) -> Iterator[tuple[str, ...]]:
    """Command and arguments of every `repflow …` of a page, in code of its own or within a sentence."""
    text = page.read_text(encoding="utf-8")
    blocks = (body for language, body in FENCE.findall(text) if not language)
    lines = chain(chain.from_iterable(map(str.splitlines, blocks)), re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))
    for line in lines:
        if found := re.search(r"(?:^|\s)repflow ([a-z].*)", line):
            yield tuple(shlex.split(found[1], comments=True))


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=ids)
def test_commands_exist_with_their_options(page: Path):
    for name, *arguments in commands(page):
        assert name in COMMANDS
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        known = set(chain.from_iterable(parameter.opts for parameter in command.params))
        assert {argument for argument in arguments if re.match(r"-+[a-z]", argument)} <= known | {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_is_told_in_the_docs(name: str):
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output
    # The README tells `repflow demo` as make demo.
    assert f"repflow {name}" in README or name == "demo"


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)|`make (\w+)", README, re.MULTILINE))
    assert {first or second for first, second in named} <= targets


def test_the_picture_comes_first_and_loops_are_those_that_are_run():
    assert README.splitlines()[2].startswith("![")
    loops = FENCE.findall((DOCS / "loops.md").read_text(encoding="utf-8"))
    attach = README.partition("## Attach it")[2].partition("\n## ")[0]
    shown = [body for language, body in FENCE.findall(attach) if language == "python"]
    assert len(shown) == 3  # tests/test_examples.py runs every loop of docs/loops.md
    assert all(("python", body) in loops for body in shown)
