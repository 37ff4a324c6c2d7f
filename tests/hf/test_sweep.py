"""Every causal language model that transformers registers, tiny; writes ``docs/compatibility.md``."""

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.hf.shrink import EXTRA, shrink
from tests.hf.sweep import CHECKS, examine, page, sweep

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MUST_WORK = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "deepseek_v4", "nemotron_h")


@pytest.mark.slow
def test_at_least_120_kinds_work(tmp_path):
    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    records = {record["kind"]: record for record in sweep(kinds, tmp_path, say=print)}
    PAGE.write_text(page(list(records.values())), encoding="utf-8")
    working = [kind for kind, record in records.items() if all(record.get(check) == "ok" for check in CHECKS)]
    assert len(working) >= 120
    assert not set(MUST_WORK) - set(working)
    for kind in MUST_WORK:
        assert records[kind]["mode"] == "hook"
    for kind, record in records.items():
        # whatever else a model cannot do, what it is given is never wrong
        assert record.get("text", "ok") == "ok", kind


@pytest.mark.parametrize("kind", ["llama", "rwkv", "cpmant"])
def test_a_kind_that_works_one_with_a_limit_and_one_that_does_not(kind):
    record = examine(kind)
    failed = [check for check in CHECKS if record.get(check) != "ok"]
    assert failed == {"llama": [], "rwkv": ["padding"], "cpmant": list(CHECKS)}[kind]
    text = page([record])
    assert f"`{kind}`" in text
    if kind == "cpmant":
        assert record["mode"] is None
        assert "never called its input embedding" in text


def test_a_wrong_choice_of_injection_would_be_seen(monkeypatch):
    monkeypatch.setattr("uhd.hf.attach.choose_injection", lambda lm: "embeds")
    monkeypatch.setattr("tests.hf.sweep.explain_injection", lambda lm: ("embeds", "by decree"))
    assert "not close" in examine("gemma3n_text")["hand"]


def test_a_config_that_cannot_be_shrunk_says_why(monkeypatch):
    monkeypatch.setitem(EXTRA, "llama", {"vocab_size": 10**7})
    with pytest.raises(ValueError, match="not built: ValueError: 640 M parameters"):
        shrink("llama")
