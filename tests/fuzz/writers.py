"""Every writer of the library, each with an old and a new state, and a reader that says which of them is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import uhd
from tests import tiny
from tests.hf import tiny as hf
from tests.pretrained import released
from uhd.compare import compare, write_page
from uhd.draw import write_picture


@dataclass(frozen=True)
class Writer:
    """``write(path, state)`` for a state of 0 or 1; ``read(path)`` gives a digest of all that is there."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], str]
    name: str = "folder"


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        states = isinstance(part, torch.nn.Module)
        for name, value in sorted(part.state_dict().items()) if states else [("", part)]:
            found.update(name.encode())
            found.update(value.numpy().tobytes() if states else json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


def encoders() -> list[Any]:
    """Of other weights, slicing, mean and note, and of the same shapes: the old description fits the new weights."""
    old = hf.encoder()
    slicing, pixels = old.slicing.replace(max_slices=4), tiny.PIXELS.replace(mean=(0.1, 0.2, 0.3))
    new = tiny.stirred(hf.encoder(slicing=slicing, pixels=pixels))
    new.note = "new"
    return [old, new]


def told(encoder: Any) -> list[Any]:
    return [encoder.slicing.to_dict(), encoder.pixels.to_dict(), encoder.note]


def of_encoder(_: Path) -> Writer:
    states = encoders()

    def read(path: Path) -> str:
        found = uhd.VisualEncoder.from_pretrained(path)
        return digest(found, told(found))

    return Writer(lambda path, state: states[state].save_pretrained(path), read)


def of_model(_: Path) -> Writer:
    """The new one is in shards, the old one is not."""
    states = [hf.attach(encoder) for encoder in encoders()]
    sizes = "1GB", "20KB"

    def read(path: Path) -> str:
        found = uhd.UHDForConditionalGeneration.from_pretrained(path)
        images = found.processor.image_processor
        return digest(found, told(found.visual), images.slicing, list(images.image_mean))

    return Writer(lambda path, state: states[state].save_pretrained(path, max_shard_size=sizes[state]), read)


def of_processor(_: Path) -> Writer:
    states = [hf.attach(encoder).processor for encoder in encoders()]
    states[1].chat_template = "{{ messages }} new"

    def read(path: Path) -> str:
        found = uhd.UHDProcessor.from_pretrained(path)
        return digest(found.image_processor.slicing, list(found.image_processor.image_mean), found.chat_template)

    return Writer(lambda path, state: states[state].save_pretrained(path), read)


def of_release(work: Path) -> Writer:
    """Into the files of a released checkpoint."""
    like = work / "like"
    released.save(*released.make("llava"), like)
    states = [uhd.pretrained.load(like), tiny.stirred(uhd.pretrained.load(like))]

    def write(path: Path, state: int) -> None:
        uhd.pretrained.save(states[state], path, like=like)

    return Writer(write, lambda path: digest(uhd.pretrained.load(path)))


def of_tokens(_: Path) -> Writer:
    states = [(encoder, encoder([tiny.picture(100, 60 + 40 * n)])) for n, encoder in enumerate(encoders())]

    def write(path: Path, state: int) -> None:
        encoder, encoded = states[state]
        uhd.save_tokens(path, encoded, schema=encoder.schema, note=encoder.note)

    def read(path: Path) -> str:
        return digest([[item.plan.to_dict(), item.tokens.tolist()] for item in uhd.load_tokens(path)])

    return Writer(write, read, "t.safetensors")


def of_picture(_: Path) -> Writer:
    def read(path: Path) -> str:
        with Image.open(path, formats=["PNG"]) as image:
            return digest([image.size, hashlib.sha256(image.tobytes()).hexdigest()])

    states = [tiny.picture(300, 200), tiny.picture(200, 310)]
    return Writer(lambda path, state: write_picture(path, states[state]), read, "o.png")


def of_page(_: Path) -> Writer:
    states = [[compare(size, ["llava-uhd", "clip"])] for size in ((30, 40), (500, 400))]

    def read(path: Path) -> str:
        page = path.read_text()
        assert page.rstrip().endswith("</html>")
        return digest(page)

    return Writer(lambda path, state: write_page(path, states[state]), read, "c.html")


WRITERS = {
    "encoder": of_encoder,
    "model": of_model,
    "processor": of_processor,
    "release": of_release,
    "tokens": of_tokens,
    "picture": of_picture,
    "page": of_page,
}
