"""How a load is spread over processes."""

import pytest

from kervan.bench.drive import check_file_limit
from kervan.errors import ConfigError


def test_streams_beyond_the_file_limit_are_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"ulimit -n \d+.*--processes \d+"):
        check_file_limit(10**9, 1)
