"""Every way in gives the same pixels, whatever carried the picture and whatever damage its metadata has."""

import base64
import copy
import http.server
import io
import pickle
import struct
import threading
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.tiny import encoded, exif, picture, png_chunk, refuses
from uhd.hf.image_processing import arrange_images, fetch_bytes
from uhd.loading import named
from uhd.pixels import image_size_hw, load_image

PICTURES = {
    "transparent": Image.new("RGBA", (30, 20), (9, 0, 0, 40)),
    "16-bit gray": Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100),
    "gray with alpha": Image.merge("LA", [Image.new("L", (30, 20), 30), Image.new("L", (30, 20), 100)]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_one_file_in_every_wrapping(name, tmp_path):
    file = encoded(PICTURES[name])
    (tmp_path / "a.png").write_bytes(file)
    code = base64.b64encode(file).decode()
    stream = io.BytesIO(file)
    stream.seek(5)
    ways = [
        tmp_path / "a.png",
        stream,
        f"data:image/png;base64,{code}",
        code,
        base64.encodebytes(file).decode(),
        base64.urlsafe_b64encode(file).decode().rstrip("="),
        f"DATA:;base64,{quote(code, safe='')}",
        {"bytes": file, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        Image.open(io.BytesIO(file)),
    ]
    for way in ways:
        assert np.array_equal(np.asarray(load_image(way)), np.asarray(load_image(file)))
        assert image_size_hw(way) == (20, 30)
    assert stream.tell() == 5
    assert load_image("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7").size == (1, 1)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "MPO", "JPEG", "WEBP"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))])
def test_a_picture_that_lost_its_file(kind, again):
    many = {"save_all": True, "append_images": [picture(20, 30, 1)]} if kind in ("MPO", "GIF") else {}
    image = Image.open(io.BytesIO(encoded(picture(20, 30), kind, **many)))
    image.load()
    found = again(image)
    assert np.array_equal(np.asarray(load_image(found)), np.asarray(load_image(image)))
    assert image_size_hw(found) == (20, 30)


def damaged():
    image = picture(20, 30)
    png, jpeg = encoded(image), encoded(image, "JPEG")
    chunks = {
        "profile": png_chunk(b"iCCP", b"x\0\5garbage"),
        "text": png_chunk(b"zTXt", b"k\0\7abc"),
        "bomb": png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000))),
        "checksum": png_chunk(b"tEXt", b"a\0b", 1),
        "gamma": png_chunk(b"gAMA", b"1"),
        "exif": png_chunk(b"eXIf", b"garbage"),
    }
    for name, extra in chunks.items():
        yield f"png {name}", png[:33] + extra + png[33:], png
        yield f"png late {name}", png[:-12] + extra + png[-12:], png
    for name, marker, data in (("exif", 0xE1, b"Exif\0\0junk"), ("adobe", 0xEE, b"Adobe"), ("jfif", 0xE0, b"JFIF\0")):
        segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data
        yield f"jpeg {name}", jpeg[:2] + segment + jpeg[2:], jpeg
    for kind in ("PNG", "WEBP", "JPEG"):
        for junk in (b"Exif\0\0" + bytes(40), b"Exif\0\0XX\0*\0\0\0\x08" + bytes(20)):
            yield f"{kind} exif", encoded(image, kind, exif=junk), encoded(image, kind)
    for name, extra in (("xmp", {"xmp": b"<x/>" * 9}), ("exif", {"exif": exif(1)})):
        yield f"webp cut in {name}", encoded(image, "WEBP", lossless=True, **extra)[:-5], png
    tiff = encoded(image, "TIFF", tiffinfo={270: "words"})
    place = tiff.index(struct.pack("<HHI", 270, 2, 6)) + 8
    yield "tiff", tiff[:place] + b"\xff\xff\xff\x7f" + tiff[place + 4 :], png


@pytest.mark.parametrize("file, whole", [pytest.param(file, whole, id=name) for name, file, whole in damaged()])
def test_damaged_metadata_refuses_no_picture(file, whole):
    assert np.array_equal(np.asarray(load_image(file)), np.asarray(load_image(whole)))
    assert image_size_hw(file) == (20, 30)
    try:
        opened = Image.open(io.BytesIO(file))
    except (OSError, ValueError, UserWarning):  # Pillow itself opens what is damaged behind the pixels alone
        return
    assert np.array_equal(np.asarray(load_image(opened)), np.asarray(load_image(whole)))


def test_a_truncated_picture_is_still_refused():
    refuses("truncated or damaged", load_image, encoded(picture(200, 300))[:-3000])


@pytest.mark.parametrize("kind", ["WEBP", "TIFF"])
def test_xmp_turns_a_picture(kind):
    upright = picture(20, 30)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    file = encoded(upright, kind, **({"lossless": True, "xmp": xmp} if kind == "WEBP" else {"tiffinfo": {700: xmp}}))
    assert np.array_equal(np.asarray(load_image(file)), np.rot90(np.asarray(upright), -1))
    assert image_size_hw(file) == (30, 20)


def test_errors_are_short():
    with pytest.raises(FileNotFoundError):
        load_image("no/such/file.png")
    with pytest.raises(FileNotFoundError):  # it is no base64 text, whose letters are of one alphabet
        load_image("/data/of_mine/" + "A" * 60)
    texts = ("A" * 10_000, "A" * 10_000 + "!")
    for source in (*texts, *(f"data:image/png;base64,{text}" for text in texts)):
        with pytest.raises((ValueError, OSError)) as caught, named("image", 0, source):
            load_image(source)
        assert str(caught.value).count("A") <= 200
    refuses("image 1 is None", arrange_images, [picture(20, 30), None])
    refuses("neither bytes nor a path", load_image, {"bytes": None, "path": None})


def test_an_address_gives_the_file_or_a_sentence():
    file = encoded(PICTURES["transparent"])

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(file)

        def log_message(self, *_):
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert fetch_bytes(f"{address}/a.png") == file
        with pytest.raises(ValueError, match="b.png' cannot be fetched: HTTP Error 404") as caught:
            fetch_bytes(f"{address}/b.png")
        assert caught.value.__cause__.closed  # with its connection
        refuses("cannot be fetched: URL can't contain", fetch_bytes, f"{address}/a b.png")
        server.shutdown()
