"""Layouts against the released code's, against the plans' own counts, and against their inverse."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd.schema import PRESETS, SpatialSchema, layout, parse_symbols
from uhd.slicing import PRESETS as SLICING
from uhd.slicing import Box, Canvas, SlicePlan, plan

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "schema.json").read_text())

grids = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9))
sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
presets = st.sampled_from(sorted(PRESETS))
marks = st.tuples(st.sampled_from(["", "<a>", "("]), st.sampled_from(["", "</a>", ")"]))
schemas = st.builds(
    SpatialSchema,
    column=st.sampled_from(["", ",", ";"]),
    row=st.sampled_from(["", "\n", ";"]),
    around_slice=marks,
    around_slices=marks,
    around_overview=marks,
    around_image=marks,
    image_id=st.none() | marks,
    overview=st.sampled_from(["first", "last"]),
)


def from_golden(names, grid):
    """Released names (views by feeding order, the overview last) in ours."""
    views = [name for name in names if ".view" in name]
    out = []
    for name in names:
        if ".view" in name:
            out.append("overview" if name == views[-1] else f"s{views.index(name)}")
        elif not name.startswith("text"):
            out.append("\n" if name.startswith("\\n") else re.sub(r"\(.*", "", name))
    assert len(views) == 1 + (grid[0] * grid[1] if grid else 0)
    return tuple(out)


@pytest.mark.parametrize("record", GOLDEN["v1"], ids=lambda r: f"{r['w']}x{r['h']}")
def test_llava_uhd_equals_the_released_merge(record):
    grid = record["grid_cols_rows"] and tuple(record["grid_cols_rows"][::-1])
    found = layout(plan((record["h"], record["w"]), "llava-uhd"), tokens_per_view=3)
    assert found.symbols == from_golden(record["layout"], grid)
    assert found.num_tokens == record["labels"].count(-100)
    assert parse_symbols(found.symbols, found.schema) == grid


@pytest.mark.parametrize("record", GOLDEN["better"], ids=lambda r: f"{r['w']}x{r['h']}")
def test_llava_uhd_better_equals_the_released_merge(record):
    grid = tuple(record["grid_cols_rows"][::-1])
    schema = SpatialSchema.preset("llava-uhd-better")
    assert schema.symbols(grid) == from_golden(record["layout"], grid)
    assert parse_symbols(schema.symbols(grid), schema) == grid


@pytest.mark.parametrize("record", GOLDEN["minicpmv"], ids=lambda r: f"{r['w']}x{r['h']}")
def test_minicpm_v_text_equals_the_released_processors(record):
    cut = plan((record["h"], record["w"]), "minicpm-v")
    v26 = SpatialSchema.preset("minicpm-v-2.6")
    two = "<unk>" * record["unk_per_view_remote"]
    assert layout(cut, SpatialSchema.preset("minicpm-v-2.0")).text(view=two) == record["remote_2_0"]
    assert layout(cut, SpatialSchema.preset("minicpm-v-2.5")).text(view=two) == record["remote_2_5"]
    assert layout(cut, v26.replace(image_id=None)).text(view=two) == record["remote_2_6_no_id"]
    assert layout(cut, v26).text(view=two) == record["remote_2_6_id0"]
    newest = layout(plan((record["h"], record["w"]), "minicpm-v-4.6"), SpatialSchema.preset("minicpm-v-4.6"))
    assert newest.text(view="{{{tokens}}}") == record["hf_4_6_id"]
    assert newest.text(lambda entry: f"{{{entry.num_tokens}}}") == record["hf_4_6_id"]


def test_the_paper_puts_separators_between_only():
    schema = SpatialSchema.preset("llava-uhd-paper")
    assert schema.symbols((2, 3)) == ("s0", ",", "s1", ",", "s2", "\n", "s3", ",", "s4", ",", "s5", "overview")
    assert schema.symbols((1, 1)) == ("s0", "overview")


@given(schemas | st.builds(SpatialSchema.preset, presets), grids, st.integers(0, 12))
def test_every_view_once_and_the_count_rule_holds(schema, grid, image_index):
    symbols = schema.symbols(grid, image_index=image_index)
    count = 0 if grid is None else grid[0] * grid[1]
    assert [s for s in symbols if re.fullmatch(r"s\d+", s)] == [f"s{i}" for i in range(count)]
    assert symbols.count("overview") == 1
    assert len(symbols) - count - 1 == schema.separator_count().count(grid)
    assert "" not in symbols
    others = {s for s in symbols if not re.fullmatch(r"s\d+|overview|\d+", s)}
    assert others <= set(schema.separators)


@given(presets, grids, st.integers(0, 12))
def test_parsing_is_the_inverse(name, grid, image_index):
    schema = SpatialSchema.preset(name)
    assert parse_symbols(schema.symbols(grid, image_index=image_index), schema) == grid


@pytest.mark.parametrize(
    "symbols, message",
    [
        (("s0", ",", "s1", ",", "overview"), r"position 3: got ',', .* expects '\\n' there"),
        (("s0", ",", "s1", "\n"), "position 4: got the end, .* expects 'overview' there"),
        (("s0", "\n", "s2", "\n", "overview"), "position 2: got 's2', .* expects 's1' there"),
        (("s0", "s1", "overview"), r"position 1: got 's1', .* expects ',' or '\\n' there"),
        (("overview", "\n"), "position 1: got '\\\\n', .* expects the end there"),
        ((), "position 0: got the end"),
    ],
)
def test_parsing_says_where_a_sequence_is_wrong(symbols, message):
    with pytest.raises(ValueError, match=message):
        parse_symbols(symbols, SpatialSchema.preset("llava-uhd"))


def test_parsing_refuses_what_several_grids_share():
    bare = SpatialSchema(column="", row="")
    assert parse_symbols(bare.symbols((1, 1)), bare) == (1, 1)
    with pytest.raises(ValueError, match=r"\[\(1, 3\), \(3, 1\)\]"):
        parse_symbols(bare.symbols((3, 1)), bare)


@given(st.sampled_from(sorted(SLICING)), sizes)
def test_slicing_presets_count_as_their_schema_does(name, size):
    cut = plan(size, name)
    found = layout(cut, SpatialSchema.preset(name))
    assert (found.num_tokens, found.num_visual_tokens) == (cut.num_tokens, cut.num_visual_tokens)
    assert found.num_separators == cut.num_separators
    assert found.view_order == tuple(range(len(cut.views)))


@given(presets, sizes)
def test_schemas_bring_a_slicing_that_agrees(name, size):
    schema = SpatialSchema.preset(name)
    cut = plan(size, schema.slicing_config())
    assert layout(cut, schema).num_tokens == cut.num_tokens
    fewer = plan(size, schema.slicing_config("llava-uhd"))
    assert layout(fewer, schema).num_tokens == fewer.num_tokens
    assert layout(fewer, schema).view_order == tuple(range(len(fewer.views)))


def test_released_slicings():
    brings = {name: PRESETS[name].slicing_preset for name in PRESETS}
    assert brings == {
        "llava-uhd": "llava-uhd",
        "llava-uhd-paper": "llava-uhd-paper",
        "llava-uhd-better": "llava-uhd-paper",
        "minicpm-v-2.0": "minicpm-v",
        "minicpm-v-2.5": "minicpm-v",
        "minicpm-v-2.6": "minicpm-v",
        "minicpm-v-4.6": "minicpm-v-4.6",
    }
    for name in SLICING:
        schema = SpatialSchema.preset(name)
        assert schema.slicing_preset == name
        assert schema.slicing_config() == SLICING[name]
    assert SpatialSchema.preset("minicpm-v-2.5").slicing_config().tokens_per_view == 96
    assert SpatialSchema.preset("minicpm-v").image_id == PRESETS["minicpm-v-2.6"].image_id
    with pytest.raises(ValueError, match="pass a base"):
        SpatialSchema().slicing_config()
    assert SpatialSchema().slicing_config("minicpm-v").overview_first is False


@given(presets, sizes)
def test_spans_tile_the_sequence_and_view_at_inverts_them(name, size):
    cut = plan(size, "minicpm-v-4.6")  # views of different lengths
    found = layout(cut, SpatialSchema.preset(name))
    assert [e.start for e in found.entries[1:]] == [e.stop for e in found.entries[:-1]]
    assert found.entries[0].start == 0
    assert found.tokens_per_view == tuple(view.num_tokens for view in cut.views)
    for view in cut.views:
        start, stop = found.span(view.index)
        assert stop - start == view.num_tokens
        assert found.view_at(start) == found.view_at(stop - 1) == view.index
    separators = [e.start for e in found.entries if e.view is None]
    assert [p for p in range(found.num_tokens) if found.view_at(p) is None] == separators
    with pytest.raises(IndexError, match="position"):
        found.view_at(found.num_tokens)
    with pytest.raises(IndexError, match="view index -1"):
        found.span(-1)


def test_views_are_matched_by_kind_when_plan_and_schema_disagree():
    cut = plan((1008, 672), "minicpm-v")  # fed overview first
    found = layout(cut, SpatialSchema.preset("llava-uhd"))
    assert found.symbols == ("s0", ",", "s1", "\n", "s2", ",", "s3", "\n", "overview")
    assert found.view_order == (1, 2, 3, 4, 0)
    assert [cut.views[i].kind for i in found.view_order] == ["slice"] * 4 + ["overview"]
    assert found.span(0) == (4 * 64 + 4, 5 * 64 + 4)
    assert str(found) == "[s0:64],[s1:64]\n[s2:64],[s3:64]\n[overview:64]"
    assert found.text("{index}") == "1,2\n3,4\n0"


def foreign(*canvases, tokens, grid):
    """A plan as another strategy would make it: 14 px patches, 28x42 px views."""
    made = []
    for kind, shape, tiles in canvases:
        boxes = tuple(Box(0, 14 * i, 28, 14 * i + 42) for i in range(tiles))
        made.append(Canvas(kind, (28, 210), (28, 210), shape, boxes, (28, 42), 5))
    return SlicePlan((30, 200), 14, tuple(made), grid, tokens, 0, "foreign")


def test_plans_of_other_strategies():
    slices, overview = ("slice", (2, 2), 4), ("overview", (1, 1), 1)
    schema = SpatialSchema.preset("llava-uhd")
    alone = layout(foreign(overview, tokens=5, grid=None), schema)
    assert alone.symbols == ("overview",)
    assert alone.num_tokens == 5
    bare = layout(foreign(slices, tokens=20, grid=(2, 2)), schema)
    assert bare.symbols == ("s0", ",", "s1", "\n", "s2", ",", "s3", "\n")
    marked = layout(foreign(slices, tokens=20, grid=(2, 2)), SpatialSchema.preset("minicpm-v-2.5"))
    assert "overview" not in marked.symbols
    assert marked.symbols[:2] == ("<slice>", "<image>")
    twice = layout(foreign(slices, overview, ("slice", (1, 2), 2), tokens=35, grid=(2, 2)), schema)
    assert twice.symbols == (*bare.symbols, "s4", ",", "s5", "\n", "overview")
    assert twice.view_order == (0, 1, 2, 3, 5, 6, 4)


def test_plans_that_cannot_be_laid_out_say_why():
    slices = ("slice", (2, 2), 4)
    with pytest.raises(ValueError, match="counts 17 visual tokens for the whole image, its 4 views alone 20"):
        layout(foreign(slices, tokens=17, grid=(2, 2)))
    given = layout(foreign(slices, tokens=17, grid=(2, 2)), tokens_per_view=[1, 2, 3, 4])
    assert given.tokens_per_view == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="4 positive numbers"):
        layout(foreign(slices, tokens=20, grid=(2, 2)), tokens_per_view=[1, 2, 3])
    with pytest.raises(ValueError, match="cut 3 slices for a grid"):
        layout(foreign(("slice", (2, 2), 3), tokens=15, grid=(2, 2)))
    with pytest.raises(ValueError, match="no views"):
        layout(foreign(tokens=0, grid=None))


def test_the_image_number_is_one_symbol():
    found = layout(plan((100, 50), "minicpm-v"), SpatialSchema.preset("minicpm-v-2.6"), image_index=12)
    assert found.symbols[:3] == ("<image_id>", "12", "</image_id>")
    assert found.num_tokens == 64 + 5
    with pytest.raises(ValueError, match="from 0"):
        SpatialSchema().symbols(None, image_index=-1)


@given(schemas | st.builds(SpatialSchema.preset, presets))
def test_schemas_survive_json(schema):
    again = SpatialSchema.from_dict(json.loads(json.dumps(schema.to_dict())))
    assert again == schema
    assert hash(again) == hash(schema)


def test_names_and_settings():
    assert SpatialSchema.preset("MiniCPM_V_2.6") is PRESETS["minicpm-v-2.6"]
    assert SpatialSchema.preset("llava-uhd", column=";").symbols((1, 2))[1] == ";"
    assert layout(plan((672, 1008), "llava-uhd")).schema == PRESETS["llava-uhd"]
    with pytest.raises(ValueError, match="did you mean 'minicpm-v-2.6'"):
        SpatialSchema.preset("minicpm-v2.6")
    with pytest.raises(ValueError, match=r"SpatialSchema has no \['rows'\]"):
        SpatialSchema.from_dict({"rows": ","})
    for error, settings, message in [
        (TypeError, {"around_slice": "<slice>"}, "around_slice must be a tuple of two strings"),
        (TypeError, {"column": None}, "column must be a string"),
        (ValueError, {"row": "s1"}, "'s1' cannot be a separator"),
        (ValueError, {"overview": "middle"}, "overview must be"),
        (ValueError, {"learned": ("sep0",)}, "learned"),
    ]:
        with pytest.raises(error, match=message):
            SpatialSchema(**settings)
    assert SpatialSchema(around_slice=(np.str_("<a>"), "</a>")) == SpatialSchema(around_slice=("<a>", "</a>"))
    for grid in [(0, 2), (2,), (1.5, 2), 4]:
        with pytest.raises(ValueError, match="a grid"):
            SpatialSchema().symbols(grid)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpatialSchema().row = ","


def test_a_budget_is_met_under_every_schema():
    for name in PRESETS:
        config = SpatialSchema.preset(name).slicing_config()
        free, bound = plan((900, 3000), config), plan((900, 3000), config, max_tokens=250)
        assert layout(bound, PRESETS[name]).num_tokens <= 250 < layout(free, PRESETS[name]).num_tokens
