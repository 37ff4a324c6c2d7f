"""One row of CI's table: the room's versions, what pytest counted, and the seconds that all of it took."""

import importlib.metadata
import pathlib
import sys
import xml.etree.ElementTree

PACKAGES = ("torch", "triton", "transformers", "timm", "pillow", "numpy", "accelerate", "peft")

name, outcome, report, seconds = sys.argv[1:]
counts = "no test ran"
if pathlib.Path(report).is_file():
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite").attrib
    tests, failures, errors, skipped = (int(suite[key]) for key in ("tests", "failures", "errors", "skipped"))
    counts = f"{tests - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped"
installed = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()}
versions = " ".join(f"{package} {installed.get(package, '-')}" for package in PACKAGES)
print(f"{name:<8} {outcome:<7} {counts:<40} {seconds:>5} s  Python {sys.version.split()[0]} {versions}")
