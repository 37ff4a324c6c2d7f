"""Borders that avoid content wherever images are prepared: once, after decoding, alike by every way."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import uhd
from tests.files import encoded, noise
from tests.scripts import load_script
from tests.tiny import PIXELS, tiny_encoder
from uhd import cli
from uhd.batch import SliceBatch
from uhd.draw import OVERVIEW, draw_plan
from uhd.loading import Preparation
from uhd.pixels import move_borders, render
from uhd.schema import PRESETS as SCHEMAS
from uhd.slicing import SlicingConfig, plan
from uhd.slicing.borders import moved_borders

MOVES = SlicingConfig.preset("llava-uhd-safe", image_size=56, border_moves=1)
SIZES = [(150, 260), (40, 260), (200, 90), (50, 50)]


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder(slicing=MOVES)


def picture(height, width, seed=0):
    """Grey noise, whose parts are even so that there is something to avoid."""
    pixels = np.array(noise(height, width, seed))
    pixels[::3] = 255
    pixels[:, 7::9] = 128
    return Image.fromarray(pixels)


def wanted(image, slicing=MOVES):
    return move_borders(image, plan((image.height, image.width), slicing), slicing)


def test_a_plan_of_a_size_is_without_moves_and_one_of_a_picture_with():
    image = picture(150, 260)
    even, moved = uhd.plan((150, 260), MOVES), uhd.plan(image, MOVES)
    assert moved_borders(even) is None
    assert even == plan((150, 260), SlicingConfig.preset("llava-uhd-safe", image_size=56))
    assert moved_borders(moved)
    assert moved == wanted(image)
    assert [" px and others, overview " in str(found) for found in (even, moved)] == [False, True]
    assert uhd.plan(image, MOVES, max_tokens=200).num_tokens <= 200


@pytest.mark.parametrize("name", SCHEMAS)
def test_rows_and_columns_are_told_apart_as_in_the_plan_of_the_size(name):
    for image in map(picture, *zip(*SIZES, strict=True)):
        moved = uhd.plan(image, MOVES)
        assert uhd.layout(moved, name) == uhd.layout(plan(moved.image_hw, MOVES), name)
    assert uhd.layout(uhd.plan(picture(40, 260), MOVES)).symbols[:3] == ("s0", ",", "s1")


def test_every_way_of_reading_gives_the_same_borders():
    """Arrays, files, turned files, and both backends, also where a JPEG waits for its plan."""
    image = picture(150, 260)
    fast = PIXELS.replace(backend="fast")
    for file in (encoded(image, "PNG"), encoded(image, "JPEG", quality=90)):
        decoded = Image.open(io.BytesIO(file)).convert("RGB")
        found = wanted(decoded)
        assert moved_borders(found)
        for settings in (PIXELS, fast, fast.replace(draft=True)):
            for source in (file, decoded, np.array(decoded)):
                batch = Preparation(MOVES, settings, 14)([source])
                assert batch.plans == (found,), (settings, type(source))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert Preparation(MOVES, PIXELS, 14)([turned]).plans == (wanted(image),)


def test_views_show_what_lies_between_the_borders():
    image = picture(150, 260)
    found = wanted(image)
    for view, pixels in zip(found.views, render(image, found), strict=True):
        top, left, bottom, right = found.canvases[view.canvas].source or (0, 0, 150, 260)
        part = image.crop((left, top, right, bottom)).resize(view.size_hw[::-1], Image.Resampling.BICUBIC)
        assert np.array_equal(pixels, np.asarray(part))


def test_an_encoder_moves_borders_and_a_plan_of_ones_own_stays(encoder, tmp_path):
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    found = encoder(images)
    plans = [wanted(image, encoder.slicing) for image in images]
    assert [one.plan for one in found] == plans
    assert sum(moved_borders(one) is not None for one in plans) >= 3
    assert [len(one.tokens) for one in found] == [encoder.plan(size).num_visual_tokens for size in SIZES]
    assert [one.layout.num_tokens for one in found] == [one.num_tokens for one in plans]
    even = [encoder.plan(size) for size in SIZES]
    assert SliceBatch.from_images(images, even).plans == tuple(even)
    encoder.save_pretrained(tmp_path)
    again = uhd.VisualEncoder.from_pretrained(tmp_path)
    assert again.slicing == encoder.slicing
    assert torch.equal(again(images)[0].tokens, found[0].tokens)


def test_images_that_share_a_budget_or_are_refused(encoder):
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    together = encoder.prepare(images, max_tokens=60)
    assert sum(one.num_tokens for one in together.plans) <= 60
    assert any(map(moved_borders, together.plans))
    batch, errors = encoder.prepare([*images, b"none"], errors="collect")
    assert list(errors) == [4]
    assert batch.plans == encoder.prepare(images).plans


def test_a_video_keeps_the_plans_of_its_size(encoder):
    frames = [picture(150, 260, seed) for seed in range(3)]
    for how in ("video", "rule"):
        (video,) = encoder.encode_videos([frames], frames=how)
        assert not any(map(moved_borders, video.plan.plans))


def test_costs_are_the_most_that_moved_slices_have():
    images = [picture(*size, seed) for seed, size in enumerate(SIZES * 3)]
    sizes = [(image.height, image.width) for image in images]
    most = uhd.image_costs(sizes, MOVES)
    real = [one.num_patches for one in Preparation(MOVES, PIXELS, 14)(images).plans]
    assert all(a >= b for a, b in zip(most, real, strict=True))
    assert uhd.image_costs(sizes, MOVES, unit="tokens").tolist() == [plan(size, MOVES).num_tokens for size in sizes]


@pytest.mark.parametrize(("name", "size"), [("minicpm-v", (763, 621)), ("llava-uhd", (1, 4370))])
def test_slices_that_do_not_move_may_exceed_the_budget_that_moved_ones_keep(name, size):
    config = SlicingConfig.preset(name, border_moves=2, cut_by="shape")
    plain = plan(size, config)
    slices = [view.num_patches for view in plain.views if view.kind == "slice"]
    assert move_borders(Image.new("RGB", size[::-1]), plain, config) is plain
    assert min(slices) > config.view_budget
    assert uhd.image_costs([size], config).tolist() == [plain.num_patches]


def test_a_processor_carries_moved_plans_to_the_model():
    from tests.hf import tiny
    from uhd.hf.plans import read_plans

    eyes = tiny.encoder(slicing=MOVES)
    model = tiny.attach(eyes)
    processor, images = model.processor, [picture(150, 260), picture(200, 90, 2)]
    inputs = processor(text=["<image> and <image>"], images=[images], return_tensors="pt")
    plans = read_plans(inputs["image_plans"])
    assert list(plans) == [wanted(image, eyes.slicing) for image in images]
    assert all(map(moved_borders, plans))
    sizes = [(150, 260), (200, 90)]
    for plans_sizes in (processor.image_processor.plan, model.visual.plan):
        assert uhd.image_costs(sizes, plans_sizes).tolist() == uhd.image_costs(sizes, MOVES).tolist()
    batch = eyes.prepare(images)
    assert inputs["grids"].tolist() == [list(grid) for grid in batch.grids]
    with torch.no_grad():
        out = model(**inputs)
        assert [len(rows) for rows in out.image_hidden_states] == [one.num_tokens for one in plans]
        before = processor(text=["<image> and <image>"], images=[eyes(images)], return_tensors="pt")
        torch.testing.assert_close(out.logits, model(**before).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="border_moves=1: an image's patches follow from its pixels"):
        processor.image_processor.get_number_of_image_patches(150, 260)
    with pytest.raises(ValueError, match="border_moves=1: an image's patches follow from its pixels"):
        processor._get_num_multimodal_tokens(image_sizes=[(150, 260)])
    with pytest.raises(ValueError, match="pad_patches .* border_moves=1 moves borders by the pixels"):
        processor.image_processor(images, pad_patches=True)
    uncut = processor.image_processor(images, crop_to_patches=False)
    assert uncut["num_patches"].tolist() == [1, 1]
    count = processor.image_processor.get_number_of_image_patches(150, 260, {"crop_to_patches": False})
    assert count == math.prod(uncut["grids"][0].tolist())


def test_an_index_of_encoded_images_keeps_the_borders(encoder, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    images = {f"{number}.png": picture(*size, number) for number, size in enumerate(SIZES)}
    for name, image in images.items():
        image.save(tmp_path / "in" / name)
    uhd.datasets.encode(tmp_path / "in", tmp_path / "out", encoder)
    tokens = uhd.datasets.Tokens(tmp_path / "out")
    direct = encoder(list(images.values()))
    assert [one.plan for one in tokens] == [one.plan for one in direct]
    assert any(moved_borders(one.plan) for one in direct)
    rows = list(tokens.rows())
    assert json.loads(rows[0]["slice_borders"]) == [list(lines) for lines in moved_borders(direct[0].plan)]
    with pytest.raises(ValueError, match="slice_borders: the index itself has columns"):
        uhd.datasets.encode(tmp_path / "in", tmp_path / "other", encoder, columns=["slice_borders"])


def test_an_exported_graph_is_given_the_same_views(encoder, tmp_path):
    pytest.importorskip("onnx")
    from uhd.export import host, onnx

    onnx(encoder, tmp_path / "model.onnx")
    image = picture(150, 260)
    found, views = host.Graph.read(tmp_path / "model.json").cut(image)
    assert found == wanted(image, encoder.slicing)
    batch = encoder.prepare([image]).normalized(encoder.pixels)
    assert np.allclose(np.concatenate(views), batch.patches.numpy(), atol=1e-6)


def test_a_drawing_shows_borders_and_where_they_would_be():
    image = picture(300, 520)
    slicing = MOVES.replace(image_size=112, border_moves=2)
    even, moved = plan((300, 520), slicing), uhd.plan(image, slicing)
    blue = [(np.asarray(draw_plan(image, one)) == OVERVIEW).all(axis=2).sum() for one in (even, moved)]
    assert blue[1] > blue[0] + 200
    draw_plan(image, moved)


def test_the_benchmark_measures_what_is_right(monkeypatch):
    benchmark = load_script("borders")
    file = benchmark.page(700, 500)
    found = benchmark.row((700, 500), 2, file, 1)
    assert found["grid"] == (2, 2)
    assert found["cut_after"] < found["cut_before"]
    monkeypatch.setattr(benchmark, "move_borders", lambda image, even, *_, **__: even if hasattr(image, "crop") else 0)
    with pytest.raises(RuntimeError, match="2 patches"):
        benchmark.row((700, 500), 2, file, 1)


def test_the_table_of_costs_is_what_plans_cost():
    benchmark = load_script("borders")
    sizes = [(600, 1500), (90, 900), (300, 300)]
    pages = [np.asarray(picture(*size)) for size in sizes]
    found = {name: benchmark.part(name, pages, 1) for name in benchmark.PARTS}
    for name, options in benchmark.PARTS.items():
        plans = [uhd.plan(Image.fromarray(one), SlicingConfig.preset("llava-uhd-safe", **options)) for one in pages]
        assert found[name]["patches"] == pytest.approx(sum(one.num_patches for one in plans) / 3, abs=1e-4)
        assert found[name]["tokens"] == pytest.approx(sum(one.num_tokens for one in plans) / 3, abs=1e-4)
        assert found[name]["tflops"] > 1
        assert min(found[name]["planning_ms"], found[name]["preparing_ms"]) > 0
    assert len({(one["patches"], one["tokens"], one["tflops"]) for one in found.values()}) == len(found) == 7


def test_commands_tell_what_is_cut(tmp_path, capsys):
    uhd.register_strategy("moves-for-a-test", MOVES.replace(name="moves-for-a-test"))
    try:
        file = tmp_path / "page.png"
        picture(150, 260).save(file)
        picture(800, 700).save(page := tmp_path / "large.png")
        assert cli.main(["show", str(page), "-o", str(tmp_path / "shown.png"), "--border-moves", "2"]) == 0
        told = capsys.readouterr().out
        assert "px (the first)" in told
        assert "% of the image's gradient lies on borders of slices" in told
        command = ["compare", str(file), "--strategies", "moves-for-a-test,clip", "--json"]
        assert cli.main([*command, "--html", str(tmp_path / "page.html")]) == 0
        (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert cli.main(command) == 0
        assert json.loads(capsys.readouterr().out) == found
        ours, clip = sorted(found["strategies"], key=lambda one: one["strategy"], reverse=True)
        assert ours["content_cut"] > clip["content_cut"] == 0
    finally:
        uhd.slicing.rules._REGISTERED.pop("moves-for-a-test")
