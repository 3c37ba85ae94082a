"""Files of records into checked conversations: every accepted shape, every kind of bad line, a split without leaks."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest

from saigakit import data
from saigakit.errors import DataError, SaigaError

TALK = [{"role": "user", "content": "Кто ты?"}, {"role": "assistant", "content": "Сайга."}]
WITH_SYSTEM = [{"role": "system", "content": "Отвечай кратко."}, *TALK]


@pytest.fixture
def read(tmp_path):
    """Content of a file, text or bytes or records, into the messages of its conversations."""

    def read_content(content, name="records.jsonl"):
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return [row["messages"] for row in data.read_conversations(tmp_path / name)]

    return read_content


@pytest.fixture
def problems(read):
    """The problems of one record or of a whole file's content."""

    def of(content):
        with pytest.raises(DataError) as caught:
            read([content] if isinstance(content, dict) else content)
        return caught.value.problems

    return of


def dataset(texts):
    """A Dataset of one-turn conversations that ask `texts`."""
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "да"}] for text in texts]
    return data._to_dataset(turns, "test")


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"messages": WITH_SYSTEM}, WITH_SYSTEM),
        ({"messages": [TALK[0], {"role": "bot", "content": "Сайга."}]}, TALK),
        ({"messages": [*TALK, *TALK]}, [*TALK, *TALK]),
        ({"messages": TALK, "system": "Отвечай кратко."}, WITH_SYSTEM),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": None}], "tools": []}, TALK),
        ({"user": "Кто ты?", "bot": "Сайга."}, TALK),
        ({"system": "Отвечай кратко.", "user": "Кто ты?", "bot": "Сайга."}, WITH_SYSTEM),
        ({"system": "", "user": "Кто ты?", "bot": "Сайга."}, TALK),
        ({"conversations": [{"from": "human", "value": "Кто ты?"}, {"from": "gpt", "value": "Сайга."}]}, TALK),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Отвечай кратко."},
                    {"from": "user", "value": "Кто ты?"},
                    {"from": "assistant", "value": "Сайга."},
                ]
            },
            WITH_SYSTEM,
        ),
    ],
)
def test_every_shape_becomes_the_same_messages(read, record, messages):
    assert read([record]) == [messages]


def test_a_damaged_gzip_file_is_an_error_with_its_name(read):
    whole = gzip.compress(json.dumps({"messages": TALK}).encode("utf-8"))
    assert read(whole, "records.jsonl.gz") == [TALK]
    for damaged in (whole[:-9], b"plain text", whole[:12] + b"\xff" * 30):
        with pytest.raises(SaigaError, match=r"records\.jsonl\.gz is not a whole gzip file"):
            read(damaged, "records.jsonl.gz")


def test_unusual_line_separators_inside_a_text_do_not_cut_it(read):
    text = "один\u2028два\u2029три\u0085четыре"
    assert read([{"user": text, "bot": "да"}])[0][0]["content"] == text


def test_texts_are_kept_to_the_letter(read):
    text = "  отступ\n\tтаб </s> <|im_end|> 🙂 漢 e\u0301\u200b \x00 "
    assert read([{"user": text, "bot": text}]) == [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ]


def test_many_batches_lose_nothing_and_keep_the_order(read, monkeypatch):
    monkeypatch.setattr(data, "_BATCH", 100)
    rows = [{"user": f"вопрос {index}", "bot": "ответ " * (index % 7 + 1)} for index in range(200)]
    assert [messages[0]["content"] for messages in read(rows)] == [row["user"] for row in rows]


def test_other_keys_of_a_record_are_counted_aloud(read, capsys):
    read([{"id": 1, "user": "а", "bot": "б"}, {"id": 2, "messages": TALK, "user": "Иван", "source": None}])
    said = capsys.readouterr().out
    assert "'id' in 2 records" in said
    assert "'user' in 1 records" in said
    assert "source" not in said


def test_nothing_is_said_when_everything_is_read(read, capsys):
    read([{"user": "а", "bot": "б"}])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "а", "output": "б"}, "record: has no messages, no conversations and no user and bot"),
        ({}, "(its keys: none)"),
        ({"messages": TALK, "conversations": []}, "record: holds two conversations"),
        ({"messages": TALK, "user": "а", "bot": "б"}, "record: holds two conversations"),
        ({"user": "а"}, "bot: is missing"),
        ({"bot": "а"}, "user: is missing"),
        ({"user": None, "bot": "а"}, "user: is missing"),
        ({"user": 5, "bot": "а"}, "user: is a number; it must be a text"),
        ({"user": True, "bot": "а"}, "user: is true or false"),
        ({"user": {"text": "а"}, "bot": "а"}, "user: is an object"),
        ({"user": "а", "bot": " \n\t"}, "bot: is empty"),
        ({"user": "", "bot": "а"}, "user: is empty"),
        ({"system": "  ", "user": "а", "bot": "а"}, "system: is empty"),
        ({"system": 1, "user": "а", "bot": "а"}, "system: is a number"),
        ({"messages": "Кто ты?"}, "messages: is a text; it must be a list"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": None}, "messages: is null"),
        ({"messages": ["Кто ты?", TALK[1]]}, "messages[0]: is a text; it must be an object with role and content"),
        ({"messages": [{"role": "user"}, TALK[1]]}, "messages[0].content: is missing"),
        ({"messages": [{"content": "а"}, TALK[1]]}, "messages[0].role: is missing"),
        ({"messages": [{"role": "narrator", "content": "а"}, TALK[1]]}, "messages[0].role: is 'narrator'; use system"),
        ({"messages": [{"role": 1, "content": "а"}, TALK[1]]}, "messages[0].role: is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, TALK[1]]}, "messages[0].content: is a list"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "messages[1]: 'weight' is an unknown key"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "б"}]}, "conversations[0].value: is missing"),
        ({"conversations": TALK}, "conversations[0].from: is missing"),
        ({"messages": [TALK[1], TALK[0]]}, "messages[0]: assistant speaks where user should"),
        ({"messages": [TALK[0], *TALK]}, "messages[1]: user speaks where assistant should"),
        ({"messages": [*TALK, WITH_SYSTEM[0], *TALK]}, "messages[2]: system speaks where user should"),
        ({"messages": WITH_SYSTEM, "system": "Ещё один."}, "messages[0]: system speaks where user should"),
        ({"messages": [*TALK, TALK[0]]}, "messages[2]: user has the last word"),
        ({"messages": [WITH_SYSTEM[0]]}, "messages[0]: system has the last word"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "tools: tools come in a later version"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{}]}]}, "'tool_calls' is there, and tools come in a later"),
        ({"messages": [*TALK, {"role": "tool", "content": "1"}]}, "messages[2].role: tools come in a later version"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "conversations[0].from: tools come in a later"),
    ],
)
def test_a_bad_record_is_named_with_its_file_line_and_field(problems, record, expected):
    good = json.dumps({"messages": TALK})
    found = problems(f"{good}\n{json.dumps(record)}\n{good}\n")
    assert all(problem.startswith("records.jsonl:2: ") for problem in found)
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5", "record: is a number; it must be an object"),
        ("null", "record: is null"),
        ('"text"', "record: is a text"),
        ('{"user": "a", "bot": "b"', "line: is broken JSON"),
        ('{"user": "\\ud83d", "bot": "b"}', "user: holds half a character ('\\ud83d')"),
        ('{"user": "a", "bot": "\\ude42\\ud83d"}', "bot: holds half a character"),
    ],
)
def test_a_bad_line_is_named_and_the_next_ones_are_checked(problems, line, expected):
    found = problems("\n".join(['{"user": "a", "bot": "b"}', line, "[]"]))
    assert found[0].startswith(f"records.jsonl:2: {expected}")
    assert found[1:] == ["records.jsonl:3: record: is empty; it must be an object"]


def test_a_whole_surrogate_pair_is_a_character(read):
    assert read(b'{"user": "\\ud83d\\ude42", "bot": "b"}')[0][0]["content"] == "🙂"


def test_every_problem_is_collected_and_fifty_are_shown(problems, read):
    bad = [{"user": "а"} for _ in range(70)]
    assert len(problems("\n".join(map(json.dumps, bad)))) == 70
    with pytest.raises(DataError) as caught:
        read([*bad, {"messages": TALK}])
    lines = str(caught.value).splitlines()
    assert "records.jsonl: 70 of 71 records cannot be used." in lines[0]
    assert len(lines) == 52
    assert lines[-1] == "  … and 20 more"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"[]", b"[ ]\n"])
def test_a_file_without_records_is_an_error(read, content):
    with pytest.raises(DataError, match="holds no record"):
        read(content)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(SaigaError, match=r"нет\.jsonl is not there"):
        data.read_conversations(tmp_path / "нет.jsonl")
    with pytest.raises(SaigaError, match="is a directory; name the file in it"):
        data.read_conversations(tmp_path)


def test_reading_and_splitting_leave_nothing_in_the_home_directory(tmp_path):
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
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_split_is_complete_and_no_prompt_is_on_both_sides(seed):
    rng = random.Random(seed)
    size = rng.randint(2, 120)
    turns = []
    for index in range(size):
        texts = [f"вопрос {rng.randint(0, size)}" for _ in range(rng.choice((1, 1, 1, 2)))]
        asked = [[{"role": "user", "content": text}, {"role": "assistant", "content": str(index)}] for text in texts]
        turns.append([message for pair in asked for message in pair])
    turns[0] = [{"role": "user", "content": "особый вопрос"}, {"role": "assistant", "content": "0"}]  # two at least
    conversations = data._to_dataset(turns, "test")
    sides = data.split_conversations(conversations, eval_fraction=rng.uniform(0.01, 0.99), seed=seed)
    train, held_out = ([row["messages"] for row in side] for side in sides)
    assert train and held_out
    assert sorted(map(json.dumps, train + held_out)) == sorted(map(json.dumps, turns))
    asked_in = [{text for messages in side for text in data.prompt_texts(messages)} for side in (train, held_out)]
    assert asked_in[0].isdisjoint(asked_in[1])


def test_a_split_is_the_same_for_the_same_seed_and_another_for_another():
    conversations = dataset([f"вопрос {index}" for index in range(100)])
    held_out = [
        data.split_conversations(conversations, eval_fraction=0.1, seed=seed)[1][:]["messages"] for seed in (1, 1, 2)
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_the_held_out_part_has_the_size_that_was_asked_for():
    train, held_out = data.split_conversations(dataset(map(str, range(200))), eval_fraction=0.05, seed=42)
    assert (len(train), len(held_out)) == (190, 10)


def test_at_least_one_is_held_out_and_at_least_one_is_trained_on():
    for fraction in (0.001, 0.999):
        assert [len(side) for side in data.split_conversations(dataset("аб"), eval_fraction=fraction, seed=1)] == [1, 1]


def test_letter_case_and_blanks_do_not_make_another_prompt():
    with pytest.raises(SaigaError, match="3 conversations with 1 distinct prompts cannot be split"):
        data.split_conversations(dataset(["Кто ты?", "кто  ты?", " Кто ты?\n"]), eval_fraction=0.5, seed=1)


def test_the_smallest_group_is_held_out_when_each_is_over_the_fraction():
    train, held_out = data.split_conversations(dataset("аааббвввв"), eval_fraction=0.01, seed=1)
    assert [row["messages"][0]["content"] for row in held_out] == ["б", "б"]
    assert len(train) == 7


def test_a_prompt_that_most_records_share_is_trained_on():
    conversations = dataset(["Продолжай"] * 80 + [f"вопрос {index}" for index in range(20)])
    train, held_out = data.split_conversations(conversations, eval_fraction=0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, "0.05", True, None, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(SaigaError, match="eval_fraction="):
        data.split_conversations(dataset("аб"), eval_fraction=fraction, seed=1)


def test_what_is_written_is_read_back_to_the_letter(tmp_path):
    texts = ["Ёлка", "один\u2028два\u0085три", '"кавычки" \\ \n', "\x00\x1f🙂"]
    file = data.write_conversations(dataset(texts), tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for row in data.read_conversations(file)] == texts


def test_a_written_file_has_readable_cyrillic_and_one_line_for_each_conversation(tmp_path):
    file = data.write_conversations(dataset(["Ёлка", "один\u2028два\u2029три\u0085"]), tmp_path / "out.jsonl")
    text = file.read_text(encoding="utf-8")
    assert "Ёлка" in text
    assert len(text.splitlines()) == 2
    assert file.read_bytes().count(b"\r") == 0


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    file = data.write_conversations(dataset(["а"]), tmp_path / "out.jsonl")
    before = file.read_bytes()
    with pytest.raises(KeyError):
        data.write_conversations([{"messages": TALK}, {}], file)
    assert file.read_bytes() == before


def test_the_system_prompt_of_all_conversations_is_known_where_there_is_one(tmp_path):
    def common(*prompts):
        rows = [
            {"system": prompt, "user": "а", "bot": "б"} if prompt else {"user": "а", "bot": "б"} for prompt in prompts
        ]
        file = tmp_path / "records.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return data.common_system_prompt(data.read_conversations(file))

    assert common("Ты — Сайга.", "Ты — Сайга.") == "Ты — Сайга."
    assert common("Ты — Сайга.", "Ты — кот.") is None
    assert common("Ты — Сайга.", None) is None
    assert common(None, None) is None
