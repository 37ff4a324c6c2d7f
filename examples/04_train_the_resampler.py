"""Train the resampler to make a frozen language model see, on pictures drawn here; save half-way and resume.

python examples/04_train_the_resampler.py [--stage align|tune|tune_all] [--steps N] [--trainer]

A tiny Llama first learns, from text alone, to find the colour and the shape among words. Then it gets eyes with random
weights, and a stage of uhd.hf.training says what trains. With three colours and three shapes of picture, the loss of
an answer cannot fall below log(9) = 2.20 without seeing.
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import uhd
import uhd.hf
from uhd.hf import training
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

COLORS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200)}
SHAPES = {"tall": (168, 84), "wide": (84, 224), "square": (112, 112)}  # (height, width) px
WIDTH, BATCH, PICTURES = 64, 16, 192
ANSWER = 3  # tokens: colour, shape, end


def draw(rng: random.Random) -> tuple[Image.Image, str]:
    """A coloured box on grey, and its answer."""
    color, shape = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
    height, width = (side + rng.randint(-8, 8) for side in SHAPES[shape])
    picture = Image.new("RGB", (width, height), (rng.randint(90, 210),) * 3)
    left, top = rng.randint(0, width // 4), rng.randint(0, height // 4)
    ImageDraw.Draw(picture).rectangle((left, top, left + width * 3 // 4, top + height * 3 // 4), fill=COLORS[color])
    return picture, f"{color} {shape} </s>"


def collate(samples, processor):
    """Samples -> a batch. Padding is on the left, so every row ends with its answer, and only that is a target."""
    pictures, answers = zip(*samples, strict=True)
    batch = processor(text=[f"<image> it is {answer}" for answer in answers], images=[[p] for p in pictures])
    labels = batch["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    batch["labels"] = labels
    return batch


def language_model():
    """A tokenizer of words, and a Llama that has learned to name the one colour and the one shape it was told."""
    words = ["<pad>", "</s>", "it", "is", ",", "\n", *COLORS, *SHAPES]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    optimizer, rng = torch.optim.AdamW(lm.parameters(), lr=3e-3), random.Random(0)
    for _ in range(150):
        lines = []
        for _ in range(32):
            color, shape = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
            given = rng.sample([color, shape, *[rng.choice([",", "\n", "<pad>"]) for _ in range(8)]], 10)
            lines.append(f"{' '.join(given)} it is {color} {shape} </s>")
        ids = tokenizer(lines, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, :-ANSWER] = -100
        loss = lm(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm, tokenizer


def model_with_eyes():
    """An untrained ViT and resampler in front of that language model."""
    lm, tokenizer = language_model()
    torch.manual_seed(1)
    vision = ViT(ViTConfig(image_size=112, patch_size=14, width=64, depth=2, heads=2, mlp_width=128))
    resampler = PerceiverResampler(PerceiverConfig(width=WIDTH, vision_width=64, num_heads=2, num_latents=4))
    pixels = PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    encoder = uhd.VisualEncoder(vision, resampler, pixels=pixels, note="untrained")
    return uhd.hf.UHDForConditionalGeneration.from_vision_and_lm(encoder, lm, tokenizer)


def choose(model, stage):
    """The optimizer of a stage. Its own rates are for real models and long runs; this one is for a toy."""
    rate = {"lr": 5e-3, "vision_lr": 1e-3} if stage == "tune_all" else {"lr": 5e-3}
    groups = getattr(training, stage)(model, **rate)
    print(f"{stage}:", ", ".join(f"{len(g['params'])} tensors of the {g['name']} at {g['lr']}" for g in groups))
    return torch.optim.AdamW(groups, weight_decay=0.0)


def loop(model, samples, stage, folder, steps):
    """To `steps` optimizer steps in all, from the checkpoint in `folder` where there is one, to a checkpoint there."""
    start, state = 0, None
    if (folder / "optimizer.pt").exists():
        model = AutoModelForImageTextToText.from_pretrained(folder)
        state = torch.load(folder / "optimizer.pt")
        start = state["step"]
        print(f"resumed at step {start}")
    optimizer = choose(model, stage)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    batches = [collate(samples[i : i + BATCH], model.processor) for i in range(0, len(samples), BATCH)]
    model.train()
    losses = []
    for step in range(start, steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * ANSWER)
        if (step + 1) % 20 == 0:
            recent = losses[-20:]
            print(
                f"step {step + 1:4d}  loss of an answer, mean of {len(recent)} steps: {sum(recent) / len(recent):.2f}"
            )
    model.save_pretrained(folder)
    torch.save({"step": steps, "optimizer": optimizer.state_dict()}, folder / "optimizer.pt")
    return model


def trainer(model, samples, stage, folder, steps):
    """The same by transformers' Trainer, which needs accelerate."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        logging_steps=20,
        save_steps=50,
        remove_unused_columns=False,  # a picture and an answer are arguments of the processor, not of the model
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    run = Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=lambda chosen: collate(chosen, model.processor),
        processing_class=model.processor,
        optimizers=(choose(model, stage), None),
    )
    run.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return model


def words_right(model, samples):
    """How many of the two words a picture are answered right."""
    right = 0
    for picture, answer in samples:
        asked = model.processor(text="<image> it is ", images=picture)
        ids = model.generate(**asked, max_new_tokens=2, do_sample=False)[0, -2:]
        said = model.processor.tokenizer.convert_ids_to_tokens(ids)
        right += sum(a == b for a, b in zip(said, answer.split(), strict=False))
    return right


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", choices=["align", "tune", "tune_all"], default="align")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trainer", action="store_true", help="use transformers' Trainer")
    args = parser.parse_args()
    train = trainer if args.trainer else loop
    model, rng = model_with_eyes(), random.Random(0)
    samples, new = ([draw(rng) for _ in range(count)] for count in (PICTURES, 24))
    print(f"untrained eyes: {words_right(model, new)} of {2 * len(new)} words right")
    with tempfile.TemporaryDirectory() as folder:
        model = train(model, samples, args.stage, Path(folder), args.steps // 2)
        model = train(model, samples, args.stage, Path(folder), args.steps)  # goes on from the checkpoint
        model.visual.note = ""  # it said "untrained", which is no longer true
        model.eval().save_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        print(f"trained, saved and loaded: {words_right(model, new)} of {2 * len(new)} words right on new pictures")


if __name__ == "__main__":
    main()
