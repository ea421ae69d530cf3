"""Runs the tests that failed in the last run of pytest once more, each alone; for `.ci/run`.

Exits with 1 when one fails again, when something else than a test failed, or when so many failed that chance is no
explanation. Prints `passed on the second try: NAME` for each of the others.
"""

import json
import subprocess
import sys
from pathlib import Path

LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")
MOST = 5


def main() -> int:
    names = sorted(json.loads(LAST_FAILED.read_text())) if LAST_FAILED.exists() else []
    if not 0 < len(names) <= MOST or not all("::" in name for name in names):
        print(f"no second try: {len(names)} tests failed, or what failed is no test; up to {MOST} are tried again")
        return 1
    passed = []
    for name in names:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--exhaustive", name]
        print(f"second try: {name}", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            print(f"failed twice: {name}")
            return 1
        passed.append(name)
    for name in passed:
        print(f"passed on the second try: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
