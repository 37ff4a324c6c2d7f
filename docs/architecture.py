"""Draw the floors of the house from the code's imports, into architecture.md: ``python docs/architecture.py``."""

from __future__ import annotations

import ast
import graphlib
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- floors -->\n", "<!-- end of floors -->\n"


def files() -> dict[str, pathlib.Path]:
    """Every module of the library by its dotted name; a package's name stands for its ``__init__``."""
    found = {}
    for folder in ("uhd", "kernels/uhd_kernels"):
        base = (ROOT / folder).parent
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(module: str, known: dict[str, pathlib.Path]) -> Iterator[str]:
    """Modules that a file imports, those inside functions and for type checkers too."""
    path = known[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module or "")))
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        yield from (name for name in names if name in known and name not in (module, "uhd"))


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports. ``uhd`` itself only names its parts, which load on first use."""
    known = files()
    return {module: set(imports(module, known)) for module in known if module != "uhd"}


def room(module: str) -> str:
    """A package, or a file that stands alone."""
    return ".".join(module.split(".")[:2]) if module.startswith("uhd.") else module.split(".")[0]


def floors() -> list[list[str]]:
    """Rooms from the ground up: each imports from lower floors only.

    Raises:
        graphlib.CycleError: Rooms import each other.
    """
    below: dict[str, set[str]] = {}
    for module, imported in graph().items():
        below.setdefault(room(module), set()).update({room(name) for name in imported} - {room(module)})
    height: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[other] for other in below[name]), default=-1)
    return [sorted(name for name in height if height[name] == floor) for floor in range(max(height.values()) + 1)]


def purpose(module: str) -> str:
    """The first sentence of a room's docstring."""
    text = ast.get_docstring(ast.parse(files()[module].read_text())).split("\n\n")[0]
    return " ".join(text.replace("`", "").split()).split(". ")[0].rstrip(".")


def drawing() -> str:
    """The floors as Markdown, the highest first, each room with what it holds."""
    rows = []
    for number, rooms in reversed(list(enumerate(floors()))):
        heads = [f"{number:>2}", *["  "] * (len(rooms) - 1)]
        rows += [f"{head}  {name:<19} {purpose(name)}" for head, name in zip(heads, rooms, strict=True)]
    return "```\n" + "\n".join(rows) + "\n```\n"


def page(text: str) -> str:
    """The page with its drawing made anew."""
    before, rest = text.split(START)
    return before + START + drawing() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
