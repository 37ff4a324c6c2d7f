"""Where only NumPy is installed, planning works, and everything else says in a sentence what is missing."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MISSING = ("torch", "transformers", "timm", "einops", "safetensors", "tqdm", "triton", "PIL", "huggingface_hub")


def bare(code, *, missing=MISSING):
    """Run code in a process that cannot import these."""
    block = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, "-W", "error", "-c", block + code], capture_output=True, text=True, env=env)


def test_planning_needs_numpy_alone():
    found = bare(
        "import uhd, uhd.testing\n"
        "plan = uhd.plan((1080, 1920))\n"
        "print(plan.grid, uhd.layout(plan, uhd.SpatialSchema()).num_tokens, uhd.plan_many([[300, 400]])['grid'])\n"
        "print(len(uhd.strategies()) > 50, uhd.plan((300, 400), 'llava-next').num_views)\n"
        "uhd.testing.check_strategy('llava-uhd')\n"
        "print(len(uhd.compare.table([(300, 400), (500, 200)], ['llava-uhd', 'llava-next'])), 'records')\n"
        "from uhd.cli import main\n"
        "assert main(['plan', '1920x1080']) == main(['layout', '1920x1080']) == 0\n"
        "assert main(['compare', '1920x1080', '--set', 'common']) == 0\n"
    )
    assert found.returncode == 0, found.stderr
    assert "(2, 3) 453 [[1 2]]" in found.stdout
    assert "4 records" in found.stdout
    assert "7 views" in found.stdout


@pytest.mark.parametrize(
    "name, library",
    [
        ("VisualEncoder", "torch"),
        ("UHDProcessor", "transformers"),
        ("merge_visual", "torch"),
        ("hf", "transformers"),
        ("pixels.load_image", "pillow"),
        ("datasets.Tokens", "safetensors"),
    ],
)
def test_other_names_say_what_they_need(name, library):
    package, _, last = f"uhd.{name}".rpartition(".")
    found = bare(f"import importlib; getattr(importlib.import_module({package!r}), {last!r})")
    last_line = found.stderr.strip().splitlines()[-1]
    assert last_line == f"uhd.lazily.LibraryMissing: uhd.{name} needs {library}, which is missing here: " + (
        "pip install llava-uhd brings what uhd needs"
    )


@pytest.mark.parametrize("words, library", [("doctor x", "transformers"), ("show a.png -o b.png", "pillow")])
def test_other_commands_say_so_in_one_line(words, library):
    found = bare(f"from uhd.cli import main; sys.exit(main({words.split()!r}))")
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert f"needs {library}, which is missing here: pip install llava-uhd" in found.stderr


def test_the_package_is_a_command():
    found = subprocess.run([sys.executable, "-m", "uhd", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.startswith("uhd ")
