"""What is installed here, beside what is supported, and what will therefore run: ``uhd doctor``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

NEWEST = {
    "torch": "2.15.0",
    "transformers": "5.24.0",
    "triton": "3.9.0",
    "timm": "1.0.31",
    "pillow": "13.0.0",
    "numpy": "2.4.6",
    "einops": "0.8.2",
    "safetensors": "0.8.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
}
"""The newest release of each package that the test suite has passed with; the oldest are pyproject's bounds."""

WITHOUT = {
    "triton": "the resampler's attention runs through PyTorch on GPUs too",
    "accelerate": "no Trainer and no device_map: pip install accelerate",
    "peft": "no adapters: pip install peft",
    "torchvision": 'no image processors of transformers; pixels="fast" decodes by Pillow: pip install torchvision',
}
"""What follows where a package is missing that is not needed for everything."""


@dataclasses.dataclass(frozen=True)
class Package:
    """The installed version of a package (``None``: none), the oldest and newest supported, and what to do."""

    name: str
    installed: str | None
    oldest: str | None
    newest: str | None
    advice: str | None


@dataclasses.dataclass(frozen=True)
class Environment:
    """What :func:`look` found.

    Attributes:
        python, machine: Of this process.
        packages: Every package that uhd uses, the missing ones too.
        attention: What computes the resampler's attention here, and why.
        pixels: What decodes and resizes images under each backend.
        products: Which matrix products inference takes on this CPU, and how fast each one is.
        compiler: The C++ compiler that ``torch.compile`` would use on a CPU, or what follows without one.
    """

    python: str
    machine: str
    packages: tuple[Package, ...]
    attention: str
    pixels: str
    products: str
    compiler: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each package that is outside the supported range, missing, or does not import."""
        found = [f"{package.name}: {package.advice}" for package in self.packages if package.advice]
        if not oldest_supported():
            found.append("uhd: not installed, so its oldest supported releases are not known here: pip install .")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**dataclasses.asdict(self), "warnings": self.warnings}


def look() -> Environment:
    """Compare what is installed with what is supported, and try what will run. Nothing is changed."""
    oldest = oldest_supported()
    names = dict.fromkeys([*NEWEST, *WITHOUT])
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)
    return Environment(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        packages=tuple(_package(name, oldest.get(name)) for name in names),
        attention=_told(lambda: ": ".join(attention())),
        pixels=_told(_pixels),
        products=_told(_products),
        compiler=compiler or "no C++ compiler: encoder.compile() and torch.compile need one on a CPU",
    )


def _told(look_up: Callable[[], str]) -> str:
    try:
        return look_up()
    except Exception as problem:
        return f"cannot be told: {type(problem).__name__}: {str(problem)[:120]}"


def oldest_supported() -> dict[str, str]:
    """Lower bounds of the installed distribution's requirements, extras included; empty where it is not installed."""
    try:
        requirements = importlib.metadata.requires("llava-uhd") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    bounds = (re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*>=\s*([\w.]+)", line) for line in requirements)
    return {bound[1].lower(): bound[2] for bound in bounds if bound}


def attention() -> tuple[str, str]:
    """Which implementation the resampler's attention gets here, and why, tried on a few numbers."""
    import torch

    from uhd.resampler.attention import attend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    few = torch.ones(2, 1, 16, device=device)
    try:
        attend(few, few, few, [2], impl="triton")
    except ValueError as problem:
        reason = str(problem).removeprefix("impl='triton' cannot run: ").partition("; use impl=")[0]
        return "sdpa", reason
    return ("triton", f"on {device}") if device == "cuda" else ("sdpa", "on the CPU the kernels are for tests only")


def table(environment: Environment) -> str:
    """The environment for a person."""
    lines = [f"Python {environment.python}, {environment.machine}", "", f"  {'':13}  {'installed':15}  supported"]
    for package in environment.packages:
        newest = f"tested up to {package.newest}" if package.newest else ""
        span = ", ".join(filter(None, (f"from {package.oldest}" if package.oldest else "", newest)))
        lines.append(f"  {package.name:13}  {package.installed or '-':15}  {span}".rstrip())
    told = {"attention": environment.attention, "pixels": environment.pixels}
    told |= {"products": environment.products, "torch.compile": environment.compiler}
    lines += ["", *(f"  {name:<13}  {value}" for name, value in told.items())]
    lines += [f"\n  warning: {warning}" for warning in environment.warnings]
    return "\n".join(lines)


def _package(name: str, oldest: str | None) -> Package:
    newest = NEWEST.get(name)
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, None, oldest, newest, f"not installed: {WITHOUT.get(name, f'pip install {name}')}")
    advice = _import_problem(name)
    if oldest and _numbers(installed) < _numbers(oldest):
        advice = f"{installed} is older than {oldest}, the oldest supported: pip install '{name}>={oldest}'"
    elif newest and _numbers(installed) > _numbers(newest):
        advice = f"{installed} is newer than {newest}, the newest tested; if it fails, pip install '{name}<={newest}'"
    return Package(name, installed, oldest, newest, advice)


def _import_problem(name: str) -> str | None:
    if name not in ("torchvision", "triton"):  # made for one release of torch
        return None
    try:
        importlib.import_module(name)
    except Exception as problem:
        reason = f"{type(problem).__name__}: {str(problem)[:100]}"
        return f"installed, but it cannot be imported ({reason}): pip install the release that goes with torch"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, without what follows: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _pixels() -> str:
    from uhd.pixels.fast import CODECS, decoder, jpeg_decoder

    codecs = "".join(f", imagecodecs' {kind} decoder" for kind in CODECS if decoder(kind))
    if jpeg_decoder():
        return f"pillow by Pillow; fast by torchvision's JPEG decoder{codecs} and PyTorch's resize"
    why = "is not installed" if find_spec("torchvision") is None else "does not decode as Pillow does here"
    return f"pillow by Pillow; fast by Pillow's decoder, since torchvision {why}{codecs}, and PyTorch's resize"


def _products() -> str:
    from uhd import machine

    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine.rates().items())
    chosen = ", ".join(f"{name} {way}" for name, way in machine.products().items())
    return f"{chosen}; GFLOP/s: {rates or 'not told by a clock that can be trusted'}"
