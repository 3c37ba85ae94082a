"""Read and check record files, name every bad record, and split without leaks."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from saigakit import data
from saigakit.core import display
from saigakit.data import conversations as data_conversations
from saigakit.data import store
from saigakit.data.conversations import asking_alike, common_system_prompt, file_labels
from saigakit.errors import DataError, SaigaError

TALK = [{"role": "user", "content": "Кто ты?"}, {"role": "assistant", "content": "Сайга."}]
WITH_SYSTEM = [{"role": "system", "content": "Отвечай кратко."}, *TALK]


@pytest.fixture
def read(tmp_path):
    """Write a file (text, bytes or records) and read the messages of its conversations."""

    def read_content(content, name="records.jsonl"):
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return [row["messages"] for row in store.iter_conversations(data.read_conversations(tmp_path / name))]

    return read_content


@pytest.fixture
def problems(read):
    """The problems of a record or of a file's content."""

    def of(content):
        with pytest.raises(DataError) as caught:
            read([content] if isinstance(content, dict) else content)
        return caught.value.problems

    return of


def asking(texts):
    """One conversation per text, with one turn."""
    return of_turns(map(asked, texts))


def asked(text):
    """A question and its answer."""
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "да"}]


def of_turns(conversations):
    return store.as_dataset({"messages": turns} for turns in conversations)


def test_an_error_names_the_damaged_gzip_file(read):
    whole = gzip.compress(json.dumps({"messages": TALK}).encode("utf-8"))
    assert read(whole, "records.jsonl.gz") == [TALK]
    for damaged in (whole[:-9], b"plain text", whole[:12] + b"\xff" * 30):
        with pytest.raises(SaigaError, match=r"records\.jsonl\.gz is a damaged gzip file"):
            read(damaged, "records.jsonl.gz")


def test_unusual_line_separators_in_a_text_do_not_split_it(read):
    text = "один\u2028два\u2029три\u0085четыре"
    assert read([{"user": text, "bot": "да"}])[0][0]["content"] == text


def test_reports_ignored_keys_with_counts(read, capsys):
    read([{"id": 1, "user": "а", "bot": "б"}, {"id": 2, "messages": TALK, "user": "Иван", "source": None}])
    said = capsys.readouterr().out
    assert "'id' in 2 records" in said
    assert "'user' in 1 record." in said
    assert "source" not in said


def test_reports_nothing_if_no_key_is_ignored(read, capsys):
    read([{"user": "а", "bot": "б"}])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5", "record: is a number; it must be an object"),
        ("null", "record: is null"),
        ('"text"', "record: is a text"),
        ('{"user": "a", "bot": "b"', "line: is invalid JSON"),
        ('{"user": "\\ud83d", "bot": "b"}', "user: contains an unpaired surrogate ('\\ud83d')"),
        ('{"user": "a", "bot": "\\ude42\\ud83d"}', "bot: contains an unpaired surrogate"),
    ],
)
def test_names_a_bad_line_and_checks_the_next_ones(problems, line, expected):
    found = problems("\n".join(['{"user": "a", "bot": "b"}', line, "[]"]))
    assert found[0].startswith(f"records.jsonl:2: {expected}")
    assert found[1:] == ["records.jsonl:3: messages: is empty; it must be a list of messages"]


def test_a_surrogate_pair_is_a_character(read):
    assert read(b'{"user": "\\ud83d\\ude42", "bot": "b"}')[0][0]["content"] == "🙂"


def test_collects_every_problem_and_shows_fifty(problems, read):
    bad = [{"user": "а"} for _ in range(70)]
    assert len(problems("\n".join(map(json.dumps, bad)))) == 70
    with pytest.raises(DataError) as caught:
        read([*bad, {"messages": TALK}])
    lines = str(caught.value).splitlines()
    assert "records.jsonl: 70 of 71 records cannot be used." in lines[0]
    assert len(lines) == 52
    assert lines[-1] == "  … and 20 more"


def test_keeps_a_thousand_problems_and_counts_all(problems, read):
    bad = "".join('{"user": 1, "bot": 2}\n' for _ in range(1200))
    assert len(problems(bad)) == 1000
    with pytest.raises(DataError) as caught:
        read(bad)
    assert str(caught.value).splitlines()[-1] == "  … and 2350 more"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"[]", b"[ ]\n"])
def test_a_file_without_records_is_an_error(read, content):
    with pytest.raises(DataError, match="has no records"):
        read(content)


@pytest.fixture
def files(tmp_path):
    """Write files and return their paths."""

    def write(**contents):
        paths = []
        for name, lines in contents.items():
            path = tmp_path / f"{name.replace('__', '/')}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            paths.append(path)
        return paths

    return write


def test_several_files_are_read_in_the_given_order(files):
    paths = files(b=['{"user": "1", "bot": "1"}'], a=['{"user": "2", "bot": "2"}', '{"user": "3", "bot": "3"}'])
    asked = [row["messages"][0]["content"] for row in data.read_conversations(paths)]
    assert asked == ["1", "2", "3"]


def test_each_problem_names_its_file(files):
    paths = files(a=['{"user": 1}'], b=['{"user": "2", "bot": "2"}', "[]", "{"], c=['{"user": "3", "bot": "3"}'])
    with pytest.raises(DataError) as caught:
        data.read_conversations(paths)
    assert caught.value.summary == "3 files: 3 of 5 records cannot be used."
    assert [problem.rpartition(": ")[0].split(": ")[0] for problem in caught.value.problems] == [
        "a.jsonl:1",
        "a.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
    ]


def test_files_with_equal_names_are_labelled_with_their_directories(files):
    paths = files(ru__part=["{}"], en__part=["{}"], other=["{}"])
    with pytest.raises(DataError) as caught:
        data.read_conversations(paths)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "ru/part.jsonl",
        "en/part.jsonl",
        "other.jsonl",
    ]


def test_files_with_equal_directory_names_are_labelled_with_their_paths():
    paths = [Path("/a/ru/x.jsonl"), Path("/b/ru/x.jsonl"), Path("/b/y.jsonl")]
    assert file_labels(paths) == ["/a/ru/x.jsonl", "/b/ru/x.jsonl", "y.jsonl"]


def test_an_empty_file_among_others_is_a_problem(files):
    with pytest.raises(DataError) as caught:
        data.read_conversations(files(a=['{"user": "2", "bot": "2"}'], b=[]))
    assert caught.value.summary == "2 files: 0 of 1 record cannot be used; files without records: 1."
    assert caught.value.problems == ["b.jsonl: has no records; write one JSON object per line, or leave the file out"]


def test_ignored_keys_are_counted_over_all_files(files, capsys):
    data.read_conversations(files(a=['{"user": "2", "bot": "2", "id": 1}'], b=['{"user": "3", "bot": "3", "id": 2}']))
    assert capsys.readouterr().out == "2 files: keys that are not read: 'id' in 2 records.\n"


def test_reads_conversations_with_tools_from_parquet(tmp_path):
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
        },
        {"type": "function", "function": {"name": "time", "parameters": {"properties": {"zone": {"type": "number"}}}}},
    ]
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Томск"}}},
        {"type": "function", "function": {"name": "time", "arguments": {"zone": 7}}},
    ]
    rows = [
        [
            TALK[0],
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "-5"},
            TALK[1],
        ],
        TALK,
    ]
    file = tmp_path / "records.parquet"
    parquet.write_table(pyarrow.table({"messages": rows, "tools": [tools, None]}), file)
    first, second = store.iter_conversations(data.read_conversations(file))
    assert second == {"messages": TALK}
    assert json.loads(first["tools"]) == tools
    for call in first["messages"][1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    assert first["messages"] == rows[0]


def test_with_a_limit_only_the_first_records_are_read(files, capsys):
    source = files(a=['{"user": "1", "bot": "1", "id": 1}', '{"user": "2", "bot": "2"}', "{"])
    assert [row["messages"][0]["content"] for row in data.read_conversations(source, limit=2)] == ["1", "2"]
    assert capsys.readouterr().out == ""  # the complete reading says what is ignored
    assert len(data.read_conversations(source, limit=1)) == 1
    with pytest.raises(DataError, match="1 of 3 records cannot be used"):
        data.read_conversations(source, limit=3)


def test_names_the_number_of_a_bad_parquet_row(tmp_path):
    file = tmp_path / "records.parquet"
    parquet.write_table(pyarrow.table({"user": ["а", None], "bot": ["б", "в"]}), file)
    with pytest.raises(DataError) as caught:
        data.read_conversations(file)
    assert caught.value.problems == ["records.parquet:2: user: is missing; add the text"]


def test_progress_names_the_file_and_counts_records(files, capsys, monkeypatch):
    monkeypatch.setattr(display, "EVERY_S", 0)
    data.read_conversations(files(a=['{"user": "1", "bot": "1"}'] * 2, b=['{"user": "3", "bot": "3"}']))
    assert capsys.readouterr().out.splitlines() == [
        "a.jsonl: 1 records checked",
        "a.jsonl: 2 records checked",
        "b.jsonl: 1 records checked",
    ]


def test_rejects_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(SaigaError, match=r"нет\.jsonl is not there"):
        data.read_conversations(tmp_path / "нет.jsonl")
    with pytest.raises(SaigaError, match="is a directory; name the files in it"):
        data.read_conversations(tmp_path)


def test_reading_and_splitting_write_nothing_to_the_home_directory(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    file = tmp_path / "records.jsonl"
    file.write_text('{"user": "а", "bot": "б"}\n{"user": "в", "bot": "г"}\n', encoding="utf-8")
    code = (
        "import sys; from saigakit import data; made = data.read_conversations(sys.argv[1]);"
        "data.split_conversations(made, eval_fraction=0.5, seed=1); print(len(made))"
    )
    names = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": str(home)}
    command = [sys.executable, "-c", code, str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("2\n", "")
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("seed", range(20))
def test_a_split_is_complete_and_shares_no_prompt(seed):
    rng = random.Random(seed)
    size = rng.randint(2, 120)
    turns = []
    for index in range(size):
        texts = [f"вопрос под своим номером {rng.randint(0, size)}" for _ in range(rng.choice((1, 1, 1, 2)))]
        asked = [[{"role": "user", "content": text}, {"role": "assistant", "content": str(index)}] for text in texts]
        turns.append([message for pair in asked for message in pair])
    turns[0] = [{"role": "user", "content": "особый вопрос"}, {"role": "assistant", "content": "0"}]  # two at least
    conversations = of_turns(turns)
    sides = data.split_conversations(conversations, eval_fraction=rng.uniform(0.01, 0.99), seed=seed)
    train, held_out = ([row["messages"] for row in side] for side in sides)
    assert train and held_out
    assert sorted(map(json.dumps, train + held_out)) == sorted(map(json.dumps, turns))
    sides = [{m["content"] for messages in side for m in messages if m["role"] == "user"} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert asking_alike(of_turns(train), of_turns(held_out)) == []


def test_the_seed_determines_the_split():
    conversations = asking([f"вопрос {index}" for index in range(100)])
    held_out = [data.split_conversations(conversations, eval_fraction=0.1, seed=seed)[1] for seed in (1, 1, 2)]
    assert list(held_out[0]) == list(held_out[1]) != list(held_out[2])


def test_the_evaluation_set_has_the_requested_size():
    train, held_out = data.split_conversations(asking(map(str, range(200))), eval_fraction=0.05, seed=42)
    assert (len(train), len(held_out)) == (190, 10)


def test_both_parts_of_a_split_have_at_least_one_conversation():
    for fraction in (0.001, 0.999):
        assert [len(side) for side in data.split_conversations(asking("аб"), eval_fraction=fraction, seed=1)] == [1, 1]


def test_letter_case_and_blanks_do_not_make_prompts_distinct():
    with pytest.raises(SaigaError, match="3 conversations with 1 distinct prompt cannot be split"):
        data.split_conversations(asking(["Кто ты?", "кто  ты?", " Кто ты?\n"]), eval_fraction=0.5, seed=1)


def test_holds_out_the_smallest_group_if_all_exceed_the_fraction():
    train, held_out = data.split_conversations(asking("аааббвввв"), eval_fraction=0.01, seed=1)
    assert [row["messages"][0]["content"] for row in held_out] == ["б", "б"]
    assert len(train) == 7


def test_a_prompt_shared_by_most_records_stays_in_training():
    conversations = asking(["Продолжай"] * 80 + [f"вопрос {index}" for index in range(20)])
    train, held_out = data.split_conversations(conversations, eval_fraction=0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)


def test_prompt_digests_ignore_case_and_blanks_but_not_the_system_prompt():
    def digest(text, system="С"):
        return data_conversations.PromptDigests.of(
            [{"role": "system", "content": system}, {"role": "user", "content": text}]
        ).prompt

    assert digest("Кто ты?") == digest(" кто  ТЫ? ") != digest("Кто я?")
    assert digest("Кто ты?") != digest("Кто ты?", "Д")
    assert 0 <= digest("Кто ты?") < 2**64


THANKS = {"role": "user", "content": "Спасибо"}
YES = {"role": "assistant", "content": "Пожалуйста"}


def test_a_common_short_text_does_not_group_conversations():
    conversations = of_turns([*asked(f"вопрос {index}"), THANKS, YES] for index in range(30))
    train, held_out = data.split_conversations(conversations, eval_fraction=0.2, seed=1)
    assert (len(train), len(held_out)) == (24, 6)
    assert asking_alike(train, held_out) == []


def test_a_common_instruction_does_not_group_conversations_with_distinct_system_prompts():
    def turn(index):
        return [
            {"role": "system", "content": f"Текст {index}"},
            *asked("Найди в этом тексте все термины и ответь списком"),
        ]

    conversations = of_turns(turn(index) for index in range(30))
    train, held_out = data.split_conversations(conversations, eval_fraction=0.2, seed=1)
    assert (len(train), len(held_out)) == (24, 6)
    assert asking_alike(train, held_out) == []


def test_finds_a_training_question_at_any_position_of_an_evaluation_record():
    question = asked("Почему небо над морем бывает зелёным?")
    training = of_turns([question, [*asked("Привет"), *question]])
    held_out = of_turns([[*asked("Здравствуй"), *question], asked("Совсем другой вопрос о море и о небе")])
    assert len(asking_alike(training, held_out)) == 1


def test_conversations_linked_through_another_one_stay_together():
    one, two, three = (f"вопрос с номером номер {number}" for number in (1, 2, 3))
    turns = [[asked(one), asked(two)], [asked(two), asked(three)], [asked(three)], [asked("г")]]
    conversations = of_turns([message for pair in pairs for message in pair] for pairs in turns)
    train, held_out = data.split_conversations(conversations, eval_fraction=0.5, seed=1)
    assert (len(train), len(held_out)) == (3, 1)
    assert held_out[0]["messages"][0]["content"] == "г"


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, "0.05", True, None, float("nan")])
def test_rejects_an_invalid_eval_fraction(fraction):
    with pytest.raises(SaigaError, match="eval_fraction="):
        data.split_conversations(asking("аб"), eval_fraction=fraction, seed=1)


def test_written_texts_are_read_back_exactly(tmp_path):
    texts = ["Ёлка", "один\u2028два\u0085три", '"кавычки" \\ \n', "\x00\x1f🙂"]
    file = data.write_conversations(asking(texts), tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for row in data.read_conversations(file)] == texts


def test_a_written_file_has_readable_cyrillic_and_one_line_per_conversation(tmp_path):
    file = data.write_conversations(asking(["Ёлка", "один\u2028два\u2029три\u0085"]), tmp_path / "out.jsonl")
    text = file.read_text(encoding="utf-8")
    assert "Ёлка" in text
    assert len(text.splitlines()) == 2
    assert file.read_bytes().count(b"\r") == 0


def test_a_failed_write_leaves_the_file_unchanged(tmp_path):
    file = data.write_conversations(asking(["а"]), tmp_path / "out.jsonl")
    before = file.read_bytes()
    with pytest.raises(KeyError):
        data.write_conversations([{"messages": TALK}, {}], file)
    assert file.read_bytes() == before


def test_finds_the_common_system_prompt(tmp_path):
    def common(*prompts):
        rows = [
            {"system": prompt, "user": "а", "bot": "б"} if prompt else {"user": "а", "bot": "б"} for prompt in prompts
        ]
        file = tmp_path / "records.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return common_system_prompt(data.read_conversations(file))

    assert common("Ты — Сайга.", "Ты — Сайга.") == "Ты — Сайга."
    assert common("Ты — Сайга.", "Ты — кот.") is None
    assert common("Ты — Сайга.", None) is None
    assert common(None, "Ты — Сайга.") is None
    assert common(None, None) == ""


def test_tools_are_written_and_read_back(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "description": "д\u2028"}}]
    rows = [{"messages": TALK, "tools": json.dumps(tools, ensure_ascii=False)}, {"messages": TALK}]
    read = data.read_conversations(data.write_conversations(rows, tmp_path / "out.jsonl"))
    assert list(store.iter_conversations(read)) == rows
    selected = data.read_conversations(data.write_conversations(read.select([1, 0]), tmp_path / "out.jsonl"))
    assert list(store.iter_conversations(selected)) == rows[::-1]


def test_locates_each_conversation_by_file_and_line(tmp_path):
    line = '{"user": "а%s", "bot": "б"}'
    files = [tmp_path / "a.jsonl", tmp_path / "b.json"]
    files[0].write_text("\n".join([line % 1, "", line % 2]), encoding="utf-8")
    files[1].write_text("[\n" + line % 3 + ",\n\n" + line % 4 + "]", encoding="utf-8")
    assert len(data.read_conversations(files)) == 4
    places = ["a.jsonl:1", "a.jsonl:3", "b.json:2", "b.json:4"]
    assert data_conversations.locate_records(files, range(4)) == places
    assert data_conversations.locate_records(files, [2, 0, 2]) == [places[2], places[0], places[2]]
    assert data_conversations.locate_records(files, []) == []


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"город": "Томск", "часы": [1]}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLING = {
    "messages": [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        TALK[1],
    ],
    "tools": TOOLS,
}


def loaded(file, **options):
    cache = str(file.parent / "cache")
    return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache, **options)


@pytest.mark.parametrize(
    "records",
    [
        [{"messages": TALK}, {"messages": WITH_SYSTEM}],
        [CALLING, {"messages": WITH_SYSTEM}],
        [{"messages": [*TALK, TALK[0], {**TALK[1], "weight": 0}]}, {"messages": TALK}],
    ],
)
def test_load_dataset_gives_the_rows_of_a_written_file(tmp_path, records):
    """Except for nulls: since version 5, `datasets` omits keys that a message lacks."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records), encoding="utf-8")
    made = data.read_conversations(source)
    file = data.write_conversations(made, tmp_path / "written.jsonl")
    rows = loaded(file)
    assert list(store.iter_conversations(rows)) == list(store.iter_conversations(made))
    assert rows.column_names == made.column_names
    if records[0] == {"messages": TALK}:
        assert list(rows) == list(made) and rows.features == made.features


def test_load_dataset_reads_a_long_file_with_the_features_of_the_conversations(tmp_path):
    """`datasets` takes the columns from the first 10 MB; here the first tools come later."""
    long = {"user": "слово " * 200_000, "bot": "да"}  # 2 MB
    file = tmp_path / "source.jsonl"
    lines = [json.dumps(each, ensure_ascii=False) for each in ([long] * 6 + [CALLING])]
    file.write_text("\n".join(lines), encoding="utf-8")
    made = data.read_conversations(file)
    rows = loaded(data.write_conversations(made, tmp_path / "written.jsonl"), features=made.features)
    assert list(store.iter_conversations(rows)) == list(store.iter_conversations(made))


def test_up_to_a_share_of_bad_records_is_left_out_and_counted(files, capsys):
    good = [f'{{"user": "{number}", "bot": "да"}}' for number in range(3)]
    paths = files(a=[good[0], "{", good[1]], b=['{"user": 1}', good[2]])
    made = data.read_conversations(paths, max_bad=0.5)
    assert [row["messages"][0]["content"] for row in made] == ["0", "1", "2"]
    assert capsys.readouterr().out.startswith(
        "2 files: 2 of 5 records cannot be used: left out. The first: a.jsonl:2: "
    )
    with pytest.raises(DataError, match="2 of 5 records cannot be used"):
        data.read_conversations(paths, max_bad=0.3)
    with pytest.raises(DataError, match="files without records: 1"):
        data.read_conversations(files(a=good, b=[]), max_bad=0.5)
