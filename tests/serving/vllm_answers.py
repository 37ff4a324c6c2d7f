"""Greedy answers of a saved folder by vLLM, for a test: reads pickled prompts, prints the new ids of each as JSON."""

import json
import pathlib
import pickle
import sys

from uhd.serving.vllm import register

if __name__ == "__main__":
    register()
    from vllm import LLM, SamplingParams

    folder, prompts, length = sys.argv[1], pickle.loads(pathlib.Path(sys.argv[2]).read_bytes()), int(sys.argv[3])
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        enable_mm_embeds=True,
        kv_cache_memory_bytes=1 << 28,
        limit_mm_per_prompt={"image": 3, "video": 1},
    )
    told = SamplingParams(temperature=0, max_tokens=length)
    print("ANSWERS", json.dumps([list(found.outputs[0].token_ids) for found in engine.generate(prompts, told)]))
