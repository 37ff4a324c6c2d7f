"""The shared perceiver resampler: a fixed number of tokens from a view of any grid."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import Grid, as_grid, check_grids, group_views, split_views
from uhd.positions import interpolate_pos_embed, sincos_2d
from uhd.resampler import folded
from uhd.resampler.attention import LatentAttention, join_tables
from uhd.resampler.config import PerceiverConfig
from uhd.resampler.latents import ReleasedResampler
from uhd.settings import check_choice
from uhd.shortcuts import is_plain, transformed, wants_gradients
from uhd.weights import draw_linear, load_exactly, sizes_of


class FeedForward(nn.Module):
    """Computes x + down(gelu(up(norm(x)))); the width stays."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.width)
        draw_linear(self.up)
        draw_linear(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class DeeperLayer(nn.Module):
    """One layer after the first: each view's latents look at its features again, with residuals."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = LatentAttention(config.width, config.num_heads)
        self.ffn = FeedForward(config) if config.ffn_ratio else nn.Identity()

    def forward(self, x: Tensor, kv: Tensor, lengths: Sequence[int], *, query_table: Tensor | None, **keys) -> Tensor:
        """x (V, Q, D), kv (N, D) -> (V, Q, D)."""
        return self.ffn(x + self.attn(self.queries(x, query_table), kv, lengths, **keys))

    def queries(self, x: Tensor, query_table: Tensor | None) -> Tensor:
        """What looks at the features: (V, Q, D)."""
        return self.ln_q(x) if query_table is None else self.ln_q(x) + query_table


class PerceiverResampler(ReleasedResampler):
    """Q learned latents attend to the patches of one view at a time; the same weights serve every view.

        kv = LN_kv(kv_proj(x))    q = LN_q(query) + P    k = kv + positions(grid)    v = kv
        tokens = LN_post(MHA(q, k, v)) @ proj

    With depth 1 and no FFN that is all: no residual, no FFN. P is the 2D sincos table of the latents' square grid.
    Sources: LLaVA-UHD (arXiv 2403.11703, section 3.2) and the class `Resampler` of its March 2024 release; class
    `Resampler` of MiniCPM-V 2.0, 2.5 and 2.6. Parameter names are theirs: query, pos_embed (where there is one),
    kv_proj.weight (where the widths differ), attn.*, ln_q.*, ln_kv.*, ln_post.*, proj; ours are `ffn.*` and
    `layers.I.*`. The March 2024 release calls its layer with a 24 x 24 grid for every view; here each has its own.

    Attributes:
        config, in_dim, out_dim, tokens_per_view: what it was made from; D_v, D and Q.
        attention_impl: kernel used, see `uhd_kernels.varlen_cross_attention`; "auto" unless set. Another one keeps
            inference to "plain", the only path that has a kernel.
        inference: which products are taken where nothing is trained, with equal results; see the property.

    Its latents can be fitted to views (`forward`): in another grid than their own square both the learned latents
    (bilinear) and P (as the keys' positions) are interpolated to that grid, over the same extent. So tokens may be
    more or fewer, and follow a view's shape, with the same weights. A long view's latents are then near each other in
    P; with `fitted_position="direct"` P is the table of the fitted grid itself, so that neighbours are as far apart as
    in the square. A model trained without the one does not know the other.

    >>> resampler = PerceiverResampler(PerceiverConfig(width=32, vision_width=16, num_heads=2, num_latents=9))
    >>> features = torch.zeros(2 * 3 + 5 * 4, 16)  # two views, of 2 x 3 and 5 x 4 patches
    >>> resampler(features, [(2, 3), (5, 4)]).shape
    torch.Size([2, 9, 32])
    >>> resampler(features, [(2, 3), (5, 4)], [(2, 3), (4, 3)]).shape
    torch.Size([18, 32])
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config)
        self.attention_impl = "auto"
        self._inference = "auto"
        self._folded = folded.Folded()
        self.ffn = FeedForward(config) if config.ffn_ratio else nn.Identity()
        self.layers = nn.ModuleList(DeeperLayer(config) for _ in range(config.depth - 1))
        self.reset_parameters()

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, variant: str, num_heads: int, eps: float = 1e-6
    ) -> PerceiverResampler:
        """Read weights under the reference's names, without a prefix; every size is read off the tensors.

        Args:
            state: name -> tensor; dtype and device of `query` become the module's. The tensors are copied.
            variant: "paper", "minicpm-v-2.0" or "minicpm-v-2.6" (also 2.5).
            num_heads: not visible in the weights; the releases use width // 128 (MiniCPM-V, ECCV), 8 (March 2024).
            eps: of the LayerNorms.

        Raises:
            ValueError: names are missing or unexpected (listed), shapes disagree, or the heads do not fit the width.
        """
        sizes, up = sizes_of(state), state.get("ffn.up.bias")
        depth = 1 + len({name.split(".")[1] for name in state if name.startswith("layers.")})
        ffn_ratio = 0.0 if up is None else len(up) / sizes["width"]
        flags = {"num_heads": num_heads, "depth": depth, "ffn_ratio": ffn_ratio, "eps": eps}
        config = PerceiverConfig.preset(variant, **sizes, **flags)
        return load_exactly(lambda: cls(config), state, f"variant {variant!r}", like="query")

    @property
    def inference(self) -> str:
        """Which products are taken in eval mode where no gradients are wanted; `uhd.resampler.folded` has the maths.

        On a CPU "auto" (as made) takes the way with the fewest FLOPs for an image's usual views, whatever a call has:
        each rounds otherwise, and tokens would depend on the batch. Views that are fitted more latents than the layer
        has take "plain", and so do all elsewhere, where the others wait for the device once a call. "plain",
        "absorbed" and "narrow" ask for one. Whatever is asked for, "plain" is taken in training, under compilation,
        tracing, autocast and functorch, while a CUDA graph is captured, with more layers than one or an FFN, and where
        weights or layers are not what they were made as (quantised, parametrised, distributed, wrapped, hooked). LoRA
        or hooks on kv_proj or ln_kv leave "absorbed". `inference_path` tells of views with no more latents than that.

        Raises (on setting):
            ValueError: an unknown name, or one that this layer cannot take (depth above 1, an FFN).
        """
        return self._inference

    @inference.setter
    def inference(self, choice: str) -> None:
        if choice == "cached":
            warnings.warn(
                "inference='cached' is gone, it saved little: 'auto' is taken", DeprecationWarning, stacklevel=2
            )
            choice = "auto"
        check_choice("inference", choice, folded.CHOICES)
        if choice not in ("auto", "plain") and (self.config.depth > 1 or self.config.ffn_ratio):
            raise ValueError(
                f"inference={choice!r} needs depth=1 and no FFN; this one has depth={self.config.depth} and "
                f"ffn_ratio={self.config.ffn_ratio}: take 'auto' or 'plain'"
            )
        self._inference = choice

    def inference_path(self, grids: Sequence[Grid], features: Tensor | None = None) -> str:
        """Tell which way a call would take now for views of these grids: "plain", "absorbed" or "narrow"."""
        grids = [as_grid(grid) for grid in grids]
        choice = self._inference
        usual = folded.usual_views(self.config)
        if choice == "auto":
            foldable = self.attention_impl == "auto" and self.query.device.type in folded.CHOSEN_ON
            choice = folded.cheapest(self.config, usual) if foldable else "plain"
        if not grids or choice == "plain":  # the usual case of small layers, where the checks would take longer
            return "plain"
        paths = self._foldable(features)
        if self._inference == "auto":
            return folded.cheapest(self.config, usual, paths)
        return choice if choice in paths else "plain"

    def _foldable(self, features: Tensor | None) -> tuple[str, ...]:
        """Tell which paths give what "plain" gives in the present state; see `inference`."""
        plain, device = folded.PATHS[:1], self.query.device
        inputs = [] if features is None else [features]
        if self.training or transformed() or self.config.depth > 1 or self.config.ffn_ratio:
            return plain
        if wants_gradients((*inputs, *self.parameters())) or torch.is_autocast_enabled(device.type):
            return plain
        if any(type(x) is not Tensor or x.device != device for x in inputs):
            return plain
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return plain
        if not (is_plain(self.attn, LatentAttention) and is_plain(self.ln_q, nn.LayerNorm)):
            return plain
        if not folded.are_plain(self._layer("absorbed").weights, self.query):
            return plain
        kv_proj = self.kv_proj
        whole = is_plain(self.ln_kv, nn.LayerNorm) and (
            is_plain(kv_proj, nn.Identity) or (is_plain(kv_proj, nn.Linear) and kv_proj.bias is None)
        )
        narrow = whole and folded.are_plain(self._layer("narrow").weights, self.query)
        return folded.PATHS if narrow else folded.PATHS[:2]

    def _layer(self, path: str) -> folded.Layer:
        """What `path` folds, as the modules hold it now; None for a parameter that is no longer there."""
        names = ["query", "attn.in_proj_weight", "attn.in_proj_bias", "ln_q.weight", "ln_q.bias"]
        names += ["pos_embed"] if self.config.has_latent_table else []
        if path == "narrow":
            names += ["ln_kv.weight", "ln_kv.bias"]
            names += ["kv_proj.weight"] if isinstance(self.kv_proj, nn.Linear) else []
        held = dict(self.named_parameters()) | dict(self.named_buffers())
        weights = {name: held.get(name) for name in names}
        return folded.Layer(self.config, weights, self.ln_q.eps, getattr(self.ln_kv, "eps", None))

    def train(self, mode: bool = True) -> PerceiverResampler:
        """Switch the mode as of every module; training lets go of what inference keeps."""
        if mode:
            self._folded.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> PerceiverResampler:
        self._folded.clear()  # on a move their memory is wanted back at once
        return super()._apply(fn, recurse)

    @property
    def fits_latents(self) -> bool:
        """Whether latents can be fitted to views: they are a square grid."""
        return self.config.side**2 == self.config.num_latents

    def forward(self, features: Tensor, grids: Sequence[Grid], latents: Sequence[Grid | None] | None = None) -> Tensor:
        """Compress every view on its own, as :meth:`CompressorModule.forward` says.

        Args:
            features, grids: As there.
            latents: (rows, columns) of the tokens of each view; None for the latents' own square. Views of the same
                are resampled together.

        Returns:
            (V, Q, D); with `latents` always packed, (sum of rows * columns, D), views in order, tokens row-major.

        Raises:
            ValueError, TypeError: As there; `latents` are not one a view, or the latents are no square grid.
        """
        if latents is None:
            return super().forward(features, grids)
        grids = check_grids(grids)
        self._check(features, grids)
        groups = self._groups(latents, grids)
        parts = self._by_latents(features, grids, groups)
        found: dict[int, Tensor] = {}
        for numbers, part in zip(groups.values(), parts, strict=True):
            found.update(zip(numbers, part, strict=True))
        return torch.cat([found[number] for number in range(len(grids))]) if found else self.proj[:0]

    def _groups(self, latents: Sequence[Grid | None], grids: Sequence[Grid]) -> dict[Grid | None, list[int]]:
        """The views of each grid of latents; None for the latents' own."""
        if len(latents) != len(grids):
            raise ValueError(f"{len(latents)} grids of latents for {len(grids)} views: give one a view")
        side = (self.config.side, self.config.side)
        wanted = [None if grid is None else as_grid(grid, f"latents[{n}]") for n, grid in enumerate(latents)]
        wanted = [None if self.fits_latents and grid == side else grid for grid in wanted]
        if not self.fits_latents and (fitted := [grid for grid in wanted if grid]):
            raise ValueError(
                f"{self.config.num_latents} latents are no square grid, so they cannot be fitted to {fitted[0]}: take "
                "64 or 144, or latents='fixed' in the slicing"
            )
        return group_views(wanted)

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        return self._by_latents(features, grids, {None: list(range(len(grids)))})[0]

    def _by_latents(
        self, features: Tensor, grids: Sequence[Grid], groups: Mapping[Grid | None, list[int]]
    ) -> list[Tensor]:
        """The tokens of each group's views, (v, Q, D)."""
        path = self.inference_path(grids, features)
        folding = [] if path == "plain" else [latents_hw for latents_hw in groups if self._folds(latents_hw)]
        layer = self._layer(path) if folding else None
        kept = dict(zip(folding, self._folded.get(path, layer, folding), strict=True)) if folding else {}
        found = []
        for latents_hw, numbers in groups.items():
            some, own = _views_of(features, grids, numbers)
            if (tensors := kept.get(latents_hw)) is None:
                x = self._plain(some, own, latents_hw)
            else:
                narrow = path == "narrow"
                keys = folded.normalised(layer, tensors, some) if narrow else self.ln_kv(self.kv_proj(some))
                x = self.attn.out_proj(folded.attend_folded(layer, tensors, keys, own, latents_hw))
            found.append(self.ln_post(x) @ self.proj)
        return found

    def _folds(self, latents_hw: Grid | None) -> bool:
        """Whether views of these latents take what is folded: "auto" leaves those of more latents than its own, whose
        constants are large, and others for nearly every shape of an image."""
        return self._inference != "auto" or latents_hw is None or prod(latents_hw) <= self.config.num_latents

    def attention_weights(
        self, features: Tensor, grids: Sequence[Grid], latents: Sequence[Grid | None] | None = None
    ) -> list[Tensor]:
        """What each token took of each feature, the mean of the layers: see `uhd.resampler.protocol.Compressor`."""
        found: dict[int, Tensor] = {}
        for latents_hw, numbers in self._groups(latents or [None] * len(grids), grids).items():
            layers: list[list[Tensor]] = []
            self._plain(*_views_of(features, grids, numbers), latents_hw, layers)
            means = (torch.stack(view).mean(0) for view in zip(*layers, strict=True))
            found.update(zip(numbers, means, strict=True))
        return [found[number] for number in range(len(grids))]

    def _plain(
        self,
        features: Tensor,
        grids: Sequence[Grid],
        latents_hw: Grid | None = None,
        looked: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Run all layers with nothing taken as constant: (V, Q, D); `looked` gets each layer's weights."""
        lengths = [h * w for h, w in grids]
        positions = offsets = None
        if self.config.key_position != "none":
            positions, offsets = join_tables(grids, partial(self.key_table, latents_hw=latents_hw))
        keys = {"positions": positions, "position_offsets": offsets, "impl": self.attention_impl}
        kv = self.ln_kv(self.kv_proj(features))  # (N, D)
        query_table = self.query_table(latents_hw)
        queries = self.queries(query_table, latents_hw)
        if looked is not None:
            looked.append(self.attn.weights(queries, kv, lengths, **keys))
        x = self.ffn(self.attn(queries, kv, lengths, **keys))  # (V, Q, D)
        for layer in self.layers:
            if looked is not None:
                looked.append(layer.attn.weights(layer.queries(x, query_table), kv, lengths, **keys))
            x = layer(x, kv, lengths, query_table=query_table, **keys)
        return x

    def query_table(self, latents_hw: Grid | None = None) -> Tensor | None:
        """What joins the queries of every layer, (Q, D); None for nothing. `latents_hw`: None is their own grid."""
        if not self.config.query_position:
            return None
        return self._resized_positions(latents_hw or (self.config.side, self.config.side), latents_hw)

    def queries(self, table: Tensor | None, latents_hw: Grid | None = None) -> Tensor:
        """What looks at the features first: (Q, D)."""
        query, side = self.query, (self.config.side, self.config.side)
        if latents_hw is not None:
            query = interpolate_pos_embed(query, side, latents_hw, mode="bilinear")
        return self.ln_q(query) if table is None else self.ln_q(query) + table

    def key_table(self, grid_hw: Grid, latents_hw: Grid | None = None) -> Tensor:
        """Make the positions that join the keys of a view: (h * w, D); ValueError where the layer has none.

        `latents_hw`: the grid of the view's latents; None is their own.
        """
        config, like = self.config, self.query
        if config.key_position == "none":
            raise ValueError("this resampler has no key positions (key_position='none')")
        if config.key_position == "direct":
            return sincos_2d(config.width, grid_hw, device=like.device, dtype=like.dtype)
        return self._resized_positions(grid_hw, latents_hw)

    def _resized_positions(self, grid_hw: Grid, latents_hw: Grid | None) -> Tensor:
        """The positions of a grid over a view whose latents have this grid."""
        table = folded.position_table(self.config, self.pos_embed, latents_hw)
        source_hw = folded.position_grid(self.config, latents_hw)
        return interpolate_pos_embed(table, source_hw, grid_hw).to(self.query)


def _views_of(features: Tensor, grids: Sequence[Grid], numbers: Sequence[int]) -> tuple[Tensor, list[Grid]]:
    """Packed features and grids of some of the views."""
    if len(numbers) == len(grids):
        return features, list(grids)
    views = split_views(features, grids)
    return torch.cat([views[number] for number in numbers]), [grids[number] for number in numbers]
