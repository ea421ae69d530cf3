"""Source trees of vLLM releases, read without importing: the installed one, and those of `KERVAN_VLLM_SOURCES`.

The variable has directories, separated as in PATH, that hold a `vllm` package (an unpacked wheel will do).
"""

import ast
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def trees() -> list[Path]:
    """Directories that hold a `vllm` package; the installed one first."""
    found = []
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent.parent)
    extra = [Path(word) for word in os.environ.get("KERVAN_VLLM_SOURCES", "").split(os.pathsep) if word]
    for path in extra:
        assert (path / "vllm" / "__init__.py").is_file(), f"KERVAN_VLLM_SOURCES: {path} holds no vllm package"
    return found + [path for path in extra if path.resolve() not in [f.resolve() for f in found]]


def release(tree: Path) -> str:
    for line in (tree / "vllm" / "_version.py").read_text().splitlines():
        name, _, value = line.partition(" = ")
        if name in ("__version__", "version", "__version__ = version"):
            return str(ast.literal_eval(value.rpartition("= ")[2]))
    return tree.name


TREES = trees()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def definition(tree: Path, file: str, *names: str) -> Any:
    """A class or function by its path of names; fails by name."""
    node: Any = parsed(tree / "vllm" / file)
    for name in names:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [child for child in node.body if isinstance(child, kinds) and child.name == name]
        assert found, f"vllm/{file} has no {'.'.join(names)}"
        node = found[-1]
    return node


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of all parameters; keyword-only ones after "*"."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    return [*names, *(["*"] if arguments.kwonlyargs else []), *(a.arg for a in arguments.kwonlyargs)]


def required(function: ast.FunctionDef) -> list[str]:
    """Names of the parameters without a default."""
    arguments = function.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    keywords = [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    return positional[: len(positional) - len(arguments.defaults)] + keywords


def fields(class_: ast.ClassDef) -> list[str]:
    return [n.target.id for n in class_.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def members(class_: ast.ClassDef) -> list[str]:
    """Names of an enumeration."""
    return [t.id for n in class_.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def attributes_set(function: ast.FunctionDef) -> set[str]:
    """`x` of every `self.x = ...` in a function."""
    targets: list[ast.expr] = []
    for node in ast.walk(function):
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}


def attributes_of(node: ast.AST, owner: str) -> Iterator[str]:
    """`x` of every `owner.x`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and ast.unparse(child.value) == owner:
            yield child.attr


def routes(tree: Path, method: str) -> set[str]:
    """Paths for which vLLM's routers take a method."""
    paths = set()
    for file in (tree / "vllm" / "entrypoints").rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                owner, path = ast.unparse(node.func.value), node.args[0] if node.args else None
                if owner.endswith(("router", "app")) and isinstance(path, ast.Constant):
                    paths.add(path.value)
    return paths
