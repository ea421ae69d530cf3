"""Builds the site: pages where they are in the repository, so that their links lead to the same files.

    python website/build.py        # needs mkdocs-material: `make site` brings it; the site is in build/site

A link that leads nowhere, a page that is not in the menu, and an anchor that does not exist end it with status 1.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = REPOSITORY / "build/site-pages"
SITE = REPOSITORY / "build/site"
MENU = REPOSITORY / "website/mkdocs.yml"
LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)


def pages_of_the_menu() -> list[Path]:
    return [REPOSITORY / name for name in re.findall(r"^ +- .*: (\S+\.md)$", MENU.read_text(), re.M)]


def linked_files(page: Path) -> list[Path]:
    """What a page links to or shows that is no page: records, pictures, fleet files."""
    targets = LINK.findall(CODE.sub("", page.read_text()))
    paths = [(page.parent / target).resolve() for target in targets if "://" not in target]
    return [path for path in paths if path.suffix != ".md" and path.is_file()]


def collect() -> None:
    """Copy the pages, and the files that they link to, to where they are in the repository, below `PAGES`."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = pages_of_the_menu()
    wanted = {*pages, *(file for page in pages for file in linked_files(page)), REPOSITORY / "website/extra.css"}
    wanted |= set((REPOSITORY / "docs").rglob("*.md"))  # one that is missing in the menu is told
    for path in wanted:
        target = PAGES / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main() -> int:
    collect()
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(MENU)]
    # The variable leaves out what mkdocs-material says of its end; see website/requirements.txt.
    return subprocess.run(build, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
