"""The stage 01_format on the tiny Saiga, and what a reader sees of it."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import tokenizers

from saigakit import data, manifest, report, tokenization
from saigakit.errors import DataError, SaigaError

DIALOGUE = [
    {"role": "user", "content": "Что такое </s> и <b>? 🙂"},
    {"role": "assistant", "content": "Конец."},
    {"role": "user", "content": "Точно?"},
    {"role": "assistant", "content": "Да."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tokenization.load_tokenizer("saiga_tiny")


@pytest.fixture(scope="module")
def stage(tiny, tmp_path_factory):
    return report.check_records(
        model="saiga_tiny", records=str(tiny / "records.jsonl"), run_dir=tmp_path_factory.mktemp("run")
    )


@pytest.fixture
def write(tmp_path):
    """(question, answer) pairs into a file of records."""

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


def test_the_stage_has_its_files_and_a_manifest_that_the_next_stage_accepts(stage, tiny, tokenizer):
    assert stage.name == "01_format"
    made = manifest.require_stage(stage, "01_format", model="saiga_tiny")
    assert sorted(made["outputs"]) == ["held_out.jsonl", "lengths.png", "report.json", "train.jsonl"]
    assert made["parameters"] == {
        "model": "saiga_tiny",
        "base_source": None,
        "records": "records.jsonl",
        "held_out": None,
        "eval_fraction": 0.05,
        "max_seq_length": 512,
        "seed": 42,
    }
    assert made["inputs"] == {"records": manifest.hashes(tiny / "records.jsonl")}
    assert made["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode("utf-8")).hexdigest()
    assert (stage / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_every_record_is_on_one_side(stage, tiny):
    sides = [messages_of(stage / name) for name in ("train.jsonl", "held_out.jsonl")]
    assert [len(side) for side in sides] == [57, 3]
    assert sorted(map(json.dumps, sides[0] + sides[1])) == sorted(map(json.dumps, messages_of(tiny / "records.jsonl")))


def test_counted_tokens_are_those_that_training_gets(stage, tokenizer):
    for side, file in (("train", "train.jsonl"), ("held_out", "held_out.jsonl")):
        examples = [tokenization.encode(messages, tokenizer) for messages in messages_of(stage / file)]
        counts = counts_of(stage)[side]
        assert counts["conversations"] == len(examples)
        assert counts["tokens"] == sum(len(example["input_ids"]) for example in examples)
        assert counts["longest"] == max(len(example["input_ids"]) for example in examples)
        assert counts["learned_tokens"] == sum(label != -100 for example in examples for label in example["labels"])


def test_a_second_call_keeps_the_stage_and_says_so(tiny, check, capsys):
    made = check(str(tiny / "records.jsonl"))
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    capsys.readouterr()
    assert check(str(tiny / "records.jsonl")) == made
    assert "kept" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before


@pytest.mark.parametrize("changed", [{"eval_fraction": 0.5}, {"seed": 1}, {"max_seq_length": 100}])
def test_a_stage_of_other_parameters_is_not_overwritten(tiny, check, changed):
    made = check(str(tiny / "records.jsonl"))
    before = manifest.hashes(made)
    with pytest.raises(SaigaError, match=next(iter(changed))):
        check(str(tiny / "records.jsonl"), **changed)
    assert manifest.hashes(made) == before


def test_a_stage_of_other_records_is_not_overwritten(check, write):
    check(write([("а", "б"), ("в", "г")]))
    with pytest.raises(SaigaError, match="made differently"):
        check(write([("а", "б"), ("в", "д")]))


def test_bad_records_leave_nothing_in_the_run_directory(check, tmp_path, write):
    with pytest.raises(DataError, match=r"own\.jsonl:2: bot: is empty"):
        check(write([("а", "б"), ("в", "")]))
    assert not (tmp_path / "run").exists()


def test_a_killed_stage_leaves_nothing_under_its_name_and_the_next_run_finishes(tiny, tmp_path, check):
    code = """
import os, signal, sys
from saigakit import data, report
write = data.write_conversations
def write_and_die(conversations, file):
    write(conversations, file)
    os.kill(os.getpid(), signal.SIGKILL)
data.write_conversations = write_and_die
report.check_records(model="saiga_tiny", records=sys.argv[1], run_dir=sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(tiny / "records.jsonl"), str(tmp_path / "run")]
    assert subprocess.run(command, check=False).returncode == -9
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".01_format.partial"]
    assert (tmp_path / "run" / ".01_format.partial" / "train.jsonl").is_file()
    manifest.require_stage(check(str(tiny / "records.jsonl")), "01_format")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["01_format"]


def test_a_held_out_file_of_ones_own_is_used_as_it_is(check, write, capsys):
    records = write([("а", "б"), ("в", "г")])
    held_out = write([("Д", "е"), ("ё", "ж"), (" а", "з")], "held.jsonl")
    made = check(records, held_out=held_out)
    assert messages_of(made / "train.jsonl") == messages_of(records)
    assert messages_of(made / "held_out.jsonl") == messages_of(held_out)
    assert counts_of(made)["held_out_prompts_in_train"] == 1
    assert "Asked in train too: 1 of 3" in capsys.readouterr().out


def test_a_split_of_its_own_never_asks_in_held_out_what_is_in_train(stage):
    assert counts_of(stage)["held_out_prompts_in_train"] == 0


def test_what_is_too_long_is_left_out_counted_and_said(check, write, tokenizer, capsys):
    pairs = [("а", "б"), ("в", "г"), ("д", "длинно " * 20)]
    longest = len(tokenization.encode(messages_of(write(pairs))[2], tokenizer)["input_ids"])
    made = check(write(pairs), max_seq_length=longest - 1, eval_fraction=0.5)
    assert counts_of(made)["dropped"] == {"records": 1}
    assert f"1 of 3 conversations are longer than {longest - 1} tokens" in capsys.readouterr().out
    kept = messages_of(made / "train.jsonl") + messages_of(made / "held_out.jsonl")
    assert sorted(messages[0]["content"] for messages in kept) == ["а", "в"]


def test_a_conversation_of_just_the_limit_is_kept(check, write, tokenizer, capsys):
    pairs = [("а", "б"), ("в", "длинно " * 20)]
    longest = len(tokenization.encode(messages_of(write(pairs))[1], tokenizer)["input_ids"])
    assert counts_of(check(write(pairs), max_seq_length=longest))["dropped"] == {"records": 0}
    assert capsys.readouterr().out == ""


def test_an_error_names_both_lengths_when_nothing_fits(check, write, tmp_path):
    with pytest.raises(SaigaError, match=r"all 2 conversations are longer than max_seq_length=3 tokens, the shortest"):
        check(write([("а", "б"), ("в", "г")]), max_seq_length=3)
    assert not (tmp_path / "run" / "01_format").exists()


def test_a_limit_over_the_context_of_the_model_is_refused(check, write):
    with pytest.raises(SaigaError, match="max_seq_length=4096 is over the context length of saiga_tiny, 1024"):
        check(write([("а", "б"), ("в", "г")]), max_seq_length=4096)


def test_records_are_found_in_an_attached_input(tiny, check, tmp_path, monkeypatch):
    attached = tmp_path / "input" / "datasets" / "me" / "example"
    attached.mkdir(parents=True)
    shutil.copy(tiny / "records.jsonl", attached / "attached.jsonl")
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(tmp_path / "input"))
    assert counts_of(check("example/attached.jsonl"))["train"]["conversations"] == 57
    with pytest.raises(SaigaError, match=r"'other\.jsonl' is not there"):
        check("other.jsonl")


def test_records_are_found_in_the_run_directory(tiny, check, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny / "records.jsonl", tmp_path / "run" / "beside.jsonl")
    assert counts_of(check("beside.jsonl"))["train"]["conversations"] == 57


def test_progress_is_printed_by_the_clock_alone(check, write, capsys, monkeypatch):
    monkeypatch.setattr(report, "EVERY_S", 0)
    check(write([("а", "б"), ("в", "г")]))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"own.jsonl: {done} of 2 conversations tokenised" for done in (1, 2)]


def test_a_template_that_refuses_a_conversation_is_named_with_its_number(tiny, tmp_path, write):
    model = shutil.copytree(tiny / "base", tmp_path / "model")
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(refusing, encoding="utf-8")
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"user": "а", "bot": "б"}\n{"system": "в", "user": "г", "bot": "д"}\n', encoding="utf-8")
    with pytest.raises(SaigaError, match=r"mixed\.jsonl, conversation 2: .*no system"):
        report.check_records(model=str(model), records=str(file), run_dir=tmp_path / "run")


def test_the_summary_counts_what_a_reader_must_know(check, write):
    pairs = [("а", "[]"), ("а", "[]"), ("</s> и <s> </s>", "</s>"), ("в </s>", '{"terms": []}')]
    held_out = write([("а", "Нет."), ("г", "да")], "held.jsonl")
    made = check(write(pairs), held_out=held_out)
    rows = {name.split(" · ")[1]: tuple(cells) for name, *cells in report.summary(made).rows}
    assert rows["conversations"] == ("4", "2")
    assert rows["duplicates"] == ("1", "0")
    assert rows["asked in train too"] == ("–", "1")
    assert rows["answers that say nothing found"] == ("3", "1")
    assert rows["special tokens as text"] == ("</s>: 2, <s>: 1", "0")
    assert rows["too long, left out"] == ("0", "0")
    assert rows["learned"][0].endswith("%")


def test_the_summary_of_an_unfinished_stage_says_what_to_run(tmp_path):
    with pytest.raises(SaigaError, match="run 01_format first"):
        report.summary(tmp_path / "01_format")


@pytest.mark.parametrize(
    "answer", ["[]", " [ ] ", "{}", "null", '""', '{"terms": []}', '[{"a": null}]', "нет", "Нет.", "Ничего не найдено"]
)
def test_an_answer_says_that_nothing_was_found(answer):
    assert report.says_nothing_found(answer)


@pytest.mark.parametrize("answer", ["[0]", "false", "0", '[{"term": "атом"}]', "Нет, это не так", "[", "[" * 100_000])
def test_an_answer_says_something(answer):
    assert not report.says_nothing_found(answer)


def bars(figure):
    """(left edge, right edge, height) of every bar that is there."""
    found = [bar for container in figure.axes[0].containers for bar in container]
    return [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in found if bar.get_height()]


def test_the_picture_shows_every_conversation_and_no_bar_crosses_the_limit():
    lengths = [*range(1, 300), 1000, 5000]
    drawn = bars(report.plot(lengths, 256))
    assert sum(height for _, _, height in drawn) == len(lengths)
    assert sum(height for left, _, height in drawn if left > 256) == sum(length > 256 for length in lengths)
    assert all(right <= 256.5 or left >= 256.5 for left, right, _ in drawn)


@pytest.mark.parametrize(("lengths", "entries"), [([5, 7], 2), ([5, 9], 3), ([9], 3), ([8], 2), ([1], 2)])
def test_the_legend_names_what_is_too_long_only_where_something_is(lengths, entries):
    figure = report.plot(lengths, 8)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == entries
    assert "max_seq_length" in texts[-1]
    assert sum(height for _, _, height in bars(figure)) == len(lengths)


def test_the_prompt_has_exactly_the_ids_and_the_learned_ones_of_training(tokenizer):
    example = tokenization.encode(DIALOGUE, tokenizer)
    shown = report.show(DIALOGUE, tokenizer).pieces
    assert [token_id for piece in shown for token_id in piece.ids] == example["input_ids"]
    learned = [piece.is_learned for piece in shown for _ in piece.ids]
    assert learned == [label != tokenization.IGNORE_INDEX for label in example["labels"]]
    assert report.show({"messages": DIALOGUE}, tokenizer).pieces == shown


def test_only_what_the_template_spells_is_a_special_token(tokenizer):
    shown = report.show(DIALOGUE, tokenizer).pieces
    special = [piece.text for piece in shown if piece.is_special]
    assert special == ["<s>", "</s>"] * 4
    assert "</s>" in "".join(piece.text for piece in shown if not piece.is_special)


def test_a_character_of_several_tokens_is_one_piece(tokenizer):
    smile = next(piece for piece in report.show(DIALOGUE, tokenizer).pieces if "🙂" in piece.text)
    assert (smile.text, len(smile.ids)) == ("🙂", 4)


def test_a_byte_level_tokenizer_is_shown_in_cyrillic():
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = tokenizers.Tokenizer(models.BPE({character: index for index, character in enumerate(sorted(alphabet))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    byte_level = tokenization.FastTokenizer(raw, chat_template, {})
    shown = report.show(DIALOGUE, byte_level).pieces
    text = "".join(piece.text for piece in shown)
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in DIALOGUE).strip(" ")
    assert ("Ч", 2) in [(piece.text, len(piece.ids)) for piece in shown]


def test_a_replacement_character_in_a_text_swallows_nothing(tokenizer):
    dialogue = [{"role": "user", "content": "\ufffd\ufffd конец"}, DIALOGUE[1]]
    shown = report.show(dialogue, tokenizer).pieces
    assert max(len(piece.ids) for piece in shown) == 4
    assert "\ufffd\ufffd конец" in "".join(piece.text for piece in shown)
    assert [i for piece in shown for i in piece.ids] == tokenization.encode(dialogue, tokenizer)["input_ids"]


def test_the_terminal_shows_pieces_with_ids_and_stars_at_learned_ones(tokenizer):
    lines = str(report.show([{"role": "user", "content": "Да"}, DIALOGUE[1]], tokenizer)).splitlines()
    start, end, user = tokenizer.special_tokens["<s>"], tokenizer.special_tokens["</s>"], tokenizer.encode_text("user")
    assert lines[0] == f"<s>[{start}] ␣user[{user[0]}] ⏎[13]"
    assert f"</s>[{end}]* " in lines[3]
    assert "*" not in "".join(lines[:3])
    assert lines[-1].startswith("* учится · learned: ")


def test_the_notebook_shows_texts_as_text_with_a_legend_in_two_languages(tokenizer):
    page = report.show(DIALOGUE, tokenizer)._repr_html_()
    assert "&lt;s&gt;" in page
    assert "<s>" not in page
    assert "<b>" not in page
    for words in ("учится · learned", "служебный токен · special token", "только читает · only read"):
        assert page.count(words) == 1
