"""How many small changes of the code do the tests notice?

    python -m tests.fuzz.mutants slicing --sample 150 --seed 0 --out slicing.jsonl

A mutant is one file with one change: another comparison, another operator, a number one higher, a condition turned,
``and`` for ``or``, ``None`` returned, a statement left out. Each runs the tests of its group, in a copy of the tree:
the checkout is never touched. Results are appended to ``--out`` as JSON lines, and what stands there is not run again,
so that a run goes on by the same command after it was stopped. ``--show ID`` prints a mutant as a diff, ``--score``
sums up.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240
"""Seconds of a mutant's tests; one that takes longer hangs, which is noticed."""

_SETTINGS = "tests/slicing/test_strategies.py::test_settings_are_those_of_the_releases"

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "slicing": {
        "uhd/slicing/strategies": ("tests/slicing/test_strategies.py", "tests/slicing/test_strategies_live.py"),
        "uhd/slicing/metrics.py": ("tests/slicing/test_metrics.py",),
        "uhd/slicing/flops.py": ("tests/slicing/test_flops.py", "tests/test_docstrings.py", _SETTINGS),
        "uhd/slicing/sample.py": ("tests/test_encoder_strategies.py", "tests/test_docstrings.py"),
        "uhd/slicing/many.py": ("tests/slicing/test_many.py",),
        "uhd/slicing": ("tests/slicing/test_plan.py", "tests/slicing", "tests/test_docstrings.py"),
        "uhd/schema/counted.py": ("tests/schema", "tests/test_encoder_strategies.py"),
        "uhd/schema": ("tests/schema", "tests/test_docstrings.py"),
    },
    "files": {
        "uhd/pixels/load.py": ("tests/test_pixels.py", "tests/test_pictures_in.py", "tests/test_loading.py"),
        "uhd/merge.py": ("tests/test_merge.py",),
        "uhd/batch.py": ("tests/test_batch.py", "tests/test_encoder.py"),
        "uhd/token_files.py": ("tests/test_token_files.py", "tests/test_encoder_strategies.py"),
        "uhd/saving.py": ("tests/test_encoder.py", "tests/test_readers.py", "tests/test_encoder_parts.py"),
    },
}
"""Group -> source -> tests of it; of several sources that fit a file the first counts."""

EQUIVALENT: dict[str, str] = {
    "uhd/slicing/strategies/anyres.py:115:comparison:57": "of equal aspects nothing is padded: both branches keep all",
}
"""Mutants that change nothing that can be seen, with the reason."""

_COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATE = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in a node's place, each with its name."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        other = copy.copy(node)
        other.ops = [_COMPARE[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", other
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATE:
        yield "operator", ast.BinOp(node.left, _OPERATE[type(node.op)](), node.right)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.BoolOp):
        yield "boolean", ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "boolean", node.operand
    elif isinstance(node, ast.If):
        yield "condition", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Return) and not (isinstance(node.value, ast.Constant) or node.value is None):
        yield "return", ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.AugAssign, ast.Raise)) or (isinstance(node, ast.Expr) and _does(node.value)):
        yield "removed", ast.Pass()


def _does(value: ast.AST) -> bool:
    return isinstance(value, (ast.Call, ast.Await))


class _Walk(ast.NodeTransformer):
    """Visits what runs: no annotations, docstrings or messages; ``wanted`` is the number of the change to make."""

    def __init__(self, wanted: int | None = None) -> None:
        self.wanted, self.found = wanted, []

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.JoinedStr):
            return node
        for kind, other in changes(node):
            self.found.append((getattr(node, "lineno", 0), kind))
            if len(self.found) - 1 == self.wanted:
                return ast.copy_location(other, node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns") or (isinstance(node, ast.Raise) and name == "exc"):
                continue
            if isinstance(value, list):
                setattr(node, name, [self.visit(one) if isinstance(one, ast.AST) else one for one in value])
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node


def mutants(group: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """Every mutant of a group, in a fixed order."""
    files: list[str] = []
    for source in GROUPS[group]:
        found = [root / source] if source.endswith(".py") else sorted((root / source).rglob("*.py"))
        files += [str(path.relative_to(root)) for path in found]
    every = []
    for file in dict.fromkeys(files):
        walk = _Walk()
        walk.visit(ast.parse((root / file).read_text()))
        every += [
            {"id": f"{file}:{line}:{kind}:{number}", "file": file, "number": number}
            for number, (line, kind) in enumerate(walk.found)
        ]
    return every


def mutated(file: str, number: int | None, root: Path = ROOT) -> str:
    """A file's source with one change, or as it is, both as ``ast`` writes it."""
    return ast.unparse(ast.fix_missing_locations(_Walk(number).visit(ast.parse((root / file).read_text()))))


def tests_of(group: str, file: str) -> list[str]:
    source = next(source for source in GROUPS[group] if file.startswith(source))
    return [test for test in GROUPS[group][source] if (ROOT / test.partition("::")[0]).exists()]


def _run_here(tree: Path, tests: list[str]) -> None:
    """In a fork: the tests' exit code becomes that of the process."""
    import pytest

    os.setsid()
    os.chdir(tree)
    sys.path[:] = [str(tree), str(tree / "kernels"), *(p for p in sys.path if p and not p.startswith(str(ROOT)))]
    os.environ["PYTHONPATH"] = f"{tree}:{tree / 'kernels'}"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "uhd")]:
        del sys.modules[name]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os._exit(int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])))


def outcome(tree: Path, tests: list[str]) -> str:
    """Run tests in a fork, which has torch imported already: killed, timeout or survived."""
    child = os.fork()
    if child == 0:
        try:
            _run_here(tree, tests)
        finally:
            os._exit(3)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2):  # 2: a module that cannot be imported any more
                raise RuntimeError(f"the tests themselves failed, exit code {code}: run pytest {' '.join(tests)}")
            return "survived" if code == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def run(group: str, chosen: list[dict[str, Any]], out: Path) -> None:
    """Try mutants one by one and write down what became of each."""
    import numpy  # noqa: F401 - once for all forks
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    done = {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.pyc"))
        for mutant in chosen:
            if mutant["id"] in done:
                continue
            place, start = tree / mutant["file"], time.monotonic()
            whole = place.read_text()
            place.write_text(mutated(mutant["file"], mutant["number"]))
            result = outcome(tree, tests_of(group, mutant["file"]))
            place.write_text(whole)
            line = {**mutant, "result": result, "seconds": round(time.monotonic() - start, 1)}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")


def score(out: Path) -> str:
    results = [json.loads(line) for line in out.read_text().splitlines()]
    counted = [one for one in results if one["id"] not in EQUIVALENT]
    left = [one["id"] for one in counted if one["result"] == "survived"]
    share = 100 * (1 - len(left) / max(len(counted), 1))
    same = len(results) - len(counted)
    return "\n".join([f"{share:.1f} % of {len(counted)} noticed, {same} equivalent left out; survived:", *left])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th mutant from i on, for several processes")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--show", help="print one mutant, by its id, as a diff")
    parser.add_argument("--score", action="store_true")
    args = parser.parse_args(arguments)
    every = mutants(args.group)
    if args.show:
        one = next(mutant for mutant in every if mutant["id"] == args.show)
        texts = (mutated(one["file"], number).splitlines() for number in (None, one["number"]))
        print("\n".join(difflib.unified_diff(*texts, lineterm="", n=1)))
    elif args.score:
        print(score(args.out))
    else:
        chosen = random.Random(args.seed).sample(every, min(args.sample, len(every)))
        first, parts = map(int, args.part.split("/"))
        run(args.group, chosen[first::parts], args.out)
        print(score(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
