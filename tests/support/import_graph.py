"""Find the modules and packages that a module of saigakit imports, from its source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import saigakit
from saigakit.core import lazy

PACKAGE = Path(saigakit.__file__).parent
LAZY = "saigakit.core.lazy"  # imports packages for the other modules
FILES = sorted(
    file for file in PACKAGE.rglob("*.py") if file not in (PACKAGE / "__init__.py", PACKAGE / "cli" / "__main__.py")
)


def room_of(file: Path) -> str:
    """The sub-package of a file, or the stem of a file directly in the package."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> set[str]:
    """The saigakit modules that a file imports anywhere, including in functions and for annotations."""
    return imported_by(ast.parse(file.read_text(encoding="utf-8")))


def imported_by(tree: ast.Module) -> set[str]:
    names, found = {name_of(each) for each in FILES}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("saigakit.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            if node.module is not None and node.module.partition(".")[0] == "saigakit":
                names_of_it = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= names_of_it & names
                found |= set() if names_of_it <= names else {node.module}
    return found - {"saigakit"}


def packages(file: Path) -> set[str]:
    """The third-party packages that a file imports anywhere, or that LAZY imports for it."""
    if name_of(file) == LAZY:
        return set()
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    from_lazy = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module == LAZY]
    lazily = {getattr(lazy, alias.name).__name__.split(".")[0] for node in from_lazy for alias in node.names}
    return {name for _, name in imported_at_once(imports)} - sys.stdlib_module_names - {"saigakit"} | lazily


def imported_at_once(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of the imports that run when the module is imported."""
    for node in _imports_at_once(body):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        else:
            yield node.lineno, (node.module or "").split(".")[0]


def imported_at_the_top(file: Path) -> set[str]:
    """The saigakit modules that importing a file imports, without those only for annotations."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return imported_by(ast.Module(list(_imports_at_once(tree.body)), []))


def _imports_at_once(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            yield from _imports_at_once(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody", "handlers"):
                yield from _imports_at_once(getattr(node, name, []))
