"""How the installed vLLM reads each of its arguments, from its source: the parser's action, type and choices.

Importing vLLM takes 5 to 25 s; reading what is asked for takes 0.1 to 0.4 s. It follows `add_cli_args` and
`_compute_kwargs` (vllm/engine/arg_utils.py): an option's type comes from the annotation of a config class's field.
tests/contract compares every argument with vLLM's own parser.
"""

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Action = Literal["store", "flag", "switch", "append"]
# `size`: 4096, 4k; `length`: a size or "auto"; `config`: JSON with the fields of one of vLLM's config classes;
# `either`: a text, or JSON in braces; `any`: what kervan cannot tell.
Kind = Literal["text", "int", "float", "size", "length", "json", "config", "either", "any"]

SIZES = frozenset(  # `human_readable_int_args`
    {
        "max_num_batched_tokens", "max_num_scheduled_tokens", "kv_cache_memory_bytes",
        "safetensors_prefetch_block_size", "max_num_queued_tokens",
    }
)  # fmt: skip
ENGINE_FILE = "engine/arg_utils.py"
ENGINE_CLASSES = ("EngineArgs", "AsyncEngineArgs")
FRONTEND_FILES = (
    "entrypoints/common/cli_args.py",  # 0.33
    "entrypoints/launchers/cli_args.py",
    "entrypoints/openai/cli_args.py",  # 0.24
)
FRONTEND_CLASSES = ("BaseFrontendArgs", "FrontendArgs")
# Where vLLM keeps the names that a text argument may have: (file, a literal, an enumeration
# or the keys of a mapping). Plugins add some.
REGISTRIES = {
    "tool_call_parser": ("tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER"),
    "reasoning_parser": ("reasoning/__init__.py", "_REASONING_PARSERS_TO_REGISTER"),
    "quantization": ("model_executor/layers/quantization/__init__.py", "QuantizationMethods"),
    "attention_backend": ("v1/attention/backends/registry.py", "AttentionBackendEnum"),
    "load_format": ("model_executor/model_loader/__init__.py", "LoadFormats"),
}
MAX_ALIASES = 20  # that a name may stand for in turn


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of a config class takes. `names`: of the types in its annotation, "any" where kervan cannot tell."""

    names: frozenset[str]
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Argument:
    """One option of vLLM's server parser.

    `nargs`: argparse's, None for one value. `choices`: empty where any value may do; `is_folded`: their case and
    hyphens do not count. `is_optional`: "" and "None" mean None. `fields`: of a config class, for the kind `config`;
    empty where it may have any.
    """

    name: str
    action: Action = "store"
    kind: Kind = "any"
    nargs: str | int | None = None
    choices: tuple[str, ...] = ()
    is_folded: bool = False
    is_optional: bool = False
    fields: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Module:
    path: Path
    names: dict[str, ast.AST]  # what a name stands for: a class, an assigned value, or the import that brings it


@dataclass(slots=True)
class _Hints:
    """The members of an annotation's union."""

    names: set[str] = field(default_factory=set)  # builtins, "None", and names of anything else
    literals: list[Any] = field(default_factory=list)
    elements: dict[str, ast.expr | None] = field(default_factory=dict)  # "list" -> annotation of its elements
    length: int | None = None  # of a tuple
    config: tuple[_Module, ast.ClassDef] | None = None


class _ClassOptions(dict[str, dict[str, Any]]):
    """`get_kwargs(Class)`: what is known of the option of each field; the class is looked for when one is asked for."""

    def __init__(self, module: _Module, class_name: str):
        super().__init__()
        self._origin = module, class_name

    def __missing__(self, key: str) -> dict[str, Any]:
        self[key] = {"field": (*self._origin, key)}
        return self[key]


class Source:
    """vLLM's arguments as the source below `root`, a directory `vllm`, defines them. Nothing is imported."""

    def __init__(self, root: Path):
        self._root = root
        self._modules: dict[Path, _Module] = {}
        self._options: dict[str, tuple[_Module, dict[str, Any]]] = {}
        if (self._root / ENGINE_FILE).exists():
            engine = self._module(self._root / ENGINE_FILE)
            for class_name in ENGINE_CLASSES:
                self._read_functions(engine, class_name, {})
        for file in FRONTEND_FILES:
            if (self._root / file).exists():
                self._read_frontend(self._module(self._root / file))

    @property
    def names(self) -> frozenset[str]:
        """All options, with underscores; not second names of one."""
        return frozenset(self._options.keys() - self.second_names.keys())

    @property
    def second_names(self) -> dict[str, str]:
        """Options that stand for another one: its name."""
        named = {name: _constant(dest) for name, (_, given) in self._options.items() if (dest := given.get("dest"))}
        return {name: dest for name, dest in named.items() if dest != name}

    @functools.cache  # noqa: B019 - a source lives as long as the process
    def argument(self, name: str) -> Argument:
        """The option of that name. Raises: KeyError."""
        module, given = self._options[name]
        found = Argument(name)
        if "field" in given:
            definition, key = self._resolve(*given["field"][:2]), given["field"][2]
            if definition is not None and (annotation := _annotation(definition[1], key)) is not None:
                found = self._of_annotation(found, key, self._hints(definition[0], annotation))
        return self._with_keywords(found, module, given)

    # ---- where options are added

    def _read_functions(self, module: _Module, class_name: str, known: dict[str, Any]) -> None:
        class_ = module.names.get(class_name)
        for node in class_.body if isinstance(class_, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and node.name in ("add_cli_args", "_customize_cli_kwargs"):
                self._read_statements(module, node.body, dict(known))

    def _read_frontend(self, module: _Module) -> None:
        """Every field of the front end's classes is an option, changed by `_customize_cli_kwargs`."""
        for class_name in FRONTEND_CLASSES:
            class_ = module.names.get(class_name)
            if not isinstance(class_, ast.ClassDef):
                continue
            for key in _fields(class_):
                self._options[key] = module, {"field": (module, class_name, key)}
            kwargs = {key: given for key, (_, given) in self._options.items()}
            self._read_functions(module, class_name, {"frontend_kwargs": kwargs})

    def _read_statements(self, module: _Module, body: Iterable[ast.stmt], known: dict[str, Any]) -> None:
        for node in body:
            if isinstance(node, ast.If):
                self._read_statements(module, [*node.body, *node.orelse], known)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._read_assignment(module, node.targets[0], node.value, known)
            elif isinstance(node, ast.AugAssign):  # choices that are added: which ones is not read
                self._read_assignment(module, node.target, node.value, known)
            elif isinstance(node, ast.Delete):
                for target in node.targets:
                    if isinstance(target, ast.Subscript) and isinstance(
                        given := self._value(target.value, known), dict
                    ):
                        given[_key(target)] = None
            elif isinstance(node, ast.Expr | ast.Return) and isinstance(node.value, ast.Call):
                self._read_call(module, node.value, known)

    def _read_assignment(self, module: _Module, target: ast.expr, value: ast.expr, known: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            if (found := self._value(value, known, module)) is not None:
                known[target.id] = found
        elif isinstance(target, ast.Subscript):
            given = self._value(target.value, known)
            if isinstance(given, dict):
                given[_key(target)] = value

    def _read_call(self, module: _Module, call: ast.Call, known: dict[str, Any]) -> None:
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if method == "remove" and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Subscript):
            given = self._value(call.func.value.value, known)
            if isinstance(given, dict):
                given.setdefault("removed", []).append(call.args[0])
        if method != "add_argument":
            return
        flags = [word.value for word in call.args if isinstance(word, ast.Constant)]
        long = [flag for flag in flags if isinstance(flag, str) and flag.startswith("--")]
        if not long:
            return
        given = dict(self._spread(call, known))
        for flag in long:
            self._options[flag.removeprefix("--").replace("-", "_")] = module, given

    def _spread(self, call: ast.Call, known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for keyword in call.keywords:
            if keyword.arg is not None:
                yield keyword.arg, keyword.value
            elif isinstance(value := self._value(keyword.value, known), dict):
                yield from value.items()

    def _value(self, node: ast.expr, known: dict[str, Any], module: _Module | None = None) -> Any:
        """What `get_kwargs(Class)`, `known["key"]` or `{**known["key"], "default": 1}` is; None for anything else."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Subscript):
            owner = self._value(node.value, known, module)
            if isinstance(owner, _ClassOptions):
                return owner[_key(node)]
            return owner.get(_key(node)) if isinstance(owner, dict) else None
        if isinstance(node, ast.Dict):
            merged: dict[str, Any] = {}
            for key, value in zip(node.keys, node.values, strict=True):
                if key is None:
                    merged |= self._value(value, known, module) or {}
                elif isinstance(key, ast.Constant):
                    merged[str(key.value)] = value
            return merged
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "get_kwargs" and module:
            return _ClassOptions(module, ast.unparse(node.args[0]))
        return None

    # ---- what an option takes

    def _of_annotation(self, found: Argument, name: str, hints: _Hints) -> Argument:
        is_optional = "None" in hints.names and "bool" not in hints.names
        found = replace(found, is_optional=is_optional)
        if hints.config is not None:
            module, class_ = hints.config
            return replace(found, kind="config", fields=self._config_fields(module, class_))
        if hints.names == {"bool", "str", "None"} and not hints.literals:
            return replace(found, kind="text", nargs="?")
        if "bool" in hints.names:
            return replace(found, action="flag")
        if hints.literals:
            return replace(found, **_of_literals(hints.literals, is_open="str" in hints.names))
        for collection in ("tuple", "list", "set"):
            if collection in hints.elements:
                return self._of_elements(found, hints, collection)
        if "int" in hints.names:
            return replace(found, kind="length" if name == "max_model_len" else "size" if name in SIZES else "int")
        if "float" in hints.names:
            return replace(found, kind="float")
        others = hints.names - {"None", "str", "dict"}
        if "dict" in hints.names:
            return replace(found, kind="either" if "str" in hints.names or others else "json")
        return replace(found, kind="text")

    def _of_elements(self, found: Argument, hints: _Hints, collection: str) -> Argument:
        nargs: str | int = hints.length if collection == "tuple" and hints.length is not None else "+"
        found = replace(found, kind="text", nargs=nargs)
        element = hints.elements[collection]
        if element is None or hints.config is not None:
            return found
        inner = self._hints(self._owner, element)
        if inner.literals:
            return replace(found, **_of_literals(inner.literals, is_open=False))
        numbers: dict[str, Kind] = {"int": "int", "float": "float"}
        return replace(found, kind=numbers.get("|".join(inner.names), "text"))

    def _with_keywords(self, found: Argument, module: _Module, given: dict[str, Any]) -> Argument:
        """What the call of `add_argument`, and changes before it, say themselves."""
        written = given.get("action")
        action = ast.unparse(written) if isinstance(written, ast.expr) else ""
        if "field" not in given and "type" not in given:
            found = replace(found, kind="text")
        if action.endswith("BooleanOptionalAction"):
            return replace(found, action="flag", kind="any", nargs=None)
        if action == "'store_true'":
            return replace(found, action="switch", kind="any", nargs=None)
        if action == "'append'":
            found = replace(found, action="append")
        if "nargs" in given:
            nargs = _constant(given["nargs"]) if given["nargs"] is not None else None
            found = replace(found, nargs=nargs)
        if isinstance(type_ := given.get("type"), ast.expr):
            found = _of_type(found, type_)
        if isinstance(choices := given.get("choices"), ast.expr):
            items = choices.elts if isinstance(choices, ast.List) else []
            is_known = all(isinstance(item, ast.Constant) for item in items)
            found = replace(found, choices=tuple(str(_constant(item)) for item in items) if is_known else ())
        for node in given.get("removed", ()):
            value = self._resolve(module, node.id) if isinstance(node, ast.Name) else (module, node)
            removed = _constant(value[1]) if value is not None else None
            found = replace(found, choices=tuple(choice for choice in found.choices if choice != removed))
        return found

    def _config_fields(self, module: _Module, class_: ast.ClassDef) -> dict[str, Field]:
        """Its fields and those of its bases; none where it takes any key, or changes what it is given."""
        if any("extra=" in ast.unparse(decorator) for decorator in class_.decorator_list):
            return {}
        found: dict[str, Field] = {}
        for base in class_.bases:
            if (definition := self._resolve(module, ast.unparse(base))) and isinstance(definition[1], ast.ClassDef):
                found |= self._config_fields(*definition)  # type: ignore[arg-type]  # which the line above has looked at
        for name in _fields(class_):
            annotation = _annotation(class_, name)
            hints = self._hints(module, annotation) if annotation is not None else _Hints({"any"})
            is_plain = not hints.elements and hints.config is None
            found[name] = Field(frozenset(hints.names) if is_plain else frozenset({"any"}), tuple(hints.literals))
        for function in class_.body:
            for decorator in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
                text = ast.unparse(decorator)
                if "mode='before'" not in text and "mode='wrap'" not in text:
                    continue
                if text.startswith("model_validator") or "'*'" in text:
                    return {}
                changed = [word.value for word in ast.walk(decorator) if isinstance(word, ast.Constant)]
                found |= dict.fromkeys(found.keys() & set(map(str, changed)), Field(frozenset({"any"})))
        return found

    def registered(self, name: str) -> tuple[str, ...]:
        """The names that vLLM itself has for a text argument; none where any text may do."""
        file, variable = REGISTRIES.get(name, ("", ""))
        if not file or not (self._root / file).exists():
            return ()
        node = self._module(self._root / file).names.get(variable)
        if isinstance(node, ast.Dict):
            return tuple(str(_constant(key)) for key in node.keys if key is not None)
        if isinstance(node, ast.Subscript):
            hints = self._hints(self._module(self._root / file), node)
            return tuple(map(str, hints.literals))
        if isinstance(node, ast.ClassDef):
            assigned = [item.targets[0] for item in node.body if isinstance(item, ast.Assign)]
            return ("auto", *(target.id.lower() for target in assigned if isinstance(target, ast.Name)))
        return ()

    # ---- names and annotations

    def _module(self, path: Path) -> _Module:
        if path not in self._modules:
            names: dict[str, ast.AST] = {}
            _collect(ast.parse(path.read_text()).body, names)
            self._modules[path] = _Module(path, names)
        return self._modules[path]

    def _resolve(self, module: _Module, name: str) -> tuple[_Module, ast.AST] | None:
        """Where a name is defined, and as what; None outside of vLLM."""
        for _ in range(MAX_ALIASES):
            node = module.names.get(name)
            if isinstance(node, ast.ImportFrom):
                imported = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
                path = self._path(module, node)
                if path is None:
                    return None
                module, name = self._module(path), imported
            elif isinstance(node, ast.Name) and node.id != name:
                name = node.id
            else:
                return None if node is None else (module, node)
        return None

    def _path(self, module: _Module, node: ast.ImportFrom) -> Path | None:
        if node.level:
            directory = module.path.parents[node.level - 1]
        elif (node.module or "").partition(".")[0] == "vllm":
            directory = self._root.parent
        else:
            return None
        base = directory.joinpath(*(node.module or "").split(".")) if node.module else directory
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)

    def _hints(self, module: _Module, annotation: ast.expr) -> _Hints:
        hints = _Hints()
        self._add_hints(module, annotation, hints, MAX_ALIASES)
        return hints

    def _add_hints(self, module: _Module, node: ast.AST, hints: _Hints, depth: int) -> None:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and depth:
                self._add_hints(module, ast.parse(node.value, mode="eval").body, hints, depth - 1)
            else:
                hints.names.add(str(node.value))
        elif isinstance(node, ast.BinOp):
            self._add_hints(module, node.left, hints, depth)
            self._add_hints(module, node.right, hints, depth)
        elif isinstance(node, ast.Subscript):
            self._add_subscript(module, node, hints, depth)
        elif isinstance(node, ast.Name):
            self._add_name(module, node.id, hints, depth)
        else:
            hints.names.add(ast.unparse(node))

    def _add_subscript(self, module: _Module, node: ast.Subscript, hints: _Hints, depth: int) -> None:
        origin = ast.unparse(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if origin == "Literal":
            for part in parts:
                if isinstance(part, ast.Constant):
                    hints.literals.append(part.value)
                else:
                    self._add_hints(module, part, hints, depth)
        elif origin == "Annotated":
            self._add_hints(module, parts[0], hints, depth)
        elif origin in ("Optional", "Union"):
            for part in parts:
                self._add_hints(module, part, hints, depth)
            hints.names |= {"None"} if origin == "Optional" else set()
        elif origin in ("list", "tuple", "set"):
            self._owner = module
            hints.elements[origin] = parts[0]
            if origin == "tuple" and not any(isinstance(p, ast.Constant) and p.value is ... for p in parts):
                hints.length = len(parts)
        else:
            hints.names.add(origin)

    def _add_name(self, module: _Module, name: str, hints: _Hints, depth: int) -> None:
        found = self._resolve(module, name) if depth else None
        if found is None:
            if name in ("list", "tuple", "set"):
                hints.elements[name] = None
            hints.names.add(name)
            return
        owner, node = found
        if not isinstance(node, ast.ClassDef):
            self._add_hints(owner, node, hints, depth - 1)
        elif any(ast.unparse(base).partition("[")[0] == "dict" for base in node.bases):
            hints.names.add("dict")
        elif any(ast.unparse(decorator).split("(")[0] in ("config", "dataclass") for decorator in node.decorator_list):
            hints.config = owner, node
        else:
            hints.names.add(name)


def _collect(body: Iterable[ast.stmt], names: dict[str, ast.AST]) -> None:
    """The names of a module at run time: of `if TYPE_CHECKING` the other branch counts, if it says anything."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: node for alias in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            names[node.target.id] = node.value
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.If):
            _collect([*node.body, *node.orelse], names)
        elif isinstance(node, ast.Try):
            _collect(node.body, names)


def _fields(class_: ast.ClassDef) -> list[str]:
    return [
        item.target.id for item in class_.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


def _annotation(class_: ast.AST, name: str) -> ast.expr | None:
    for item in class_.body if isinstance(class_, ast.ClassDef) else ():
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
            return item.annotation
    return None


def _key(node: ast.Subscript) -> str:
    return str(_constant(node.slice))


def _constant(node: ast.AST) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _of_literals(options: list[Any], *, is_open: bool) -> dict[str, Any]:
    kind = "int" if isinstance(options[0], int) else "text"
    return {"kind": kind, "choices": () if is_open else tuple(dict.fromkeys(map(str, sorted(options))))}


def _of_type(found: Argument, type_: ast.expr) -> Argument:
    """With the `type` that the source gives: a function that reads the text."""
    text = ast.unparse(type_)
    if text.startswith("optional_type("):
        found, text = replace(found, is_optional=True), text.removeprefix("optional_type(").removesuffix(")")
    elif not isinstance(type_, ast.Lambda):
        found = replace(found, is_optional=False)
    kinds: dict[str, Kind] = {"json.loads": "json", "str": "text", "int": "int", "float": "float"}
    if text in kinds:
        return replace(found, kind=kinds[text])
    if text == "lambda s: s.lower().replace('-', '_')":
        return replace(found, kind="text", is_folded=True)
    return replace(found, kind="any")
