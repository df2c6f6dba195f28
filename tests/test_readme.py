"""The README and the pages that it leads to agree with each other and with the package."""

import re
from pathlib import Path

import pytest

import geomkit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("[dgt]*/*/README.md"))]


def headings(page):
    """Return the headings of a Markdown page as GitHub writes them in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_every_name_of_the_readme_is_public():
    names = set(re.findall(r"\bgk\.(\w+)", README))
    assert len(names) > 10
    assert names <= set(geomkit.__all__)


def test_two_commands_do_the_setup_and_the_readme_is_short():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert commands[0].endswith("geomkit tour")
    assert re.search(r"pytest [^&]*$", commands[1])
    assert len(README.splitlines()) <= 150


def test_the_citation_names_this_version():
    assert f"\nversion: {geomkit.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
