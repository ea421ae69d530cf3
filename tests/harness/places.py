"""Where the files that tests read are."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
BENCHMARKS = REPOSITORY / "benchmarks"
MODELS = BENCHMARKS / "models"
TRACES = BENCHMARKS / "traces"
DOCS = REPOSITORY / "docs"
DATA = TESTS / "data"
