"""What several tests share: README.md has a line for each module."""

from pathlib import Path

import pytest

# Before its modules are imported: else their assertions fail without a word of what they compared.
pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
)
