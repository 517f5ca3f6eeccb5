"""The site: it builds without a warning, calls nobody, and holds every verb and every name of the package."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import leanvit
from common import ROOT
from leanvit.cli import VERBS

LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
"""What a browser fetches by itself, by element."""


class Page(HTMLParser):
    """Addresses that a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        # rel="canonical" and the like only name an address.
        if tag in LOADS and (tag != "link" or given.get("rel") in ("stylesheet", "icon", "preload", "preconnect")):
            address = given.get(LOADS[tag])
            self.loads += [address] if address else []


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, "--site-dir", str(folder))
    assert built.returncode == 0, built.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    # Where a missing page stands isn't known, so that 404.html names everything from the root.
    pages = sorted(page for page in site.rglob("*.html") if page.name != "404.html")
    assert len(pages) > len(VERBS)
    for page in pages:
        for address in Page(page.read_text(encoding="utf-8")).loads:
            assert not re.match(r"(https?:)?//", address), f"{page.name}: {address}"
            if not address.startswith("data:"):
                assert (page.parent / address.partition("?")[0]).is_file(), f"{page.name}: {address}"


def test_the_reference_has_all_names_and_flags(site: Path) -> None:
    api = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in leanvit.__all__:
        if not name.startswith("__"):
            assert re.search(rf'id="leanvit[\w.]*\.{name}"', api), name
    verbs = (site / "reference" / "verbs.html").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"usage: leanvit {verb}" in verbs, verb
    assert "--keep-tokens" in verbs


def test_notebooks_are_shown_with_what_they_draw(site: Path) -> None:
    links = re.findall(r'href="(examples/notebooks/\w+\.html)"', (site / "notebooks.html").read_text(encoding="utf-8"))
    assert len(links) == len(list((ROOT / "examples" / "notebooks").glob("*.ipynb")))
    for link in links:
        page = (site / link).read_text(encoding="utf-8")
        assert 'src="data:image/png;base64,' in page
        assert "The notebook itself" in page


def test_a_link_to_nothing_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[no page](nowhere.md)\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\n", encoding="utf-8")
    built = build(tmp_path)
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
