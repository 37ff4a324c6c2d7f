"""Teach the small model that comes with the package a new question, by TRL's SFTTrainer: pip install '.[trl]'.

python examples/07_trl_sft.py [--steps N] [--lora]

It reads words on small images, but was never asked "last?", for the word at the end. 120 steps take a minute or two on
a CPU core, and then it answers 57 of 64 new images right (5 before; 55 with --lora).
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import uhd
from uhd.nano.task import scene

SEED = 77


def sample(index):
    """A drawn image, the question, and its true answer, as TRL's data sets of prompts and completions have them."""
    drawn = scene(SEED, index)
    return {
        "images": [drawn.image],
        "prompt": [{"role": "user", "content": "last?"}],
        "completion": [{"role": "assistant", "content": drawn.lines[-1][-1]}],
    }


@torch.no_grad()
def right(model, processor, samples):
    """How many samples are answered exactly."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": s["images"][0]}, {"type": "text", "text": "last?"}]}]
        for s in samples
    ]
    batch = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.eval().generate(**batch.to(model.device), max_new_tokens=4, do_sample=False)
    said = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(told == s["completion"][0]["content"] for told, s in zip(said, samples, strict=True))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lora", action="store_true", help="train adapters and the compressor alone")
    args = parser.parse_args()
    model = uhd.load_nano()
    processor = model.processor
    new = [sample(index) for index in range(64)]
    print(f"before: {right(model, processor, new)} of {len(new)} right")
    where = r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj)"
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=where, modules_to_save=["compressor"])
    trainer = SFTTrainer(
        model.train(),
        args=SFTConfig(
            "sft",
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3 if args.lora else 3e-4,
            max_length=None,  # an image is never cut
            logging_steps=max(args.steps // 6, 1),
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list([sample(index) for index in range(64, 64 + 16 * args.steps)]),
        processing_class=processor,
        peft_config=lora if args.lora else None,
    )
    trainer.train()
    trained = trainer.model.merge_and_unload() if args.lora else trainer.model
    print(f"after {args.steps} steps: {right(trained, processor, new)} of {len(new)} right")
    trained.save_pretrained("sft/model")  # with its processor, for uhd.UHDForConditionalGeneration.from_pretrained


if __name__ == "__main__":
    main()
