"""A saved folder in a process that has not imported uhd."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor

import uhd.hf
from tests.hf.tiny import IMAGES, attach, encoder
from uhd.hf.bare import MODULE, SOURCE

SCRIPT = """
import sys
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor
from transformers import pipeline
folder = sys.argv[1]
order = {"images": AutoImageProcessor, "videos": AutoVideoProcessor, "processor": AutoProcessor,
         "model": AutoModelForImageTextToText, "config": AutoConfig}
assert "uhd" not in sys.modules
got = {name: auto.from_pretrained(folder, trust_remote_code=True) for name, auto in order.items()}
import uhd.hf
for name, kind in {"config": "UHDConfig", "model": "UHDForConditionalGeneration", "processor": "UHDProcessor",
                   "images": "UHDImageProcessor", "videos": "UHDVideoProcessor"}.items():
    assert type(got[name]) is getattr(uhd.hf, kind), name
from transformers.models.auto import modeling_auto
for table in ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
    assert getattr(modeling_auto, table)["uhd"] == "UHDForConditionalGeneration"  # where transformers serve looks
ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
image = Image.new("RGB", (40, 60), "teal")
print(ask(images=image, text="a<image>b", generate_kwargs={"max_new_tokens": 2, "do_sample": False}))
got["model"].save_pretrained(sys.argv[2])
"""
FILES = {
    f"{MODULE}.py",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "eyes"
    attach(encoder()).save_pretrained(folder)
    return folder


def run(code, *args, cache, **environment):
    settings = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=settings)


def test_everything_loads_in_a_bare_process_and_is_the_package_s_own(folder, tmp_path):
    """Saved again, the folder holds the same files: no code of the library is copied into it."""
    out = run(SCRIPT, folder, tmp_path / "again", cache=tmp_path)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "generated_text" in out.stdout
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()} == FILES
    assert (tmp_path / "again" / "processor_config.json").read_text() == (folder / "processor_config.json").read_text()


def test_without_uhd_the_message_says_how_to_install_it(folder, tmp_path):
    """A process that cannot import the package: its name on the index is not the module's."""
    code = (
        "import sys; sys.modules['uhd'] = None\n"
        "from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    out = run(code, folder, cache=tmp_path)
    assert out.returncode == 1
    assert "ImportError: this model needs the package llava-uhd" in out.stderr
    assert out.stderr.rstrip().endswith("pip install llava-uhd")


def test_a_processor_alone(tmp_path):
    """Each processor's folder names its class, and what is loaded from the package needs no trust."""
    processor = attach(encoder()).processor
    parts = {
        "AutoProcessor": (AutoProcessor, processor),
        "AutoImageProcessor": (AutoImageProcessor, processor.image_processor),
        "AutoVideoProcessor": (AutoVideoProcessor, processor.video_processor),
    }
    for name, (auto, part) in parts.items():
        part.save_pretrained(tmp_path / name)
        assert (tmp_path / name / f"{MODULE}.py").read_text() == SOURCE
        assert name in next((tmp_path / name).glob("*processor_config.json")).read_text()
        for trust in (None, False, True):
            found = auto.from_pretrained(tmp_path / name, trust_remote_code=trust)
            assert type(found) is type(part)
            assert json.loads(json.dumps(found.to_dict())) == json.loads(json.dumps(part.to_dict()))


def test_a_folder_without_the_names_still_loads(folder, tmp_path):
    """As it was written before they were."""
    model = uhd.hf.UHDForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    (tmp_path / f"{MODULE}.py").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("auto_map")
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = model.processor(text="<image>", images=IMAGES[0])
    assert again(**batch).logits.equal(model(**batch).logits)
