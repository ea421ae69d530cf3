"""What several tests share: README.md has a line for each module."""

import pytest

pytest.register_assert_rewrite(__name__)  # before its modules are imported: else their assertions fail without a word
