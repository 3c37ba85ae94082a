"""Find record files: local, attached and on a stub of the Hub."""

import re
import time
from pathlib import Path

import hub_questions
import hub_stub
import pytest
from datasets import Dataset, DatasetDict
from hub_questions import directory_with

from saigakit.data import sources
from saigakit.data.conversations import read_conversations
from saigakit.errors import SaigaError

CARD = b"---\nconfigs:\n- {config_name: en, data_files: en/*.jsonl}\n- {config_name: ru, data_files: ru/*.jsonl}\n---\n"
DATA_SETS = {
    "datasets/someone/talks": {
        "data/train-00000-of-00002.parquet": b"first",
        "data/train-00001-of-00002.parquet": b"second",
        "data/test-00000-of-00001.parquet": b"third",
        "README.md": b"#",
    },
    "datasets/someone/letters": {"data/train.jsonl": b"first", "data/test [x].jsonl": b"third"},
    "datasets/someone/languages": {"en/train.jsonl": b"{}", "ru/train.jsonl": b"[]", "README.md": CARD},
    "datasets/someone/named": {"data/train_sft-00000-of-00001.jsonl": b"1", "data/ru-00000-of-00001.jsonl": b"2"},
}
DATA_SETS["datasets/someone/pictures"] = {"train/a.png": b"picture"}
DATA_SETS[f"datasets/someone/named@{hub_stub.OTHER_BRANCH}"] = {"data/ru-00000-of-00001.jsonl": b"an older 2"}
DATA_SETS["datasets/someone/merged"] = {"ru.jsonl": b"1", "en.jsonl": b"2", "dataset_infos.json": b"{}"}
DATA_SETS["datasets/someone/sft"] = {f"{name}.jsonl": name.encode() for name in ("train_sft", "train_gen", "test_sft")}
DATA_SETS["datasets/someone/packed"] = {"train.jsonl.zst": b"1", "dev.jsonl.zst": b"2"}
DATA_SETS["datasets/someone/tables"] = {"train.csv": b"1", "validation.csv": b"2"}
DATA_SETS["datasets/someone/both"] = {
    **{f"{language}/{part}.jsonl": part.encode() for language in ("en", "ru") for part in ("train", "validation")},
    "README.md": b"---\nconfigs:\n- {config_name: en, data_dir: en}\n- {config_name: ru, data_dir: ru}\n---\n",
}


@pytest.fixture(scope="module")
def hub():
    with hub_stub.serving(DATA_SETS) as (endpoint, calls), hub_questions.answering(endpoint) as ask:
        yield ask, calls


@pytest.fixture
def asked(hub):
    return hub[0]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    return tmp_path / "input"


def test_an_unknown_demo_file_is_an_error_with_the_two_known_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.wordnet_records, "packaged_records", lambda: tmp_path)
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    assert sources.records_files("package:wordnet/train.jsonl") == [tmp_path / "train.jsonl"]
    with pytest.raises(SaigaError, match=r"'package:wordnet/test\.jsonl' is not there; .* train\.jsonl and held_out"):
        sources.records_files("package:wordnet/test.jsonl")


def test_the_demo_of_function_calling_has_records_too(callers_cache, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(callers_cache))
    [train], [held_out] = (sources.records_files(f"package:tools/{part}.jsonl") for part in ("train", "held_out"))
    assert train.parent == held_out.parent
    assert len(held_out.read_text(encoding="utf-8").splitlines()) == 200


def test_finds_a_record_file_locally_in_the_run_directory_and_in_an_input(inputs, tmp_path, monkeypatch):
    here = directory_with(tmp_path / "here", "a.jsonl")
    run_dir = directory_with(tmp_path / "run", "b.jsonl")
    attached = directory_with(inputs / "datasets" / "me" / "talks", "c.csv")
    monkeypatch.chdir(here)
    assert sources.records_files("a.jsonl", run_dir) == [Path("a.jsonl")]
    assert sources.records_files("b.jsonl", run_dir) == [run_dir / "b.jsonl"]
    assert sources.records_files("talks/c.csv", run_dir) == [attached / "c.csv"]
    with pytest.raises(SaigaError, match=r"'talks/d\.csv' is not there"):
        sources.records_files("talks/d.csv", run_dir)


def test_a_directory_gives_its_visible_record_files_in_order(tmp_path):
    names = ["b.jsonl", "a.json.gz", "c.parquet", "d.jsonl.gz", "e.json", "f.csv", "README.md", ".g.jsonl"]
    directory_with(tmp_path / "talks", *names)
    directory_with(tmp_path / "talks" / "a" / "b", "z.jsonl")
    directory_with(tmp_path / "talks" / ".cache", "y.jsonl")
    found = [file.relative_to(tmp_path / "talks").as_posix() for file in sources.records_files(str(tmp_path / "talks"))]
    assert found == ["a.json.gz", "a/b/z.jsonl", "b.jsonl", "c.parquet", "d.jsonl.gz", "e.json"]


def test_reports_the_files_of_a_directory_that_are_left_out(tmp_path, capsys):
    directory_with(tmp_path / "talks", "a.JSONL", "b.ndjson", "c.csv", "d.txt")
    assert len(sources.records_files(str(tmp_path / "talks"))) == 2
    assert "talks: 2 of 4 files are read; left out: c.csv, d.txt." in capsys.readouterr().out


def test_a_local_copy_of_a_data_set_gives_its_train_split(tmp_path, capsys):
    directory_with(tmp_path / "set", "dataset_infos.json")
    for split in ("train", "test"):
        directory_with(tmp_path / "set" / split, "a.jsonl")
    assert sources.records_files(str(tmp_path / "set")) == [tmp_path / "set" / "train" / "a.jsonl"]
    assert "left out: test/a.jsonl." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dataset-metadata.json", "dataset_info.json", "dataset_dict.json", "state.json"])
def test_metadata_next_to_records_is_left_out_silently(tmp_path, capsys, name):
    made = directory_with(tmp_path / "talks", "a.jsonl", name, ".DS_Store")
    assert sources.records_files(str(made)) == [made / "a.jsonl"]
    assert capsys.readouterr().out == ""


def test_tables_are_read_if_a_directory_has_no_other_records(tmp_path, capsys):
    made = directory_with(tmp_path / "tables", "a.csv", "b.tsv", "c.csv.zst", "d.xlsx")
    assert [file.name for file in sources.records_files(str(made))] == ["a.csv", "b.tsv", "c.csv.zst"]
    (made / "e.jsonl").write_text("{}", encoding="utf-8")
    assert sources.records_files(str(made)) == [made / "e.jsonl"]
    assert "left out: a.csv, b.tsv, c.csv.zst, d.xlsx." in capsys.readouterr().out


def test_a_directory_offers_its_evaluation_split_and_gives_it_by_name(tmp_path, capsys, monkeypatch):
    for split in ("train", "dev"):
        directory_with(tmp_path / "talks" / split, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert sources.records_files("talks", offers_evaluation=True) == [Path("talks/train/a.jsonl")]
    assert 'talks also has the split validation: held_out="talks:validation" uses it' in capsys.readouterr().out
    assert sources.records_files("talks:validation") == [Path("talks/dev/a.jsonl")]
    with pytest.raises(SaigaError, match=r"talks has no split 'test'\. Choose one of train, validation, a"):
        sources.records_files("talks:test")


@pytest.fixture
def saved(tmp_path):
    """A directory of save_to_disk, with the cache that `shuffle` leaves there."""
    rows = [{"user": str(index), "bot": "а"} for index in range(10)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "cache-2d0a802b78a30b76.arrow").write_bytes(b"an index")
    return tmp_path / "saved"


def test_reads_a_data_set_of_save_to_disk_without_its_caches(saved, capsys):
    files = sources.records_files(str(saved))
    assert [file.name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [row["messages"][0]["content"] for row in read_conversations(files)] == list("0123456789")
    assert "left out: cache-2d0a802b78a30b76.arrow." in capsys.readouterr().out


def test_reads_the_train_split_of_a_saved_dict_and_offers_another(tmp_path, capsys):
    parts = {name: Dataset.from_list([{"user": name, "bot": "а"}]) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    for asked_for, split in ((name, "train"), (f"{name}:test", "test")):
        (row,) = read_conversations(sources.records_files(asked_for, offers_evaluation=True))
        assert row["messages"][0]["content"] == split
    assert f'held_out="{name}:test" uses it for evaluation.' in capsys.readouterr().out


def test_an_incomplete_saved_data_set_is_an_error(saved):
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SaigaError, match=r"saved lost data-00001-of-00002\.arrow; save the data set again"):
        sources.records_files(str(saved))
    (saved / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SaigaError, match=r"state\.json is not the state of a saved data set"):
        sources.records_files(str(saved))


def test_records_next_to_a_saved_data_set_are_read_instead_of_it(saved, capsys):
    (saved / "a.jsonl").write_text("{}", encoding="utf-8")
    assert sources.records_files(str(saved)) == [saved / "a.jsonl"]
    assert "left out: cache-2d0a802b78a30b76.arrow, data-00000" in capsys.readouterr().out


def test_a_list_gives_the_files_of_each_name_in_order(tmp_path):
    made = directory_with(tmp_path / "talks", "a.jsonl", "b.jsonl", "c.jsonl")
    names = ["c.jsonl", "[ab].jsonl"]
    assert sources.records_files(names, made) == [made / "c.jsonl", made / "a.jsonl", made / "b.jsonl"]
    with pytest.raises(SaigaError, match=r"a\.jsonl is named twice; name it once"):
        sources.records_files(["a.jsonl", "*.jsonl"], made)
    with pytest.raises(SaigaError, match=r"a\.jsonl is named twice; name it once"):
        sources.records_files([str(made / "a.jsonl"), "a.jsonl"], made)


def test_a_number_among_the_names_is_an_error():
    with pytest.raises(SaigaError, match="records=7 is not text; give a path or a name in quotes"):
        sources.records_files(["r.jsonl", 7])


@pytest.mark.parametrize("name", ["", "  ", [], [""], ["package:wordnet/train.jsonl", " "]])
def test_rejects_an_empty_name(name):
    with pytest.raises(SaigaError, match="records is empty"):
        sources.records_files(name)


def test_reads_a_directory_below_a_hidden_one(tmp_path):
    made = directory_with(tmp_path / ".data" / "talks", "a.jsonl")
    assert sources.records_files(str(made)) == [made / "a.jsonl"]


def test_rejects_a_directory_without_records(tmp_path):
    made = directory_with(tmp_path / "talks", "a.xlsx")
    with pytest.raises(SaigaError, match="talks has no record files"):
        sources.records_files(str(made))


def test_a_pattern_gives_the_matches_of_the_first_place(inputs, tmp_path, monkeypatch):
    names = ("part-2.jsonl", "part-1.jsonl", "other.jsonl")
    run_dir = directory_with(tmp_path / "run", *names)
    here = directory_with(tmp_path / "here", *names)
    attached = directory_with(inputs / "datasets" / "me" / "talks", *names)
    monkeypatch.chdir(here)
    fitting = sorted(names)[1:]
    assert sources.records_files("part-*.jsonl", run_dir) == [run_dir / name for name in fitting]
    assert sources.records_files("part-?.jsonl") == [Path(name) for name in fitting]
    assert sources.records_files(f"{here}/part-*") == [here / name for name in fitting]
    assert sources.records_files("../*/part-[1].jsonl") == [Path(f"../{name}/part-1.jsonl") for name in ("here", "run")]
    assert sources.records_files("talks/part-*.jsonl", run_dir) == [attached / name for name in fitting]


def test_rejects_a_pattern_that_matches_in_two_inputs(inputs, tmp_path, monkeypatch):
    first, second = (directory_with(inputs / name, "part-1.jsonl") for name in ("one", "two"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaigaError) as caught:
        sources.records_files("part-*.jsonl")
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_an_unmatched_pattern_is_an_error_with_the_searched_places(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory_with(tmp_path / "run", "other.jsonl")
    (tmp_path / "scratch").mkdir()
    for place, is_named in (("run", True), ("scratch", False)):  # an empty run directory is not mentioned
        with pytest.raises(SaigaError) as caught:
            sources.records_files("part-*.jsonl", tmp_path / place)
        assert f"No file matches 'part-*.jsonl'. Searched {tmp_path}" in str(caught.value)
        assert (str(tmp_path / place) in str(caught.value)) == is_named


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    made = directory_with(tmp_path / "talks", "part [1].jsonl", "part 1.jsonl")
    assert sources.records_files("talks/part [1].jsonl", tmp_path) == [made / "part [1].jsonl"]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("someone/talks", ["train-00000-of-00002.parquet: first", "train-00001-of-00002.parquet: second"]),
        ("someone/talks:test", ["test-00000-of-00001.parquet: third"]),
        ("someone/letters:test", ["test [x].jsonl: third"]),
        ("someone/named:train_sft", ["train_sft-00000-of-00001.jsonl: 1"]),
        ("someone/named:ru", ["ru-00000-of-00001.jsonl: 2"]),
        (f"someone/named@{hub_stub.COMMIT}:ru", ["ru-00000-of-00001.jsonl: 2"]),
        (f"someone/named@{hub_stub.OTHER_BRANCH}:ru", ["ru-00000-of-00001.jsonl: an older 2"]),
        ("someone/languages:ru", ["train.jsonl: []"]),
        ("someone/languages:en/train", ["train.jsonl: {}"]),
        ("someone/merged:ru", ["ru.jsonl: 1"]),
        ("someone/sft:train_sft", ["train_sft.jsonl: train_sft"]),
        ("someone/sft:test", ["test_sft.jsonl: test_sft"]),
        ("someone/packed", ["train.jsonl.zst: 1"]),
        ("someone/packed:dev", ["dev.jsonl.zst: 2"]),
        ("someone/tables", ["train.csv: 1"]),
        ("someone/both:ru/validation", ["validation.jsonl: validation"]),
        (["someone/merged:ru", "someone/merged:en"], ["ru.jsonl: 1", "en.jsonl: 2"]),
    ],
)
def test_a_data_set_on_the_hub_gives_the_files_of_its_split(asked, tmp_path, name, files):
    assert asked(f"sources.records_files({name!r})", tmp_path) == files


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "someone/merged",
            ['someone/merged: train is made of the files en, ru; name one as in "someone/merged:en".'],
        ),
        (
            "someone/sft",
            [
                'someone/sft: train is made of the files train_gen, train_sft; name one as in "someone/sft:train_gen".',
                'someone/sft also has the split test: held_out="someone/sft:test" uses it for evaluation.',
            ],
        ),
        (
            "someone/sft:train_sft",
            ['someone/sft also has the split test_sft: held_out="someone/sft:test_sft" uses it for evaluation.'],
        ),
        ("someone/sft:test", []),
        (
            "someone/talks",
            ['someone/talks also has the split test: held_out="someone/talks:test" uses it for evaluation.'],
        ),
        (
            "someone/both:ru",
            [
                "someone/both also has the split validation: "
                'held_out="someone/both:ru/validation" uses it for evaluation.'
            ],
        ),
        (
            f"someone/packed@{hub_stub.COMMIT}",
            [
                f"someone/packed@{hub_stub.COMMIT} also has the split validation: "
                f'held_out="someone/packed@{hub_stub.COMMIT}:validation" uses it for evaluation.'
            ],
        ),
        ("someone/languages:ru", []),
    ],
)
def test_reports_merged_files_and_a_split_for_evaluation(asked, tmp_path, name, lines):
    def reported(**options):
        return [line for line in asked(f"sources.records_files({name!r}, **{options})", tmp_path) if line.endswith(".")]

    assert reported(offers_evaluation=True) == lines
    assert reported() == [line for line in lines if "is made of" in line]


def test_the_offered_split_is_the_one_that_held_out_then_takes(asked, tmp_path):
    offer, _ = asked("sources.records_files('someone/both:ru', offers_evaluation=True)", tmp_path)
    (name,) = re.findall('held_out="(.*)"', offer)
    assert asked(f"sources.records_files({name!r})", tmp_path) == ["validation.jsonl: validation"]


def test_downloads_only_the_files_of_the_split(hub, tmp_path):
    ask, calls = hub
    before = len(calls)
    ask("sources.records_files('someone/languages:ru')", tmp_path)
    fetched = [call for call in calls[before:] if "/resolve/" in call and call.endswith(".jsonl")]
    assert fetched and all("ru/train.jsonl" in call for call in fetched)


def test_rejects_a_data_set_with_several_configurations_and_names_them(asked, tmp_path):
    kind, sentence = asked("sources.records_files('someone/languages')", tmp_path)
    assert kind == "SaigaError"
    assert "someone/languages has more than one configuration. Choose one of en, ru" in sentence


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/named", "has no split 'train'. Choose one of ru, train_sft"),
        ("someone/talks:dev", "has no split 'dev'. Choose one of train, test"),
        ("someone/languages:ru/test", "has no split 'test'. Choose one of train"),
        ("someone/merged:de", "has no split 'de'. Choose one of train, en, ru"),
        ("someone/languages:de/train", "has no configuration 'de'. Choose one of en, ru"),
        ("someone/pictures", "has no record files (.jsonl, .ndjson, .json, "),
    ],
)
def test_rejects_an_unknown_split_and_names_the_known_ones(asked, tmp_path, name, message):
    kind, sentence = asked(f"sources.records_files({name!r})", tmp_path)
    assert kind == "SaigaError"
    assert message in sentence


def test_the_card_of_a_local_copy_determines_its_splits(tmp_path):
    made = directory_with(tmp_path / "set", "ru.jsonl", "en.jsonl")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: ru.jsonl}\n---\n"
    (made / "README.md").write_text(card, encoding="utf-8")
    assert sources.records_files(str(made)) == [made / "ru.jsonl"]


def test_checks_the_disk_before_downloading_a_data_set(asked, tmp_path):
    small = "setattr(sources.workspace, 'free_disk', lambda path: 0) or sources.records_files('someone/talks')"
    kind, sentence = asked(small, tmp_path)
    assert kind == "SaigaError" and "Downloading someone/talks needs 0.00 GB of disk" in sentence


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/gated", "is gated: accept its licence"),
        ("someone/named@2023:ru", "has no revision of that name: give a branch, a tag or a commit."),
        ("someone/vanished:train", "is not on the Hub"),
        ("my/talks", "is not on the Hub"),
        ("someone/overloaded", "503 Service Unavailable"),
    ],
)
def test_a_hub_error_for_a_data_set_says_what_to_attach(asked, tmp_path, name, message):
    kind, sentence = asked(f"sources.records_files({name!r})", tmp_path)
    assert kind == "SaigaError"
    assert sentence.startswith(f"{re.split('[:@]', name)[0]} ")
    assert message in sentence
    assert "It is not a local path either: attach a copy as a Kaggle data set" in sentence


def test_a_data_set_fails_fast_without_a_connection(tmp_path):
    with hub_questions.answering(hub_questions.NOWHERE) as ask:
        start = time.monotonic()
        kind, sentence = ask("sources.records_files('a/b')", tmp_path)
        assert kind == "SaigaError" and "a/b could not be fetched from the Hub: " in sentence
        assert time.monotonic() - start < 20  # the Hub's own retries take 24 s


def test_a_local_path_takes_precedence_over_the_hub(tmp_path):
    made = directory_with(tmp_path / "someone" / "talks", "a.jsonl")
    assert sources.records_files("someone/talks", tmp_path) == [made / "a.jsonl"]


@pytest.mark.parametrize(
    "name", ["someone/talks.jsonl", "01_format/train.jsonl", "a/b/c", "/a/b", "./a", "a--b/c", "ы/я"]
)
def test_does_not_ask_the_hub_for_an_invalid_name(tmp_path, name):
    with pytest.raises(SaigaError, match="is not there"):
        sources.records_files(name, tmp_path)


def test_a_copy_with_several_configurations_is_refused_with_a_way_that_works_here(tmp_path):
    made = directory_with(tmp_path / "set", "ru.jsonl", "en.jsonl")
    (made / "README.md").write_text(
        "---\nconfigs:\n- {config_name: en, data_files: en.jsonl}\n- {config_name: ru, data_files: ru.jsonl}\n---\n",
        encoding="utf-8",
    )
    with pytest.raises(SaigaError, match=r"more than one configuration\. Choose one of en, ru, by naming its files"):
        sources.records_files(str(made))
