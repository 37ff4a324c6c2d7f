"""Models whose language model embeds the image and the video token too, for contracts over embeddings."""

import functools

from tests.hf.tiny import EMBEDS, IMAGES, TEXTS, encoder, language_model, tokenizer
from uhd.hf import UHDForConditionalGeneration, UHDModel
from uhd.hf.attach import with_image_token, with_video_token

EMBEDS.setdefault("qwen2", {"sliding_window": None})
KINDS = ("llama", "qwen2", "gpt2", "gemma4_text")  # the last one by hook
CLASSES = (UHDModel, UHDForConditionalGeneration)
PLACES = [len(tokenizer()), len(tokenizer()) + 1]
"""Ids of the image and the video token, which stand for an image only in a prompt: no answer here may hold one."""

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": PLACES}


def fresh(kind, **how):
    """A new model; its tokenizer has both tokens, and its language model an embedding for each."""
    schema = encoder().schema.separators
    known, image = with_image_token(tokenizer(), None, schema)
    known, _ = with_video_token(known, None, (*schema, image))
    lm = language_model(kind, vocab_size=len(known), **how)
    return UHDForConditionalGeneration.from_vision_and_lm(encoder(), lm, known).eval()


@functools.cache
def shared(kind):
    """For tests that do not change it."""
    return fresh(kind)


@functools.cache
def _batch(kind):
    return shared(kind).processor(text=TEXTS, images=IMAGES)


def batch_of(kind):
    """Three samples, with one image, none and two."""
    return dict(_batch(kind))


def visual(batch):
    return {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
