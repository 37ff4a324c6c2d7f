"""Scenes are a function of seed and index, their questions have the answers that stand in the image."""

from dataclasses import replace

import numpy as np
import pytest

from uhd.nano.task import GLYPHS, TaskSettings, bucket, questions, scene

SCENES = [scene(11, index) for index in range(150)]


def test_a_scene_is_the_same_every_time_and_another_for_every_index_and_seed():
    again = scene(11, 7)
    assert np.array_equal(np.asarray(again.image), np.asarray(SCENES[7].image))
    assert again.lines == SCENES[7].lines
    others = {scene(seed, index).image.tobytes() for seed in (11, 12) for index in range(20)}
    assert len(others) == 40


def test_sizes_and_words_are_within_the_settings():
    settings = TaskSettings()
    for item in SCENES:
        height, width = item.image_hw
        assert item.image.mode == "L"
        assert height >= settings.min_hw[0]
        assert width >= settings.min_hw[1]
        assert height * width <= 1.05 * settings.area[1]
        words = [word for line in item.lines for word in line]
        assert 1 <= len(words) <= settings.max_words
        assert all(1 <= len(word) <= settings.max_word and set(word) <= set(GLYPHS) for word in words)
    assert {bucket(item.aspect) for item in SCENES} == {0, 1, 2, 3}
    assert any(item.image_hw[0] > item.image_hw[1] for item in SCENES)


def test_glyphs_stand_where_they_are_said_to_and_in_reading_order():
    for item in SCENES:
        assert "".join(glyph.text for glyph in item.glyphs) == item.text.replace(" ", "").replace("\n", "")
        pixels = np.asarray(item.image, int)
        ground = np.median(pixels)
        for glyph in item.glyphs:
            y, x = glyph.centre_hw
            around = pixels[max(int(y) - 5, 0) : int(y) + 5, max(int(x) - 4, 0) : int(x) + 4]
            assert ground - around.min() > 60, (item.text, glyph)
        places = [(glyph.line, glyph.word) for glyph in item.glyphs]
        assert places == sorted(places)
        same_line = zip(item.glyphs, item.glyphs[1:], strict=False)
        assert all(a.centre_hw[1] < b.centre_hw[1] for a, b in same_line if a.line == b.line)


def test_answers_are_those_of_a_reader_of_the_lines():
    kinds = set()
    for item in SCENES:
        lines, text = item.text.split("\n"), item.text.replace(" ", "").replace("\n", "")
        for kind, some in questions(item).items():
            for question in some:
                kinds.add(kind)
                if kind == "all":
                    assert question.answer == item.text
                elif kind == "line":
                    assert question.answer == lines[int(question.text.removeprefix("line ").removesuffix("?")) - 1]
                elif kind == "count":
                    assert int(question.answer) == len(item.text.split())
                else:
                    glyph = question.text.split()[1].removesuffix("?")
                    assert text.count(glyph) == 1
                    line = next(number for number, line in enumerate(lines) if glyph in line)
                    if kind == "right":
                        assert glyph + question.answer in lines[line].replace(" ", "")
                    else:
                        word = next(number for number, word in enumerate(lines[line].split()) if glyph in word)
                        assert question.answer == f"{line + 1} {word + 1}"
    assert kinds == {"all", "line", "right", "where", "count"}


def test_settings_change_what_is_drawn():
    light = scene(3, 5, replace(TaskSettings(), inverted=1.0))
    assert np.median(np.asarray(light.image)) < 80
    wide = [scene(3, index, replace(TaskSettings(), area=(8000, 9000), max_words=20)) for index in range(20)]
    assert all(7000 <= np.prod(item.image_hw) <= 9500 for item in wide)
    assert max(len(item.text.split()) for item in wide) > 8


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match=r"no glyph of \(12, 8\) fits an image of \(10, 8\)"):
        scene(0, 0, replace(TaskSettings(), area=(64, 64), max_aspect=1.0001, min_hw=(10, 6)))
    for number in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="seed and index must be at least 0"):
            scene(*number)


def test_words_are_made_of_the_settings_glyphs():
    drawn = [scene(3, index, replace(TaskSettings(), glyphs="BQ")) for index in range(20)]
    assert {glyph.text for item in drawn for glyph in item.glyphs} == {"B", "Q"}
