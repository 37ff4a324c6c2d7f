"""Files and folders are written whole or not at all."""

import errno
import json
import os
import stat
import threading

import pytest
import torch
from transformers import AutoModelForImageTextToText

import uhd
from tests.fuzz.kills import hidden
from tests.fuzz.writers import encoders
from tests.hf import tiny
from tests.tiny import refuses
from uhd import writing
from uhd.hf import UHDConfig, UHDImageProcessor
from uhd.writing import READY, check_place, finish, new_file, new_files, read_whole


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail(writing, name, error=KeyError):
    """Write something half, and then raise an error, if any."""
    with writing as new:
        (new / name).write_text("half")
        if error:
            raise error


def half_moved(folder, moved=()):
    """As a writer leaves it that was killed after its save, before its files, but these, were in place."""
    taken = folder.with_name("taken")
    folder.rename(taken)
    folder.mkdir()
    (taken / READY).rename(folder / READY) if (taken / READY).exists() else taken.rename(folder / READY)
    for name in moved:
        (folder / READY / name).rename(folder / name)


def test_a_file_is_replaced_at_once(tmp_path):
    place = tmp_path / "a.json"
    place.write_text("old")
    place.chmod(0o640)
    with new_file(place) as new:
        new.write_text("new")
        assert place.read_text() == "old"
        assert not list(tmp_path.rglob("*.json"))[1:]
    assert place.read_text() == "new"
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    with pytest.raises(KeyError):
        fail(new_file(place), ".")
    assert content(tmp_path) == {"a.json": "new"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "real").write_text("old")
    (tmp_path / "link").symlink_to("inner/real")
    with new_file(tmp_path / "link") as new:
        new.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "inner" / "real").read_text() == "new"


def test_places_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for ask in (check_place, lambda path: new_file(path).__enter__()):
        refuses("cannot write .*: it is a folder", ask, tmp_path)
        refuses("cannot write .*: there is no folder .*nowhere", ask, tmp_path / "nowhere" / "x")
        refuses("cannot write .*: it is a pipe or a device", ask, tmp_path / "pipe")
        refuses("cannot write .*: it is a pipe or a device", ask, "/dev/null")
    (tmp_path / "file").write_text("")
    refuses("cannot save to .*file: it is a file, expected a folder", new_files(tmp_path / "file").__enter__)
    check_place(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_writers_of_one_file_do_not_meet(tmp_path):
    place = tmp_path / "a"
    with new_file(place) as first:
        first.write_text("first")
        with new_file(place) as second:
            assert second != first
            second.write_text("second")
        assert place.read_text() == "second"
        assert first.read_text() == "first"
    assert content(tmp_path) == {"a": "first"}


def test_without_locks_names_are_each_writers_own(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "fcntl", None)
    for word in ("old", "new"):
        with new_file(tmp_path / "a") as first, new_file(tmp_path / "b") as second, new_files(tmp_path / "c") as new:
            for path in (first, second, new / "d"):
                path.write_text(word)
        assert content(tmp_path) == dict.fromkeys(["a", "b", "c/d"], word)
    assert not hidden(tmp_path)


def test_writers_on_a_file_system_without_locks(tmp_path, monkeypatch):
    """As on some network drives: each finds out for itself, with the others beside it."""

    def flock(*_):
        barrier.wait(10)
        raise OSError(errno.ENOLCK, "no locks")

    barrier = threading.Barrier(2)
    monkeypatch.setattr(writing.fcntl, "flock", flock)
    found = []
    claimed = [threading.Thread(target=lambda: found.append(writing._claim(tmp_path / "a"))) for _ in range(2)]
    for thread in claimed:
        thread.start()
    for thread in claimed:
        thread.join()
    names = {path.name for path, _ in found}
    assert len(names) == 2
    assert names == set(os.listdir(tmp_path))


def test_what_another_users_killed_writer_left_stays(tmp_path, monkeypatch):
    (tmp_path / ".a.uhd-tmp-0").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: path.name != ".a.uhd-tmp-0" and access(path, how))
    with new_file(tmp_path / "a") as new:
        new.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".a.uhd-tmp-0", "a"]


def test_what_a_killed_writer_left_is_taken_over(tmp_path):
    killed = tmp_path / ".a.uhd-tmp-0"
    killed.mkdir()
    (killed / "new").write_text("half")
    with new_file(tmp_path / "a") as new:
        assert new.parent == killed
        assert not new.exists()
        new.write_text("whole")
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_of_its_own_name_keeps_files_of_others(tmp_path):
    """But for old files that would be taken for new ones."""
    folder = tmp_path / "model"
    for names in (("config.json", "model.safetensors"), ("config.json", "model-00001-of-00001.safetensors")):
        with new_files(folder, one_of=r"model.*\.safetensors") as new:
            assert new.name == "model"
            for name in names:
                (new / name).write_text("new")
            (new / "sub").mkdir(exist_ok=True)
            (new / "sub" / "x").write_text("new")
        (folder / "notes").write_text("mine")
    assert sorted(content(folder)) == ["config.json", "model-00001-of-00001.safetensors", "notes", "sub/x"]
    before = content(folder)
    with pytest.raises(KeyError):
        fail(new_files(folder), "config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ValueError, match="config.json: it is a folder"):
        fail(new_files(folder), "config.json", None)
    assert content(folder) == {name: words for name, words in before.items() if name != "config.json"}
    assert not hidden(folder)


def test_a_save_that_was_killed_as_files_moved_is_finished(tmp_path):
    old, new = encoders()
    folder = tmp_path / "encoder"
    for moved in ((), ["model.safetensors"], ["uhd_encoder.json"]):
        new.save_pretrained(folder)
        half_moved(folder, moved)
        found = uhd.VisualEncoder.from_pretrained(folder)
        assert (found.note, found.pixels) == (new.note, new.pixels)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), new.parameters(), strict=True))
        assert sorted(os.listdir(folder)) == ["model.safetensors", "uhd_encoder.json"]
    half_moved(folder, ["model.safetensors"])
    old.save_pretrained(folder)
    assert uhd.VisualEncoder.from_pretrained(folder).note == old.note
    assert not hidden(folder)


def test_a_config_that_was_read_before_is_not_trusted(tmp_path):
    model, folder = tiny.attach(encoders()[1]), tmp_path / "model"
    model.save_pretrained(folder)
    half_moved(folder, ["config.json"])
    refuses("held a save that was killed, .*: load it again", AutoModelForImageTextToText.from_pretrained, folder)
    assert AutoModelForImageTextToText.from_pretrained(folder).visual.note == "new"
    half_moved(folder)
    assert uhd.UHDProcessor.from_pretrained(folder).image_processor.image_mean == (0.1, 0.2, 0.3)
    for part in (UHDImageProcessor, UHDConfig):
        half_moved(folder)
        assert "0.1" in str(part.from_pretrained(folder))


def test_a_save_that_cannot_be_finished_is_refused(tmp_path):
    folder = tmp_path / "encoder"
    encoders()[0].save_pretrained(folder)
    half_moved(folder)
    (folder / "uhd_encoder.json").mkdir()
    words = f"{folder} is half old and half new: .*save it again"
    refuses(words, uhd.VisualEncoder.from_pretrained, folder, error=OSError)
    assert (folder / READY).is_dir()


@pytest.mark.parametrize("dropped", [["../kept"], ["..", "."], 7, {"a": 1}, [[]], "x" * 9])
def test_nothing_outside_is_touched(dropped, tmp_path):
    """Whatever a folder from elsewhere holds under the names of a killed save."""
    (tmp_path / "kept").write_text("kept")
    folder = tmp_path / "folder"
    (folder / READY / "sub").mkdir(parents=True)
    (folder / READY / ".uhd-dropped").write_text(json.dumps(dropped))
    (folder / "sub").symlink_to(tmp_path)
    (folder / READY / "sub" / "kept").write_text("evil")
    with pytest.raises(OSError, match="leads out of it"):
        finish(folder)
    (folder / "sub").unlink()
    try:
        finish(folder)
    except OSError as problem:
        assert "half old and half new" in str(problem)  # noqa: PT017
    assert (tmp_path / "kept").read_text() == "kept"


def test_what_is_saved_while_it_is_read_is_refused(tmp_path):
    for state in ("old", "new"):
        if state == "new":
            reading = read_whole(tmp_path, "description")
            reading.__enter__()
        with new_files(tmp_path) as new:
            (new / "description").write_text(state)
    refuses("was saved anew while it was read: load it again", reading.__exit__, None, None, None)
    with read_whole(tmp_path, "description"):
        assert (tmp_path / "description").read_text() == "new"


def test_a_model_in_shards_takes_the_place_of_one_in_a_file(tmp_path):
    """transformers would load the old weights, under the new config."""
    for encoder, size in zip(encoders(), ("1GB", "20KB"), strict=True):
        tiny.attach(encoder).save_pretrained(tmp_path, max_shard_size=size)
    found = uhd.UHDForConditionalGeneration.from_pretrained(tmp_path)
    weights = zip(found.visual.parameters(), encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_encoder_leaves_weights_of_others(tmp_path):
    (tmp_path / "model-00001-of-00001.safetensors").write_text("a language model")
    encoders()[0].save_pretrained(tmp_path)
    assert (tmp_path / "model-00001-of-00001.safetensors").read_text() == "a language model"


def test_new_files_can_be_read_by_whom_the_user_lets(tmp_path):
    before = os.umask(0o027)
    try:
        encoders()[0].save_pretrained(tmp_path / "encoder")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "encoder").iterdir()}
    assert modes == {0o640}


def test_threads_that_save_into_one_folder(tmp_path):
    """The last one wins, whole."""
    words = [f"{number}" * 1000 for number in range(8)]

    def save(word):
        for _ in range(10):
            with new_files(tmp_path) as new:
                for name in "abc":
                    (new / name).write_text(word)

    threads = [threading.Thread(target=save, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(content(tmp_path).values())) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
