"""Many images at once: one that is refused stops no other, and nothing carries what is not its own."""

import copy
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import uhd
from tests.tiny import IMAGES, encoded, noise, tiny_encoder
from uhd.resampler import MLPProjector
from uhd.token_files import token_file

LONG = np.zeros((20, 2_000, 3), np.uint8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two good images among those that are refused: by their bytes, their kind, their place, and by a rule."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "torn.png").write_bytes(encoded(noise(40, 40))[:400])
    return [IMAGES[0], b"no image", folder / "torn.png", 3, IMAGES[1], folder / "none.png"]


def test_sizes_are_collected(mixed):
    for threads in (1, 3):
        sizes, errors = uhd.image_sizes_hw(iter(mixed), threads=threads, errors="collect")
        assert sizes.tolist() == [[100, 60], [0, 0], [40, 40], [0, 0], [30, 200], [0, 0]]
        assert [(number, type(error)) for number, error in errors.items()] == [
            *((1, ValueError), (3, TypeError), (5, FileNotFoundError))
        ]
        assert str(errors[1]).startswith("item 1: ")
    assert uhd.image_sizes_hw(mixed[:1], errors="collect")[1] == {}
    with pytest.raises(ValueError, match="errors must be 'raise' or 'collect', got 'ignore'"):
        uhd.image_sizes_hw(mixed, errors="ignore")


def test_batches_are_collected(mixed):
    encoder = tiny_encoder()
    prepare = uhd.Preparation.of(encoder, errors="collect")
    batch, errors = prepare(mixed)
    assert sorted(errors) == [1, 2, 3, 5]
    assert "torn.png" in str(errors[2])
    assert torch.equal(batch.patches, encoder.prepare([mixed[0], mixed[4]]).patches)
    assert pickle.loads(pickle.dumps(prepare)) == prepare
    (batch, errors), rest = DataLoader(mixed, batch_size=4, collate_fn=prepare)
    assert (len(batch.plans), sorted(errors)) == (1, [1, 2, 3])
    assert (len(rest[0].plans), sorted(rest[1])) == (1, [1])
    with pytest.raises(TypeError, match="put one image into a list"):
        prepare(IMAGES[0])


def test_a_rule_that_refuses_a_size_is_collected():
    def square(image_hw):
        if max(image_hw) > 20 * min(image_hw):
            raise ValueError("too long")
        return uhd.plan(image_hw, tiny_encoder().slicing)

    encoder = tiny_encoder()
    encoder.slicing = square
    found, errors = encoder([LONG, IMAGES[0]], errors="collect")
    assert str(errors[0]) == "image 0: too long"
    assert found[0] is None
    assert found[1].plan == encoder.plan((100, 60))


def test_encoded_images_are_collected(mixed):
    encoder = tiny_encoder()
    with torch.inference_mode():
        found, errors = encoder(mixed, errors="collect")
        wanted = encoder([mixed[0], mixed[4]])
    assert [image is None for image in found] == [False, True, True, True, False, True]
    assert sorted(errors) == [1, 2, 3, 5]
    assert torch.equal(found[0].tokens, wanted[0].tokens)
    assert torch.equal(found[4].tokens, wanted[1].tokens)
    assert encoder([b"no"], errors="collect")[0] == [None]
    with pytest.raises(ValueError, match="prepared batch is planned already"):
        encoder(encoder.prepare(IMAGES), errors="collect")
    with pytest.raises(ValueError, match="image 1"):
        encoder(mixed)


@pytest.mark.parametrize("copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy])
def test_an_encoded_image_carries_its_own_tokens_only(copied):
    encoder = tiny_encoder()
    with torch.no_grad():
        images = encoder(IMAGES * 20)
        (video,) = encoder.encode_videos([[noise(40, 60), noise(40, 60, 1)]])
    for item in (images[3], video):
        found = copied(item)
        assert found.tokens.untyped_storage().nbytes() == found.tokens.numel() * found.tokens.element_size()
        assert torch.equal(found.tokens, item.tokens)
        assert (found.plan, found.layout) == (item.plan, item.layout)
    assert len(pickle.dumps(images[3])) < len(pickle.dumps(images)) / 20


def test_a_description_plans_without_weights(tmp_path):
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    described = uhd.VisualEncoder.describe(tmp_path)
    assert all(weight.is_meta for weight in described.parameters())
    assert (described.slicing, described.schema, described.pixels) == (encoder.slicing, encoder.schema, encoder.pixels)
    assert described.plan((100, 60)) == encoder.plan((100, 60))
    assert uhd.Preparation.of(described) == uhd.Preparation.of(encoder)
    assert torch.equal(described.prepare(IMAGES).patches, encoder.prepare(IMAGES).patches)
    with pytest.raises(ValueError, match="this encoder has no weights"):
        described(IMAGES)
    (tmp_path / "uhd_encoder.json").write_text("{}")
    with pytest.raises(ValueError, match=r"uhd_encoder.json does not fit or is damaged"):
        uhd.VisualEncoder.describe(tmp_path)
    with pytest.raises(ValueError, match=r"holds no uhd_encoder.json"):
        uhd.VisualEncoder.describe(tmp_path / "none")


def test_a_described_encoder_may_be_given_weights(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    assigned, here, offloaded = (uhd.VisualEncoder.describe(tmp_path) for _ in range(3))
    assigned.load_state_dict(load_file(weights), assign=True)
    accelerate.load_checkpoint_and_dispatch(here, str(weights), device_map={"": "cpu"})
    accelerate.load_checkpoint_in_model(offloaded, str(weights), device_map={"": "cpu"})
    offloaded = accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    half = accelerate.cpu_offload(tiny_encoder(MLPProjector(32, 24)).half(), execution_device=torch.device("cpu"))
    half.slicing = uhd.strategy("llava-next").for_vision(image_size=56, patch_size=14)
    assert half.packer.newline.dtype == torch.float16
    with torch.no_grad():
        (wanted,) = encoder(IMAGES[:1])
        for found in (assigned, here, offloaded):
            assert torch.equal(found(IMAGES[:1])[0].tokens, wanted.tokens)


def header_of(path):
    with open(path, "rb") as file:
        return file.read(struct.unpack("<Q", file.read(8))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_headers_do_not_grow_with_images(dtype, tmp_path):
    encoder = tiny_encoder().to(dtype)
    with torch.no_grad():
        images = encoder(IMAGES[:2])
    for number in (1, 400):
        path = tmp_path / f"{number}.safetensors"
        uhd.save_tokens(path, images * number, schema=encoder.schema, names=["é"] * 2 * number)
        assert len(header_of(path)) == len(header_of(tmp_path / "1.safetensors")) < 4000
        found = uhd.load_tokens(path)
        assert len(found) == 2 * number
        assert all(torch.equal(found[place].tokens, images[place % 2].tokens) for place in range(2 * number))
        assert found[-1].plan == images[1].plan
    with pytest.raises(ValueError, match="image 1 has tokens of float64 and width 24"):
        uhd.save_tokens(path, [images[0], encoder.double()(IMAGES[:1])[0]], schema=encoder.schema)


def test_older_token_files_are_read(tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        images = encoder(IMAGES)
    told = json.dumps([{"name": "a", "plan": image.plan.to_dict()} for image in images])
    metadata = {"format": "uhd-tokens-1", "images": told, "schema": json.dumps(encoder.schema.to_dict())}
    save_file({"tokens": torch.cat([image.tokens for image in images])}, tmp_path / "t.safetensors", metadata=metadata)
    found = uhd.load_tokens(tmp_path / "t.safetensors")
    assert [image.plan for image in found] == [image.plan for image in images]
    assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(found, images, strict=True))


def test_what_an_interrupt_leaves_of_an_image_is_not_in_the_file(tmp_path, monkeypatch):
    encoder = tiny_encoder()
    with torch.no_grad():
        images = encoder(IMAGES)

    def stop(*_):
        raise KeyboardInterrupt

    with token_file(tmp_path / "t.safetensors", schema=encoder.schema) as file:
        file.add("a", images[0])
        write = file._items.write
        monkeypatch.setattr(file, "_items", type("Broken", (), {"seek": file._items.seek, "write": stop})())
        with pytest.raises(KeyboardInterrupt):
            file.add("b", images[1])
        monkeypatch.setattr(file, "_items", write.__self__)
        file.add("c", images[2])
    found = uhd.load_tokens(tmp_path / "t.safetensors")
    assert [image.plan for image in found] == [images[0].plan, images[2].plan]
    assert torch.equal(found[1].tokens, images[2].tokens)
    with pytest.raises(KeyboardInterrupt), token_file(tmp_path / "no.safetensors", schema=encoder.schema) as file:
        stop(file.add("a", images[0]))
    assert [one.name for one in tmp_path.iterdir()] == ["t.safetensors"]
