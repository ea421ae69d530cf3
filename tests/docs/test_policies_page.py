"""docs/policies.md quotes its record."""

import json
import re

import policies
from harness.places import REPOSITORY

PAGE = (REPOSITORY / "docs" / "policies.md").read_text()


def test_the_table_of_loads_is_that_of_its_record() -> None:
    match = re.search(r"^<!-- policies: (\S+) -->\n((?:\|.*\n)+)", PAGE, re.M)
    assert match is not None
    rows = json.loads((REPOSITORY / f"benchmarks/records/{match[1]}.json").read_text())["rows"]
    loads = list(dict.fromkeys(row["load"] for row in rows))
    assert match[2].strip().splitlines() == policies.table(rows, loads)
