"""What the reference is made of: every public name has a docstring, those that take tensors say their shapes,
and what packages export says what it raises. Counted by reading the source.
"""

import ast
import re
from pathlib import Path

import lit_gen

PACKAGE = Path(lit_gen.__file__).parent
SHAPE = re.compile(r"\((?:[A-Za-z]|\d+|\.\.\.|3 c|C_a|num\w*(?: \+ 1)?)(?:,|\))|\(\)|\bshape\b")
ELSEWHERE = re.compile(r"\b(?:as|of)\s`|^`\w+\.\w+` by")  # the docstring of another has them
UNDOCUMENTED = {
    "config.schema": "types of configurations; the comments of conf/ explain the options",
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.startswith(("commands", "__main__", "conf.")) and name not in UNDOCUMENTED:
            yield name, ast.parse(path.read_text())


MODULES = list(modules())
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(nodes: list[ast.stmt], kind) -> list:
    """Those that may be called from outside; setters and overloads have the docstring of another."""
    mark = re.compile(r"setter|overload")
    found = [node for node in nodes if isinstance(node, kind) and not node.name.startswith("_")]
    return [node for node in found if not any(mark.search(ast.unparse(d)) for d in node.decorator_list)]


def exports(tree: ast.Module) -> list[str]:
    """The module's `__all__`."""
    lists = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    ]
    return [name for value in lists for name in ast.literal_eval(value)]


def functions():
    """(name, function, its docstring, what class and module say) of every public function and method."""
    for module, tree in MODULES:
        about = ast.get_docstring(tree) or ""
        for node in public(tree.body, Function):
            yield f"{module}.{node.name}", node, ast.get_docstring(node) or "", about
        for cls in public(tree.body, ast.ClassDef):
            for node in public(cls.body, Function):
                context = f"{about}\n{ast.get_docstring(cls) or ''}"
                yield f"{module}.{cls.name}.{node.name}", node, ast.get_docstring(node) or "", context


def takes_tensors(node: Function) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return any(a.annotation and ast.unparse(a.annotation).startswith("Tensor") for a in arguments)


def raises_config_error(node: Function) -> bool:
    found = (n.exc for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc is not None)
    return any(ast.unparse(exc).startswith("ConfigError") for exc in found)


def test_every_public_name_has_a_docstring():
    missing = [module for module, tree in MODULES if not ast.get_docstring(tree)]
    for module, tree in MODULES:
        nodes = public(tree.body, Function | ast.ClassDef)
        missing += [f"{module}.{node.name}" for node in nodes if not ast.get_docstring(node)]
    assert not missing


def test_who_takes_tensors_says_their_shapes():
    """In the docstring, or in that of the class or module, where a contract is written once."""
    told = [(name, text, text + context) for name, node, text, context in functions() if takes_tensors(node)]
    assert not [
        name
        for name, text, all_of_it in told
        if text and not (SHAPE.search(all_of_it) or ELSEWHERE.search(text))
    ]


def test_what_packages_export_says_what_it_raises():
    exported = {f"{module}.{name}" for module, tree in MODULES for name in exports(tree)}
    told = [
        (name, text + context)
        for name, node, text, context in functions()
        if text and raises_config_error(node)
    ]
    theirs = [(name, text) for name, text in told if name in exported or name.rpartition(".")[0] in exported]
    assert len(theirs) > 50
    assert not [name for name, text in theirs if not re.search("ConfigError|[Rr]efuse", text)]


def test_the_count_sees_what_is_missing():
    tree = ast.parse('def f(x: Tensor):\n    """Doubles x."""\n    raise ConfigError("no")')
    (node,) = public(tree.body, Function)
    assert takes_tensors(node) and raises_config_error(node) and not SHAPE.search(ast.get_docstring(node))
