"""The plug-in of vLLM without vLLM: what an installed package says of it, and what a saved model says for it."""

import json
import pathlib
import re
import subprocess
import sys

from tests.hf.tiny import attach, encoder

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_the_entry_point_is_a_function_and_imports_no_vllm():
    found = re.search(r'"vllm.general_plugins"\]\nuhd = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text())
    code = f"import sys; from {found[1]} import {found[2]}; print(callable({found[2]}), 'vllm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.split() == ["True", "False"], out.stderr


def test_the_language_model_s_class_is_saved(tmp_path):
    model = attach(encoder())
    assert model.config.text_config.architectures is None
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["architectures"] == ["LlamaForCausalLM"]
