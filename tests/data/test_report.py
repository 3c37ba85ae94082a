"""Run the stage 01_format on the tiny Saiga and show its results."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from saigakit import data
from saigakit.core import display, manifest
from saigakit.core.files import sha256
from saigakit.data import report
from saigakit.data.conversations import common_system_prompt, spread
from saigakit.errors import DataError, SaigaError
from saigakit.prompt import encoding, template
from saigakit.registry import MODELS


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return encoding.load_tokenizer("saiga_tiny")


@pytest.fixture(scope="module")
def stage(tiny, tmp_path_factory):
    return report.check_records(
        model="saiga_tiny", records=str(tiny / "records.jsonl"), run_dir=tmp_path_factory.mktemp("run")
    )


@pytest.fixture
def write(tmp_path):
    """Write (question, answer) pairs to a file of records."""

    def write_records(pairs, name="own.jsonl"):
        rows = [{"user": question, "bot": answer} for question, answer in pairs]
        file = tmp_path / name
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write_records


@pytest.fixture
def check(tmp_path):
    def check_in_run_dir(records, **parameters):
        return report.check_records(model="saiga_tiny", records=records, run_dir=tmp_path / "run", **parameters)

    return check_in_run_dir


def messages_of(file):
    return [row["messages"] for row in data.read_conversations(file)]


def counts_of(stage):
    return json.loads((stage / "report.json").read_text(encoding="utf-8"))


def test_the_stage_has_its_files_and_a_valid_manifest(stage, tiny, tokenizer):
    assert stage.name == "01_format"
    made = manifest.require_stage(stage, "01_format", model="saiga_tiny")
    assert sorted(made["outputs"]) == ["held_out.jsonl", "lengths.png", "report.json", "train.jsonl"]
    assert made["parameters"] == {
        "model": "saiga_tiny",
        "base_source": None,
        "records": "records.jsonl",
        "held_out": None,
        "eval_fraction": 0.15,
        "max_seq_length": 512,
        "seed": 42,
    }
    names = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
    tokenizer_files = {name: sha256(tiny / "base" / name) for name in names}
    assert made["inputs"] == {"records": manifest.hashes(tiny / "records.jsonl"), "tokenizer": tokenizer_files}
    assert made["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode("utf-8")).hexdigest()
    assert (stage / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prompts", "common"), [(["Ты — Сайга."] * 8, "Ты — Сайга."), (["Ты — кот.", ""] * 4, None), ([""] * 8, "")]
)
def test_the_manifest_has_the_common_system_prompt_of_training(tmp_path, check, prompts, common):
    rows = [{"user": f"{n}?", "bot": "б", **({"system": each} if each else {})} for n, each in enumerate(prompts)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made = check(str(file))
    assert manifest.read(made)["system_prompt"] == common
    assert common_system_prompt(data.read_conversations(made / "train.jsonl")) == common


def test_every_record_is_in_one_of_the_sets(stage, tiny):
    sides = [messages_of(stage / name) for name in ("train.jsonl", "held_out.jsonl")]
    assert [len(side) for side in sides] == [51, 9]
    assert sorted(map(json.dumps, sides[0] + sides[1])) == sorted(map(json.dumps, messages_of(tiny / "records.jsonl")))


def test_counts_the_tokens_that_training_gets(stage, tokenizer):
    for side, file in (("train", "train.jsonl"), ("held_out", "held_out.jsonl")):
        examples = [encoding.encode(messages, tokenizer) for messages in messages_of(stage / file)]
        counts = counts_of(stage)[side]
        assert counts["conversations"] == len(examples)
        assert counts["tokens"] == sum(len(example["input_ids"]) for example in examples)
        assert counts["longest"] == max(len(example["input_ids"]) for example in examples)
        assert counts["learned_tokens"] == sum(label != -100 for example in examples for label in example["labels"])


def test_records_and_held_out_may_be_lists(write, check, tmp_path):
    pairs = [(f"Вопрос номер {index} сюда?", "Да.") for index in range(8)]
    files = [write(pairs[start : start + 2], f"{start}.jsonl") for start in (0, 2, 4, 6)]
    made = check(files[:2], held_out=files[2:])
    assert manifest.read(made)["parameters"]["records"] == ["0.jsonl", "2.jsonl"]
    assert manifest.read(made)["parameters"]["held_out"] == ["4.jsonl", "6.jsonl"]
    assert list(manifest.read(made)["inputs"]["records"]) == ["0.jsonl", "2.jsonl"]
    assert [len(messages_of(made / name)) for name in ("train.jsonl", "held_out.jsonl")] == [4, 4]
    assert check(files[:2], held_out=files[2:]) == made


def test_a_list_of_one_name_is_that_name(tiny, check, capsys):
    made = check(str(tiny / "records.jsonl"))
    assert check([str(tiny / "records.jsonl")]) == made
    assert "is up to date, reusing it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "message"), [([], "records is empty"), (["a.jsonl", 7], "records=7 is not text; give")]
)
def test_rejects_a_list_without_names(check, names, message):
    with pytest.raises(SaigaError, match=message):
        check(names)


def test_a_split_is_offered_only_without_held_out(tmp_path, tiny, check, capsys):
    for split in ("train", "test"):
        (tmp_path / "talks" / split).mkdir(parents=True)
        shutil.copy(tiny / "records.jsonl", tmp_path / "talks" / split)
    name = str(tmp_path / "talks")
    with pytest.raises(SaigaError, match="was made differently"):
        check(name) and check(name, held_out=f"{name}:test")
    assert capsys.readouterr().out.count(f'held_out="{name}:test" uses it for evaluation.') == 1


def test_a_second_call_reuses_the_stage_and_reports_it(tiny, check, capsys):
    made = check(str(tiny / "records.jsonl"))
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    capsys.readouterr()
    assert check(str(tiny / "records.jsonl")) == made
    assert "up to date" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before


@pytest.mark.parametrize("changed", [{"eval_fraction": 0.5}, {"seed": 1}, {"max_seq_length": 100}])
def test_a_stage_with_other_parameters_is_not_overwritten(tiny, check, changed):
    made = check(str(tiny / "records.jsonl"))
    before = manifest.hashes(made)
    with pytest.raises(SaigaError, match=next(iter(changed))):
        check(str(tiny / "records.jsonl"), **changed)
    assert manifest.hashes(made) == before


def test_a_stage_with_other_records_is_not_overwritten(check, write):
    check(write([("а", "б"), ("в", "г")]))
    with pytest.raises(SaigaError, match="made differently"):
        check(write([("а", "б"), ("в", "д")]))


def test_bad_records_leave_nothing_in_the_run_directory(check, tmp_path, write):
    with pytest.raises(DataError, match=r"own\.jsonl:2: bot: is empty"):
        check(write([("а", "б"), ("в", "")]))
    assert not (tmp_path / "run").exists()


def test_names_the_bad_records_of_both_files_at_once(check, write):
    records, held_out = write([("а", "б"), ("в", "")]), write([("", "б")], "held.jsonl")
    with pytest.raises(DataError, match=r"1 of 2 records cannot be used.*1 of 1 record cannot be used") as caught:
        check(records, held_out=held_out)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["own.jsonl", "held.jsonl"]


def test_a_killed_stage_leaves_nothing_under_its_name_and_the_next_run_finishes(tiny, tmp_path, check):
    code = """
import os, signal, sys
from saigakit.data import report
write = report.write_conversations
def write_and_die(conversations, file):
    write(conversations, file)
    os.kill(os.getpid(), signal.SIGKILL)
report.write_conversations = write_and_die
report.check_records(model="saiga_tiny", records=sys.argv[1], run_dir=sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(tiny / "records.jsonl"), str(tmp_path / "run")]
    assert subprocess.run(command, check=False).returncode == -9
    lock, partial = sorted((tmp_path / "run").iterdir(), reverse=True)
    assert lock.name == ".saigakit.lock" and lock.stat().st_size == 0
    assert (partial / "files" / "01_format" / "train.jsonl").is_file()
    manifest.require_stage(check(str(tiny / "records.jsonl")), "01_format")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["01_format"]


def test_a_given_evaluation_set_is_used_unchanged(check, write):
    records = write([("а", "б"), ("в", "г")])
    held_out = write([("Д", "е"), ("ё", "ж"), (" а", "з")], "held.jsonl")
    made = check(records, held_out=held_out)
    assert messages_of(made / "train.jsonl") == messages_of(records)
    assert messages_of(made / "held_out.jsonl") == messages_of(held_out)
    assert counts_of(made)["held_out_prompts_in_train"] == 1


def test_its_own_split_never_asks_a_training_question(stage):
    assert counts_of(stage)["held_out_prompts_in_train"] == 0


def test_long_conversations_are_left_out_and_reported(check, write, tokenizer, capsys):
    pairs = [("а", "б"), ("в", "г"), ("д", "длинно " * 20)]
    longest = len(encoding.encode(messages_of(write(pairs))[2], tokenizer)["input_ids"])
    made = check(write(pairs), max_seq_length=longest - 1, eval_fraction=0.5)
    assert counts_of(made)["dropped"] == {"records": 1}
    said = f"0 of 3 conversations cut after an earlier answer and 1 left out, because of more than {longest - 1} tokens"
    assert f"own.jsonl: {said}: own.jsonl:3.\n" in capsys.readouterr().out
    assert counts_of(made)["left_out"] == {"records": ["own.jsonl:3"]}
    kept = messages_of(made / "train.jsonl") + messages_of(made / "held_out.jsonl")
    assert sorted(messages[0]["content"] for messages in kept) == ["а", "в"]


def test_keeps_a_conversation_of_exactly_the_limit(check, write, tokenizer, capsys):
    pairs = [("а", "б"), ("в", "длинно " * 20)]
    longest = len(encoding.encode(messages_of(write(pairs))[1], tokenizer)["input_ids"])
    assert counts_of(check(write(pairs), max_seq_length=longest))["dropped"] == {"records": 0}
    assert capsys.readouterr().out == "own.jsonl: 2 conversations, each is well-formed.\n"


def test_an_error_names_the_limit_and_the_shortest_length_if_nothing_fits(check, write, tmp_path):
    with pytest.raises(SaigaError, match=r"none of 2 conversations fits into max_seq_length=3 tokens; the shortest"):
        check(write([("а", "б"), ("в", "г")]), max_seq_length=3)
    assert not (tmp_path / "run" / "01_format").exists()


def test_rejects_a_limit_over_the_context_length(check, write):
    with pytest.raises(SaigaError, match="max_seq_length=4096 is over the context length of saiga_tiny, 1024"):
        check(write([("а", "б"), ("в", "г")]), max_seq_length=4096)


@pytest.mark.parametrize("given", [{"records": 5}, {"records": None}, {"records": "own.jsonl", "held_out": 7}])
def test_rejects_records_that_are_not_a_text_and_names_the_parameter(check, given):
    name, value = list(given.items())[-1]
    with pytest.raises(SaigaError, match=f"^{name}(={value} is not text| is not set); give a path or a name in quotes"):
        check(**given)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "512"])
def test_rejects_an_invalid_max_seq_length(check, wrong):
    with pytest.raises(SaigaError, match=f"max_seq_length={wrong!r} must be a whole number of at least 1"):
        check("own.jsonl", max_seq_length=wrong)


def test_finds_records_in_an_attached_input(tiny, check, tmp_path, monkeypatch):
    attached = tmp_path / "input" / "datasets" / "me" / "example"
    attached.mkdir(parents=True)
    shutil.copy(tiny / "records.jsonl", attached / "attached.jsonl")
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    assert counts_of(check("example/attached.jsonl"))["train"]["conversations"] == 51
    with pytest.raises(SaigaError, match=r"'other\.jsonl' is not there"):
        check("other.jsonl")


def test_finds_records_in_the_run_directory(tiny, check, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny / "records.jsonl", tmp_path / "run" / "beside.jsonl")
    assert counts_of(check("beside.jsonl"))["train"]["conversations"] == 51


def test_progress_is_printed_only_at_intervals(check, write, capsys, monkeypatch):
    monkeypatch.setattr(display, "EVERY_S", 0)
    check(write([("а", "б"), ("в", "г")]))
    lines = capsys.readouterr().out.splitlines()
    assert "own.jsonl: 2 of 2 conversations tokenised" in lines
    assert "train.jsonl: 1 of 1 conversation checked" in lines


def test_names_file_and_line_of_a_conversation_that_the_template_refuses(tiny, tmp_path):
    model = shutil.copytree(tiny / "base", tmp_path / "model")
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(refusing, encoding="utf-8")
    records = tmp_path / "records"
    records.mkdir()
    good, bad = '{"user": "а", "bot": "б"}\n', '{"system": "в", "user": "г", "bot": "д"}\n'
    (records / "1.jsonl").write_text(good + "\n\n" + bad, encoding="utf-8")
    (records / "2.jsonl").write_text(bad + good, encoding="utf-8")
    with pytest.raises(DataError, match=r"2 of 4 conversations cannot be tokenised") as caught:
        report.check_records(
            model=str(model),
            records=str(records),
            held_out=str(records / "2.jsonl"),
            run_dir=tmp_path / "run",
        )
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["1.jsonl:4", "2.jsonl:1", "2.jsonl:1"]
    assert all("no system" in problem for problem in caught.value.problems)


def test_counts_and_cuts_rows_if_the_final_turn_is_rendered_differently(tiny, tmp_path, capsys):
    model = shutil.copytree(tiny / "base", tmp_path / "model")
    thoughtful = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' }}"
        "{{ 'так: ' if loop.last and m['role'] == 'assistant' }}{{ m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(thoughtful, encoding="utf-8")
    turns = [
        ("user", "Кто ты и что умеешь?"),
        ("assistant", "Сайга"),
        ("user", "А ещё что?"),
        ("assistant", "да " * 90),
    ]
    lines = [
        json.dumps({"messages": [{"role": role, "content": f"{text} {number}"} for role, text in some]})
        for number in range(9)
        for some in (turns, turns[:2])
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")

    def made(limit):
        stage = report.check_records(
            model=str(model), records=str(file), run_dir=tmp_path / str(limit), max_seq_length=limit
        )
        facts = [report.read_report(stage)[side] for side in ("train", "held_out")]
        return stage, [sum(side[key] for side in facts) for key in ("conversations", "rows", "turns", "learned_tokens")]

    stage, counts = made(1000)
    assert counts[:3] == [18, 27, 27]
    assert "rows, one for each answer" in str(report.summary(stage))
    assert "так: " in str(report.examples(stage, encoding.load_tokenizer(str(model)), count=18))
    tokenizer = encoding.load_tokenizer(str(model))
    rows = [row for each in encoding.encode_rows(data.read_conversations(file), tokenizer) for row in each]
    assert counts[3] == sum(label != -100 for row in rows for label in row["labels"])
    stage, counts = made(100)
    assert counts[:3] == [18, 18, 18]
    assert "9 of 18 conversations cut after an earlier answer" in capsys.readouterr().out
    assert "rows, one for each answer" not in str(report.summary(stage))


def test_the_summary_has_all_counts(check, write):
    pairs = [("а", "[]"), ("а", "[]"), ("</s> и <s> </s>", "</s>"), ("в </s>", '{"terms": []}')]
    held_out = write([("а", "Нет."), ("г", "да")], "held.jsonl")
    made = check(write(pairs), held_out=held_out)
    rows = {name.split(" · ")[1]: tuple(cells) for name, *cells in report.summary(made).rows}
    assert rows["conversations"] == ("4", "2")
    assert rows["duplicates"] == ("1", "0")
    assert rows["one question, different answers"] == ("0", "0")
    assert rows["question is in training"] == ("–", "1")
    assert rows["answers that nothing was found"] == ("3 (75.0%)", "1 (50.0%)")
    assert rows["special tokens as text"] == ("</s>: 2, <s>: 1", "0")
    assert rows["too long, last turns cut off"] == ("0", "0")
    assert rows["without trained tokens"] == rows["answers without an end token"] == ("0", "0")
    assert rows["too long, left out"] == ("0", "0")
    assert rows["trained tokens"][0].endswith("%")


def test_the_summary_of_an_unfinished_stage_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(SaigaError, match="run 01_format first"):
        report.summary(tmp_path / "01_format")


def test_a_long_conversation_loses_complete_turns_and_is_counted(check, tmp_path, tokenizer, capsys):
    turn = [{"role": "user", "content": "в"}, {"role": "assistant", "content": "г"}]
    short = [{"role": "user", "content": "а"}, {"role": "assistant", "content": "б"}]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (turn * 4, short)), encoding="utf-8")
    limit = len(encoding.encode(turn * 2, tokenizer)["input_ids"])
    made = check(str(file), max_seq_length=limit, eval_fraction=0.5)
    assert counts_of(made)["cut"] == {"records": 1}
    kept = messages_of(made / "train.jsonl") + messages_of(made / "held_out.jsonl")
    assert sorted(map(len, kept)) == [2, 4]
    assert "1 of 2 conversations cut after an earlier answer and 0 left out" in capsys.readouterr().out


def test_the_stage_keeps_tools_and_calls(check, tmp_path):
    tools = [{"type": "function", "function": {"name": "найти", "parameters": {"type": "object"}}}]
    call = {"function": {"name": "найти", "arguments": '{"что": "</s>"}'}}
    rows = [
        {
            "tools": tools,
            "messages": [{"role": "user", "content": f"в {i}"}, {"role": "assistant", "tool_calls": [call]}],
        }
        for i in range(4)
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
    made = check(str(file), eval_fraction=0.5)
    written = data.read_conversations(made / "train.jsonl")[0]
    assert json.loads(written["tools"]) == tools
    assert written["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"что": "</s>"}'
    counts = counts_of(made)["train"]
    assert (counts["with_tools"], counts["no_call"]) == (2, 0)
    assert counts["special_tokens_where"] == {"</s>": {"arguments": 2}}
    rows = {name.split(" · ")[1]: tuple(cells) for name, *cells in report.summary(made).rows}
    assert rows["tools but no call"] == ("0 / 2", "0 / 2")
    assert any("tools but no call" in row[0] for row in report.advice(made).rows)


NEAR = "В старом парке у реки каждое утро гуляют люди с собаками, а дети кормят уток хлебом и смеются у фонтана. "


def test_reports_an_evaluation_record_that_is_nearly_in_training(check, write):
    records = write([(NEAR + "Найди термины.", "[]"), ("Совсем другой вопрос о погоде на севере страны", "да")])
    held_out = write([(NEAR.replace("хлебом", "зерном") + "Найди термины.", "[]")], "held.jsonl")
    made = check(records, held_out=held_out)
    near = counts_of(made)["near_duplicates"]
    assert near["held_out_in_train"] == 1
    assert [text[:15] for text in near["pairs"][0]] == [NEAR[:15]] * 2
    assert NEAR[:60] in report.near_pairs(made)
    assert any("nearly the same as in training: 1 of 1" in row[0] for row in report.advice(made).rows)


def test_the_advice_ends_with_steps_and_hours(stage):
    last = report.advice(stage).rows[-1][0]
    assert last.startswith("шагов за эпоху · steps per epoch: 4; ")
    assert "T4 ×2" in last and "quota" in last


def test_examples_have_their_trained_text_marked(stage, tokenizer):
    marked = report.examples(stage, tokenizer, count=2)
    for prompt, conversation in zip(marked.prompts, spread(messages_of(stage / "train.jsonl"), 2), strict=True):
        assert f"⟦{conversation[-1]['content']}</s>⟧" in str(marked)
        assert "".join(piece.text for piece in prompt.pieces if piece.is_trained).endswith("</s>")


@pytest.mark.parametrize("name", ["records.jsonl", "part-*.jsonl", "."])
def test_records_of_several_files_form_one_set(check, write, tmp_path, name):
    (tmp_path / "own").mkdir()
    write([("а", "б"), ("в", "г")], "own/part-1.jsonl")
    write([("д", "е")], "own/part-2.jsonl")
    write([("д", "е"), ("а", "б"), ("в", "г")], "own/records.jsonl")
    made = check(str(tmp_path / "own" / name), eval_fraction=0.4)
    counted = counts_of(made)
    total = counted["train"]["conversations"] + counted["held_out"]["conversations"]
    assert total == (6 if name == "." else 3)


def test_a_stage_with_another_tokenizer_is_not_overwritten(tiny, write, tmp_path):
    model = shutil.copytree(tiny / "base", tmp_path / "model")
    records = write([("а", "б"), ("в", "г")])
    chat_template = template.read_chat_template(MODELS["saiga_tiny"], tiny / "base")
    (model / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    report.check_records(model=str(model), records=records, run_dir=tmp_path / "run")
    (model / "chat_template.jinja").write_text(chat_template + "{# another #}", encoding="utf-8")
    with pytest.raises(SaigaError, match="made differently"):
        report.check_records(model=str(model), records=records, run_dir=tmp_path / "run")


def test_reads_an_older_report_without_row_counts(stage, tmp_path):
    older = shutil.copytree(stage, tmp_path / "01_format")
    facts = counts_of(older)
    for side in ("train", "held_out"):
        del facts[side]["rows"], facts[side]["different_answers"]
    (older / "report.json").write_text(json.dumps(facts), encoding="utf-8")
    assert str(report.summary(older)) == str(report.summary(stage))
    assert str(report.advice(older)) == str(report.advice(stage))


@pytest.mark.parametrize(
    "pairs",
    [[("Кто ты?", "Я")], [("Кто ты?", "Я")] * 2, [("Кто ты такой сегодня?", "Я"), ("кто ты такой  сегодня?", "Он")]],
)
def test_records_too_few_to_split_all_become_the_training_set(check, write, pairs):
    with pytest.raises(SaigaError, match="cannot be split"):
        check(write(pairs))
    made = check(write(pairs), may_lack_held_out=True)
    assert len(messages_of(made / "train.jsonl")) == len(pairs)
    assert (made / "held_out.jsonl").read_text(encoding="utf-8") == ""
    assert str(report.summary(made)) and len(report.advice(made).rows) >= 2
    assert any("There is no evaluation set" in row[0] for row in report.advice(made).rows)


def test_enough_records_are_split_even_if_they_need_not_be(check, write):
    made = check(write([("а", "б"), ("в", "г")]), may_lack_held_out=True)
    assert counts_of(made)["held_out"]["conversations"] == 1


def test_the_first_question_with_different_answers_is_shown_with_its_lines(check, write):
    records = write([("длинный", "да " * 900), ("в", "б"), ("Где он?", "[]"), ("г", "д"), ("где  он?", '["тут"]')])
    made = check(records, held_out=write([("x", "1"), ("x", "2")], "held.jsonl"))
    shown = {name.split(" · ")[1]: tuple(cells) for name, *cells in report.summary(made).rows}
    assert shown["one question, different answers"] == ("1", "1")
    advice = "\n".join(row[0] for row in report.advice(made).rows)
    assert 'keep one: «Где он?» → «[]» (own.jsonl:3), «["тут"]» (own.jsonl:5)' in advice
    assert "keep one: «x» → «1» (held.jsonl:1), «2» (held.jsonl:2)" in advice


def test_different_answers_are_quoted_from_shortly_before_they_differ(check, write):
    alike = '[{"term": "атом", "definition": "мельчайшая частица вещества, носитель его свойств"}'
    made = check(write([("Определения", alike + "]"), ("Определения", alike + ', {"term": "ион"}]'), ("в", "г")]))
    advice = "\n".join(row[0] for row in report.advice(made).rows)
    assert "keep one: «Определения» → " in advice
    assert f"«…{alike[-20:]}]» (own.jsonl:1)" in advice
    assert f'«…{alike[-20:]}, {{"term": "ион"}}]» (own.jsonl:2)' in advice


def test_of_different_answers_the_last_trained_one_is_quoted(check, tmp_path):
    def line(answer):
        turns = [("user", "q"), ("assistant", answer), ("user", "ок"), ("assistant", "конец")]
        messages = [{"role": role, "content": text} for role, text in turns]
        messages[-1]["weight"] = 0
        return json.dumps({"messages": messages}, ensure_ascii=False)

    (tmp_path / "w.jsonl").write_text("\n".join([line("РАЗ"), line("ДВА"), line("РАЗ")]), encoding="utf-8")
    made = check(str(tmp_path / "w.jsonl"), may_lack_held_out=True)
    advice = "\n".join(row[0] for row in report.advice(made).rows)
    assert "«q» → " in advice and "«ДВА» (w.jsonl:2)" in advice and "«конец»" not in advice


def test_damaged_records_are_counted_with_three_places(check, write):
    made = check(write([("а", "б"), *[(f"РџСЂРёРІРµС‚ {n}", "\x00") for n in range(5)], ("в", "мои\u0306")]))
    assert counts_of(made)["damaged"]["records"] == {
        "mojibake": [5, ["own.jsonl:2", "own.jsonl:3", "own.jsonl:4"]],
        "control": [5, ["own.jsonl:2", "own.jsonl:3", "own.jsonl:4"]],
        "decomposed": [1, ["own.jsonl:7"]],
    }
    assert any("wrong encoding: 5; read the original files" in row[0] for row in report.advice(made).rows)


def test_names_fifty_of_those_left_out_and_warns(check, write, capsys):
    made = check(write([("а", "б"), ("в", "г"), *[(f"д {n}", "длинно " * 300) for n in range(53)]]))
    assert ": own.jsonl:3, own.jsonl:4, " in (said := capsys.readouterr().out)
    assert said.endswith(", own.jsonl:52 and 3 more.\n")
    assert len(counts_of(made)["left_out"]["records"]) == 50
    assert any("(records): 53 of 55, 96.4%" in row[0] for row in report.advice(made).rows)
