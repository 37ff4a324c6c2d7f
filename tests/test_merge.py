"""Merging: against the released batches, against a loop, and its errors."""

import json
import pathlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.tiny import refuses
from uhd.merge import assemble, merge_samples, merge_visual, separator_embeddings
from uhd.schema import SeparatorIds, SpatialSchema, layout
from uhd.slicing import plan

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "schema.json").read_text())["v1_batches"]
IMAGE_ID, PAD_ID = 32000, 0
IDS = {",": SeparatorIds((29892,), "given"), "\n": SeparatorIds((13,), "given")}
UHD = SpatialSchema.preset("llava-uhd")


def code(ids):
    """An "embedding" one can read back: (0, id)."""
    return torch.stack([torch.zeros_like(ids), ids], -1).float()


def image_rows(number, size, *, tokens=3):
    """The laid-out image whose view v, token t is the vector (1 + number, 10 v + t)."""
    cut = plan(size, "llava-uhd")
    view_ids = torch.arange(len(cut.views)).float()[:, None] * 10 + torch.arange(tokens)
    views = torch.stack([torch.full_like(view_ids, 1 + number), view_ids], -1)
    return assemble(views, layout(cut, UHD, tokens_per_view=tokens), separator_embeddings(code, IDS))


def released_rows(names):
    """The golden's names as vectors of the two functions above, and the ids before merging."""
    vectors, ids = [], []
    for name in names:
        if found := re.fullmatch(r"text(\d+)", name):
            vectors.append([0, int(found[1])])
            ids.append(int(found[1]))
        elif found := re.fullmatch(r".*\(id(\d+)\)", name):
            vectors.append([0, int(found[1])])
        else:
            number, view, tokens = map(int, re.fullmatch(r"img(\d+)\.view(\d+)\*(\d+)", name).groups())
            vectors += [[1 + number, 10 * view + token] for token in range(tokens)]
            if view == 0:
                ids.append(IMAGE_ID)
    return vectors, ids


@pytest.mark.parametrize("batch", [GOLDEN[0], GOLDEN[2]], ids=["right", "left"])
def test_batches_equal_the_released_merge(batch):
    side = batch["cfg"].get("tokenizer_padding_side", "right")
    rows = [released_rows(row["layout"]) for row in batch["rows"]]
    pictures = [image_rows(i, (h, w)) for i, (w, h) in enumerate(batch["image_sizes"])]
    # the released code also spends image 2 on the text-only row
    merged = merge_samples(
        [ids for _, ids in rows],
        [pictures[:2], [], pictures[3:]],
        embed=code,
        image_token_id=IMAGE_ID,
        pad_token_id=PAD_ID,
        padding_side=side,
    )
    assert merged.labels.tolist() == [row["labels"] for row in batch["rows"]]
    assert merged.attention_mask.tolist() == [row["attention"] for row in batch["rows"]]
    for row, (vectors, _) in enumerate(rows):
        kept = merged.attention_mask[row].bool()
        assert merged.inputs_embeds[row][kept].tolist() == vectors
        assert merged.position_ids[row][kept].tolist() == list(range(len(vectors)))
        assert not merged.position_ids[row][~kept].any()
        assert not merged.visual_mask[row][~kept].any()
    assert IMAGE_ID not in merged.input_ids


def test_nothing_is_truncated_where_the_released_code_cuts_an_image():
    short, whole = GOLDEN[1], GOLDEN[0]
    assert short["cfg"] == {"tokenizer_model_max_length": 14}
    assert short["rows"][2]["layout"][-1] == "img3.view3"  # one of its three tokens is left
    vectors, ids = released_rows(whole["rows"][2]["layout"])
    picture = image_rows(3, (1000, 700))
    merged = merge_samples([ids], [[picture]], embed=code, image_token_id=IMAGE_ID, pad_token_id=PAD_ID)
    assert merged.inputs_embeds[0].tolist() == vectors


masks = st.integers(1, 4).flatmap(
    lambda b: st.integers(1, 9).flatmap(
        lambda t: st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b)
    )
)


@given(masks)
def test_merge_visual_equals_a_loop(rows):
    mask = torch.tensor(rows)
    embeds = torch.randn(*mask.shape, 5)
    visual = torch.randn(int(mask.sum()), 5)
    before = embeds.clone()
    merged = merge_visual(embeds, mask, visual, counts=mask.sum(1).tolist())
    queue = iter(visual)
    for b, row in enumerate(rows):
        for t, here in enumerate(row):
            torch.testing.assert_close(merged[b, t], next(queue) if here else before[b, t], rtol=0, atol=0)
    torch.testing.assert_close(embeds, before, rtol=0, atol=0)  # the input is left alone


def test_merge_visual_gradients():
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    embeds = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e, v: merge_visual(e, mask, v), (embeds, visual))
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    (merge_visual(embeds, mask, visual) * weight).sum().backward()
    torch.testing.assert_close(visual.grad, weight[mask])
    torch.testing.assert_close(embeds.grad, weight * ~mask[..., None])


def test_merge_visual_casts_to_the_embeddings_dtype():
    embeds, mask = torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.tensor([[True, False]])
    merged = merge_visual(embeds, mask, torch.full((1, 3), 1 / 3))
    assert merged.dtype == torch.bfloat16
    assert merged[0, 0].tolist() == torch.full((3,), 1 / 3).bfloat16().tolist()


def test_merge_visual_without_images_or_strides():
    embeds = torch.randn(3, 2, 4).transpose(0, 1)  # not contiguous
    none = torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(merge_visual(embeds, none, torch.zeros(0, 4)), embeds, rtol=0, atol=0)
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    visual = torch.randn(6, 4)
    torch.testing.assert_close(merge_visual(embeds, everywhere, visual).flatten(0, 1), visual, rtol=0, atol=0)


def test_merge_visual_errors_hold_both_counts():
    embeds, mask = torch.zeros(2, 3, 4), torch.tensor([[True, True, False], [False, False, True]])
    for rows in (2, 4):
        with pytest.raises(ValueError, match=rf"3 masked positions but {rows} visual rows; .* \[2, 1\]"):
            merge_visual(embeds, mask, torch.zeros(rows, 4))
    with pytest.raises(ValueError, match=r"each row: \[2, 1\], visual rows meant: \[1, 2\]"):
        merge_visual(embeds, mask, torch.zeros(3, 4), counts=[1, 2])  # the total alone would fit
    refuses(r"\(M, 4\), the width of embeds, got \(3, 5\)", merge_visual, embeds, mask, torch.zeros(3, 5))
    refuses("mask .* of torch.int64", merge_visual, embeds, mask.long(), torch.zeros(3, 4))
    refuses(r"mask \(3, 2\)", merge_visual, embeds, mask.T, torch.zeros(3, 4))


sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(sizes, st.sampled_from(["llava-uhd", "llava-uhd-better", "minicpm-v-2.5", "minicpm-v-4.6"]))
def test_assemble_puts_every_view_at_its_span(size, name):
    schema = SpatialSchema.preset(name)
    cut = plan(size, "minicpm-v-4.6")  # views of different lengths, fed overview first
    found = layout(cut, schema)
    views = [torch.randn(view.num_tokens, 2) for view in cut.views]
    separators = {symbol: torch.randn(2) for symbol in (*schema.separators, "0")}
    rows = assemble(views, found, separators)
    assert rows.shape == (found.num_tokens, 2)
    for view, tokens in zip(cut.views, views, strict=True):
        assert torch.equal(rows[slice(*found.span(view.index))], tokens)
    for entry in found.entries:
        if entry.view is None:
            assert torch.equal(rows[entry.start], separators[entry.symbol])
    assert torch.equal(assemble(torch.cat(views), found, separators), rows)  # packed


def test_assemble_gradients_reach_views_and_separators():
    found = layout(plan((1008, 672), "llava-uhd"), tokens_per_view=2)  # 3 rows x 2 columns
    views = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    comma = torch.randn(3, dtype=torch.float64, requires_grad=True)
    newline = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, c, n: assemble(v, found, {",": c, "\n": n}), (views, comma, newline))
    assemble(views, found, {",": comma, "\n": newline}).sum().backward()
    assert comma.grad.tolist() == newline.grad.tolist() == [3.0] * 3  # each stands three times
    assert torch.equal(views.grad, torch.ones_like(views))


def test_assemble_casts_separators_to_the_views_dtype():
    found = layout(plan((336, 672), "llava-uhd"), tokens_per_view=2)
    separators = {",": torch.zeros(4), "\n": torch.ones(4)}
    assert assemble(torch.zeros(3, 2, 4, dtype=torch.bfloat16), found, separators).dtype == torch.bfloat16


def test_assemble_errors():
    found = layout(plan((336, 672), "llava-uhd"), tokens_per_view=2)  # 2 slices and the overview
    separators = {",": torch.zeros(4), "\n": torch.ones(4)}
    refuses(r"3 views of \[2, 2, 2\] tokens, got 2 of \[2, 2\]", assemble, torch.zeros(2, 2, 4), found, separators)
    refuses(r"got 3 of \[3, 3, 3\]", assemble, torch.zeros(3, 3, 4), found, separators)
    refuses(r"6 visual tokens \[2, 2, 2\], got 7 packed rows", assemble, torch.zeros(7, 4), found, separators)
    refuses("same D", assemble, [torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 5)], found, separators)
    refuses(r"3 views of \[2, 2, 2\] tokens, got 0", assemble, [], found, separators)
    with pytest.raises(ValueError, match=r"no embedding for the symbol '\\n'; there are \[','\]"):
        assemble(torch.zeros(3, 2, 4), found, {",": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"embedding of ',' must be \(4,\) as the views, got \(5,\)"):
        assemble(torch.zeros(3, 2, 4), found, {",": torch.zeros(5), "\n": torch.ones(4)})


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the scale is applied in the call, not stored in the weight."""

    def forward(self, ids):
        return super().forward(ids) * 7


def test_separator_embeddings_call_the_module():
    embed = ScaledEmbedding(20, 3)
    ids = {",": SeparatorIds((11,), "probe"), "<slice>": SeparatorIds((2, 5, 2), "pieces")}
    found = separator_embeddings(embed, ids)
    torch.testing.assert_close(found[","], embed.weight[11] * 7)
    torch.testing.assert_close(found["<slice>"], (2 * embed.weight[2] + embed.weight[5]) * 7 / 3)
    (found[","].sum() + found["<slice>"].sum()).backward()
    torch.testing.assert_close(embed.weight.grad[:, 0].nonzero().flatten(), torch.tensor([2, 5, 11]))
    assert separator_embeddings(embed, {}) == {}


def samples(rows, images, **settings):
    return merge_samples(rows, images, embed=code, image_token_id=IMAGE_ID, pad_token_id=9, **settings)


@given(
    st.lists(st.lists(st.sampled_from([IMAGE_ID, 1, 2, 3]), max_size=6), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
)
def test_a_batch_equals_its_rows_alone(rows, side):
    images = [[torch.randn(1 + place, 2) for place in range(row.count(IMAGE_ID))] for row in rows]
    batch = samples(rows, images, padding_side=side)
    for row, (ids, pictures) in enumerate(zip(rows, images, strict=True)):
        alone = samples([ids], [pictures])
        kept = batch.attention_mask[row].bool()
        for name in ("inputs_embeds", "labels", "position_ids", "input_ids", "visual_mask"):
            assert torch.equal(getattr(batch, name)[row][kept], getattr(alone, name)[0]), name
        assert torch.equal(alone.inputs_embeds[0][alone.visual_mask[0]], torch.cat([torch.zeros(0, 2), *pictures]))
        assert (batch.labels[row][~kept] == -100).all()
        assert (batch.input_ids[row][~kept] == 9).all()


def test_tensor_rows_own_labels_and_gradients():
    embed, picture = nn.Embedding(10, 4), torch.randn(3, 4, requires_grad=True)
    batch = merge_samples(
        [torch.tensor([1, 9, 2, 3])],
        [[picture]],
        embed=embed,
        image_token_id=9,
        pad_token_id=0,
        labels=[[-100, 5, -100, 3]],
    )
    assert batch.labels.tolist() == [[-100, -100, -100, -100, -100, 3]]
    assert batch.input_ids.tolist() == [[1, 0, 0, 0, 2, 3]]
    batch.inputs_embeds.sum().backward()
    assert torch.equal(picture.grad, torch.ones(3, 4))
    assert embed.weight.grad[:, 0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_merge_samples_errors_name_the_row_and_both_counts():
    picture = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"row 1 has 2 placeholders \(id 32000\) and 1 images"):
        samples([[1], [IMAGE_ID, 1, IMAGE_ID]], [[], [picture]])
    refuses("row 0 has 0 placeholders .* and 1 images", samples, [[1], [IMAGE_ID]], [[picture], [picture]])
    refuses("row 1 has 2 ids and 1 labels", samples, [[1], [2, 3]], [[], []], labels=[[1], [2]])
    refuses("2 rows of ids and 1 rows of labels", samples, [[1], [2, 3]], [[], []], labels=[[1]])
    refuses("2 rows of ids and images for 1", samples, [[1], [2]], [[]])
    refuses("at least one", samples, [], [])
    refuses(r"image 0 of row 0 must be \(tokens, D\), got \(1, 2, 2\)", samples, [[IMAGE_ID]], [[picture[None]]])
    refuses("padding_side", samples, [[1]], [[]], padding_side="both")
    with pytest.raises(ValueError, match=r"images are \[2, 5\] wide, embed gives 2"):
        samples([[IMAGE_ID, IMAGE_ID]], [[picture, torch.zeros(2, 5)]])
