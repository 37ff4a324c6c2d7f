"""Models of transformers, saved and loaded: the same pixels give the same tokens, embeddings, logits and answers."""

import numpy as np
import pytest
import torch

import uhd
from tests.pretrained import released
from tests.pretrained.released import SIZES, assert_equal_files, assert_same
from tests.tiny import noise, picture
from uhd.encoded import num_rows
from uhd.hf import UHDForConditionalGeneration
from uhd.pixels.normalize import normalize
from uhd.vision import CompressedViT, unpatchify

CASES = {
    "llava": {},
    "llava, first layer, whole last": {"vision_feature_layer": 1},
    "llava, no bias, tanh": {"multimodal_projector_bias": False, "projector_hidden_act": "gelu_pytorch_tanh"},
    "llava_next": {},
    "llava_onevision": {},
    "llava_onevision, layer before the last": {"vision_feature_layer": -2},
    "minicpmv4_6": {},
    "minicpmv4_6, 4x": {"downsample_mode": "4x"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, processor, folder) of a case, made once."""
    found = {}

    def get(case):
        if case not in found:
            model, images = released.make(case.split(",")[0], **CASES[case])
            found[case] = model, images, released.save(model, images, tmp_path_factory.mktemp("released"))
        return found[case]

    return get


def assert_near(ours, theirs):
    torch.testing.assert_close(list(ours), list(theirs), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def tokens(encoder, *inputs, **how):
    return [item.tokens for item in encoder(*inputs, **how)]


@pytest.mark.parametrize("case", CASES)
def test_the_same_pixels_give_the_same_tokens(saved, case):
    """A batch of eight aspect ratios, and every image alone; some single entries of tokens differ between images."""
    released.skip_unless_sized_for(CASES[case].get("downsample_mode"))
    model, images, folder = saved(case)
    encoder = uhd.pretrained.load(folder)
    pictures = [picture(*size) for size in SIZES]
    pixels = images(pictures, return_tensors="pt")
    theirs = released.features(model, images, pixels)
    plans = [encoder.plan(size) for size in SIZES]
    with torch.no_grad():
        batch = encoder(released.our_views(pixels, plans, encoder.vision.patch_size))
    assert_near([item.tokens for item in batch], theirs)
    assert_near(tokens(encoder, pictures), theirs)  # its own pixels are those of the processor on Pillow
    assert_near([tokens(encoder, [image])[0] for image in pictures], theirs)
    assert all(item.layout.num_visual_tokens == len(item.tokens) for item in batch)
    assert torch.equal(torch.stack([part.std() for part in theirs]) > 0.1, torch.ones(len(SIZES), dtype=torch.bool))


@pytest.mark.parametrize("case", ["llava", "llava_next", "llava_onevision", "minicpmv4_6"])
def test_pixels_from_files(saved, case, tmp_path):
    """Equal to the processor on Pillow; to the one on torchvision up to its rounding, below 1 level on average."""
    _, images, folder = saved(case)
    encoder = uhd.pretrained.load(folder)
    module, name = type(images).__module__.split(".")[2], type(images).__name__.removesuffix("ImageProcessorPil")
    settings = {key: value for key, value in images.to_dict().items() if key != "image_processor_type"}
    fast = released.processor(module, name, pillow=False, **settings)
    level = min(encoder.pixels.std)
    for size in SIZES:
        picture(*size).save(tmp_path / "picture.png")
        batch = encoder.prepare([tmp_path / "picture.png"])
        ours = normalize(batch.patches, encoder.pixels)
        for theirs, bound in ((images, 1e-6), (fast, 1 / 255 / level)):
            pixels = theirs([picture(*size)], return_tensors="pt")
            found = released.our_views(pixels, batch.plans, encoder.vision.patch_size)
            off = (found.patches - ours).abs()
            assert off.mean() < bound, (size, theirs)
        assert ours.std() > 0.2


@pytest.mark.parametrize("case", ["llava", "llava_next", "llava_onevision", "minicpmv4_6"])
@pytest.mark.parametrize("resample", [1, 2])
def test_another_filter(saved, case, resample, tmp_path):
    model, images, _ = saved(case)
    images = type(images)(**{**images.to_dict(), "resample": resample})
    encoder = uhd.pretrained.load(released.save(model, images, tmp_path))
    pictures = [picture(*size) for size in SIZES[:3]]
    assert_near(tokens(encoder, pictures), released.features(model, images, images(pictures, return_tensors="pt")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision", "minicpmv4_6"])
def test_the_released_geometry(kind, tmp_path):
    """Views of 336, 384 and 448 px, the released grids and bounds; sizes up to 2000 px and aspects up to 8."""
    model, images = released.make_full(kind)
    encoder = uhd.pretrained.load(released.save(model, images, tmp_path))
    rng = np.random.default_rng(0)
    sizes = [(336, 336), (1008, 672), (384, 768), (2000, 2000)]
    for side, aspect in zip(rng.integers(60, 2000, 12).tolist(), np.exp(rng.uniform(-2, 2, 12)), strict=True):
        shorter = max(int(side / max(aspect, 1 / aspect)), 1)
        sizes.append((side, shorter) if aspect > 1 else (shorter, side))
    for size in sizes:
        pixels, ours = images([picture(*size)], return_tensors="pt"), tokens(encoder, [picture(*size)])
        assert_near(ours, released.features(model, images, pixels))
        assert len(ours[0]) == num_rows(encoder.plan(size))


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("size", [{"height": 56, "width": 56}, {"shortest_edge": 56}])
def test_every_way_of_llava_to_a_square(do_pad, size, saved, tmp_path):
    model, _, _ = saved("llava")
    crop = "shortest_edge" in size
    images = released.processor("llava", "Llava", size=size, crop_size=56, do_center_crop=crop, do_pad=do_pad)
    encoder = uhd.pretrained.load(released.save(model, images, tmp_path))
    pictures = [picture(*size) for size in SIZES]
    theirs = released.features(model, images, images(pictures, return_tensors="pt"))
    assert_near(tokens(encoder, pictures), theirs)


@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_minicpm_takes_another_mode_than_its_config(saved, mode, tmp_path):
    """4x leaves the compressor out; its weights stay in the files."""
    released.skip_unless_sized_for(mode)
    model, images, folder = saved("minicpmv4_6" if mode == "4x" else "minicpmv4_6, 4x")
    encoder = uhd.pretrained.load(folder, downsample=mode)
    assert isinstance(encoder.vision, CompressedViT) == (mode == "16x")
    pictures = [picture(*size) for size in SIZES]
    pixels = images(pictures, return_tensors="pt", downsample_mode=mode)
    assert_near(tokens(encoder, pictures), released.features(model, images, pixels, downsample_mode=mode))
    uhd.pretrained.save(encoder, tmp_path, like=folder)
    assert_same(encoder, uhd.pretrained.load(tmp_path, downsample=mode))
    assert_equal_files(folder, tmp_path)


def test_two_rounds_of_the_merger(tmp_path):
    """Twice as many patches per side: only the model knows this setting, its processor does not."""
    model, images = released.make("minicpmv4_6", merger_times=2, downsample_mode="4x")
    encoder = uhd.pretrained.load(released.save(model, images, tmp_path))
    assert encoder.slicing.merge == 4
    pixels = images([picture(60, 120)], return_tensors="pt", downsample_mode="16x")
    assert_near(tokens(encoder, [picture(60, 120)]), released.features(model, images, pixels))


@pytest.mark.parametrize("mean", [[0.5] * 3, [0.5, 0.4, 0.3]])
def test_onevision_several_images(saved, mean, tmp_path):
    """Of one sample: padded with the mean's colour, one view and one newline each; a sample of one is cut as ever."""
    model, _, _ = saved("llava_onevision")
    images = released.make("llava_onevision")[1]
    images.image_mean = mean
    encoder = uhd.pretrained.load(released.save(model, images, tmp_path))
    sample, single = [picture(*size) for size in SIZES[2:6]], [picture(*SIZES[6])]
    pixels = images([sample, single], return_tensors="pt")
    theirs = released.features(model, images, pixels, batch_num_images=torch.tensor([4, 1]))
    ours = tokens(encoder, sample, multi_image=True) + tokens(encoder, single, multi_image=True)
    assert_near(ours, theirs)
    assert [len(part) for part in ours[:4]] == [17] * 4


@pytest.mark.parametrize("size", [(56, 56), (60, 120), (171, 57)])
def test_onevision_videos(saved, size):
    """Frames pooled bilinearly, 4 x 4 features to 2 x 2, and one newline; two videos in a batch."""
    model, _, folder = saved("llava_onevision")
    encoder = uhd.pretrained.load(folder)
    videos = [[noise(*size, step) for step in part] for part in ((0, 1, 2), (3, 4, 5))]
    flat = [frame for video in videos for frame in video]
    plans = [encoder.plan_video(size, 1).plans[0]] * len(flat)
    batch = uhd.SliceBatch.from_images(flat, plans, settings=encoder.pixels, patch_size=14).normalized(encoder.pixels)
    views = unpatched(batch)
    with torch.no_grad():
        theirs = model.model.get_video_features(views.unflatten(0, (2, 3))).pooler_output
        ours = encoder.encode_videos(videos)
    assert all(len(video.tokens) == 3 * 4 + 1 for video in ours)
    # some releases add the newline behind that function
    assert_near([video.tokens[:-1] for video in ours], [video[: 3 * 4] for video in theirs])
    assert_near([video.tokens[-1] for video in ours], [model.model.image_newline] * 2)


@pytest.mark.parametrize("frames, slices", [("rule", 9), ("video", 1)])
def test_minicpm_videos(saved, frames, slices):
    """Frames cut as images are, or whole; transformers has only torchvision for them, so up to its rounding."""
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

    model, images, folder = saved("minicpmv4_6")
    settings = {name: getattr(images, name) for name in ("scale_resolution", "patch_size", "downsample_mode")}
    processor = MiniCPMV4_6VideoProcessor(**settings, max_slice_nums=slices, do_sample_frames=False)
    video = [np.kron(noise(20, 40, step), np.ones((3, 3, 1), np.uint8)) for step in range(3)]
    pixels = processor([np.stack(video)], return_tensors="pt")
    with torch.no_grad():
        theirs = released.view_by_view(
            model.model.get_video_features, pixels.pixel_values_videos, pixels.target_sizes_videos
        )
        (ours,) = uhd.pretrained.load(folder).encode_videos([video], frames=frames)
    assert len(theirs) == (9 if slices == 9 else 3)
    torch.testing.assert_close(ours.tokens, torch.cat(theirs), atol=5e-3, rtol=5e-3)


def unpatched(batch):
    """(V, 3, 56, 56)."""
    return unpatchify(batch.patches, (4, 4), 14)


# --- with the language model


@torch.no_grad()
def run(model, trunk, inputs):
    """(what the language model inside is given as inputs_embeds, logits)."""
    found = []
    handle = trunk.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits = model(**inputs).logits
    handle.remove()
    return found[0], logits


def assert_equal_runs(ours, batch, model, other):
    mine = run(ours, ours.language_model.model, batch)
    assert_near(mine, run(model, model.model.language_model, other))
    assert mine[1].std() > 0.1


def ours_around(model, folder):
    encoder = uhd.pretrained.load(folder)
    lm = released.language_model(model)
    return UHDForConditionalGeneration.from_vision_and_lm(encoder, lm, released.tokenizer(), match_scale=False)


def their_batch(model, images, ours, texts, pictures):
    """Input of theirs: for LLaVA our ids, which are plain placeholders; for MiniCPM those of its own processor."""
    batch = ours.processor(text=texts, images=pictures)
    mask = {"attention_mask": batch["attention_mask"]}
    if "MiniCPM" not in type(model).__name__:
        model.config.image_token_id = ours.config.image_token_id
        pixels = images(pictures, return_tensors="pt")
        names = [name for name in ("pixel_values", "image_sizes") if name in pixels]
        return batch, {"input_ids": batch["input_ids"], **mask, **{name: pixels[name] for name in names}}
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

    moving = MiniCPMV4_6VideoProcessor(downsample_mode=images.downsample_mode)
    processor = MiniCPMV4_6Processor(images, moving, released.tokenizer())
    return batch, dict(processor(text=texts, images=pictures))


@pytest.mark.parametrize("case", ["llava", "llava_next", "llava_onevision", "minicpmv4_6", "minicpmv4_6, 4x"])
def test_embeddings_logits_and_greedy_tokens(saved, case):
    released.skip_unless_sized_for(CASES[case].get("downsample_mode"))
    model, images, folder = saved(case)
    if case == "minicpmv4_6":
        released.skip_unless_packed(model)
    ours = ours_around(model, folder)
    token = ours.config.image_token
    pictures = [picture(*size) for size in (SIZES[0], SIZES[2], SIZES[5])]
    texts = [f"ab{token}c", f"x{token}y\n{token}?"] if case != "llava_onevision" else [f"ab{token}c", f"x{token}y"]
    pictures = pictures[: sum(text.count(token) for text in texts)]
    for text, some in ((texts[0], pictures[:1]), (texts[1], pictures[1:])):
        batch, other = their_batch(model, images, ours, [text], some)
        assert_equal_runs(ours, batch, model, other)
    batch, other = their_batch(model, images, ours, texts, pictures)
    length = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **settings)[:, length:], model.generate(**other, **settings)[:, length:])


def test_onevision_several_images_and_a_video_in_one_prompt(saved):
    """The embeddings and the logits of a sample with two images, which are padded, and a video."""
    model, images, folder = saved("llava_onevision")
    ours = ours_around(model, folder)
    model.config.image_token_id, model.config.video_token_id = ours.config.image_token_id, ours.config.video_token_id
    pictures, frames = [picture(*size) for size in SIZES[2:4]], [noise(60, 120, step) for step in range(3)]
    text = f"a{ours.config.image_token}b{ours.config.image_token}c{ours.config.video_token}d"
    batch = ours.processor(text=[text], images=pictures, videos=[frames], images_kwargs={"multi_image": True})
    pixels = images([pictures], return_tensors="pt")
    plans = [uhd.pretrained.load(folder).plan_video((60, 120), 1).plans[0]] * 3
    settings = ours.visual.pixels
    moving = uhd.SliceBatch.from_images(frames, plans, settings=settings, patch_size=14).normalized(settings)
    other = {name: pixels[name] for name in ("pixel_values", "image_sizes")} | {"input_ids": batch["input_ids"]}
    other |= {"batch_num_images": torch.tensor([2]), "pixel_values_videos": unpatched(moving)[None]}
    assert_equal_runs(ours, batch, model, other)
