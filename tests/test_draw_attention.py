"""Where tokens looked, drawn: the red is where the map is."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import noise, perceiver, refuses, tiny_encoder
from uhd import cli
from uhd.draw_attention import _row, draw_attention, heated
from uhd.nano.evaluate import EVALUATION_SEED
from uhd.nano.task import scene
from uhd.slicing import find


def redness(picture):
    pixels = np.asarray(picture, np.float32)
    return pixels[..., 0] - pixels[..., 1:].mean(-1)


def test_the_most_of_a_map_is_red_and_the_least_is_grey():
    heat = np.zeros((4, 6))
    heat[1, 4] = 1
    drawn = heated(Image.new("L", (60, 40), 200), heat, (120, 80))
    red = redness(drawn)
    assert red.argmax() in np.arange(120 * 80).reshape(80, 120)[20:40, 80:100]
    _, green, blue = np.asarray(drawn).reshape(-1, 3)[red.argmax()].astype(int)
    assert green < blue  # red, not the amber of what is less
    assert np.abs(red[:, :50]).max() < 2


def test_pictures_of_a_row_do_not_cover_each_other():
    black = Image.new("L", (30, 30))
    _, panel = _row("three", [(str(n), black, np.zeros((3, 3))) for n in range(3)], 3 * 120)
    dark = (np.asarray(panel.convert("L"))[-60] < 200).reshape(3, 120)
    assert dark.sum(1).tolist() == [112] * 3


@pytest.mark.parametrize("strategy, image_hw", [("llava-uhd-safe", (200, 90)), ("llava-next", (60, 300))])
def test_a_page_has_the_image_its_answer_and_its_tokens(strategy, image_hw):
    slicing = find(strategy).for_vision(image_size=56, patch_size=14)
    encoder = tiny_encoder(perceiver(), slicing=slicing)
    image = Image.fromarray(noise(*image_hw))
    plan, (maps,) = encoder.plan(image_hw), encoder.attention([image])
    maps = torch.zeros_like(maps)
    maps[:, :5, :5] = 1 / 25
    bare = draw_attention(image, plan, maps)
    assert bare.height > 700
    body = redness(bare)[24 : 24 + 300]
    row, column = np.unravel_index(body.argmax(), body.shape)
    assert row < 60
    assert column < 90
    told = draw_attention(image, plan, maps, answer=[("A", np.asarray(maps[0]))] * 40, facts=["a line"])
    assert told.height > bare.height
    refuses("visual tokens, got 1 maps", draw_attention, image, plan, maps[:1])


def test_tokens_of_several_views_are_drawn_on_the_whole_image():
    from uhd.resampler import MLPProjector

    encoder = tiny_encoder(MLPProjector(32, 24), slicing=find("llava-next").for_vision(image_size=56, patch_size=14))
    image = Image.fromarray(noise(60, 90))
    (maps,) = encoder.attention([image], (12, 18))
    assert draw_attention(image, encoder.plan((60, 90)), maps).width == 1480


def test_the_command_draws_what_the_shipped_model_or_an_encoder_saw(tmp_path, capsys):
    photo, out = tmp_path / "scene.png", tmp_path / "out.png"
    drawn = scene(EVALUATION_SEED, 3)
    drawn.image.save(photo)
    command = ["show", str(photo), "-o", str(out), "--attention"]
    assert cli.main([*command, "--ask", "all?"]) == 0
    said = capsys.readouterr().out
    assert f"it says {drawn.text!r}" in said
    assert "eyes: the shipped nano model" in said
    drawn.image.point(lambda value: 255 - value).save(light := tmp_path / "light.png")
    assert cli.main(["show", str(light), *command[2:], "--model", "nano-plus", "--ask", "all?"]) == 0
    said = capsys.readouterr().out
    assert f"it says {drawn.text!r}" in said
    assert "eyes: the shipped nano-plus model" in said
    with Image.open(out) as picture:
        asked = picture.size
    assert cli.main([*command, "--strategy", "llava-next"]) == 0
    assert "llava-next" in capsys.readouterr().out
    tiny_encoder().save_pretrained(tmp_path / "eyes")
    assert cli.main([*command, "--encoder", str(tmp_path / "eyes")]) == 0
    with Image.open(out) as picture:
        assert picture.size != asked
    for wrong, words in (
        (["--max-slices", "2"], "--max-slices is not for --attention"),
        (["--encoder", str(tmp_path / "eyes"), "--ask", "all?"], "give --model or --encoder"),
        (["--model", str(tmp_path)], "is no folder with a saved model"),
    ):
        assert cli.main([*command, *wrong]) == 1
        assert words in capsys.readouterr().err
    assert cli.main([*command[:-1], "--ask", "all?"]) == 1
    assert "--ask is of --attention" in capsys.readouterr().err
