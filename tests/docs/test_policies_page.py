"""docs/policies.md quotes its record."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import policies
import pytest
import spot_policies
from harness.places import REPOSITORY

PAGE = (REPOSITORY / "docs" / "policies.md").read_text()


@pytest.mark.parametrize(("name", "table"), [("policies", policies.table), ("spot policies", spot_policies.table)])
def test_the_table_is_that_of_its_record(
    name: str, table: Callable[[Sequence[dict[str, Any]], Sequence[str]], list[str]]
) -> None:
    match = re.search(rf"^<!-- {name}: (\S+) -->\n((?:\|.*\n)+)", PAGE, re.M)
    assert match is not None
    rows = json.loads((REPOSITORY / f"benchmarks/records/{match[1]}.json").read_text())["rows"]
    loads = list(dict.fromkeys(row["load"] for row in rows))
    assert match[2].strip().splitlines() == table(rows, loads)
