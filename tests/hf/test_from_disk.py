"""Tokens of a data set on disk, wherever pixels go: the same loss from either, as docs/datasets.md says it."""

import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainingArguments

from tests.hf.tiny import IMAGES, TEXTS, attach, encoder, targets
from tests.tiny import encoded
from uhd import datasets

# Trainer asks transformers for a name that it renamed, which is not ours to change
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Those of all images, encoded as one part, as a batch of all has them."""
    place = tmp_path_factory.mktemp("tokens")
    (place / "in").mkdir()
    for number, image in enumerate(IMAGES):
        (place / "in" / f"{number}.png").write_bytes(encoded(image))
    datasets.encode(place / "in", place / "out", encoder(), processes=0)
    return datasets.Tokens(place / "out")


def batch_of(model, images):
    batch = model.processor(text=TEXTS, images=images, padding_side="right")
    return {**batch, "labels": targets(model, batch)}


@pytest.fixture(scope="module")
def model():
    return attach(encoder()).eval()


@pytest.fixture(scope="module")
def wanted(model):
    """The loss from pixels."""
    return model(**batch_of(model, IMAGES)).loss


def test_a_processor_takes_them(tokens, model, wanted):
    assert model(**batch_of(model, list(tokens))).loss == wanted > 0
    assert model(**batch_of(model, [*tokens][::-1][1:] + [tokens[2]])).loss != wanted


def losses(folder, images):
    """Of steps of the language model, behind a vision side that does not learn."""
    model = attach(encoder())
    model.visual.requires_grad_(False)
    settings = {"max_steps": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"remove_unused_columns": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(folder, use_cpu=True, dataloader_pin_memory=False, **settings)
    sample = {"text": TEXTS, "images": images}
    run = Trainer(
        model, arguments, train_dataset=[sample] * 4, data_collator=lambda rows: batch_of(model, rows[0]["images"])
    )
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_learns_the_same(tokens, tmp_path):
    found = losses(tmp_path, [tokens[f"{number}.png"] for number in range(3)])
    assert found == losses(tmp_path, IMAGES)
    assert found[-1] < found[0]


def test_rows_of_arrow_take_them_as_they_are_read(tokens, model, wanted, tmp_path):
    arrow = pytest.importorskip("datasets")
    rows = arrow.Dataset.from_parquet(str(tokens.out / "index.parquet"), cache_dir=str(tmp_path))
    rows = rows.with_transform(lambda some: {"images": [tokens[key] for key in some["key"]], "key": some["key"]})
    assert [row["key"] for row in rows] == list(tokens.keys())
    loader = DataLoader(rows, batch_size=3, collate_fn=lambda some: batch_of(model, [row["images"] for row in some]))
    assert [model(**batch).loss for batch in loader] == [wanted]


class Stream(IterableDataset):
    """Keys and images, every worker its share, in the order of the source."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __iter__(self):
        info = get_worker_info()
        mine = range(info.id, len(self.tokens), info.num_workers) if info else range(len(self.tokens))
        return ((self.tokens.key(number), self.tokens[number]) for number in mine)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_take_them(workers, tokens, model, wanted):
    found = dict(DataLoader(Stream(tokens), batch_size=None, num_workers=workers))
    assert model(**batch_of(model, [found[key] for key in tokens.keys()])).loss == wanted  # noqa: SIM118
    assert [key for key, _ in tokens.items()] == sorted(found)
