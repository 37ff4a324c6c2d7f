"""Give a causal language model eyes: visual tokens and its own "," and "\\n" go into its input embeddings.

python examples/03_answer_with_any_lm.py [IMAGE] [--lm FOLDER] [--question TEXT]

Without --lm a tiny Llama with random weights answers, so the text is noise: it shows the wiring. The resampler is
untrained either way.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uhd.demo import page_image, untrained_encoder
from uhd.merge import assemble, merge_samples, separator_embeddings
from uhd.schema import resolve_schema


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Two random layers over bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    return LlamaForCausalLM(config).eval(), fast


parser = argparse.ArgumentParser()
parser.add_argument("image", nargs="?", default=None)
parser.add_argument("--lm", help="folder of a causal language model in the transformers format")
parser.add_argument("--question", default="\nWhat does the page say?\n")
args = parser.parse_args()

if args.lm:
    tokenizer, lm = AutoTokenizer.from_pretrained(args.lm), AutoModelForCausalLM.from_pretrained(args.lm)
else:
    lm, tokenizer = tiny_llama()
lm.eval()
embed = lm.get_input_embeddings()
encoder = untrained_encoder(out_dim=embed(torch.zeros(1, 1, dtype=torch.long)).shape[-1])

with torch.inference_mode():
    [image] = encoder([args.image or page_image()])
    ids = resolve_schema(tokenizer, encoder.schema)
    rows = assemble(image.tokens.to(lm.dtype), image.layout, separator_embeddings(embed, ids))
    # -1 is no token: it marks where the image goes
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = [*start, -1, *tokenizer.encode(args.question, add_special_tokens=False)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = merge_samples([prompt], [[rows]], embed=embed, image_token_id=-1, pad_token_id=pad, padding_side="left")
    answer = lm.generate(
        inputs_embeds=batch.inputs_embeds,
        attention_mask=batch.attention_mask,
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=pad,
    )

print(image.plan)
print("separators:", {symbol: found.ids for symbol, found in ids.items()})
print(f"sequence: {tuple(batch.inputs_embeds.shape)}, of which {int(batch.visual_mask.sum())} positions are the image")
print("answer:", repr(tokenizer.decode(answer[0], skip_special_tokens=True)))
