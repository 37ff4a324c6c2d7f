"""The second learned comparison: options of the adaptive planner, alone and together; ``learned.py run --set plus``.

What was expected of it, and what would refute that, stood in docs/learned.md before anything was run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from learned_pages import PageSettings
from learned_run import Arm, Settings, all_arms, stages

from uhd import SlicePlan, register_strategy
from uhd.nano.build import NanoConfig, plus_parts
from uhd.nano.task import TaskSettings
from uhd.slicing import Slicing, SlicingLike, find
from uhd.slicing.latents import with_latents

ARMS = ("uhd", "uhd-more", "shape", "borders", "one-view", "fitted", "plus", "stretch", "anyres")
AFTER_ARMS = ("uhd-more", "plus", "native", "slices")
"""Of the afterthought: two that ``plus`` set aside, and two that its results suggested."""

PAGE_ARMS = ("uhd-more", "native-direct")
DIRECT_ARMS = (*PAGE_ARMS, "stretch", "anyres", "native")
"""Of the second task, and of the third comparison; the others are asked for by name."""

BASELINE = "uhd-more"
TAKES = {arm: BASELINE for arm in ARMS if arm not in (BASELINE, "plus")}
"""Arms that take the learning rate that another one chose."""

DIRECT_CONTRASTS = tuple(("native-direct", other) for other in ("anyres", "stretch", "native"))
CONTRASTS = (("borders", "uhd"), ("uhd-more", "uhd"), ("plus", "stretch"), ("plus", "anyres"))

NEAR_SQUARE = 2.5
"""Up to this aspect the arms with ``one_view_below`` make one view of an image."""

NO_IMAGE_BEYOND = 8.0
"""No scene has a larger aspect."""

EXPECTED = {
    "plus": (
        ("H1", "plus", "uhd-more", "all", "all images", 0.03),
        ("H2", "shape", "uhd-more", "all", "long and not cut", 0.10),
        ("H3", "borders", "uhd", "right", "a border through a glyph", 0.03),
        ("H4", "one-view", "uhd-more", "all", "below 2.5", 0.05),
        ("H5", "fitted", "uhd-more", "all", "all images", 0.0),
        ("H6", "plus", "stretch", "all", "from 2.5 on", 0.10),
        ("H7", "plus", "anyres", "all", "all images", 0.0),
    ),
    "pages": (("H8", "native-direct", "uhd-more", "all", "all images", 0.0),),
    "after": (
        ("H9", "native", "uhd-more", "all", "all images", 0.03),
        ("H10", "slices", "uhd-more", "all", "all images", 0.03),
        ("H1 again", "plus", "uhd-more", "all", "all images", 0.03),
    ),
    "direct": (
        ("H11", "native-direct", "uhd-more", "all", "all images", 0.03),
        ("H12", "native-direct", "anyres", "all", "all images", 0.0),
        ("H13", "native-direct", "stretch", "all", "all images", 0.0),
        ("H14", "native-direct", "native", "all", "all images", 0.0),
    ),
}
"""What docs/learned.md expects: an arm minus another one, in a question, on some images, by at least so much."""

NOWHERE_WORSE, NOT_WORSE_BELOW, NOT_WORSE_IN_ALL = ("H1", "H3", "H9", "H10", "H1 again"), ("H6",), ("H11",)
"""Of these also that no bucket of any question is worse; that none below 2.5 is in their own question; that no bucket
of their own question is, and no question over all images."""

Grid = tuple[int, int]


def plus_arms(base: NanoConfig | None = None) -> dict[str, Arm]:
    """Every arm by name. All but ``uhd`` and ``borders`` have about as many visual tokens as ``uhd-more``."""
    return _arms(base or NanoConfig())


@lru_cache(maxsize=8)  # a registered function is this very one
def _arms(base: NanoConfig) -> dict[str, Arm]:
    first, side = all_arms(base), 2 * base.side
    wide = replace(base, side=side, latents=4 * base.latents)  # positions and latents for one large view
    cut, fitted = base.slicing, base.slicing.replace(latents="fitted")
    tens = cut.replace(one_view_below=NEAR_SQUARE, tokens_per_view=10)
    sizes = "" if base == NanoConfig() else "-" + "-".join(map(str, asdict(base).values()))
    more = _told(f"learned-uhd-more{sizes}", cut, overview=_wide_overview)
    joined = _told(f"learned-one-view{sizes}", tens, overview=_wide_overview)
    fewer = _told(f"learned-anyres{sizes}", first["anyres"].slicing, overview=_narrow_overview)
    return {
        "uhd": first["uhd"],
        "uhd-more": Arm("uhd with 12 latents for the overview of a cut image", base, more),
        "shape": Arm("uhd with slices for what the longer side needs too", base, cut.replace(cut_by="shape")),
        "borders": Arm("uhd with borders where little is cut", base, cut.replace(border_moves=2)),
        "one-view": Arm("uhd-more, but images up to 2.5:1 as one larger view", wide, joined),
        "fitted": Arm("uhd with latents by patches", base, fitted.replace(tokens_per_view=10)),
        "plus": Arm(
            "all of them together",
            wide,
            fitted.replace(one_view_below=NEAR_SQUARE, cut_by="shape", border_moves=2),
        ),
        "stretch": first["stretch"],
        "anyres": Arm("anyres with 6 latents for the base view beside four tiles", base, fewer),
    }


def after_arms(base: NanoConfig | None = None) -> dict[str, Arm]:
    """What the results of ``plus`` suggested: all images as one view, or none but those that are not cut."""
    base = base or NanoConfig()
    wide = replace(base, side=2 * base.side, latents=4 * base.latents)
    fitted = base.slicing.replace(latents="fitted", cut_by="shape")
    whole = fitted.replace(one_view_below=NO_IMAGE_BEYOND)
    return {
        "native": Arm("plus, but every image as one view", wide, whole),
        "slices": Arm("plus without one view in place of slices", base, fitted.replace(border_moves=2)),
    }


def direct_arms(base: NanoConfig | None = None) -> dict[str, Arm]:
    """``native`` with a resampler for long views: neighbours stay as far apart in its positions as in a square."""
    told = "native with fitted latents' own positions, and 64 learned latents"
    return {"native-direct": Arm(told, **plus_parts(base))}


def _wide_overview(slices: int) -> Grid:
    return (3, 4) if slices else (3, 3)


def _narrow_overview(slices: int) -> Grid:
    return (2, 3) if slices > 3 else (3, 3)


def _told(name: str, rule: SlicingLike, *, overview: Callable[[int], Grid]) -> Slicing:
    """The rule with 3 x 3 latents a slice and as many for the overview as its slices ask for, under a name of its own,
    by which a saved model finds it."""
    rule = find(rule)

    def planned(image_hw: Grid) -> SlicePlan:
        found = rule.plan(image_hw)
        slices = sum(len(canvas.tiles) for canvas in found.canvases if canvas.kind == "slice")
        canvases = tuple(
            canvas
            if canvas.latents_hw
            else with_latents(canvas, (3, 3) if canvas.kind == "slice" else overview(slices))
            for canvas in found.canvases
        )
        tokens = sum(len(canvas.tiles) * canvas.tokens_per_view for canvas in canvases)
        return found.replace(canvases=canvases, num_visual_tokens=tokens, num_separators=0, packing=None)

    planned.__name__ = planned.__qualname__ = name
    register_strategy(name, planned)
    return find(name)


class PageStage(stages.Stage):
    """A stage of the recipe whose scenes are pages."""

    def settings(self, step: int) -> TaskSettings:
        words = super().settings(step)
        return PageSettings(area=words.area, max_words=words.max_words)


@dataclass(frozen=True, kw_only=True)
class PlusSettings(Settings):
    """As the first comparison's, with its own arms, learning rates, and scenes that judge."""

    factors: tuple[float, ...] = (0.5, 0.25, 0.125)

    name: ClassVar[str] = "plus"
    takes: ClassVar[Mapping[str, str]] = TAKES
    test_seed: ClassVar[int] = 1_000_303
    validation_seed: ClassVar[int] = 1_000_403

    def arms(self) -> dict[str, Arm]:
        return plus_arms(self.model)

    def to_dict(self) -> dict[str, Any]:
        seeds = {"test_seed": self.test_seed, "validation_seed": self.validation_seed}
        return {**super().to_dict(), "set": self.name, **seeds, "arms": {n: a.summary for n, a in self.arms().items()}}


@dataclass(frozen=True, kw_only=True)
class PageTaskSettings(PlusSettings):
    """The same on the second task."""

    factors: tuple[float, ...] = (0.5,)

    name: ClassVar[str] = "pages"
    test_seed: ClassVar[int] = 1_000_503
    validation_seed: ClassVar[int] = 1_000_603
    task: ClassVar[TaskSettings] = PageSettings()

    def arms(self) -> dict[str, Arm]:
        return {**super().arms(), **direct_arms(self.model)}

    def stage(self, name: str, factor: float = 1.0) -> stages.Stage:
        return PageStage(**asdict(super().stage(name, factor)))


@dataclass(frozen=True, kw_only=True)
class AfterSettings(PlusSettings):
    """The afterthought, on scenes of its own; arms of ``plus`` are those that were trained there."""

    factors: tuple[float, ...] = (0.5,)

    name: ClassVar[str] = "after"
    test_seed: ClassVar[int] = 1_000_703
    validation_seed: ClassVar[int] = 1_000_803
    trained_in: ClassVar[str | None] = "plus"

    def arms(self) -> dict[str, Arm]:
        return {**super().arms(), **after_arms(self.model)}


@dataclass(frozen=True, kw_only=True)
class DirectSettings(PlusSettings):
    """The third comparison, on scenes of its own; arms of ``plus`` that were trained there are judged here."""

    factors: tuple[float, ...] = (0.5,)

    name: ClassVar[str] = "direct"
    test_seed: ClassVar[int] = 1_000_903
    validation_seed: ClassVar[int] = 1_001_003
    trained_in: ClassVar[str | None] = "plus"

    def arms(self) -> dict[str, Arm]:
        return {**super().arms(), **after_arms(self.model), **direct_arms(self.model)}


PLUS, PAGES, AFTER, DIRECT = PlusSettings(), PageTaskSettings(), AfterSettings(), DirectSettings()
_arms(NanoConfig())  # a saved model finds its slicing by its name
