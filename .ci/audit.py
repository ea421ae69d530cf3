"""Looks for known vulnerabilities in the locked packages, by the advisories of PyPI: `make audit`.

Exit status: 0 if there are none, or the advisories are out of reach, which is told; 1 if there are some.
"""

import json
import subprocess
import sys
import urllib.request

LOCKS = ("requirements/cpu.txt", "requirements/gpu.txt")
# One release with a known vulnerability: a mirror without advisories answers too, and would find nothing anywhere.
KNOWN = "https://pypi.org/pypi/idna/3.6/json"


def why_not() -> str:
    """Why the advisories cannot be had; empty if they can."""
    try:
        with urllib.request.urlopen(KNOWN, timeout=15) as response:
            advisories = json.load(response)["vulnerabilities"]
    except (OSError, ValueError, KeyError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "" if advisories else f"{KNOWN} has no advisories"


def main() -> int:
    if reason := why_not():
        print(f"not audited: no access to the advisories of pypi.org ({reason})")
        return 0
    found = 0
    for lock in LOCKS:
        print(f"{lock}:", flush=True)
        command = [sys.executable, "-m", "pip_audit", "--requirement", lock, "--no-deps", "--disable-pip",
                   "--progress-spinner", "off"]  # fmt: skip
        found |= subprocess.run(command, check=False).returncode
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
