"""The README's code runs as it stands, and so do the examples."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_python_block_runs_and_prints_what_it_says(capsys):
    block = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert 10 <= len([line for line in block.splitlines() if line.strip()]) <= 14
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\)\s+# (.*)", block)
    assert promised
    assert printed == promised


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_linked_tests_exist():
    """Every difference from paper and release names the test that shows it."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) >= 8
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    found = subprocess.run(
        [sys.executable, "-W", "error", path], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) > 3
