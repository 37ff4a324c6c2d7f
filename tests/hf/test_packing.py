"""Packed rows give what their samples give alone."""

import copy
import itertools
import json

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainingArguments

from tests.hf.tiny import IMAGES, attach, encoder, language_model, model, tokenizer
from tests.scripts import FOLDER, load_script
from tests.tiny import refuses
from uhd.hf.collating import PackedStream, PackingCollator, pack_rows
from uhd.hf.packing import samples_in_rows
from uhd.hf.visual_inputs import VISUAL_KEYS, together
from uhd.schema import SpatialSchema

TEXTS = ["a<image>b", "hello there", "x<image>yz<image>?", "<image>", "z"]
KINDS = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "gemma4_text")


def prepared(found):
    images = [[IMAGES[0]], [], list(IMAGES[1:3]), [IMAGES[2]], []]
    return [found.processor(text=text, images=some or None) for text, some in zip(TEXTS, images, strict=True)]


def trained(kind, **changes):
    """In training mode, so that a cache would be made, but without dropout."""
    found = attach(encoder(), language_model(kind, **changes)).train()
    for module in found.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return found


def places(batch):
    """Row and slice of each sample, padding left out."""
    for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            if (ids[start:end] != tokenizer().pad_token_id).any():
                yield row, slice(start, end)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_samples_alone(kind, attention):
    found = trained(kind)
    try:
        found.set_attn_implementation(attention)
    except ValueError:
        pytest.skip("this language model has one attention")
    samples = prepared(found)
    batch = PackingCollator(found.processor, max_length=40)(samples)
    assert len(batch["input_ids"]) == 2
    mask = torch.ones_like(batch["input_ids"])
    out = found(**batch, attention_mask=mask, use_cache=True)
    out.loss.backward()
    packed = {name: p.grad.clone() for name, p in found.named_parameters() if p.grad is not None}
    found.zero_grad()
    losses, count, seen = [], 0, 0
    for row, place in places(batch):
        ids = batch["input_ids"][row, place].tolist()
        sample = next(item for item in samples if item["input_ids"][0].tolist() == ids)
        labels = batch["labels"][row, place][None]
        alone = found(**sample, use_cache=False)
        torch.testing.assert_close(out.logits[row, place][None], alone.logits, rtol=1e-5, atol=1e-5)
        flat = torch.nn.functional.cross_entropy(
            alone.logits[0, :-1].float(), labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        losses.append(flat)
        count += int((labels[0, 1:] != -100).sum())
        seen += 1
    assert seen == len(samples)
    (sum(losses) / count).backward()
    for name, parameter in found.named_parameters():
        if parameter.grad is not None and not name.endswith("router.weight"):
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_sample_changes_nothing_in_its_neighbours():
    found = model("llama")
    batch = PackingCollator(found.processor, max_length=100)(prepared(found))
    (row, place), *others = places(batch)
    before = found(**batch).logits
    batch["input_ids"] = batch["input_ids"].clone()
    text = batch["input_ids"][row, place]
    text[text < 256] = 7
    after = found(**batch).logits
    assert not before[row, place].equal(after[row, place])
    for row, place in others:
        assert before[row, place].equal(after[row, place])


def test_labels():
    found = model("llama")
    samples = [dict(item) for item in prepared(found)]
    samples[1]["assistant_masks"] = [0] * 6 + [1] * 5
    samples[2]["labels"] = samples[2]["input_ids"].clone()
    samples[4]["completion_mask"] = [[1]]
    batch = PackingCollator(found.processor, max_length=100)(samples)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert (labels[ids == found.config.image_token_id] == -100).all()
    text = found.processor.tokenizer.decode(labels[labels != -100].sort().values)
    assert sorted(text) == sorted("b" + "there" + "yz?")
    starts = (batch["position_ids"] == 0) & (batch["labels"] != -100)
    assert not starts.any()


def test_samples_as_lists_and_raw_ones():
    found = model("llama")
    samples = prepared(found)
    collate = PackingCollator(found.processor, max_length=40)
    wanted = collate(samples)
    lists = [{name: value.tolist() for name, value in sample.items()} for sample in samples]
    images = [[IMAGES[0]], [], list(IMAGES[1:3]), [IMAGES[2]], []]
    raw = [{"text": text, "images": some} for text, some in zip(TEXTS, images, strict=True)]
    prepare = PackingCollator(
        found.processor,
        max_length=40,
        prepare=lambda sample: found.processor(text=sample["text"], images=sample["images"] or None),
    )
    for batch in (collate(lists), prepare(raw)):
        assert batch.keys() == wanted.keys()
        for name in wanted.keys() - {"visual"}:
            assert batch[name].equal(wanted[name])
        for name in ("pixel_values", "grids", "num_patches", "image_plans", "image_sizes"):
            got, value = getattr(batch["visual"], name), getattr(wanted["visual"], name)
            assert got.dtype == value.dtype
            assert got.equal(value), name


def test_samples_as_columns_all_have_the_same():
    """As ``datasets.map`` needs them, which drops what its first sample lacks."""
    found = model("llama")
    collate = PackingCollator(found.processor, max_length=40)
    samples = prepared(found)
    columns = [collate.columns(sample) for sample in samples]
    assert len({tuple(sorted(sample)) for sample in columns}) == 1
    got, wanted = collate(columns), collate(samples)
    assert all(got[name].equal(wanted[name]) for name in wanted.keys() - {"visual"})
    assert got["visual"].pixel_values.equal(wanted["visual"].pixel_values)
    lost = {name: value for name, value in samples[0].items() if name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"\d+ image or video positions and neither images nor videos.*columns"):
        collate([lost])


def test_samples_with_an_image_a_row():
    """As ``pad_patches`` makes them: images of other samples have other lengths."""
    found = attach(encoder(), "llama")
    wanted = found(**PackingCollator(found.processor, max_length=100)(prepared(found))).logits
    found.processor.image_processor.pad_patches = True
    batch = PackingCollator(found.processor, max_length=100)(prepared(found))
    assert batch["visual"].pixel_values.dim() == 3
    assert found(**batch).logits.equal(wanted)


def test_padding_of_prepared_samples_is_cut_off():
    found = model("llama")
    both = found.processor(text=["a", "long one"], padding=True)
    sample = {"input_ids": both["input_ids"][0], "attention_mask": both["attention_mask"][0]}
    batch = PackingCollator(found.processor, max_length=9)([sample, sample])
    assert found.processor.tokenizer.decode(batch["input_ids"][0]) == "aa"
    assert batch["position_ids"].tolist() == [[0, 0]]


def test_one_row_for_flash_attention():
    """What flash attention needs of a row: one row, positions that start again, no mask."""
    found = model("llama")
    batch = PackingCollator(found.processor, max_length=30, one_row=True)(prepared(found))
    lengths = [item["input_ids"].shape[1] for item in prepared(found)]
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert samples_in_rows(batch["position_ids"], None)[0].bincount().sort().values.tolist() == sorted(lengths)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "visual"}
    other = attach(encoder(), "llama")
    other.language_model.config._attn_implementation = "flash_attention_2"
    rows = PackingCollator(found.processor, max_length=40)(prepared(found))
    with pytest.raises(ValueError, match=r"in one row, got 2 rows: PackingCollator\(..., one_row=True\)"):
        other(**rows)


def test_images_are_numbered_by_sample():
    found = attach(encoder(schema=SpatialSchema.preset("minicpm-v-2.6")))
    text = found.processor.image_token + "a"
    samples = [found.processor(text=text, images=image) for image in IMAGES[:2]]
    batch = PackingCollator(found.processor, max_length=200)(samples)
    out = found(**batch)
    for (row, place), sample in zip(places(batch), samples, strict=True):
        torch.testing.assert_close(out.logits[row, place], found(**sample).logits[0], rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_rows_hold_every_sample_once_and_are_no_longer_than_asked(lengths, max_length):
    rows = pack_rows(lengths, max_length)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    used = [sum(lengths[place] for place in row) for row in rows]
    assert max(used) <= max_length
    assert sum(count * 2 <= max_length for count in used) <= 1 or len(rows) == 1 or min(used) * 2 > max_length - 50


def test_streams_fill_rows():
    found = model("llama")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (300,), generator=generator).tolist()
    stream = ({"input_ids": [place % 200] * length} for place, length in enumerate(lengths))
    collate = PackingCollator(found.processor, max_length=100)
    loader = DataLoader(PackedStream(stream, collate, buffer=32), batch_size=2, collate_fn=collate)
    rows = [row for batch in loader for row in batch["input_ids"]]
    total = sum(len(row) for row in rows)
    assert sum(lengths) / total > 0.92
    counts = [int((torch.cat(rows) == place).sum()) for place in range(200)]
    assert counts[:100] == [lengths[place] + lengths[place + 200] for place in range(100)]
    assert counts[100:] == lengths[100:200]


class Numbers(IterableDataset):
    """Samples of different lengths, each worker its share; with ``state_dict`` as ``datasets`` has it."""

    def __init__(self, lengths):
        self.lengths, self.epoch, self.place, self.start, self.read = lengths, 0, 0, 0, 0

    def __iter__(self):
        worker = get_worker_info()
        share = range(len(self.lengths))[worker.id :: worker.num_workers] if worker else range(len(self.lengths))
        self.place = self.start
        for number in share[self.start :]:
            self.place, self.read = self.place + 1, self.read + 1
            yield {"input_ids": [number % 200] * self.lengths[number], "number": number}


class Marked(Numbers):
    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"place": self.place, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.start = self.place = state["place"]  # and stays so for every pass, as in datasets


LENGTHS = torch.randint(1, 40, (150,), generator=torch.Generator().manual_seed(1)).tolist()


class TestStreamState:
    def stream(self, kind, buffer=16, max_length=100):
        collate = PackingCollator(model("llama").processor, max_length=max_length)
        return PackedStream(kind(LENGTHS), collate, buffer=buffer)

    def rows(self, rows):
        return [[int(sample["input_ids"][0]) for sample in row] for row in rows]

    @pytest.mark.parametrize("kind", [Numbers, Marked])
    @pytest.mark.parametrize("done", [0, 1, 7, 23, "all but one", "all"])
    def test_resumed_is_uninterrupted(self, kind, done):
        whole = self.rows(self.stream(kind))
        assert sorted(itertools.chain(*whole)) == list(range(150))
        done = {"all but one": len(whole) - 1, "all": len(whole)}.get(done, done)
        stream = self.stream(kind)
        rows = iter(stream)
        used = self.rows(itertools.islice(rows, done)) + ([] if done < len(whole) else self.rows(rows))
        state = json.loads(json.dumps(stream.state_dict()))
        assert len(json.dumps(state)) < 500  # no patches
        other = self.stream(kind)
        other.load_state_dict(state)
        assert other.state_dict() == state
        rest = iter(other)
        again = self.rows(itertools.islice(rest, 3))  # and is interrupted once more
        third = self.stream(kind)
        third.load_state_dict(json.loads(json.dumps(other.state_dict())))
        assert used + again + self.rows(third) == whole
        assert self.rows(third) == whole  # the state is used once
        if kind is Marked and 7 <= done < len(whole):
            assert third.dataset.read < 150 + 150 - done  # not from the beginning

    def test_what_is_refused(self):
        state = self.stream(Numbers).state_dict()
        for changes in ({"buffer": 8}, {"max_length": 120}):
            with pytest.raises(ValueError, match=f"of a stream with other rows \\({next(iter(changes))}: saved"):
                self.stream(Numbers, **changes).load_state_dict(state)
        stream = self.stream(Marked)
        stream.set_epoch(3)
        next(iter(stream))
        other = self.stream(Marked)
        other.load_state_dict({**stream.state_dict(), "first": 5, "mark": {"place": 5, "epoch": 3}})
        with pytest.raises(ValueError, match=r"stands in epoch 3 of the stream, which is in 0: set_epoch\(3\)"):
            next(iter(other))

    @pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.set_vital.")
    @pytest.mark.parametrize("kind", [Numbers, Marked])
    @pytest.mark.parametrize("workers", [0, 1, 4])
    def test_a_stateful_loader_resumes_with_workers(self, workers, kind):
        stateful = pytest.importorskip("torchdata.stateful_dataloader")

        def loader():
            settings = {"num_workers": workers, "persistent_workers": workers > 0}
            return stateful.StatefulDataLoader(self.stream(kind), batch_size=2, collate_fn=self.rows, **settings)

        whole = list(loader())
        assert sorted(itertools.chain(*itertools.chain(*whole))) == list(range(150))
        first = loader()
        used = list(itertools.islice(first, 9))
        state = copy.deepcopy(first.state_dict())
        second = loader()
        second.load_state_dict(state)
        assert used + list(second) == whole
        assert list(second) == whole


class Endless(IterableDataset):
    def __init__(self, found):
        self.found = found

    def __iter__(self):
        while True:
            yield from prepared(self.found)


def padded(found):
    """A collator without packing: the processor's own batches."""

    def collate(samples):
        images = [[IMAGES[0]], [], list(IMAGES[1:3])]
        batch = found.processor(text=TEXTS[:3], images=images, padding=True)
        return together({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})

    return collate


@pytest.mark.filterwarnings("ignore:labels")  # those of images, which `padded` leaves to the model
@pytest.mark.parametrize("kind", ["map", "stream", "packed stream", "padded stream"])
def test_trainer_trains_with_its_default_settings(kind, tmp_path):
    """accelerate cuts the batches of streams by their first dimension: patches and views must come through whole."""
    if kind != "map":
        try:
            accelerate.utils.concatenate([object()])
        except TypeError:
            pytest.skip("this accelerate joins the batches of a stream even where there is one")
    found = trained("llama")
    collate = padded(found) if kind == "padded stream" else PackingCollator(found.processor, max_length=60)
    dataset = {
        "map": [dict(item) for item in prepared(found)],
        "packed stream": PackedStream(Endless(found), collate, buffer=6),
    }.get(kind, Endless(found))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2 if kind == "packed stream" else 5,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(found, arguments, train_dataset=dataset, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_batch_that_was_cut_is_refused_with_the_way_out():
    found = model("llama")
    batch = dict(found.processor(text=TEXTS[0], images=IMAGES[0]))
    cut = {name: value[:1] for name, value in batch.items()}
    with pytest.raises(ValueError, match=r"there are 1 grids.* uhd\.hf\.together\(batch\)"):
        found(**cut)
    whole = together(batch)
    assert found(**whole).logits.equal(found(**batch).logits)
    with pytest.raises(ValueError, match="come as visual, got pixel_values, grids as well"):
        found(**whole, pixel_values=batch["pixel_values"], grids=batch["grids"])
    assert whole["visual"].to("cpu").pixel_values.equal(batch["pixel_values"])


@pytest.mark.parametrize("kind", ["mamba", "nemotron_h", "opt"])
def test_language_models_that_mix_samples_are_refused(kind):
    found = model(kind)
    batch = PackingCollator(found.processor, max_length=60)(prepared(found))
    name = type(found.language_model).__name__
    with pytest.raises(ValueError, match=f"{name} with .* attention does not keep packed samples apart"):
        found(**batch)


MARKED = (
    "{% for message in messages %}{{ message['role'][0] }}:{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endgeneration %}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'video' %}"
    "<video>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def said(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def test_raw_samples_are_prepared_as_the_processor_would():
    processor = model("llama").processor
    video = torch.randint(0, 255, (3, 3, 30, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw = [
        {"text": "hello", "images": None, "source": "web", "messages": None},
        {"text": "a<image>b<image>", "images": list(IMAGES[:2])},
        {"text": "<image>c", "images": IMAGES[2]},
        {"text": "<video>d<image>", "images": [IMAGES[1]], "videos": [video]},
    ]
    made = [processor(**{n: v for n, v in sample.items() if n != "source" and v is not None}) for sample in raw]
    pack = PackingCollator(processor, max_length=120)
    found, wanted = pack(raw), pack(made)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in ("input_ids", "labels", "position_ids"))
    for name in VISUAL_KEYS:
        one, two = getattr(found["visual"], name), getattr(wanted["visual"], name)
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def test_messages_have_their_media_in_place_and_the_assistant_s_words_as_targets():
    processor = copy.deepcopy(model("llama").processor)
    processor.chat_template = MARKED
    pack = PackingCollator(processor, max_length=120)
    place, first, second = {"type": "image"}, *IMAGES[:2]
    whole = said("user", {"type": "image", "image": first}, "x", {"type": "image", "image": second})
    answer = said("assistant", "yes")
    forms = [
        {"messages": [whole, answer]},
        {"messages": [said("user", place, "x", place), answer], "images": [first, second]},
        {
            "messages": [said("user", {**place, "image": None, "text": None}, "x", place), answer],
            "images": [first, second],
        },
    ]
    (wanted,) = processor(text="u:<image>x<image>a:yes", images=[first, second])["input_ids"]
    for form in forms:
        batch = pack([form])
        assert batch["input_ids"].tolist() == [wanted.tolist()]
        kept = batch["labels"] != -100
        assert processor.tokenizer.decode(batch["input_ids"][kept]) == "yes"
        assert len(batch["visual"].image_plans) == 2
    in_front = pack(
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}], "images": first}]
    )
    again = pack([{"messages": [said("user", place, "x"), answer], "images": [first]}])
    assert torch.equal(in_front["input_ids"], again["input_ids"])
    processor.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    labels = pack([forms[0]])["labels"][0]
    assert (labels[1:] == wanted[1:])[wanted[1:] != processor.image_token_id].all()
    for messages, images in (([said("user", "x", place)], [first, second]), ([said("user", place)], [])):
        with pytest.raises(ValueError, match=f"1 parts of type 'image' without a source, .* {len(images)} images"):
            pack([{"messages": messages, "images": images}])
    assert torch.equal(pack([{**forms[0], "text": None}])["labels"], pack(forms[:1])["labels"])
    for wrong, words in (
        ({"messages": [whole], "text": "x"}, r"text or messages.* has \['messages', 'text'\]"),
        ({"messages": None, "text": None, "id": 3}, r"text or messages.* has \['id'\]"),
        ({"messages": [], "images": images}, r"a list of at least one, got \[\]"),
        ({"messages": "x"}, "a list of at least one, got 'x'"),
        ({"messages": [{"content": "x"}]}, r'"role": \.\.\..*, got .*content'),
        ({"messages": ["x"]}, "a message is .*, got 'x'"),
    ):
        refuses(f"^sample 1: .*{words}", pack, [{"text": "x"}, wrong])
        refuses(f"^sample 1: .*{words}", list, PackedStream([{"text": "x"}, wrong], pack))


def test_what_does_not_pack():
    found = model("llama")
    sample = prepared(found)[0]
    length = sample["input_ids"].shape[1]
    collate = PackingCollator(found.processor, max_length=length - 1)
    with pytest.raises(ValueError, match=rf"sample 0 has {length} tokens, a row holds {length - 1}: raise max_length"):
        collate([sample])
    with pytest.raises(ValueError, match=rf"sample 0 has {length} tokens"):
        list(PackedStream([sample], collate))
    refuses(f"^sample 1 has {length} tokens", list, PackedStream([{"text": "a"}, sample], collate))
    refuses("^there is no sample to pack", collate, [])
    refuses("^sample 0: a sample is a dictionary, got str", collate, ["a"], error=TypeError)
    for wrong in (0, -1, 2.5, "9", None, True):
        words = "max_length (is at least 1|must be a whole number)"
        refuses(words, PackingCollator, found.processor, max_length=wrong)
    with pytest.raises(ValueError, match=r"text or messages, or input_ids .* this one has \['words'\]"):
        collate([{"words": "a"}])
    with pytest.raises(ValueError, match=r"a prepared sample has input_ids, this one has \['words'\]"):
        PackingCollator(found.processor, max_length=9, prepare=lambda sample: sample)([{"words": "a"}])
    with pytest.raises(ValueError, match=r"one prompt, its input_ids are \(2, 3\)"):
        collate([{"input_ids": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match="a sample has no tokens"):
        collate([{"input_ids": [], "attention_mask": []}])
    with pytest.raises(ValueError, match="the buffer must hold 1 sample or more, got 0"):
        PackedStream([], collate, buffer=0)
    batch = PackingCollator(found.processor, max_length=60)(prepared(found))
    with pytest.raises(ValueError, match="are for training: leave the cache out"):
        found(**batch, cache=object())
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="have padding before a sample"):
        found(**batch, attention_mask=mask)


def test_the_benchmark_runs_small_and_reports_only_what_is_equal(tmp_path, capsys, monkeypatch):
    benchmark = load_script("packing")
    small = ["--samples", "16", "--width", "64", "--depth", "1", "--out", str(tmp_path)]
    assert benchmark.main(small) == 0
    result = json.loads((tmp_path / "packing.json").read_text())
    padded, packed, by_length = result["rows"]
    assert packed["first_loss"] == pytest.approx(padded["first_loss"], rel=1e-5)
    assert packed["full"] > 0.9 > by_length["full"]
    assert benchmark.table(result) in capsys.readouterr().out
    stored = json.loads((FOLDER / "results/packing.json").read_text())
    page = (FOLDER.parent / "docs/performance.md").read_text()
    assert benchmark.table(stored) in page
    assert stored["about"] in page
    (tmp_path / "packing.json").unlink()
    monkeypatch.setattr(benchmark, "check", lambda *_: 0.5)
    assert benchmark.main(small) == 1
    assert "nothing is reported: packed samples are off by 5.0e-01" in capsys.readouterr().err
    assert not (tmp_path / "packing.json").exists()
