"""What modules define, read from their sources by `ast`: dataclasses, enums and constants, without an import.

The flags of a run are fields of dataclasses of transformers and TRL, whose import takes seconds. Their sources are read
in a tenth of one, whatever releases are installed. What takes more than constants is left out: a default is then None.
"""

import ast
import copy
import dataclasses
import enum
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias


def setting(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field of a dataclass whose fields are flags; `metadata` are what else its flag has, such as `aliases`."""
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


# A statement's part that says what a name is; or the module that it is imported from, and its name there.
_Binding: TypeAlias = ast.ClassDef | ast.expr | tuple[str, str]


class UnreadableError(LookupError):
    """Sources do not say what a name is."""


# What an expression raises in which a name was not read, as one of a function, or is its own definition.
_UNREAD = (LookupError, NameError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


class _Unread(str):
    """Stands for a class that was not read: a word is read as a text."""


@functools.cache
def read(module: str, name: str) -> Any:
    """What `name` is in `module`: a dataclass of the same fields without its methods, an enum, or a value.

    Modules of the standard library, and those at the top of this package, which do without torch, are imported.
    Raises UnreadableError where the source is not there, has no such name, or reading it is not enough.
    """
    top, _, rest = module.partition(".")
    if top in sys.stdlib_module_names or (top == __package__ and "." not in rest):
        return getattr(importlib.import_module(module), name)
    binding = bindings(module).get(name)
    if binding is None:
        raise UnreadableError(f"{module} defines no {name}.")
    if isinstance(binding, tuple):
        return read(*binding)
    try:
        return _class_of(module, binding) if isinstance(binding, ast.ClassDef) else _value(module, binding)
    except _UNREAD as error:
        raise UnreadableError(f"{module}.{name}: {error}") from error


@functools.cache
def bindings(module: str) -> dict[str, _Binding]:
    """The names of a module; of one that is bound twice, as below `if TYPE_CHECKING`, the last."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)  # of a submodule it would import what is above
    folders = (spec and spec.submodule_search_locations) or ()
    for path in (Path(folder, *parts) for folder in folders):
        for file, package in ((path / "__init__.py", module), (path.with_suffix(".py"), module.rpartition(".")[0])):
            if file.is_file():
                names: dict[str, _Binding] = {}
                _bind(names, ast.parse(file.read_bytes()).body, package.split("."))
                return names
    raise UnreadableError(f"{module} has no source.")


def _bind(names: dict[str, _Binding], body: Iterable[ast.stmt], package: list[str]) -> None:
    """Add the names that statements bind."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            names[statement.name] = statement
        elif isinstance(statement, ast.FunctionDef):
            names[statement.name] = ast.Constant(...)  # which cannot be called
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) + 1 - statement.level] if statement.level else []
            module = ".".join([*above, *([statement.module] if statement.module else [])])
            names |= {alias.asname or alias.name: (module, alias.name) for alias in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {target.id: statement.value for target in targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            before = names.pop(statement.target.id, None)
            if isinstance(before, ast.expr):
                names[statement.target.id] = ast.BinOp(before, statement.op, statement.value)
        elif isinstance(statement, ast.If | ast.Try):
            _bind(names, [*statement.body, *statement.orelse], package)


def _value(module: str, node: ast.expr, *, is_type: bool = False) -> Any:
    """What an expression is; in a type, a class that was not read is `_Unread`."""
    if isinstance(node, ast.Constant):
        return node.value
    names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    known = {}
    for name in names & bindings(module).keys():
        try:
            known[name] = read(module, name)
        except UnreadableError:
            known |= {name: _Unread} if is_type else {}
    return eval(compile(ast.fix_missing_locations(ast.Expression(node)), module, "eval"), known)  # as an import would


def _class_of(module: str, node: ast.ClassDef) -> Any:
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        members = [one for one in node.body if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant)]
        values = {target.id: one.value.value for one in members for target in one.targets}  # type: ignore[attr-defined]
        is_enum = any("Enum" in ast.unparse(base) for base in node.bases)
        return enum.Enum(node.name, values) if is_enum else type(node.name, (_Unread,), {})
    bases = [_value(module, base, is_type=True) for base in node.bases]
    if _Unread in bases:
        raise UnreadableError(f"{module}.{node.name}: a base of it is in no source that was found.")
    known = tuple(base for base in bases if base is not object)
    body: dict[str, Any] = {"__doc__": node.name, "__annotations__": {}}
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            body["__annotations__"][one.target.id] = _type(module, one.annotation)
            if one.value is not None:
                body[one.target.id] = _default(module, one.value)
    return dataclasses.dataclass(init=False, repr=False, eq=False)(type(node.name, known, body))


def _type(module: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    try:
        return _value(module, node, is_type=True)
    except _UNREAD:
        return _Unread


def _default(module: str, node: ast.expr) -> Any:
    """A field, or its default."""
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("field"):
        return _or_none(module, node)
    given: dict[str, Any] = {}
    for word in node.keywords:
        name, value = str(word.arg), word.value
        if name == "metadata" and isinstance(value, ast.Dict):
            entries = zip(value.keys, value.values, strict=True)
            given[name] = {key.value: _or_none(module, one) for key, one in entries if isinstance(key, ast.Constant)}
        elif name == "default_factory":
            given[name] = functools.partial(copy.copy, _or_none(module, value, calls=True))
        else:
            given[name] = _or_none(module, value)
    return dataclasses.field(**given)


def _or_none(module: str, node: ast.expr, *, calls: bool = False) -> Any:
    """What an expression is, or returns; None where that takes more than reading."""
    try:
        value = _value(module, node)
        return value() if calls else value
    except _UNREAD:
        return None
