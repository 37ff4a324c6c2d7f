"""The code of the README and of the pages under docs/ runs as it stands, and so do the examples."""

import copy
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_first_python_block_runs_and_prints_what_it_says(capsys):
    block = python_blocks(README)[0]
    assert 10 <= len([line for line in block.splitlines() if line.strip()]) <= 14
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\)\s+# (.*)", block)
    assert promised
    assert printed == promised


def tiny_folders(folder):
    """A language model with its tokenizer, and a CLIP with its normalisation, each in a folder."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from tests.hf.tiny import language_model, tokenizer

    lm = language_model("llama", max_position_embeddings=1024)
    for part in (lm, tokenizer()):
        part.save_pretrained(folder / "lm")
    clip = CLIPVisionConfig(
        image_size=336, patch_size=14, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    for part in (CLIPVisionModel(clip), CLIPImageProcessorPil()):
        part.save_pretrained(folder / "vision")
    return {"lm_folder": folder / "lm", "vision_folder": folder / "vision"}


def test_eyes_are_attached_in_ten_lines_saved_and_loaded(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    names, (attach, load) = tiny_folders(tmp_path), python_blocks(README)[1:3]
    assert len([line for line in attach.splitlines() if line.strip()]) <= 10
    exec(compile(attach, "README.md", "exec"), names)
    before, batch = names["model"], names["batch"]
    assert names["answer"].shape[1] > batch["input_ids"].shape[1] > 400  # seven views of 64 tokens
    exec(compile(load, "README.md", "exec"), names)
    assert names["model"] is not before
    with torch.no_grad():
        assert torch.equal(names["model"](**batch).logits, before.eval()(**batch).logits)
    again = names["processor"](text="<image>\nWhat does the page say?", images=names["page_image"]())
    assert torch.equal(again["input_ids"], batch["input_ids"])


def test_the_ways_to_be_faster_are_taken():
    import torch

    import uhd
    from uhd.demo import page_image

    torch.manual_seed(0)
    sizes = {"image_size": 56, "patch_size": 14, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    vision = uhd.vision.ViT(uhd.vision.ViTConfig(**sizes, position_grid_hw=(4, 4))).eval().requires_grad_(False)
    latents = uhd.resampler.PerceiverConfig(width=24, vision_width=32, num_heads=2, num_latents=4)
    compressor = uhd.resampler.PerceiverResampler(latents).eval().requires_grad_(False)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = uhd.PixelSettings(mean=mean, std=std)
    plain = uhd.VisualEncoder(copy.deepcopy(vision), compressor, pixels=pixels).eval()
    names = {"uhd": uhd, "mean": mean, "std": std, "vision": vision, "compressor": compressor}
    block = python_blocks((ROOT / "docs/performance.md").read_text())[0]
    exec(compile(block, "docs/performance.md", "exec"), names)
    encoder, picture = names["encoder"].eval(), page_image()
    assert encoder.pixels.backend == "fast"
    assert encoder.max_patches_per_step == 4096
    encoder.compile(backend="none")
    got, wanted = encoder([picture])[0].tokens, plain([picture])[0].tokens
    assert 0 < (got - wanted).norm() < 0.05 * wanted.norm()


def test_the_code_of_the_family_page_gives_a_releases_tokens_and_writes_it_back(tmp_path, monkeypatch):
    import torch

    from tests.pretrained import released
    from tests.tiny import picture
    from uhd.pretrained import FAMILIES

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/family.md").read_text()
    photo = picture(90, 135)
    photo.save("photo.png")
    model, images = released.make("llava_onevision")
    names = {"released_folder": released.save(model, images, tmp_path / "release"), "photo": photo}
    (block,) = python_blocks(page)
    exec(compile(block, "docs/family.md", "exec"), names)
    (theirs,) = released.features(model, images, images([photo], return_tensors="pt"))
    for image in names["images"]:
        torch.testing.assert_close(image.tokens, theirs, atol=1e-4, rtol=1e-4)
    assert [len(item.tokens) for item in names["sample"]] == [17, 17]
    assert (tmp_path / "trained" / "model.safetensors").exists()
    assert names["other"].plan((90, 135)).grid != names["encoder"].plan((90, 135)).grid
    assert set(re.findall(r"^\| [^|]+ \| `([\w.-]+)` \|", page, re.M)) - {"family"} == set(FAMILIES)


def released_folder(kind, name, folder):
    """A small model of transformers with its whole processor, saved as a release is."""
    import transformers

    from tests.pretrained import released

    model, images = released.make(kind)
    tokenizer, token = released.tokenizer(), released.EXTRA["image_token"]
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(token)
    parts, settings = [tokenizer], {"patch_size": 14, "num_additional_image_tokens": 1, "image_token": token}
    if kind == "minicpmv4_6":
        from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

        parts, settings = [MiniCPMV4_6VideoProcessor(), tokenizer], {}
    else:
        settings["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    for part in (model, getattr(transformers, f"{name}Processor")(images, *parts, **settings)):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_the_page_of_those_who_come_from_elsewhere_gives_their_numbers(kind, tmp_path, monkeypatch):
    import torch

    from tests.pretrained import released
    from tests.tiny import picture
    from uhd.hf import UHDForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/coming_from.md").read_text()
    names = {"photo": picture(90, 135), "llava_folder": released_folder(kind, released.LLAVA[kind], tmp_path / kind)}
    first, second, third = python_blocks(page)
    for block in (first, second):
        exec(compile(block, "docs/coming_from.md", "exec"), names)
    assert names["logits"].std() > 0.1
    assert torch.equal(names["batch"]["input_ids"], names["inputs"]["input_ids"])
    saved = UHDForConditionalGeneration.from_pretrained(tmp_path / "llava-here")
    with torch.no_grad():
        torch.testing.assert_close(saved(**names["batch"]).logits, names["their_logits"], atol=1e-4, rtol=1e-4)
    if kind != "llava":
        return
    released.skip_unless_packed(released.make("minicpmv4_6")[0])
    names["minicpm_folder"] = released_folder("minicpmv4_6", "MiniCPMV4_6", tmp_path / "minicpm")
    exec(compile(third, "docs/coming_from.md", "exec"), names)
    assert names["last"].std() > 0.1
    assert names["fewer"]["num_patches"].item() < names["batch"]["num_patches"].item()


def test_every_python_block_of_the_readme_is_run_by_a_test():
    assert len(python_blocks(README)) == 3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # PEFT, of a model from no hub
def test_the_training_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import torch

    from tests.hf.test_training import fresh
    from tests.hf.tiny import IMAGES
    from uhd.hf import UHDForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    answers = ["ab", "c", "def"]
    samples = [{"image": i, "question": "what? ", "answer": a} for i, a in zip(IMAGES, answers, strict=True)]
    model = fresh()
    model.visual.note = "untrained"
    names = {"model": model, "samples": samples}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for block in python_blocks((ROOT / "docs/training.md").read_text()):
        exec(compile(block, "docs/training.md", "exec"), names)
    marked = names["marked"]["labels"]
    assert model.processor.tokenizer.decode(marked[marked != -100]) == answers[0]
    # two epochs, the first in two parts
    assert sorted(item for batch in names["used"] for item in batch) == sorted([*range(3)] * 2)
    labels = names["collate"](samples)["labels"]
    assert (labels != -100).sum(1).tolist() == [len(answer) for answer in answers]
    assert all(not torch.equal(p, start[name]) for name, p in names["model"].named_parameters() if "q_proj" in name)
    assert (tmp_path / "trainer/checkpoint-4/model.safetensors").exists()
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    trained = UHDForConditionalGeneration.from_pretrained(tmp_path / "trained")
    assert trained.visual.note == ""
    with torch.no_grad():
        tokens = names["program"].module()(names["batch"]["pixel_values"])
        assert torch.equal(tokens, trained.visual([samples[0]["image"]])[0].tokens)


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    from uhd import cli, demo

    monkeypatch.chdir(tmp_path)
    tiny_folders(tmp_path)["lm_folder"].rename("LM_DIR")
    demo.untrained_encoder(out_dim=16).save_pretrained("DIR")
    demo.page_image(300, 200).save("photo.jpg")
    pathlib.Path("scans").mkdir()
    demo.page_image(400, 300).save("scans/first.png")
    pathlib.Path("sizes.json").write_text("[[672, 1008], [30, 20]]")
    pathlib.Path("data.jsonl").write_text('{"image": "photo.jpg", "question": "all?", "answer": "A"}')
    block = re.search(r"```\n(uhd plan .*?)```", (ROOT / "docs/command_line.md").read_text(), re.S)[1]
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert {words[0] for words in commands} == {
        *("plan", "layout", "show", "encode", "export", "encode-dataset", "inspect", "compare", "choose", "evaluate"),
        *("explore", "doctor"),
    }
    extra = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
    for words in commands:
        if not extra and ("export" in words or "--onnx" in words):
            continue
        assert cli.main(words) == 0, words
        assert capsys.readouterr().out, words
    assert all(pathlib.Path(name).stat().st_size > 1000 for name in ("cut.png", "tokens.safetensors", "compare.html"))


def test_the_page_of_data_sets_runs(tmp_path, monkeypatch):
    import torch

    from tests.tiny import picture, tiny_encoder

    monkeypatch.chdir(tmp_path)
    pathlib.Path("pictures/cats").mkdir(parents=True)
    picture(90, 60).save("pictures/cats/1.png")
    pathlib.Path("pictures/2.png").write_bytes(b"no image")
    names = {"encoder": tiny_encoder()}
    (block,) = python_blocks((ROOT / "docs/datasets.md").read_text())
    exec(compile(block, "docs/datasets.md", "exec"), names)
    with torch.no_grad():
        (alone,) = names["encoder"]([picture(90, 60)])
    torch.testing.assert_close(names["image"].tokens, alone.tokens)
    assert names["image"].plan == alone.plan
    assert [row[:2] for row in names["refused"]] == [("2.png", "decode")]


def test_linked_files_and_headings_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            aim = page.parent / target if target else page
            assert aim.exists(), (page.name, target)
            if heading:
                titles = re.findall(r"^#+ (.*)", aim.read_text(), re.M)
                assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], heading


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+)", README))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_readme_on_pypi_has_no_link_that_leads_nowhere():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = README
    for rule in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not re.search(r"\]\((?!https://)", text)
    assert "](https://arxiv.org/" in text
    assert python_blocks(text) == python_blocks(README)
    for name in re.findall(r"\]\((?!https?:)([^)#]+)", README.partition("docs/demo.png")[2]):
        assert f"`{name}`" in text


def test_linked_tests_exist():
    """Every difference from paper and release names the test that shows it."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/family.md").read_text())
    assert len(named) >= 8
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)


ARGUMENTS = {
    "04_train_the_resampler": ["--steps", "40"],
    "05_pack_and_train": ["--steps", "20"],
    "06_many_ranks": ["--steps", "8"],
}
"""Fewer than their own."""


def run_example(path, folder, *arguments):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "ranks" in path.stem else []
    found = subprocess.run(
        [sys.executable, "-W", "error", *ranks, path, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if "trl" not in path.stem]
"""TRL's are run by tests/hf/test_trl.py."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path):
    said = run_example(path, tmp_path, *ARGUMENTS.get(path.stem, []))
    assert len(said.splitlines()) > 3
    if path.stem in ARGUMENTS:
        losses = [float(found) for found in re.findall(r"steps: (\d+\.\d+)", said)]
        assert losses[-1] < losses[0]
        assert "resumed" in said or path.stem == "06_many_ranks"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--trainer"], ["--stage", "tune"], ["--stage", "tune_all"]])
def test_the_training_example_makes_the_model_see(arguments, tmp_path):
    said = run_example(ROOT / "examples/04_train_the_resampler.py", tmp_path, *arguments)
    before, after = map(int, re.findall(r"(\d+) of 48 words right", said))
    assert before < 24 < 30 <= after  # guessing is right once in three
