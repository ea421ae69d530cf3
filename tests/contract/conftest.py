"""What contract tests share."""

from pathlib import Path

import pytest
from harness.vllm_sources import TREES, release


@pytest.fixture(params=TREES, ids=[release(tree) for tree in TREES], scope="module")
def tree(request: pytest.FixtureRequest) -> Path:
    return request.param
