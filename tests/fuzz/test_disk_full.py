"""A full disk, which a limit on the size of files stands for: what was there stays, and one sentence says why."""

import contextlib
import random

import pytest

from tests.fuzz.kills import hidden
from tests.fuzz.writers import WRITERS
from uhd import cli
from uhd.demo import page_image

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module", params=WRITERS)
def old(request, tmp_path_factory):
    """A writer, a place where it has written, and a digest of that."""
    work = tmp_path_factory.mktemp(request.param)
    writer = WRITERS[request.param](work)
    place = work / writer.name
    writer.write(place, 0)
    return writer, place, writer.read(place)


def test_what_was_there_stays(old):
    writer, place, before = old
    rng = random.Random(0)
    for size in (0, 1, *(rng.randrange(1500) for _ in range(3))):
        with pytest.raises(OSError) as refused, files_of_at_most(size):
            writer.write(place, 1)
        assert str(refused.value).startswith(f"cannot write {place}: ")
        assert "File too large" in str(refused.value)
        assert str(refused.value).endswith("; nothing there was changed")
        assert writer.read(place) == before
        assert not hidden(place.parent)


def test_commands_find_it_before_the_work(tmp_path, capsys):
    page = tmp_path / "page.png"
    page_image().save(page)
    for command, name in (("encode", "t.safetensors"), ("show", "o.png"), ("demo", "o.png")):
        (tmp_path / name).write_text("old")
        with files_of_at_most(1000):
            status = cli.main([command, str(page), "-o", str(tmp_path / name)])
        out, err = capsys.readouterr()
        assert (status, out) == (1, "")
        assert err == f"uhd {command}: cannot write {tmp_path / name}: File too large; nothing there was changed\n"
        assert (tmp_path / name).read_text() == "old"


def test_a_full_standard_output_is_one_sentence(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert cli.main(["plan", "10x20"]) == 1
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert "No space left on device" in capsys.readouterr().err
