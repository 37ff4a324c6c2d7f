"""A saved model in lmms-eval's own runner: its tasks, its prompts, its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from uhd.evaluation.judging import OWN, encoder_with
from uhd.nano.answer import batches, load_model

Message = dict[str, Any]
ANSWER = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
"""Settings of ``generate`` that a task may give; its ``until`` and ``max_new_tokens`` are heeded too."""


class UHDChat(lmms):
    """``--model uhd``, for tasks that ask and read what is generated.

    Args:
        pretrained: A folder that ``save_pretrained`` wrote, or the name of a shipped one, ``nano`` or ``nano-plus``
            (whose images are shown as they are: nothing is repainted).
        strategy: A slicing rule in place of the model's own.
        batch_size: Samples that are answered together; those of one batch have the same settings.
        device, dtype: Where the model runs, and in what; ``None`` leaves them.
        max_new_tokens: Most that any answer may have, whatever a task says.
        num_frames: Of a video's file that are read, evenly.
        videos: ``"video"``: as the model plans videos; ``"images"``: each frame is an image.
        max_batch_size: Not used; the runner passes it.

    Raises:
        ValueError: No such model or rule; a setting is wrong; audio, which no model here hears.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        strategy: str = OWN,
        batch_size: int | str | None = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 1024,
        num_frames: int = 8,
        videos: str = "video",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if videos not in ("video", "images"):
            raise ValueError(f"videos is 'video' or 'images', got {videos!r}")
        self.batch_size, self.max_new_tokens, self.num_frames = int(batch_size or 1), max_new_tokens, num_frames
        self.videos, self.model = videos, load_model(pretrained)
        self.model.visual = encoder_with(self.model, strategy)
        self.model.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
        self.processor = self.model.processor

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, greedy unless a task says otherwise, cut off before a task's ``until``."""
        asked = [self._asked(request.args) for request in requests]
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(number)
        found: dict[int, str] = {}
        with tqdm(total=len(asked), desc="answers", disable=self.rank != 0) as bar:
            for numbers in groups.values():
                for part in batches(numbers, self.batch_size):
                    texts = self._answers([asked[number][0] for number in part], asked[part[0]][1])
                    found.update(zip(part, texts, strict=True))
                    bar.update(len(part))
        return [found[number] for number in range(len(asked))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The negative log-likelihood of each continuation, and whether it is what greedy generation would write.

        Negative, since this runner takes the choice with the least: its models give losses. It is the sum over the
        continuation's tokens, those after what prompt and prompt with continuation have in common. The pair is the
        ``text`` of a result, as the runner of 0.7.3 takes nothing else: of a bare pair it makes a string.
        """
        found = []
        for request in tqdm(requests, desc="continuations", disable=self.rank != 0):
            context, continuation, *place = request.args
            doc, to_visual = None, None
            if place:
                to_visual, doc_id, task, split = place
                doc = self.task_dict[task][split][doc_id]
            continuation = continuation if isinstance(continuation, str) else continuation(doc)
            visuals = [] if to_visual is None else to_visual(doc) or []
            found.append(GenerationResult(self._likelihood(_said(visuals, context), continuation)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("uhd: tasks of several rounds are not supported")

    def _asked(self, arguments: tuple[Any, ...]) -> tuple[list[Message], dict[str, Any]]:
        """A request's messages and settings."""
        _, to_messages, settings, doc_id, task, split = arguments
        messages = to_messages(self.task_dict[task][split][doc_id])
        return ChatMessages(messages=messages).to_hf_messages(), settings

    def _inputs(self, chats: Sequence[list[Message]], continuations: Sequence[str] | None = None) -> Any:
        """Prompts of conversations, and what each goes on with, for the model."""
        images: list[list[Any]] = [[] for _ in chats]
        videos: list[list[Any]] = [[] for _ in chats]
        texts = []
        for number, chat in enumerate(chats):
            shown = [self._shown(message, images[number], videos[number]) for message in chat]
            texts.append(self.processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=True))
            for token, media in ((self.processor.image_token, images), (self.processor.video_token, videos)):
                if texts[-1].count(token) != len(media[number]):
                    raise ValueError(
                        f"the model's chat template writes {texts[-1].count(token)} {token} for {len(media[number])}: "
                        "it does not know this kind of content (videos=images shows frames as images)"
                    )
        if continuations is not None:
            texts = [text + more for text, more in zip(texts, continuations, strict=True)]
        given = {"images": images if any(images) else None, "videos": videos if any(videos) else None}
        media = {name: value for name, value in given.items() if value is not None}
        return self.processor(text=texts, return_tensors="pt", **media).to(self.model.device)

    def _shown(self, message: Message, images: list[Any], videos: list[Any]) -> Message:
        """A message without its pictures, which are added to the lists."""
        content = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "audio":
                raise ValueError("a task has audio, which this model does not hear")
            if kind == "image":
                images.append(part["image"])
            frames = self._frames(part["video"]) if kind == "video" else []
            if kind == "video" and self.videos == "images":
                images += frames
                content += [{"type": "image"}] * len(frames)
                continue
            if kind == "video":
                videos.append(frames)
            content.append(part if kind == "text" else {"type": kind})
        return {"role": message["role"], "content": content}

    def _frames(self, video: Any) -> list[Any]:
        """A video's frames: its own where they are given, else of its file."""
        if isinstance(video, str):
            from lmms_eval.models.model_utils.load_video import read_video

            video = read_video(video, num_frm=self.num_frames)
        return [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in video]

    @torch.inference_mode()
    def _answers(self, chats: Sequence[list[Message]], settings: dict[str, Any]) -> list[str]:
        inputs, told = self._inputs(chats), {name: settings[name] for name in ANSWER if name in settings}
        if not (told.get("temperature") or 0) > 0:  # tasks write 0 for greedy
            told = {name: value for name, value in told.items() if name not in ("temperature", "top_p", "top_k")}
            told["do_sample"] = False
        most = min(self.max_new_tokens, settings.get("max_new_tokens") or self.max_new_tokens)
        out = self.model.generate(**inputs, **told, max_new_tokens=most)
        texts = self.processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        until = settings.get("until") or []
        return [_cut(text, [until] if isinstance(until, str) else until) for text in texts]

    @torch.inference_mode()
    def _likelihood(self, chat: list[Message], continuation: str) -> tuple[float, bool]:
        before = self._inputs([chat])["input_ids"][0]
        inputs = self._inputs([chat], [continuation])
        ids: Tensor = inputs["input_ids"][0]
        common = min(len(before), len(ids) - 1)
        same = torch.eq(before[:common], ids[:common]).int().cumprod(0)
        start = max(int(same.sum()), 1)
        logits = self.model(**inputs).logits[0, start - 1 : -1].float().log_softmax(-1)
        chosen = logits.gather(-1, ids[start:, None].to(logits.device))[:, 0]
        greedy = bool((logits.argmax(-1) == ids[start:].to(logits.device)).all())
        return -float(chosen.sum()), greedy


class UHDSimple(UHDChat):
    """The same for tasks of continuations, which this runner gives to simple models alone (``--force_simple``)."""

    is_simple = True

    def _asked(self, arguments: tuple[Any, ...]) -> tuple[list[Message], dict[str, Any]]:
        context, settings, to_visual, doc_id, task, split = arguments
        visuals: Callable[[Any], Any] = to_visual
        return _said(visuals(self.task_dict[task][split][doc_id]) or [], context), settings


def _said(visuals: Sequence[Any], text: str) -> list[Message]:
    """One message of the user's: pictures (a string is a video's file), then text."""
    content: list[Message] = []
    for visual in visuals:
        if isinstance(visual, dict):
            content.append({"type": "audio"})
        else:
            kind = "image" if isinstance(visual, Image.Image) else "video"
            content.append({"type": kind, kind: visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of these."""
    ends = [text.index(end) for end in until if end and end in text]
    return text[: min(ends)] if ends else text
