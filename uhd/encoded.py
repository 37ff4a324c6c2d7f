"""What an encoder gives: visual tokens of an image or a video, with their plan and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uhd.schema import TokenLayout
from uhd.slicing import SlicePlan, VideoPlan

if TYPE_CHECKING:
    from torch import Tensor


class _OwnTokens:
    """Pickled, or copied, with its own rows: they are a view of all tokens of their batch."""

    def __getstate__(self) -> dict[str, Any]:
        tokens = self.tokens
        own = tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()
        return {**self.__dict__, "tokens": tokens if own else tokens.clone()}


@dataclass(frozen=True, eq=False)
class EncodedImage(_OwnTokens):
    """One image's visual tokens, with the plan and the layout that say what they are.

    Attributes:
        tokens: (plan.num_visual_tokens, D), views in the order of ``plan.views``; no separators among them. Where the
            plan has a packing (LLaVA-NeXT's stitched maps, say) (plan.num_tokens, D), its learned newlines included.
        plan: Where the image was cut.
        layout: Where its views, "," and "\\n" go in the language model's sequence; one entry ``"image"`` where the
            plan has a packing. :func:`uhd.merge.assemble` takes tokens and layout of either kind.
    """

    tokens: Tensor
    plan: SlicePlan
    layout: TokenLayout

    @property
    def views(self) -> tuple[Tensor, ...]:
        """(q, D) for every view of ``plan.views``; a ``ValueError`` where a packing mixes views."""
        if self.plan.packing is not None:
            raise ValueError(f"the tokens of {self.plan.strategy!r} are packed, not one view's each")
        return self.tokens.split([view.num_tokens for view in self.plan.views])


@dataclass(frozen=True, eq=False)
class EncodedVideo(_OwnTokens):
    """A video's visual tokens.

    Attributes:
        tokens: (n, D): those of its frames, as in :class:`EncodedImage`, and the newline where ``plan`` has one.
        plan: How its frames were cut.
        layout: The frames' layouts one after the other, the newline as entry ``"newline"``.
    """

    tokens: Tensor
    plan: VideoPlan
    layout: TokenLayout


def frames_of(plan: SlicePlan | VideoPlan) -> tuple[SlicePlan, ...]:
    """The plans of a video's frames, or an image's own."""
    return plan.plans if isinstance(plan, VideoPlan) else (plan,)


def num_rows(plan: SlicePlan | VideoPlan) -> int:
    """Rows of an image's :attr:`EncodedImage.tokens`, or of a video's, its newline included.

    >>> from uhd.slicing import plan
    >>> num_rows(plan((1008, 672), "llava-uhd")), num_rows(plan((1008, 672), "llava-next"))
    (448, 2160)
    """
    if isinstance(plan, VideoPlan):
        return sum(map(num_rows, plan.plans)) + plan.newline
    return plan.num_visual_tokens if plan.packing is None else plan.num_tokens
