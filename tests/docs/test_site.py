"""Pages made from the code are current, and the site is built without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness.places import DOCS, REPOSITORY

WEBSITE = REPOSITORY / "website"
UV = Path(sys.executable).parent / "uv"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import reference; print(json.dumps(reference.pages()))"
    done = subprocess.run(
        [sys.executable, "-c", code, WEBSITE], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    pages: dict[str, str] = yaml.safe_load(done.stdout.splitlines()[-1])
    return pages


@pytest.mark.parametrize("name", sorted(path.name for path in (DOCS / "reference").iterdir()))
def test_the_reference_is_what_the_code_says(made: dict[str, str], name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == made[name], "run python website/reference.py"


def test_every_page_is_in_the_menu_once() -> None:
    menu = re.findall(r": (\S+\.md)$", (WEBSITE / "mkdocs.yml").read_text(), re.M)
    pages = {
        str(path.relative_to(REPOSITORY)) for path in (*DOCS.rglob("*.md"), *(REPOSITORY / "examples").rglob("*.md"))
    }
    assert len(menu) == len(set(menu))
    assert pages <= set(menu)


def test_pictures_are_named_by_a_page_and_have_a_title() -> None:
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    for picture in (DOCS / "pictures").iterdir():
        assert f"(pictures/{picture.name})" in text
        assert "<title>" in picture.read_text()


@pytest.mark.exhaustive
def test_the_site_is_built_without_a_warning() -> None:
    wanted = ["--with-requirements", WEBSITE / "requirements.txt"]
    words = [UV, "run", "--quiet", "--no-project", "--python", sys.executable, *wanted, "python", WEBSITE / "build.py"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr + done.stdout
    site = REPOSITORY / "build/site"
    assert (site / "index.html").exists()
    page = (site / "docs/concepts.html").read_text()
    assert "pictures/move.svg" in page
    loaded = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(https?://[^"' >]+)""", page)
    assert [url for url in loaded if "canonical" not in url] == []  # nothing comes from elsewhere
