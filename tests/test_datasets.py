"""Data sets on disk: every image of every kind of source is encoded or recorded, whatever ends a run."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import uhd
from tests.tiny import encoded, noise, tiny_encoder
from uhd import cli, datasets, machine
from uhd.datasets import index, running, sources

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

SIZES = [(60, 90), (200, 70), (56, 56), (31, 120), (90, 60), (130, 150)]
BAD = {"a/torn.png": encoded(noise(40, 40))[:300], "b/none.jpg": b"no image", "b/empty.webp": b""}


SLOW = pytest.mark.slow  # half a minute each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder's folder."""
    place = tmp_path_factory.mktemp("encoder")
    tiny_encoder().save_pretrained(place)
    return place


def pictures(number=10):
    """Names to bytes: the same names in two folders, three that cannot be read."""
    found = {
        f"{place}/{one}.png": encoded(noise(*SIZES[one % 6], seed=one + shift))
        for shift, place in enumerate("ab")
        for one in range(number // 2)
    }
    return dict(sorted({**found, **BAD}.items()))


def as_folder(place, content):
    for name, data in content.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    (place / "notes.txt").write_text("no image")
    return place


def as_tar(place, content):
    with tarfile.open(place, "w") as tar:
        for name, data in content.items():
            for own, some in ((name, data), (name.rpartition(".")[0] + ".txt", f"of {name}".encode())):
                info = tarfile.TarInfo(own)
                info.size = len(some)
                tar.addfile(info, io.BytesIO(some))
    return place


def as_parquet(place, content, *, group=3):
    rows = [{"bytes": data, "path": None} for data in content.values()]
    table = pyarrow.table({"image": rows, "text": [f"of {name}" for name in content], "n": range(len(content))})
    pyarrow.parquet.write_table(table, place, row_group_size=group)
    return place


def as_list(place, content):
    as_folder(place.parent / "pictures", content)
    place.write_text("\n".join(f"pictures/{name}" for name in content) + "\n")
    return place


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 4)


def run(source, out, folder, **settings):
    here = {} if settings.get("engine") == "ray" else {"processes": 0}
    return datasets.encode(source, out, folder, **{**here, "budget_patches": 60, **settings})


def files(out, *more):
    """All but locks: names to contents."""
    kept = ("unit-", "index", "errors", "README", "run.json", *more)
    return {one.name: one.read_bytes() for one in out.iterdir() if one.name.startswith(kept)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """A source, and a folder with its tokens, of units of 4 images."""
    place = tmp_path_factory.mktemp("whole")
    before, sources.UNIT = sources.UNIT, 4
    counts = run(as_folder(place / "in", pictures()), place / "out", folder)
    sources.UNIT = before
    assert counts == {
        "inputs": 13, "images": 10, "errors": 3, "units": 4, "done": 4, "complete": True, "tokens": counts["tokens"]
    }  # fmt: skip
    return place / "in", place / "out"


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        (as_tar, "some.tar", "some.tar/{}"),
        (as_list, "list.txt", "pictures/{}"),
        (as_parquet, "some.parquet", "some.parquet#{}"),
    ],
)
def test_sources_have_the_same_tokens_and_keys_of_their_own(kind, name, key, tmp_path, folder, whole):
    content = pictures()
    counts = run(kind(tmp_path / name, content), tmp_path / "out", folder)
    assert (counts["inputs"], counts["images"], counts["errors"]) == (13, 10, 3)
    found, wanted = datasets.Tokens(tmp_path / "out"), datasets.Tokens(whole[1])
    names = dict(zip(content, range(13), strict=True)) if kind is as_parquet else {one: one for one in content}
    for own, image in wanted.items():
        assert torch.equal(found[key.format(names[own])].tokens, image.tokens)
    assert {row["key"] for row in found.errors()} == {key.format(names[own]) for own in BAD}


def test_a_folder_holds_archives_and_what_datasets_saved(tmp_path, folder):
    hf = pytest.importorskip("datasets")
    content = dict(list(pictures().items())[:3])
    as_folder(tmp_path / "in", content)
    as_tar(tmp_path / "in" / "x.tar", content)
    as_parquet(tmp_path / "in" / "y.parquet", content)
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "in" / "words.parquet")
    hf.Dataset.from_dict({"image": list(content.values())}).save_to_disk(tmp_path / "in" / "z")
    keys = [item.key for item in sources.listed(tmp_path / "in")]
    assert keys == [
        *(f"a/{n}" for n in ("0.png", "1.png", "2.png")),
        *(f"x.tar/a/{n}" for n in ("0.png", "1.png", "2.png")),
        *(f"y.parquet#{n}" for n in range(3)),
        *(f"z/data-00000-of-00001.arrow#{n}" for n in range(3)),
    ]
    for item, data in zip(sources.listed(tmp_path / "in"), [*content.values()] * 4, strict=True):
        assert sources.read(item)[0] == data


def test_what_cannot_be_listed_is_counted(tmp_path, folder):
    torn = as_tar(tmp_path / "torn.tar", pictures())
    torn.write_bytes(torn.read_bytes()[:30000])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b no")
    (tmp_path / "more.TAR.GZ").write_bytes(b"\x1f\x8b no")
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "dead.png")
    counts = run(tmp_path, tmp_path / "out", folder)
    errors = {row["key"]: row["error"] for row in datasets.Tokens(tmp_path / "out").errors()}
    assert set(errors) == {"dead.png", "more.TAR.GZ", "no.parquet", "torn.tar", "zipped.tar"}
    assert "unpack it" in errors["more.TAR.GZ"]
    with pytest.raises(ValueError, match=r"more.TAR.GZ: this archive is compressed"):
        run(tmp_path / "more.TAR.GZ", tmp_path / "no", folder)
    assert counts["images"] > 0
    assert "torn" in errors["torn.tar"]


def test_columns_are_kept(tmp_path, folder):
    for source, columns in (
        (as_tar(tmp_path / "s.tar", pictures()), ["txt"]),
        (as_parquet(tmp_path / "s.parquet", pictures()), ["text", "n"]),
    ):
        run(source, tmp_path / source.name[2:], folder, columns=columns)
        rows = list(datasets.Tokens(tmp_path / source.name[2:]).rows())
        assert rows[0][columns[0]] == "of a/0.png"
        assert [row.get("n") for row in rows][:2] in ([None] * 2, ["0", "1"])
    for columns, words in ((["nope"], "no column nope"), (["sha256"], "has columns of these names")):
        with pytest.raises(ValueError, match=words):
            run(tmp_path / "s.parquet", tmp_path / "no", folder, columns=columns)
    for source in (as_list(tmp_path / "s.txt", pictures()), tmp_path / "pictures"):
        for call in (run, lambda source, _, encoder, **own: datasets.estimate(source, encoder, **own)):
            with pytest.raises(ValueError, match="0.png is a plain file, which has no column text"):
                call(source, tmp_path / "no", folder, columns=["text"])
    assert not (tmp_path / "no").exists()


def test_the_index_says_what_the_pictures_are(whole):
    source, out = whole
    rows = pyarrow.parquet.read_table(out / "index.parquet").to_pylist()
    assert list(rows[0]) == list(index.COLUMNS)
    content, encoder = pictures(), tiny_encoder()
    assert [row["key"] for row in rows] == [name for name in content if name not in BAD]
    for row in rows:
        with Image.open(source / row["key"]) as picture:
            assert (row["height"], row["width"]) == (picture.height, picture.width)
        plan = encoder.plan((row["height"], row["width"]))
        assert row["sha256"] == hashlib.sha256(content[row["key"]]).hexdigest()
        assert (row["num_tokens"], row["num_views"]) == (plan.num_tokens, plan.num_views)
        assert row["stop"] - row["start"] == row["num_visual_tokens"] == plan.num_visual_tokens


def test_ten_lines_read_it_without_uhd(whole):
    code = f"""
import json, sys
import numpy as np, pyarrow.parquet as parquet
from safetensors.numpy import load_file
total = 0
for row in parquet.read_table({str(whole[1] / "index.parquet")!r}).to_pylist():
    tokens = load_file({str(whole[1])!r} + "/" + row["shard"])["tokens"][row["start"] : row["stop"]]
    assert len(tokens) == row["num_visual_tokens"]
    total += float(np.abs(tokens).sum())
assert "uhd" not in sys.modules
print(total)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    wanted = sum(float(image.tokens.abs().sum()) for image in datasets.Tokens(whole[1]))
    assert float(printed) == pytest.approx(wanted)


def test_tokens_are_the_encoders_and_do_not_depend_on_other_parts(whole, folder, tmp_path):
    """Up to rounding those of one image alone; bit by bit those of the parts that it was encoded in."""
    source, out = whole
    encoder, tokens = uhd.VisualEncoder.from_pretrained(folder), datasets.Tokens(out)
    with torch.inference_mode():
        for key, image in tokens.items():
            (alone,) = encoder([source / key])
            torch.testing.assert_close(image.tokens, alone.tokens, rtol=0, atol=1e-5)
            assert image.plan == alone.plan
            assert image.layout.symbols == alone.layout.symbols
    run(source, tmp_path / "half", folder, dtype="bfloat16")
    half = datasets.Tokens(tmp_path / "half")
    assert all(torch.equal(half[n].tokens, image.tokens.bfloat16()) for n, image in enumerate(tokens))


def test_tokens_by_number_and_key(whole):
    tokens = datasets.Tokens(whole[1])
    assert len(tokens) == 10
    assert torch.equal(tokens[-1].tokens, tokens["b/4.png"].tokens)
    assert tokens[np.int64(2)].tokens.is_contiguous()
    assert "a/0.png" in tokens
    assert "a/torn.png" not in tokens
    for wrong, kind in ((10, IndexError), (-11, IndexError), ("a/torn.png", KeyError), (1.5, TypeError)):
        with pytest.raises(kind):
            tokens[wrong]
    tokens[0].tokens.fill_(0)
    assert tokens[0].tokens.any()


def test_repeated_keys_are_told(tmp_path, folder):
    as_list(tmp_path / "list.txt", pictures())
    (tmp_path / "list.txt").write_text("pictures/a/0.png\npictures/a/1.png\npictures/a/0.png\n")
    assert run(tmp_path / "list.txt", tmp_path / "out", folder)["images"] == 3
    with pytest.raises(ValueError, match="2 images of .* take their numbers, \\[0, 2\\]"):
        datasets.Tokens(tmp_path / "out")["pictures/a/0.png"]


def _sums(tokens):
    return [float(image.tokens.double().sum()) for image in tokens]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=SLOW)])
def test_tokens_in_processes(start, whole):
    tokens = datasets.Tokens(whole[1])
    wanted = _sums(tokens)
    context = multiprocessing.get_context(start)
    with context.Pool(2) as pool:
        assert pool.map(_sums, [tokens, tokens]) == [wanted, wanted]


def test_tokens_in_threads(whole, monkeypatch):
    monkeypatch.setattr("uhd.datasets.tokens._OPEN", 1)
    tokens = datasets.Tokens(whole[1])
    wanted = _sums(tokens)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: float(tokens[n % 10].tokens.double().sum()), range(400)))
    assert found == wanted * 40
    assert len(pickle.dumps(tokens)) < 500


def test_a_run_goes_on_and_heals(whole, tmp_path, folder):
    source, wanted = whole[0], files(whole[1])
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="enough"):
        run(source, out, folder, progress=_two_then_error)
    assert not (out / "index.parquet").exists()
    with pytest.raises(ValueError, match="2 units are there"):
        datasets.Tokens(out)
    assert run(source, out, folder)["done"] == 2
    (out / "unit-00000001.safetensors").unlink()
    torn = (out / "unit-00000002.safetensors").read_bytes()
    (out / "unit-00000002.safetensors").write_bytes(torn[:-1])
    (out / "index.parquet").write_bytes(b"")
    assert run(source, out, folder)["done"] == 2
    assert files(out) == wanted


def _two_then_error(running):
    yield next(running)
    yield next(running)
    running.close()
    raise RuntimeError("enough")


def copies(place):
    """Three files of one content in units apart, two of another in one unit, two that cannot be decoded, others."""
    one, two, three = (encoded(noise(*SIZES[n], seed=n)) for n in range(3))
    content = [one, two, two, BAD["a/torn.png"], three, one, BAD["a/torn.png"], three, two, one, *pictures().values()]
    return as_folder(place, {f"{n:02d}.png": data for n, data in enumerate(content)})


def test_equal_files_are_encoded_once(tmp_path, folder):
    """Whatever writes them: at once, in shards that come in another order, or after units were lost."""
    source = copies(tmp_path / "in")
    counts = run(source, tmp_path / "out", folder, dedupe=True)
    every = run(source, tmp_path / "every", folder)
    assert [counts[name] for name in ("inputs", "images", "errors")] == [23, 18, 5]
    found, wanted = datasets.Tokens(tmp_path / "out"), datasets.Tokens(tmp_path / "every")
    rows, others = list(found.rows()), list(wanted.rows())
    places = {row["sha256"]: (row["shard"], row["start"], row["stop"]) for row in rows}
    assert [places[row["sha256"]] for row in rows] == [(row["shard"], row["start"], row["stop"]) for row in rows]
    assert len({*places.values()}) == len(places) < len(rows)
    assert counts["tokens"] == sum(stop - start for _, start, stop in places.values()) < every["tokens"]
    told = ("shard", "start", "stop")
    assert [{**row, **dict.fromkeys(told)} for row in rows] == [{**row, **dict.fromkeys(told)} for row in others]
    for key, image in wanted.items():
        torch.testing.assert_close(found[key].tokens, image.tokens, rtol=0, atol=1e-5)
    looked = datasets.inspect(tmp_path / "out")
    assert (looked["copies"], looked["problems"]) == (len(rows) - len(places), [])
    for place in (1, 2, 0):
        run(source, tmp_path / "shards", folder, dedupe=True, shard=(place, 3))
    assert files(tmp_path / "shards") == files(tmp_path / "out")
    for number in (0, 2):
        (tmp_path / "shards" / f"unit-{number:08d}.safetensors").unlink()
    run(source, tmp_path / "shards", folder, dedupe=True)
    assert files(tmp_path / "shards") == files(tmp_path / "out")
    with pytest.raises(ValueError, match="another recipe \\(dedupe: true there, false asked for\\)"):
        run(source, tmp_path / "out", folder)


def test_a_copy_whose_file_is_gone_is_told(tmp_path, folder):
    """The first of three equal files changes, and its unit is made anew: the others have no tokens until theirs is."""
    source, out = copies(tmp_path / "in"), tmp_path / "out"
    run(source, out, folder, dedupe=True)
    (source / "00.png").write_bytes(encoded(noise(70, 80)))
    (out / "unit-00000000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the file of '05.png' .* remove unit-00000001.safetensors"):
        run(source, out, folder, dedupe=True)
    assert any("05.png" in problem for problem in datasets.inspect(out)["problems"])
    (out / "unit-00000001.safetensors").unlink()
    run(source, out, folder, dedupe=True)
    run(source, tmp_path / "new", folder, dedupe=True)
    assert files(out) == files(tmp_path / "new")
    assert datasets.inspect(out)["problems"] == []


def test_shards_share_a_source(whole, tmp_path, folder):
    found = [run(whole[0], tmp_path / "out", folder, shard=(place, 3)) for place in range(3)]
    assert [one["done"] for one in found] == [2, 1, 1]
    assert [one["complete"] for one in found] == [False, False, True]
    assert files(tmp_path / "out") == files(whole[1])


def test_another_recipe_or_source_is_refused(whole, tmp_path, folder):
    source = as_folder(tmp_path / "in", pictures())
    run(source, tmp_path / "out", folder)
    with pytest.raises(ValueError, match="another recipe \\(budget_patches: 60 there, 61 asked for\\)"):
        run(source, tmp_path / "out", folder, budget_patches=61)
    other = tiny_encoder()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="another recipe \\(weights: "):
        run(source, tmp_path / "out", other)
    assert run(source, tmp_path / "out", tiny_encoder())["done"] == 0
    (source / "a" / "00.png").write_bytes(encoded(noise(20, 20)))
    with pytest.raises(ValueError, match="the source has changed"):
        run(source, tmp_path / "out", folder)
    (source / "a" / "00.png").unlink()
    for name in list(pictures())[3:]:
        (source / name).unlink()
    with pytest.raises(ValueError, match="the source has changed|of other images"):
        run(source, tmp_path / "out", folder)


def test_what_a_caller_pinned_stays(whole, tmp_path, folder):
    pinned = machine.NATIVE | {"float32": "onednn"}
    before = machine.use_products(pinned)
    try:
        run(whole[0], tmp_path / "out", folder)
        datasets.estimate(whole[0], folder, limit=4)
        assert machine.products() == pinned
        assert json.loads((tmp_path / "out" / "run.json").read_text())["settled"]["products"] == pinned
    finally:
        assert machine.use_products(before) == pinned


def test_shards_that_begin_at_once_settle_one_thing(whole, tmp_path, folder, monkeypatch):
    """Each would choose otherwise: the second waits for what the first has written."""
    settled, numbers = running.settled_on, iter(range(1, 3))

    def slowly(device):
        time.sleep(0.3)
        return settled(device) | {"threads": next(numbers)}

    monkeypatch.setattr(running, "settled_on", slowly)
    monkeypatch.setattr(running, "Job", lambda *_, **told: told)
    monkeypatch.setitem(running.ENGINES, "local", lambda job, *_, **__: iter([job["threads"]]))
    threads = []

    def shard(place):
        run(whole[0], tmp_path / "out", folder, shard=(place, 2), progress=lambda done: threads.append(*done) or ())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(shard, range(2)))
    assert threads == [1, 1]


def test_what_changed_between_runs_is_read_anew(tmp_path, folder):
    for seed in range(2):
        as_parquet(tmp_path / "s.parquet", {"a.png": encoded(noise(30, 40, seed=seed))})
        run(tmp_path / "s.parquet", tmp_path / str(seed), folder)
    one, two = (next(datasets.Tokens(tmp_path / str(seed)).rows())["sha256"] for seed in range(2))
    assert one != two


def test_bytes_of_every_kind_of_column(tmp_path):
    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()):
        table = pyarrow.table({"image": pyarrow.array([b"some"], kind)})
        pyarrow.parquet.write_table(table, tmp_path / "s.parquet")
        assert [sources.read(item) for item in sources.listed(tmp_path / "s.parquet")] == [(b"some", {})]


def test_a_source_can_be_read_more_than_once(tmp_path, folder):
    """A pipe would be empty for the run itself, or be waited for."""
    as_list(tmp_path / "list.txt", pictures())
    words = (
        f"{sys.executable} -m uhd.cli encode-dataset <(cat {tmp_path}/list.txt) -o {tmp_path}/no --encoder {folder}"
    )
    told = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert (told.returncode, "is a pipe or a device" in told.stderr) == (1, True)
    os.mkfifo(tmp_path / "pictures" / "x.tar")
    run(tmp_path / "pictures", tmp_path / "out", folder)
    assert {row["key"]: row["error"] for row in datasets.Tokens(tmp_path / "out").errors()}["x.tar"] == "it is no file"


def test_a_damaged_run_is_told(whole, tmp_path, folder):
    for content, words in (("{}", "has format None"), ('{"format": 1}', "missing recipe"), ("[", "damaged")):
        (tmp_path / "run.json").write_text(content)
        for use in (datasets.Tokens, datasets.inspect, lambda out: run(whole[0], out, folder)):
            with pytest.raises(ValueError, match=f"run.json.*{words}"):
                use(tmp_path)
    told = json.loads((whole[1] / "run.json").read_text())
    for counts in ([1], {**told["counts"], "units": "4"}):
        (tmp_path / "run.json").write_text(json.dumps({**told, "counts": counts}))
        with pytest.raises(ValueError, match="run.json does not fit or is damaged: a run's counts"):
            datasets.inspect(tmp_path)


@pytest.mark.parametrize("name", ["key", "start"])
def test_an_index_without_a_value_is_told(name, whole, tmp_path):
    out = shutil.copytree(whole[1], tmp_path / "out")
    _rewritten(out / "index.parquet", lambda rows: [{**rows[0], name: None}, *rows[1:]])
    with pytest.raises(ValueError, match=f"index.parquet does not fit or is damaged: {name} is null"):
        datasets.Tokens(out)
    (out / "index.parquet").unlink()
    (out / "index.jsonl").write_text(json.dumps({"key": "a"}) + "\n")
    with pytest.raises(ValueError, match="index.jsonl does not fit or is damaged"):
        datasets.Tokens(out)


def test_without_pyarrow_a_table_is_refused(tmp_path, folder, monkeypatch):
    as_parquet(tmp_path / "s.parquet", pictures())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"s.parquet is read by pyarrow, which is missing here"):
        run(tmp_path, tmp_path / "out", folder)


def test_two_runs_at_once(whole, tmp_path, folder):
    def second(running):
        with pytest.raises(ValueError, match="another run is writing"):
            run(whole[0], tmp_path / "out", folder)
        yield from running

    assert run(whole[0], tmp_path / "out", folder, progress=second)["complete"]


def test_wrong_calls(whole, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"\xff\xfe\0")
    for source, changes, words in (
        (tmp_path / "empty", {}, "holds no images"),
        (tmp_path / "none", {}, "there is no"),
        (tmp_path / "file", {}, "no source of images"),
        (whole[0], {"shard": (3, 3)}, "0 to n - 1"),
        (whole[0], {"limit": 0}, "at least 1"),
        (whole[0], {"dtype": "int8"}, "dtype must be"),
        (whole[0], {"device": "tpu"}, "device must be"),
        (whole[0], {"processes": -1}, "processes must be a whole number of at least 0"),
        (whole[0], {"processes": 1.5}, "processes must be a whole number"),
        (whole[0], {"engine": "ray", "actors": 0}, "actors must be a whole number of at least 1"),
        (whole[0], {"on_error": "stop"}, "a/torn.png \\(decode\\)"),
    ):
        with pytest.raises(ValueError, match=words):
            run(source, out := tmp_path / "out" / words.split()[0], folder, **changes)
        assert "on_error" in changes or not (out / "run.json").exists()  # refused before anything is settled
    with pytest.raises(ValueError, match="expected a folder"):
        run(whole[0], tmp_path / "file", folder)
    with pytest.raises(ValueError, match="is the source: give another folder"):
        run(whole[0], whole[0] / "a" / "..", folder)
    with pytest.raises(TypeError, match="unexpected keyword argument 'proceses'"):
        run(whole[0], tmp_path / "out", folder, proceses=2)
    for wrong in ({"shard": (5, 3)}, {"limit": 0}, {"dtype": "int8"}, {"columns": ["key"]}):
        with pytest.raises(ValueError, match="0 to n - 1|at least 1|dtype must be|columns of these names"):
            datasets.estimate(whole[0], folder, **wrong)
    for call in (partial(run, whole[0], tmp_path / "out"), partial(datasets.estimate, whole[0])):
        with pytest.raises(TypeError, match="write \\['label'\\]"):
            call(folder, columns="label")


def _bytes_changed(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "unit-00000001.safetensors").unlink(), "unit-00000001.safetensors is missing"),
        (lambda out: (out / "unit-00000003.safetensors").unlink(), "unit-00000003.safetensors is missing"),
        (lambda out: _bytes_changed(out / "unit-00000002.safetensors", -9), "unit-00000002.safetensors is damaged"),
        (lambda out: _bytes_changed(out / "unit-00000002.safetensors", 1500), "unit-00000002.safetensors is damaged"),
        (lambda out: _bytes_changed(out / "unit-00000002.safetensors", 5), "unit-00000002.safetensors is damaged"),
        (lambda out: os.truncate(out / "unit-00000000.safetensors", 2000), "unit-00000000.safetensors is damaged"),
        (
            lambda out: (out / "unit-00000000.safetensors").write_bytes(
                (out / "unit-00000001.safetensors").read_bytes()
            ),
            "another unit's",
        ),
        (lambda out: (out / "index.parquet").write_bytes(b"PAR1"), "index.parquet"),
        (lambda out: (out / "errors.parquet").unlink(), "has no errors.parquet"),
        (lambda out: _rewritten(out / "index.parquet", lambda rows: rows[:-1]), "index.parquet: 1 rows, the first"),
        (lambda out: _rewritten(out / "index.parquet", _other_key), "index.parquet: 1 rows, the first number 3"),
    ],
)
def test_inspect_finds_planted_damage_and_a_run_heals_it(damage, words, whole, tmp_path, folder):
    out = tmp_path / "out"
    run(whole[0], out, folder)
    assert datasets.inspect(out)["problems"] == []
    damage(out)
    problems = datasets.inspect(out)["problems"]
    assert len([one for one in problems if words in one]) == 1
    for name in {one.partition(" ")[0] for one in problems if one.startswith("unit-")}:
        (out / name).unlink(missing_ok=True)
    run(whole[0], out, folder)
    assert datasets.inspect(out)["problems"] == []
    assert files(out) == files(whole[1])


def _rewritten(path, change):
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(change(table.to_pylist()), table.schema), path)


def test_an_index_and_counts_of_someone_else_lead_nowhere(whole, tmp_path, folder):
    """Out of the folder, or into a list of a thousand million files."""
    out = tmp_path / "out"
    run(whole[0], out, folder)
    told = json.loads((out / "run.json").read_text())
    told["counts"]["units"] = 10**9
    (out / "run.json").write_text(json.dumps(told))
    (problem,) = datasets.inspect(out)["problems"]
    assert problem.startswith("unit-00000004.safetensors to unit-999999999.safetensors are missing"), problem
    shutil.copy(out / "unit-00000000.safetensors", tmp_path / "unit-00000000.safetensors")
    _rewritten(out / "index.parquet", lambda rows: [{**row, "shard": f"../{row['shard']}"} for row in rows])
    with pytest.raises(
        ValueError, match=r"the index names '\.\./unit-00000000.safetensors', which is no file of a unit"
    ):
        datasets.Tokens(out)[0]


def _other_key(rows):
    rows[3]["key"] = "a/9.png"
    return rows


def test_without_pyarrow_it_is_json_lines(whole, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(index, "_pyarrow", lambda: None)
    run(whole[0], tmp_path / "out", folder)
    assert not (tmp_path / "out" / "index.parquet").exists()
    assert datasets.inspect(tmp_path / "out")["problems"] == []
    one, two = datasets.Tokens(tmp_path / "out"), list(datasets.Tokens(tmp_path / "out").rows())
    monkeypatch.undo()
    monkeypatch.setattr(sources, "UNIT", 4)
    assert two == list(datasets.Tokens(whole[1]).rows())
    assert _sums(one) == _sums(datasets.Tokens(whole[1]))


def test_a_full_disk_loses_nothing(whole, tmp_path, folder):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [one.stat().st_size for one in sorted(whole[1].glob("unit-*"))]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes[:2]) // 2 + 200, hard))
        with pytest.raises(OSError, match="cannot write .*: File too large"):
            run(whole[0], tmp_path / "out", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run(whole[0], tmp_path / "out", folder)["complete"]
    assert files(tmp_path / "out") == files(whole[1])


def test_processes_write_the_same_bytes_across_kills(whole, tmp_path, folder, capsys):
    """A worker is killed in the middle, and what workers are copies of; the others and its successor do its units."""
    psutil = pytest.importorskip("psutil")
    source, out = whole[0], tmp_path / "out"

    def killing(running):
        yield next(running)
        for child in multiprocessing.active_children()[:1]:
            server = psutil.Process(child.pid).parent()
            os.kill(child.pid, signal.SIGKILL)
            if server.pid != os.getpid():
                server.kill()
        yield from running

    counts = run(source, out, folder, processes=2, progress=killing, limit=None)
    assert counts["complete"]
    assert {name: data for name, data in files(out).items() if name != "run.json"} == {
        name: data for name, data in files(whole[1]).items() if name != "run.json"
    }
    assert multiprocessing.active_children() == []


def test_a_server_that_dies_while_it_starts_a_worker(whole, tmp_path, folder, monkeypatch):
    """The next one does; where none ever does, the error is told."""
    start, ended = multiprocessing.process.BaseProcess.start, iter([True, False])

    def dying(process):
        if next(ended):
            raise EOFError("unexpected EOF")
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", dying)
    assert run(whole[0], tmp_path / "out", folder, processes=1)["complete"]
    ended = iter([True] * 3)
    with pytest.raises(RuntimeError, match="no process can be started here"):
        run(whole[0], tmp_path / "never", folder, processes=1)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGKILL, -9, marks=SLOW),
        pytest.param(signal.SIGTERM, 143, marks=SLOW),
    ],
)
def test_the_command_goes_on_after_signals(sent, status, tmp_path, folder, monkeypatch):
    source = as_folder(tmp_path / "in", pictures(400))
    out, alone = tmp_path / "out", tmp_path / "alone"
    monkeypatch.setattr(sources, "UNIT", 64)
    words = [sys.executable, "-m", "uhd.cli", "encode-dataset", str(source), "--encoder", str(folder)]
    first = subprocess.Popen(
        [*words, "-o", str(out), "--processes", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not list(out.glob("unit-*")) and time.monotonic() < end:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(sent)
    told = first.communicate(timeout=60)[1]
    assert first.returncode == status
    assert sent is signal.SIGKILL or "the same command goes on" in told
    assert not (out / "index.parquet").exists()
    done = len(list(out.glob("unit-*")))
    assert cli.main([*words[3:], "-o", str(out), "--processes", "0"]) == 0
    assert cli.main([*words[3:], "-o", str(alone), "--processes", "0"]) == 0
    assert 0 < done < len(list(out.glob("unit-*")))
    assert files(out) == files(alone)


def test_commands(whole, tmp_path, folder, capsys):
    words = ["encode-dataset", str(whole[0]), "-o", str(tmp_path / "out"), "--encoder", str(folder)]
    assert cli.main([*words, "--processes", "0", "--shard", "0/1", "--dtype", "float16"]) == 0
    told = capsys.readouterr()
    assert "10 images + 3 errors = 13 inputs" in told.out
    assert f"{tmp_path / 'out' / 'errors.parquet'} says which, and why" in told.err
    assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["width"], found["problems"], found["stages"]) == ("float16", 24, [], {"decode": 3})
    next((tmp_path / "out").glob("unit-*")).unlink()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 1
    assert "is missing" in capsys.readouterr().out
    assert cli.main([*words[:-1], str(tmp_path)]) == 1
    assert "holds no uhd_encoder.json" in capsys.readouterr().err
    for wrong in (["--shard", "3"], ["--engine", "spark"]):
        with pytest.raises(SystemExit):
            cli.main([*words, *wrong])
    assert cli.main([*words, "--actors", "2"]) == 1
    assert "--actors is of --engine ray" in capsys.readouterr().err


def test_a_dry_run_counts_from_headers(whole, tmp_path, folder, capsys):
    words = ["encode-dataset", str(whole[0]), "-o", str(tmp_path / "out"), "--encoder", str(folder), "--dry-run"]
    assert cli.main([*words, "--engine", "ray", "--actors", "2"]) == 0
    assert not (tmp_path / "out").exists()
    told = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    counts = index.finish(whole[1], 13, 4)
    assert (int(told["inputs"]), int(told["errors"])) == (counts["inputs"], 2)  # pixels tell of the third
    torn = uhd.VisualEncoder.describe(folder).plan((40, 40)).num_visual_tokens
    assert int(told["tokens"].replace(",", "")) == counts["tokens"] + torn
    assert float(told["tflops"]) > 0
    assert float(told["hours"]) > 0


@pytest.mark.slow
def test_ray_writes_the_same_bytes(whole, tmp_path, folder):
    ray = pytest.importorskip("ray")
    counts = run(whole[0], tmp_path / "out", folder, engine="ray", actors=2)
    assert counts["complete"]
    assert not ray.is_initialized()
    assert files(tmp_path / "out") == files(whole[1])
    source = copies(tmp_path / "in")
    run(source, tmp_path / "once", folder, dedupe=True)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:  # as many actors as cores: tasks find one nevertheless
        run(source, tmp_path / "there", folder, engine="ray", actors=2, dedupe=True)
        assert files(tmp_path / "there") == files(tmp_path / "once")
        with pytest.raises(ValueError, match="torn.png \\(decode\\)"):
            run(whole[0], tmp_path / "stop", folder, engine="ray", actors=1, on_error="stop")
        with pytest.raises(ValueError, match="at most the cluster's 2 cores, got 3"):
            run(whole[0], tmp_path / "many", folder, engine="ray", cpus_per_task=3)
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_ray_is_asked_for_where_it_is_missing(whole, tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install llava-uhd\[ray\]"):
        run(whole[0], tmp_path / "out", folder, engine="ray")
