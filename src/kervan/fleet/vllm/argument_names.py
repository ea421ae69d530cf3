"""Names of the engine arguments that the installed vLLM knows, read from its source.

Importing vLLM takes 5 to 25 s; parsing two files takes 0.1 s, and `kervan up` can refuse a misspelt name at once.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from kervan.errors import ConfigError

# (file, classes whose annotated fields are arguments)
SOURCES = (
    ("engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs")),
    ("entrypoints/launchers/cli_args.py", ("BaseFrontendArgs", "FrontendArgs")),
    ("entrypoints/openai/cli_args.py", ("BaseFrontendArgs", "FrontendArgs")),
)


def installed_vllm() -> Path:
    """The directory of the installed vLLM.

    Raises: ConfigError when there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ConfigError("vLLM is not installed here; install it: pip install 'kervan[gpu]' (or 'kervan[cpu]')")
    return Path(spec.origin).parent


def installed_names() -> frozenset[str]:
    """The names of the installed vLLM's arguments, with underscores. Raises: ConfigError without vLLM."""
    root = installed_vllm()
    names: set[str] = set()
    for file, classes in SOURCES:
        path = root / file
        if not path.exists():
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in classes:
                fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
                names |= {target.id for target in fields if isinstance(target, ast.Name)}
    return frozenset(names)


def check(names: Iterable[str]) -> None:
    """Raises: ConfigError naming the first unknown argument and the nearest known one."""
    valid = installed_names()
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see 'vllm serve --help=all' for the names"
            raise ConfigError(f"vLLM has no engine argument {name!r}; {hint}")
