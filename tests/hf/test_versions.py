"""What differs between releases of transformers is asked for, and what vanishes is told in one sentence."""

import pytest
from transformers import ProcessorMixin, processing_utils

from uhd.hf import versions


def test_every_hook_that_is_needed_is_there():
    for kind in versions.HOOKS:
        versions.check_hooks(getattr(versions, kind))


def test_a_hook_that_vanished_refuses_the_import():
    class ProcessorMixin:
        pass

    with pytest.raises(ImportError, match=r"has no ProcessorMixin\._merge_kwargs, which uhd needs: `uhd doctor`"):
        versions.check_hooks(ProcessorMixin)


def test_marks_of_the_users_words_are_dropped_where_there_are_any(monkeypatch):
    monkeypatch.delattr(processing_utils, "_MARKED_RE", raising=False)
    assert versions.without_marked_text(["a<image>b"]) == ["a<image>b"]


@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_a_cache_goes_in_under_the_name_of_the_language_models_forward(name):
    scope = {}
    exec(f"class LM:\n    def forward(self, input_ids, {name}=None): pass", scope)
    assert versions.cache_name(scope["LM"]()) == name
    given = {name: 1, "labels": None}
    assert versions.take_cache(given) == 1
    assert given == {"labels": None}


def test_defaults_are_read_by_this_release():
    @versions.processor_defaults({"text_kwargs": {"padding": "max_length"}})
    class Processor(ProcessorMixin):
        valid_processor_kwargs = type("Kwargs", (processing_utils.ProcessingKwargs,), {}, total=False)

    class Tokenizer:
        init_kwargs = {}  # noqa: RUF012

    processor = object.__new__(Processor)
    processor.tokenizer = Tokenizer()
    merged = processor._merge_kwargs(Processor.valid_processor_kwargs, tokenizer_init_kwargs={})
    assert merged["text_kwargs"]["padding"] == "max_length"
