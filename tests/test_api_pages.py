"""The API reference is made from the docstrings without a warning, and opens in a browser."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.test_compare import BROWSERS, FLAGS

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    out = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(out / "made"),
        "docs/api",
        str(out),
    ]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return out


def test_public_names_are_on_the_pages(site):
    import uhd.slicing

    text = (site / "planning.html").read_text()
    public = {f"uhd.slicing.{name}" for name in uhd.slicing.__all__ if callable(getattr(uhd.slicing, name))}
    assert len(public) > 20
    assert public <= set(re.findall(r'id="([\w.]+)"', text))
    assert 'id="uhd.VisualEncoder.from_pretrained"' in (site / "encoding.html").read_text()


@pytest.mark.parametrize("page", ["index", "planning", "encoding", "models", "data"])
def test_a_browser_opens_them(site, page):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs a Chromium")
    command = [browser, *FLAGS, "--enable-logging=stderr", "--dump-dom", f"file://{site / page}.html"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "<h1>" in found.stdout
    assert "CONSOLE" not in found.stderr
