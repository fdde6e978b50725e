"""Imports point down, lazy ones too, and no module is imported in a circle. See CONTRIBUTING.md."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import nf4

ROOT = Path(__file__).resolve().parents[1]
# From the top down: a room may import those after it
ORDER = [
    *("commands", "bench", "integrations", "error", "files", "models", "layers", "adapters"),
    *("functional", "ops", "gpu", "cpu", "kernels", "reference", "tensor", "tools", "codebook"),
    "losses",  # which imports nothing of the package
]
# kernels/ and bench/ lie beside the package, and are folders of it by name
FOLDERS = {"nf4": "nf4", "kernels": "nf4.kernels", "bench": "nf4.bench"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Return the modules of the package that one imports, wherever in it; types alone are none."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {
        found
        for node in nodes(ast.parse(path.read_text(encoding="utf-8")))
        for found in named(node, package)
        if found.startswith("nf4.") and found != name
    }


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those for types alone, and what a module does as a script."""
    for child in ast.iter_child_nodes(node):
        test = ast.unparse(child.test) if isinstance(child, ast.If) else ""
        if "TYPE_CHECKING" not in test and "__name__ == '__main__'" not in test:
            yield child
            yield from nodes(child)


def named(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the modules that a node names, by ``import_module`` too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in MODULES else base
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES if "." in name} == {*ORDER}
    entries = {p.stem for p in (ROOT / "nf4").iterdir() if p.suffix == ".py" or p.is_dir()}
    own = entries - {"__init__", "__pycache__", "kernels", "bench"}
    assert len(own) <= 16, sorted(own)


def test_imports_point_down() -> None:
    up = [
        f"{name} imports {found}"
        for name in MODULES
        if "." in name
        for found in imports(name)
        if ORDER.index(room(found)) < ORDER.index(room(name))
    ]
    assert up == []


def test_only_kernels_import_triton_and_only_the_cpu_s_path_numba() -> None:
    for package, rooms in (("triton", {"kernels", "gpu", "bench"}), ("numba", {"cpu"})):
        using = {
            room(name)
            for name, path in MODULES.items()
            if f"import {package}" in path.read_text(encoding="utf-8") and "." in name
        }
        assert using <= rooms, package


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {name: imports(name) & MODULES.keys() for name in MODULES if name != "nf4"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


MOST_PARAMETERS = 7  # of what users do not call: beyond, parts of one thing should be one object
# What a compiler takes flat: Triton's kernels, and numba's functions
COMPILED = ("triton.jit", "compiled", "intrinsic")
PUBLIC = {*nf4.__all__, "NF4Config"}


def functions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield all functions, with the name of the class of a constructor, or their own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield outer if child.name == "__init__" else child.name, child
        yield from functions(child, child.name if isinstance(child, ast.ClassDef) else outer)


def test_functions_that_users_do_not_call_have_few_parameters() -> None:
    found = {}
    for module, path in MODULES.items():
        for name, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            compiled = any(ast.unparse(d).startswith(COMPILED) for d in function.decorator_list)
            given = function.args
            names = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
            count = len(names - {"self", "cls"})
            if count > MOST_PARAMETERS and not compiled and name not in PUBLIC:
                found[f"{module}.{name}"] = count
    assert found == {}


# The system's, and constants of the format: they do not depend on what was called before
KEPT = {"nf4.cpu._threads", "nf4.cpu._memory", "nf4.codebook"}


def test_one_function_forgets_all_that_is_remembered() -> None:
    for module, path in MODULES.items():
        if module.startswith("nf4.bench") or module in KEPT:
            continue
        for name, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = [ast.unparse(d) for d in function.decorator_list]
            cached = [d for d in decorators if "cache" in d and "cached_property" not in d]
            assert not cached or decorators[0] == "forgettable", f"{module}.{name}"


MOST_LINES = 60  # of a function, its docstring not counted
# Kernels have no helpers for what ends in the middle, and every pointer is a line of its own
MOST_LINES_OF_A_KERNEL = 105


def test_functions_and_files_are_short() -> None:
    long = {}
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, module
        for name, function in functions(ast.parse(text)):
            first = function.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            said = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            lines = (function.end_lineno or 0) - function.lineno + 1 - said
            kernel = any(ast.unparse(d).startswith(COMPILED) for d in function.decorator_list)
            if lines > (MOST_LINES_OF_A_KERNEL if kernel else MOST_LINES):
                long[f"{module}.{name}"] = lines
    assert long == {}
