"""Parts of lit_gen as one Python file that does not need lit_gen: the definitions that some names need, and
what these need in turn, as they stand in the package."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lit_gen
from lit_gen import __version__
from lit_gen.errors import ConfigError

PACKAGE = Path(lit_gen.__file__).parent
Name = tuple[str, str]
"""A module of lit_gen, and a name in it."""


@dataclass
class _Module:
    """A module: `statements` that define something, by the names; `imported` names of lit_gen, a whole module
    as (module, ""); `stars`, modules that everything is imported from; and `foreign` names, with the
    statements that import them."""

    source: str
    statements: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Name] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    foreign: dict[str, str] = field(default_factory=dict)


def bundle(targets: Iterable[str], *rest: str) -> str:
    """The source of a module that defines `targets`, "lit_gen.room.module.Name", by their last names, and
    that ends with the sources `rest`. Raises ConfigError for what is not of lit_gen, and where two parts have
    one name."""
    needed: dict[str, set[str]] = {}
    foreign: set[str] = set()
    attributes: dict[str, set[str]] = {}  # of modules that are named as such
    todo = [_home(*target.rpartition(".")[::2]) for target in targets]
    while todo:
        name, wanted = todo.pop()
        if wanted in needed.setdefault(name, set()):
            continue
        needed[name].add(wanted)
        module = _read(name)
        for used in {u for statement in module.statements[wanted] for u in _uses(statement, module)}:
            if isinstance(used, tuple):
                todo.append(_home(*used))
                attributes.setdefault(used[0], set()).add(used[1])
            elif used in module.statements:
                todo.append((name, used))
            elif used in module.imported and module.imported[used][1]:
                todo.append(_home(*module.imported[used]))
            elif used in module.foreign:
                foreign.add(module.foreign[used])
    _check_unique(needed)
    sections = [_section(name, needed[name]) for name in _ordered(needed)]
    aliases = {name: _alias(name, own) for name, own in attributes.items()}
    if aliases:
        foreign.add("from types import SimpleNamespace")
    parts = [f"# Parts of lit_gen {__version__} (Apache-2.0), written by `lit-gen export`.", *sorted(foreign)]
    body = [text + aliases.get(name, "") for name, text in sections]
    return "\n".join(parts) + "\n\n\n" + "\n\n\n".join([*body, *rest]) + "\n"


def _alias(name: str, attributes: Iterable[str]) -> str:
    """What stands for a module that others name its parts by."""
    own = ", ".join(f"{attribute}={attribute}" for attribute in sorted(attributes))
    return f"\n\n\n{name.rpartition('.')[2]} = SimpleNamespace({own})"


@cache
def _read(name: str) -> _Module:
    source = _path(name).read_text(encoding="utf-8")
    module = _Module(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _import(node, module)
            continue
        for defined in _defines(node):
            module.statements.setdefault(defined, []).append(node)
    return module


def _path(name: str) -> Path:
    root, *parts = name.split(".")
    path = PACKAGE.joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if root != "lit_gen" or not path.is_file():
        raise ConfigError(
            f"{name} is not of lit_gen: an exported folder can hold the networks of lit_gen alone."
        )
    return path


def _import(node: ast.Import | ast.ImportFrom, module: _Module) -> None:
    source = getattr(node, "module", None) or ""
    for alias in node.names:
        local = alias.asname or alias.name
        if not source.startswith("lit_gen"):
            module.foreign[local] = f"from {source} " * bool(source) + f"import {ast.unparse(alias)}"
        elif alias.name == "*":
            module.stars.append(source)
        else:
            whole = (PACKAGE.joinpath(*source.split(".")[1:]) / f"{alias.name}.py").is_file()
            module.imported[local] = (f"{source}.{alias.name}", "") if whole else (source, alias.name)


def _defines(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.If):
        for inner in (*node.body, *node.orelse):
            yield from _defines(inner)
    else:
        targets = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        yield from (target.id for target in targets)


def _uses(node: ast.stmt, module: _Module) -> Iterator[Any]:
    """Names that a statement mentions, and (module, name) for an attribute of a module of lit_gen."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            source, rest = module.imported.get(part.value.id, ("", "x"))
            if not rest:
                yield (source, part.attr)


def _home(name: str, wanted: str) -> Name:
    """Where a name that can be imported from a module is defined."""
    module = _read(name)
    if wanted in module.statements:
        return name, wanted
    if wanted in module.imported:
        return _home(*module.imported[wanted])
    for star in module.stars:
        try:
            return _home(star, wanted)
        except ConfigError:
            continue
    raise ConfigError(f"{name} of lit_gen has no {wanted}.")


def _check_unique(needed: dict[str, set[str]]) -> None:
    owner: dict[str, str] = {}
    for name, wanted in needed.items():
        for defined in wanted:
            if owner.setdefault(defined, name) != name:
                raise ConfigError(
                    f"{name} and {owner[defined]} both define {defined}: one file cannot hold both."
                )


def _ordered(needed: dict[str, set[str]]) -> list[str]:
    """The modules, each after those that it imports."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order and name not in open_:
            open_.add(name)
            for source, wanted in _read(name).imported.values():
                visit(_home(source, wanted)[0] if wanted else source)
            order.append(name)

    open_: set[str] = set()
    for name in sorted(needed):
        visit(name)
    return [name for name in order if name in needed]


def _section(name: str, wanted: set[str]) -> tuple[str, str]:
    module = _read(name)
    chosen = {id(node): node for key in wanted for node in module.statements[key]}
    lines, texts = module.source.splitlines(), []
    for node in sorted(chosen.values(), key=lambda node: node.lineno):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        texts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return name, f"# --- {name} ---\n\n" + "\n\n\n".join(texts)
