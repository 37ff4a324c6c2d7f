"""The arms of the learned comparison, and the runs that train and judge them; ``learned.py`` is the command."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import platform
import string
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL
import torch
import transformers

import uhd
from uhd import SlicePlan, SpatialSchema, UHDForConditionalGeneration, VisualEncoder
from uhd.evaluation.judging import cost
from uhd.nano.build import NanoConfig, build_nano
from uhd.nano.evaluate import Item, edit_distance, evaluate
from uhd.nano.task import QUESTIONS, Scene, TaskSettings, scene
from uhd.slicing import SlicingLike, find
from uhd.slicing.coordinates import view_box
from uhd.slicing.strategies.base import GRAY
from uhd.slicing.strategies.fixed import SquarePadConfig, StretchConfig
from uhd.slicing.strategies.selectors import grids_up_to

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "nano"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))

import stages  # noqa: E402  the example is a folder of scripts
from train import RECIPE, settle  # noqa: E402

TRAINED = ("vision", "text", "joint")
"""Stages of a run; the shipped model has one more."""

TEST_SEED, VALIDATION_SEED = 1_000_103, 1_000_203
"""Of the scenes: neither is trained on, nor that of the shipped model's own evaluation."""

TUNING_SEED = 0
"""The training seed on which every arm chooses its learning rate."""

CHOSEN_BY = ("right", "line", "all")
"""Questions whose mean share of exact answers on the validation scenes chooses the learning rate."""

PIECE = 200
"""Steps between checkpoints: what is lost where a process is killed, and what is not begun too near the end."""

INK_HW = (9, 7)
"""Height and width of a glyph's ink around its middle, px; a border inside cuts the glyph."""

DIGITS = string.digits + string.ascii_lowercase + string.ascii_uppercase
NOT_ASKED = "."


@dataclass(frozen=True)
class Arm:
    """One way to show images to the model: sizes of its parts, a slicing (``None``: the sizes' own), a schema, and the
    positions of fitted latents."""

    summary: str
    config: NanoConfig
    slicing: SlicingLike | None = None
    schema: str | SpatialSchema = "llava-uhd"
    fitted_position: str = "interpolated"

    def build(self, seed: int) -> UHDForConditionalGeneration:
        """The untrained model."""
        given = {"slicing": self.slicing, "schema": self.schema, "fitted_position": self.fitted_position}
        return build_nano(self.config, **given, seed=seed)


def all_arms(base: NanoConfig | None = None) -> dict[str, Arm]:
    """Every arm by name; square views have twice the side and four times the latents of a slice."""
    base = base or NanoConfig()
    tile, side, latents = base.side, 2 * base.side, 4 * base.latents
    square = replace(base, side=side, latents=latents)
    tiles = find("llava-next").for_vision(image_size=tile, patch_size=base.patch_size)
    return {
        "uhd": Arm("LLaVA-UHD: native slices and an overview", base),
        "stretch": Arm(
            "one square view, the image stretched",
            square,
            StretchConfig("stretch", base.patch_size, side, tokens=latents),
        ),
        "pad": Arm(
            "one square view, the image padded", square, SquarePadConfig("pad", base.patch_size, side, fill=GRAY)
        ),
        "next": Arm("LLaVA-NeXT's five canvases of square tiles, and a base view", base, tiles.replace(name="next")),
        "anyres": Arm(
            "all canvases of up to 4 square tiles, and a base view",
            base,
            tiles.replace(name="anyres", grids=grids_up_to(base.max_slices)),
        ),
        "no-separators": Arm(
            'uhd without "," and "\\n"', base, schema=SpatialSchema(name="no-separators", column="", row="")
        ),
        "overview": Arm("uhd's overview alone", base, base.slicing.replace(max_slices=1)),
        "overview-wide": Arm(
            "uhd's overview alone, with the tokens of four slices",
            replace(base, latents=latents),
            base.slicing.replace(max_slices=1),
        ),
        "few-latents": Arm("uhd with 4 tokens a view instead of 9", replace(base, latents=4)),
    }


ARMS = ("uhd", "stretch", "pad", "next", "anyres", "no-separators")
QUICK_ARMS = ("uhd", "stretch", "next", "no-separators")
VARIANTS = dict.fromkeys(("overview", "overview-wide", "few-latents"), "uhd")
"""Arms that choose no learning rate, and whose they take: changes of the arm ``uhd`` in one number."""

SEEDS = (0, 1, 2)

COSTED = 256
"""Images over which tokens, views, patches and FLOPs are averaged, the first ones."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every arm is trained and judged.

    Attributes:
        vision, text, joint: Steps of the stages.
        batch_size: Images in a step.
        factors: Of the recipe's learning rates, to choose from.
        test_images, validation_images: Fresh scenes that judge, and that choose the factor.
        local_steps: Of the fit that lets latents start by looking at their own cells.
        model: Sizes of the arm ``uhd``.
    """

    vision: int = 1000
    text: int = 1000
    joint: int = 1200
    batch_size: int = 32
    factors: tuple[float, ...] = (1.0, 0.5)
    test_images: int = 1000
    validation_images: int = 300
    local_steps: int = 300
    model: NanoConfig = field(default_factory=NanoConfig)

    test_seed: ClassVar[int] = TEST_SEED
    validation_seed: ClassVar[int] = VALIDATION_SEED
    task: ClassVar[TaskSettings] = TaskSettings()
    takes: ClassVar[Mapping[str, str]] = VARIANTS
    trained_in: ClassVar[str | None] = None
    """Another set, of which the models of arms that both have are judged and not trained again."""

    def arms(self) -> dict[str, Arm]:
        """Every arm by name."""
        return all_arms(self.model)

    def test_scene(self, number: int) -> Scene:
        """One of the scenes that judge."""
        return scene(self.test_seed, number, self.task)

    def stage(self, name: str, factor: float = 1.0) -> stages.Stage:
        """The recipe's stage with these steps and this share of its rates, asking every kind of question."""
        kept = RECIPE[name]
        return replace(
            kept,
            steps=getattr(self, name),
            batch_size=self.batch_size,
            matrix_lr=kept.matrix_lr * factor,
            other_lr=kept.other_lr * factor,
            every=name != "vision",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the recipe among them: runs with another one do not belong together."""
        told = {**asdict(self), "recipe": {name: asdict(self.stage(name)) for name in TRAINED}}
        return json.loads(json.dumps(told))


LONG = Settings()
QUICK = Settings(vision=250, text=220, joint=240, factors=(1.0,), test_images=300, validation_images=0)


@dataclass(frozen=True)
class Task:
    """One run: an arm, a training seed, a factor of the learning rates."""

    arm: str
    seed: int
    factor: float

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}-lr{self.factor:g}"


def tried_factors(arm: str, found: Mapping[Task, Mapping[str, Any]], factors: Sequence[float]) -> Sequence[float]:
    """Those to choose from: the first two, and each other one if the one before it read better than the one before."""
    for count in range(2, len(factors)):
        runs = [found.get(Task(arm, TUNING_SEED, factor)) for factor in factors[count - 2 : count]]
        if None in runs or runs[1]["validation"] <= runs[0]["validation"]:
            return factors[:count]
    return factors


def chosen_factor(
    arm: str,
    found: Mapping[Task, Mapping[str, Any]],
    factors: Sequence[float],
    takes: Mapping[str, str] = VARIANTS,
) -> float | None:
    """Of the tried ones, that which reads the validation scenes best, the first of equals; ``None``: one has not run.

    Arms in ``takes`` take another one's.
    """
    if len(factors) == 1:
        return factors[0]
    arm = takes.get(arm, arm)
    tried = tried_factors(arm, found, factors)
    scores = {f: found[task]["validation"] for f in tried if (task := Task(arm, TUNING_SEED, f)) in found}
    return max(scores, key=scores.__getitem__) if len(scores) == len(tried) else None


def tasks(
    factors: Sequence[float],
    arms: Sequence[str],
    seeds: Sequence[int],
    found: Mapping[Task, Any],
    takes: Mapping[str, str] = VARIANTS,
) -> tuple[list[Task], list[str]]:
    """The runs in their order, arms side by side, and what cannot be planned before an arm has its factor."""
    choosing = [arm for arm in arms if arm not in takes]
    tried = {arm: tried_factors(arm, found, factors) for arm in choosing if TUNING_SEED in seeds}
    first = [Task(arm, TUNING_SEED, f) for f in factors for arm in tried if f in tried[arm]]
    rest, blocked = [], []
    for seed in seeds:
        for arm in arms if seed != TUNING_SEED else [arm for arm in arms if arm in takes]:
            factor = chosen_factor(arm, found, factors, takes)
            if factor is None:
                blocked.append(f"{arm}-seed{seed}")
            else:
                rest.append(Task(arm, seed, factor))
    return first + rest, blocked


RUN_KEYS = {"arm", "seed", "factor", "settings", "parameters", "time", "validation", "cost", "test"}
"""What every result holds."""


def read_runs(out: Path, settings: Settings | None = None) -> dict[Task, dict[str, Any]]:
    """The finished runs in a folder.

    Raises:
        ValueError: A file is no run, or was made with other settings than those given, or than the others; two files
            are the same run.
    """
    found, paths = {}, {}
    wanted = settings.to_dict() if settings else None
    for path in sorted(out.glob("*.json")):
        try:
            run = json.loads(path.read_text())
            if absent := sorted(RUN_KEYS - set(run)):
                raise ValueError(f"it has no {', '.join(absent)}")
            task = Task(run["arm"], run["seed"], run["factor"])
        except (ValueError, TypeError) as problem:
            raise ValueError(f"{path} is no run of this benchmark: {problem}") from None
        if task in paths:
            raise ValueError(f"{paths[task]} and {path} are the same run: move one of them away")
        paths[task], wanted = path, wanted or run["settings"]
        if run["settings"] != wanted:
            differ = sorted(
                key for key in {**wanted, **run["settings"]} if run["settings"].get(key) != wanted.get(key)
            )
            raise ValueError(
                f"{path} was made with other settings ({', '.join(differ)}): give another folder with --out, or move "
                "it away"
            )
        found[task] = run
    return found


class Clock:
    """Seconds until a deadline; whether another piece, as long as the longest so far, ends before it."""

    def __init__(self, minutes: float | None, longest: float = 0.0) -> None:
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.longest = longest

    @property
    def room(self) -> bool:
        return self.deadline is None or time.monotonic() + self.longest < self.deadline

    @contextmanager
    def piece(self, told: dict[str, float]) -> Iterator[None]:
        """Adds a piece's wall and CPU seconds to ``told``."""
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self.longest = max(self.longest, time.monotonic() - wall)
        told["seconds"] = round(told.get("seconds", 0) + time.monotonic() - wall, 1)
        told["cpu"] = round(told.get("cpu", 0) + time.process_time() - cpu, 1)


def longest_piece(times: Iterable[Mapping[str, Mapping[str, float]]]) -> float:
    """CPU seconds that a piece took in the slowest stage of earlier runs, on average; 0 where there are none."""
    return max(
        (
            part["cpu"] * min(PIECE / part.get("steps", PIECE), 1)
            for told in times
            for part in told.values()
            if part.get("cpu") and part.get("steps", PIECE)
        ),
        default=0.0,
    )


def work(
    settings: Settings,
    *,
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = SEEDS,
    out: Path,
    checkpoints: Path,
    minutes: float | None = None,
    pause: float = 5.0,
) -> list[str]:
    """Do runs one after the other until none is left, or none that would end in time; returns what is left.

    Any number of processes may work on the same folders: each run is one process's at a time.
    """
    torch.set_num_threads(1)  # small matrices: one thread a process, more processes
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    begun = [read_progress(folder) for folder in checkpoints.iterdir()]
    clock = Clock(minutes, longest_piece([*begun, *(run["time"] for run in read_runs(out, settings).values())]))
    while True:
        found = read_runs(out, settings)
        planned, blocked = tasks(settings.factors, arms, seeds, found, settings.takes)
        left = [task for task in planned if task not in found]
        names = [*(task.name for task in left), *blocked]
        if not names or not clock.room:
            return names
        moved = elsewhere = False
        for task in left:
            with claimed(checkpoints / f"{task.name}.lock") as mine:
                if not mine:
                    elsewhere = True
                    continue
                moved = (out / f"{task.name}.json").exists()  # by another process, a moment ago
                moved = moved or carry_out(task, settings, out=out, folder=checkpoints / task.name, clock=clock)
                break
        if not moved and (not elsewhere or not clock.room):
            return names
        if not moved:
            time.sleep(pause)  # another process may finish what the rest waits for


def work_side_by_side(count: int, settings: Settings, **kwargs: Any) -> None:
    """:func:`work` in ``count`` processes, one core each.

    Raises:
        RuntimeError: One of them failed.
    """
    started = [
        multiprocessing.get_context("spawn").Process(target=work, args=(settings,), kwargs=kwargs)
        for _ in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError("a worker failed, see above; what was finished is kept, start again to go on")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may go on with the run; the system gives it back where a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def carry_out(task: Task, settings: Settings, *, out: Path, folder: Path, clock: Clock) -> bool:
    """Begin a run or go on with it; ``True`` where it is done, ``False`` where the time is over.

    Raises:
        ValueError: The folder was begun with other settings, or the model to judge was trained with others.
    """
    if settings.trained_in and (model := folder.parents[1] / settings.trained_in / folder.name / "model").exists():
        trained = json.loads((out.parent / settings.trained_in / f"{task.name}.json").read_text())
        if any(trained["settings"][key] != settings.to_dict()[key] for key in ("recipe", "model", "local_steps")):
            raise ValueError(f"{model} was trained otherwise than {settings.name} asks for: move it away")
        result = judged(UHDForConditionalGeneration.from_pretrained(model).eval(), settings)
        write_json(out / f"{task.name}.json", {**trained, "settings": settings.to_dict(), **result})
        print(f"{task.name}: judged as {settings.trained_in} trained it", flush=True)
        return True
    settle(folder, {**settings.to_dict(), **asdict(task)})
    arm = settings.arms()[task.arm]
    progress = read_progress(folder)
    for name in TRAINED:
        stage = settings.stage(name, task.factor)
        told = progress.setdefault(name, {"steps": 0})
        while told["steps"] < stage.steps:
            if not clock.room:
                return False
            stop = min(told["steps"] + PIECE, stage.steps)
            with clock.piece(told), (folder / "log.txt").open("a") as log, redirect_stdout(log):
                model, supervision = begin(arm, name, folder, settings, seed=task.seed)
                stages.train(model, supervision, stage, folder, seed=task.seed, stop=stop, every=100, keep=PIECE)
            told["steps"] = stop
            write_json(folder / "progress.json", progress)
            print(f"{task.name}: {name} {stop} of {stage.steps} steps, {told['cpu']:.0f} CPU s", flush=True)
    if not clock.room:
        return False
    model, _ = begin(arm, "joint", folder, settings, seed=task.seed)
    model.load_state_dict(torch.load(folder / "joint.pt", weights_only=True)["model"])
    told = progress.setdefault("evaluation", {})
    with clock.piece(told):
        result = judged(model.eval(), settings)
    model.save_pretrained(folder / "model")  # before the result, which says that the run is done
    write_json(out / f"{task.name}.json", {**described(task, settings, model, progress, folder), **result})
    print(f"{task.name}: done, {sum(part.get('cpu', 0) for part in progress.values()):.0f} CPU s", flush=True)
    for path in (folder / "progress.json", *folder.glob("*.pt")):
        path.unlink()
    return True


def begin(
    arm: Arm, name: str, folder: Path, settings: Settings, *, seed: int
) -> tuple[UHDForConditionalGeneration, stages.Supervision]:
    """The model as a stage finds it; :func:`stages.train` then loads the stage's own checkpoint, if there is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        supervision = stages.Supervision(arm.config.width, arm.config.latents)
    model = arm.build(seed)
    if not (folder / f"{name}.pt").exists():
        if name == "joint":
            stages.start_joint(folder, model, supervision)
        elif name == "vision":
            stages.fit_attention(model, steps=settings.local_steps)
    return model, supervision


def described(
    task: Task, settings: Settings, model: UHDForConditionalGeneration, progress: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """What a result says of itself besides the answers."""
    shown = {"vision": "patch found", "text": "characters", "joint": "characters"}
    curves = {}
    for name, key in shown.items():
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        curves[name] = sorted({line["step"]: line[key] for line in lines}.items())  # a killed piece wrote some twice
    return {
        "format": 1,
        "arm": task.arm,
        "seed": task.seed,
        "factor": task.factor,
        "settings": settings.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "time": progress,
        "curves": curves,
        "versions": {
            "uhd": uhd.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def judged(model: UHDForConditionalGeneration, settings: Settings) -> dict[str, Any]:
    """Every answer about the test scenes, the score on the validation scenes, and the cost."""
    items = evaluate(model, images=settings.test_images, seed=settings.test_seed, settings=settings.task)
    validation = None
    if settings.validation_images:
        given = {"images": settings.validation_images, "seed": settings.validation_seed, "settings": settings.task}
        tried = evaluate(model, **given, kinds=CHOSEN_BY)
        shares = [np.mean([item.exact for item in tried if item.kind == kind]) for kind in CHOSEN_BY]
        validation = round(float(np.mean(shares)), 4)
    return {
        "validation": validation,
        "test": {"seed": settings.test_seed, **written(items, settings, model.visual)},
        "cost": cost(model.visual, [settings.test_scene(n).image for n in range(min(settings.test_images, COSTED))]),
    }


def written(items: Sequence[Item], settings: Settings, encoder: VisualEncoder) -> dict[str, Any]:
    """Items as one character an image: edit distance (0 is exact) and length of the truth in base 62, by question.

    ``cut`` is of the question "right": 1 where a border between slices goes through one of its two glyphs, 0 where
    not, u where the image is not cut.
    """
    images = settings.test_images
    buckets = [NOT_ASKED] * images
    found = {kind: {"distance": [NOT_ASKED] * images, "length": [NOT_ASKED] * images} for kind in QUESTIONS}
    cut = [NOT_ASKED] * images
    for item in items:
        buckets[item.index] = str(item.bucket)
        found[item.kind]["distance"][item.index] = DIGITS[edit_distance(item.answer, item.truth)]
        found[item.kind]["length"][item.index] = DIGITS[len(item.truth)]
        if item.kind == "right":
            drawn = settings.test_scene(item.index)
            cut[item.index] = cut_by(drawn, item.question, encoder.prepare([drawn.image]).plans[0])
    return {
        "buckets": "".join(buckets),
        "items": {kind: {key: "".join(row) for key, row in rows.items()} for kind, rows in found.items()},
        "cut": "".join(cut),
    }


def cut_by(drawn: Scene, question: str, plan: SlicePlan, ink_hw: tuple[float, float] = INK_HW) -> str:
    """Whether slices cut the glyph that "right K?" names, or the one after it: "1", "0", or "u" for an uncut image.

    ``ink_hw``: height and width, px, of what must not be cut around a glyph's middle.
    """
    slices = [tuple(map(float, view_box(plan, view.index))) for view in plan.views if view.kind == "slice"]
    if len(slices) < 2:
        return "u"
    place = next(n for n, glyph in enumerate(drawn.glyphs) if glyph.text == question.split()[1][0])
    return str(int(any(not _whole(glyph.centre_hw, slices, ink_hw) for glyph in drawn.glyphs[place : place + 2])))


def _whole(centre_hw: tuple[float, float], slices: Sequence[tuple[float, ...]], ink_hw: tuple[float, float]) -> bool:
    """Whether one slice shows all of the ink, or none cuts it; the image's own border cuts nothing."""
    (y, x), (half_h, half_w) = centre_hw, (ink_hw[0] / 2, ink_hw[1] / 2)
    edges = [min(box[0] for box in slices), min(box[1] for box in slices)]
    ends = [max(box[2] for box in slices), max(box[3] for box in slices)]
    top, left = max(y - half_h, edges[0]), max(x - half_w, edges[1])
    bottom, right = min(y + half_h, ends[0]), min(x + half_w, ends[1])
    return any(box[0] <= top and box[1] <= left and bottom <= box[2] and right <= box[3] for box in slices)


def read_progress(folder: Path) -> dict[str, Any]:
    """Steps and seconds of a run that was begun."""
    try:
        return json.loads((folder / "progress.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def write_json(path: Path, value: Any) -> None:
    """Write whole, or leave the file that was there."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value) + "\n")
    new.replace(path)
