"""``uhd doctor`` on folders of tiny language models, and on folders that are none."""

import copy
import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, T5Config, T5ForConditionalGeneration

import uhd
from tests.hf.tiny import attach, encoder, language_model, model, tokenizer
from uhd import cli, environment
from uhd.hf.doctor import COMMON_SIZES_HW, diagnose, table
from uhd.pixels import fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a language model by name, saved once."""
    root = tmp_path_factory.mktemp("lms")

    def of(kind, **changes):
        path = root / "-".join([kind, *map(str, changes.values())])
        if not path.exists():
            language_model(kind, **changes).save_pretrained(path)
            tokenizer().save_pretrained(path)
        return path

    return of


def run(*args, capsys):
    status = cli.main(["doctor", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3n_text", "nemotron_h", "gemma2"])
def test_it_tells_what_attaching_does(kind, folder):
    found, attached = diagnose(folder(kind)), model(kind)
    assert found.model_type == attached.config.text_config.model_type
    assert found.injection == attached.config.injection_mode
    assert {symbol: list(item.ids) for symbol, item in found.separators.items()} == attached.config.separator_ids
    assert (found.image_token, found.image_token_is_new) == (attached.config.image_token, True)
    assert found.max_positions == attached.config.max_positions
    assert found.num_parameters == sum(p.numel() for p in language_model(kind).parameters())
    with torch.no_grad():
        rows = attached.get_input_embeddings()(torch.arange(260)[None])
    assert found.embedding_rms == pytest.approx(rows.pow(2).mean().sqrt().item(), rel=1e-5)
    assert found.problems == ()
    schema = uhd.SpatialSchema.preset("llava-uhd")
    for size_hw, item in zip(COMMON_SIZES_HW, found.tokens, strict=True):
        assert (item.image_hw, item.tokens) == (size_hw, uhd.plan(size_hw, schema.slicing_config()).num_tokens)
        assert item.fits == (found.max_positions is None or item.tokens < found.max_positions)


def test_the_reasons(folder):
    assert "embed_tokens_per_layer" in diagnose(folder("gemma3n_text")).injection_reason
    assert "generate does not take inputs_embeds" in diagnose(folder("nemotron_h")).injection_reason
    found = diagnose(folder("llama"))
    assert "same logits" in found.injection_reason
    assert found.attention in found.attention_supported
    assert "eager" in found.attention_supported
    assert found.kernel in ("triton", "sdpa")
    assert found.kernel_reason


def test_the_table_and_the_json(folder, capsys):
    status, out, _ = run(folder("gpt2"), capsys=capsys)
    assert status == 0
    assert re.search(r"injection +embeds: ids and their embeddings", out)
    assert re.search(r"separator ',' +11 ", out)
    assert re.search(r"positions +192\n", out)
    assert re.search(r"672x1008 +3x2 +454  more than the model's positions", out)
    assert re.search(r"336x336 +not cut +64\n", out)
    status, out, _ = run(folder("gpt2"), "--json", capsys=capsys)
    record = json.loads(out)
    assert status == 0
    assert record["separators"][","]["ids"] == [11]
    assert record["tokens"][2] == {"image_hw": [1008, 672], "grid": [3, 2], "tokens": 454, "fits": False}
    assert record["max_positions"] == 192


def test_another_schema_has_its_own_symbols_and_counts(folder, capsys):
    status, out, _ = run(folder("llama"), "--schema", "minicpm-v-2.6", "--json", capsys=capsys)
    record = json.loads(out)
    assert status == 0
    assert {"<image>", "</image>", "<slice>", "</slice>", "\n", "0", "9"} <= set(record["separators"])
    assert record["image_token"] == "<|image_pad|>"
    assert record["separators"]["<slice>"]["how"] == "pieces"
    status, _, err = run(folder("llama"), "--schema", "nothing", capsys=capsys)
    assert status == 1
    assert "nothing" in err


def test_an_image_token_of_the_tokenizers_own(folder, tmp_path):
    shutil.copytree(folder("llama"), tmp_path / "lm")
    known = copy.deepcopy(tokenizer())
    known.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    known.save_pretrained(tmp_path / "lm")
    found = diagnose(tmp_path / "lm")
    assert (found.image_token, found.image_token_is_new) == ("<image>", False)
    assert "<image> (its own)" in table(found)


def test_a_vocabulary_larger_than_the_embeddings_is_a_problem(folder, capsys):
    status, out, _ = run(folder("llama", vocab_size=120, pad_token_id=3, eos_token_id=4), capsys=capsys)
    assert status == 1
    assert re.search(r"problem: the tokenizer pads with id \d+ .* embeds 120 ids", out)
    assert re.search(r"problem: the separator '\\n' has the ids \(\d+,\), the language model embeds 120", out)


def test_two_symbols_with_one_vector_are_a_problem(folder, capsys, monkeypatch):
    monkeypatch.setattr("uhd.hf.doctor.NUMBERED_IMAGES", 12)
    status, out, _ = run(folder("llama"), "--schema", "minicpm-v-2.6", capsys=capsys)
    assert status == 1
    assert "problem: '1' and '11' both resolve to the mean of the ids" in out


def test_a_model_without_a_way_in_is_a_problem(folder, monkeypatch, capsys):
    path = folder("llama")
    kind = type(language_model("llama"))
    other = torch.nn.Embedding(260, 32)
    monkeypatch.setattr(kind, "get_input_embeddings", lambda self: other)
    status, out, _ = run(path, capsys=capsys)
    assert status == 1
    assert re.search(r"injection +none works: LlamaForCausalLM cannot be given images", out)


class TestRefused:
    def check(self, path, message, capsys):
        status, out, err = run(path, capsys=capsys)
        assert (status, out) == (1, "")
        assert re.search(message, err), err

    def test_no_folder(self, tmp_path, capsys):
        self.check(tmp_path / "nothing", "there is no folder .*nothing", capsys)

    def test_no_config(self, tmp_path, capsys):
        self.check(tmp_path, "holds no config.json", capsys)

    def test_a_config_of_no_model(self, tmp_path, capsys):
        (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
        self.check(tmp_path, "config.json of .* cannot be read: .*unheard-of", capsys)
        (tmp_path / "config.json").write_text("{")
        self.check(tmp_path, "config.json of .* cannot be read", capsys)

    def test_no_tokenizer(self, tmp_path, capsys):
        language_model("llama").save_pretrained(tmp_path)
        self.check(tmp_path, "holds no tokenizer: save it there", capsys)

    def test_a_broken_tokenizer(self, folder, tmp_path, capsys):
        shutil.copytree(folder("llama"), tmp_path / "lm")
        (tmp_path / "lm" / "tokenizer.json").write_text("{}")
        self.check(tmp_path / "lm", "the tokenizer of .* cannot be read", capsys)

    def test_no_weights(self, folder, tmp_path, capsys):
        shutil.copytree(folder("llama"), tmp_path / "lm")
        (tmp_path / "lm" / "model.safetensors").unlink()
        self.check(tmp_path / "lm", "the weights of .* cannot be loaded", capsys)

    def test_an_encoder_decoder(self, tmp_path, capsys):
        config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        self.check(tmp_path, "type 't5', which is no causal language model", capsys)

    def test_an_encoder(self, tmp_path, capsys):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = AutoConfig.for_model("bert", vocab_size=20, **sizes)
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
        self.check(tmp_path, "saved as BertForMaskedLM, which is no causal language model", capsys)

    def test_a_model_that_has_eyes(self, tmp_path, capsys):
        found = attach(encoder())
        found.save_pretrained(tmp_path)
        self.check(tmp_path, "has eyes already", capsys)


def test_sizes_are_width_by_height_in_the_table(folder):
    text = table(diagnose(folder("llama")))
    assert "1240x1754" in text
    assert "1754x1240" not in text


class TestEnvironment:
    """``uhd doctor`` without a folder: what is installed and what will run."""

    def test_it_tells_versions_and_what_runs(self, capsys):
        status, out, err = run(capsys=capsys)
        assert (status, err) == (0, "")
        for name in ("torch", "transformers", "attention", "pixels", "torch.compile"):
            assert f"  {name} " in out
        status, out, _ = run("--json", capsys=capsys)
        packages = {package["name"]: package for package in json.loads(out)["packages"]}
        assert packages["torch"]["installed"] == torch.__version__.partition("+")[0]
        assert packages["transformers"]["oldest"] == environment.oldest_supported()["transformers"]

    @pytest.mark.parametrize(
        ("version", "advice"),
        [("5.2.1", "is older than"), ("99.0", "is newer than"), (None, "not installed: pip install transformers")],
    )
    def test_outside_of_the_range_it_warns(self, version, advice, monkeypatch, capsys):
        real = importlib.metadata.version

        def pretended(name):
            if name != "transformers":
                return real(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", pretended)
        status, out, _ = run(capsys=capsys)
        assert status == 0
        [warning] = [line for line in out.splitlines() if "warning: transformers" in line]
        assert advice in warning

    def test_what_is_broken_or_not_installed_is_told_and_crashes_nothing(self, monkeypatch, capsys):
        def broken(name, *_):
            raise RuntimeError(f"operator {name}::nms does not exist")

        def missing():
            raise ModuleNotFoundError("No module named 'torch'")

        monkeypatch.setattr(environment.importlib, "import_module", broken)
        monkeypatch.setattr(environment, "attention", missing)
        monkeypatch.setattr(environment, "oldest_supported", dict)
        status, out, _ = run(capsys=capsys)
        assert status == 0
        assert "warning: torchvision: installed, but it cannot be imported (RuntimeError: operator" in out
        assert "cannot be told: ModuleNotFoundError: No module named 'torch'" in out
        assert "warning: uhd: not installed" in out

    def test_without_torchvision_and_a_compiler(self, monkeypatch, capsys):
        monkeypatch.setattr(fast, "jpeg_decoder", lambda: None)
        monkeypatch.setattr(environment, "find_spec", lambda name: None)
        monkeypatch.setattr(shutil, "which", lambda name: None)
        out = run(capsys=capsys)[1]
        assert "since torchvision is not installed" in out
        assert "no C++ compiler" in out


def test_the_floor_is_the_one_that_pyproject_declares():
    """Constraints of CI's oldest room, line by line the lower bounds."""
    root = Path(__file__).parents[2]
    declared = re.findall(r'^\s+"([\w.-]+)>=([\w.]+)', (root / "pyproject.toml").read_text(), re.MULTILINE)
    floor = re.findall(r"^([\w.-]+)==([\w.]+)$", (root / ".ci" / "floor.txt").read_text(), re.MULTILINE)
    assert floor == declared
    assert set(environment.NEWEST) <= {name for name, _ in declared}
    oldest = dict(declared)
    words = " ".join((root / "README.md").read_text().split())
    page = (root / "docs" / "versions.md").read_text()
    for name, newest in environment.NEWEST.items():
        assert f"| {name} | {oldest[name]} | {newest} |" in page
    assert f"torch from {oldest['torch']} and transformers from {oldest['transformers']} to the newest" in words
