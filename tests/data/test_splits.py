"""Names of files of a data set, and which of them are asked for."""

import pytest

from saigakit.data import splits
from saigakit.errors import SaigaError

SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
OTHERS = ["data/test-00000-of-00001.parquet", "README.md", ".gitattributes", "dataset_infos.json"]
CONFIGURATIONS = ["en/train.jsonl", "en/dev.jsonl", "ru/train.jsonl.gz", "ru/test.json"]


@pytest.mark.parametrize(
    ("names", "choice", "chosen"),
    [
        ([*SHARDS[::-1], *OTHERS], "", SHARDS),
        ([*SHARDS, *OTHERS], "test", OTHERS[:1]),
        ([*SHARDS, *OTHERS], "data", SHARDS),
        ([*SHARDS, *OTHERS], "data/test", OTHERS[:1]),
        (["records.jsonl", "more.json.gz", "README.md"], "", ["more.json.gz", "records.jsonl"]),
        (["train.jsonl", "valid.jsonl", "notes.json"], "", ["train.jsonl"]),
        (["train.jsonl", "valid.jsonl"], "validation", ["valid.jsonl"]),
        (["train.jsonl", "validation.jsonl"], "dev", ["validation.jsonl"]),
        (["train/a.json", "train/b.json", "test/a.json"], "", ["train/a.json", "train/b.json"]),
        (["Train.jsonl", "trainer.jsonl", "contest/b.json"], "", ["Train.jsonl"]),
        (["train.jsonl", ".hidden/train.jsonl", ".train.jsonl"], "", ["train.jsonl"]),
        (CONFIGURATIONS, "en", ["en/train.jsonl"]),
        (CONFIGURATIONS, "ru/test", ["ru/test.json"]),
        (CONFIGURATIONS, "test", ["ru/test.json"]),
        (["a/one.jsonl", "b/two.jsonl"], "", ["a/one.jsonl", "b/two.jsonl"]),
        (["a/one.jsonl", "b/two.jsonl"], "b", ["b/two.jsonl"]),
        (["train.jsonl", "raw/train.jsonl"], ".", ["train.jsonl"]),
    ],
)
def test_of_all_files_those_of_the_split_are_chosen(names, choice, chosen):
    assert splits.records_of("me/set", names, choice) == chosen


@pytest.mark.parametrize(
    ("names", "choice", "said"),
    [
        (CONFIGURATIONS, "", "me/set has more than one configuration: en, ru. Name one, as in me/set:ru."),
        (["train.jsonl", "raw/train.jsonl"], "", "more than one configuration: ., raw"),
        (CONFIGURATIONS, "de", "no configuration or split 'de'. Its configurations: en, ru; its splits: test, train"),
        (CONFIGURATIONS, "en/test", "me/set has no split 'test'; its splits: train, validation."),
        (CONFIGURATIONS, "en/rest", "me/set has no split 'rest'; its splits: train, validation."),
        (["test.jsonl"], "", "me/set has no split 'train'; its splits: test."),
        (["records.jsonl"], "test", "me/set has no split 'test'; the names of its files say no split"),
        (["records.jsonl.zst", "README.md"], "", "me/set holds no file of records (.jsonl, .ndjson, .json, "),
        (["records.jsonl.zst"], "", "but records.jsonl.zst. Turn what you want to train on into JSONL"),
        ([], "", "but nothing"),
    ],
)
def test_a_choice_that_cannot_be_made_is_said_with_what_there_is(names, choice, said):
    with pytest.raises(SaigaError) as caught:
        splits.records_of("me/set", names, choice)
    assert said in str(caught.value)
