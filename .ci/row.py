"""One row of CI's table: the room's versions, what pytest counted, and the seconds that all of it took.

Ends with 1 where no test ran, so that a room in which nothing was proved is not taken for a good one.
"""

import importlib.metadata
import pathlib
import sys
import xml.etree.ElementTree

PACKAGES = ("torch", "triton", "transformers", "timm", "pillow", "numpy", "accelerate", "peft")

venv, name, outcome, report, seconds = sys.argv[1:]
counts, passed = "no test ran", 0
try:
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite").attrib
    tests, failures, errors, skipped = (int(suite[key]) for key in ("tests", "failures", "errors", "skipped"))
    passed = tests - failures - errors - skipped
    counts = f"{passed} passed, {failures + errors} failed, {skipped} skipped"
except (OSError, xml.etree.ElementTree.ParseError) as problem:
    counts += f" ({type(problem).__name__})"
paths = [str(path) for path in pathlib.Path(venv).glob("lib/python*/site-packages")]
installed = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions(path=paths)}
versions = " ".join(f"{package} {installed.get(package, '-')}" for package in PACKAGES)
outcome = outcome if passed else "FAILED"
print(f"{name:<8} {outcome:<7} {counts:<40} {seconds:>5} s  Python {sys.version.split()[0]} {versions}")
sys.exit(not passed)
