"""Count facts on the examples that training gets, and warn about them."""

import json

import pytest

from saigakit.data import audit
from saigakit.data.audit import SplitAudit
from saigakit.prompt import encoding
from saigakit.prompt.encoding import IGNORE_INDEX

END = 2
SPECIAL = ("<s>", "</s>", "</s>x", "[INST]", " ")
LEARNED = {"input_ids": [1, 5, 6, END], "labels": [IGNORE_INDEX, IGNORE_INDEX, 6, END]}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
TOOLS = json.dumps([TOOL])


def dialogue(question="а", answer="б"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def calling(arguments, call_id="1"):
    function = {"name": "search", "arguments": json.dumps(arguments, ensure_ascii=False)}
    called = {"id": call_id, "type": "function", "function": function}
    return [
        {"role": "user", "content": "а"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "в", "tool_call_id": call_id},
        {"role": "assistant", "content": "г"},
    ]


def counted(example):
    return audit.count_tokens([example], frozenset({END}))


def facts_of(*conversations, example=LEARNED):
    side = SplitAudit(SPECIAL)
    for conversation in conversations:
        side.add(conversation if isinstance(conversation, dict) else {"messages": conversation}, counted(example))
    return side.facts()


@pytest.fixture
def facts():
    """Facts without warnings."""
    sound = {"conversations": 1000, "tokens": 10_000, "learned_tokens": 5000, "answers": 1000, "structured": 0}
    return {**facts_of(), **sound}


def warned(train, held_out, near=0):
    """The warnings in English."""
    return [warning.split(" · ")[1] for warning in audit.warnings(train, held_out, near_in_train=near)]


def test_counts_the_tokens_of_the_examples(tiny):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    conversations = [dialogue("Что это?", "Атом."), [*dialogue("Да?", "Да."), *dialogue("Точно?", "Точно, да.")]]
    side = SplitAudit(tokenizer.special_tokens)
    examples = [encoding.encode(messages, tokenizer) for messages in conversations]
    for messages, example in zip(conversations, examples, strict=True):
        side.add({"messages": messages}, audit.count_tokens([example], encoding.end_of_turn_ids(tokenizer)))
    facts = side.facts()
    assert facts["conversations"] == 2
    assert facts["turns"] == 3
    assert facts["tokens"] == sum(len(example["input_ids"]) for example in examples)
    assert facts["longest"] == len(examples[1]["input_ids"])
    learned = [label for example in examples for label in example["labels"] if label != IGNORE_INDEX]
    assert facts["learned_tokens"] == len(learned)
    assert facts["answers_without_end"] == facts["without_learned_tokens"] == 0


def test_facts_are_json():
    facts = facts_of(dialogue("<s>"), dialogue("<s>"))
    assert json.loads(json.dumps(facts)) == facts


def test_an_empty_set_has_facts():
    facts = facts_of()
    assert (facts["conversations"], facts["duplicates"], facts["longest"]) == (0, 0, 0)


def test_facts_are_available_between_conversations():
    side = SplitAudit(SPECIAL)
    for count in (1, 2):
        side.add({"messages": dialogue()}, counted(LEARNED))
        assert side.facts()["conversations"] == count


def test_an_exact_duplicate_has_the_same_roles_contents_calls_and_tools():
    same = facts_of(dialogue(), dialogue(), calling({"q": 1}), calling({"q": 1}, call_id="2"))
    assert same["duplicates"] == 2
    tooled = {"messages": dialogue(), "tools": TOOLS}
    other = facts_of(dialogue(), dialogue("а "), dialogue("аб", ""), calling({"q": 1}), calling({"q": 2}), tooled)
    assert other["duplicates"] == 0


def test_counts_conversations_without_trained_tokens():
    example = {"input_ids": [1, 5], "labels": [IGNORE_INDEX, IGNORE_INDEX]}
    assert facts_of(dialogue(), example=example)["without_learned_tokens"] == 1


def test_counts_answers_without_an_end_at_any_position():
    labels = [IGNORE_INDEX, 7, 8, IGNORE_INDEX, 9, END, IGNORE_INDEX, 7]
    facts = facts_of(dialogue(), example={"input_ids": [0] * 8, "labels": labels})
    assert facts["answers_without_end"] == 2
    assert facts["longest_answer"] == 2


@pytest.mark.parametrize(
    "answer",
    [
        "[]",
        " [ ] ",
        "{}",
        "null",
        '""',
        '{"terms": []}',
        '[{"a": null}]',
        "нет",
        "Нет.",
        "Терминов нет.",
        "Термины не найдены",
        "В тексте ничего не найдено",
        "No terms found",
    ],
)
def test_recognises_answers_that_nothing_was_found(answer):
    assert facts_of(dialogue(answer=answer))["nothing_found"] == 1


@pytest.mark.parametrize("answer", ["[0]", "false", "0", '[{"term": "атом"}]', "Нет, это не так", "[", "[" * 100_000])
def test_other_answers_found_something(answer):
    assert facts_of(dialogue(answer=answer))["nothing_found"] == 0


def test_only_lists_and_objects_are_structured_answers():
    answers = ["[1]", ' {"a": 1}\n', "1", '"a"', "null", "текст [1]", "[1"]
    facts = facts_of(*(dialogue(answer=answer) for answer in answers))
    assert (facts["structured"], facts["answers"]) == (2, 7)


def test_only_the_last_answer_is_judged():
    assert facts_of([*dialogue(answer="[]"), *dialogue(answer="текст")])["nothing_found"] == 0


def test_a_final_call_is_not_an_answer():
    facts = facts_of({"messages": calling({})[:2], "tools": TOOLS})
    assert (facts["answers"], facts["nothing_found"], facts["structured"]) == (0, 0, 0)


def test_counts_conversations_with_tools_but_no_call():
    made = [{"messages": calling({}), "tools": TOOLS}, {"messages": dialogue(), "tools": TOOLS}, dialogue()]
    facts = facts_of(*made)
    assert (facts["with_tools"], facts["no_call"]) == (2, 1)


def test_a_special_token_is_counted_once_per_conversation_and_by_place():
    system = {"role": "system", "content": "[INST]"}
    facts = facts_of([system, *dialogue("</s> и </s>", "</s>")], dialogue("</s>x"), dialogue("<s"))
    assert facts["special_tokens_as_text"] == {"</s>": 1, "[INST]": 1, "</s>x": 1}
    assert facts["special_tokens_where"] == {
        "</s>": {"user": 1, "assistant": 1},
        "[INST]": {"system": 1},
        "</s>x": {"user": 1},
    }


def test_special_tokens_are_found_in_tools_arguments_and_results():
    tools = json.dumps([{"type": "function", "function": {"name": "search", "description": "до </s>"}}])
    messages = calling({"q": ["<s>"]})
    messages[2]["content"] = "[INST]"
    where = facts_of({"messages": messages, "tools": tools})["special_tokens_where"]
    assert where == {"</s>": {"tools": 1}, "<s>": {"arguments": 1}, "[INST]": {"tool": 1}}


def test_a_thought_counts_as_a_text_of_its_record():
    one, other = ([*dialogue()[:-1], {**dialogue()[-1], "reasoning_content": text}] for text in ("а</s>", "б"))
    facts = facts_of(one, other, dialogue(), one)
    assert facts["duplicates"] == 1 and facts["different_answers"] == 0
    assert facts["special_tokens_where"] == {"</s>": {"reasoning_content": 2}}
    assert audit.find_damage(one[:-1]) == set() and audit.find_damage([{**one[-1], "reasoning_content": "\x00"}]) == {
        "control"
    }


def test_finds_the_right_one_of_a_thousand_reserved_tokens():
    side = SplitAudit([f"<SPECIAL_{number}>" for number in range(1000)])
    side.add({"messages": dialogue("<SPECIAL_7> <SPECIAL_777> <SPECIAL_1000> <SPECIAL_")}, counted(LEARNED))
    assert side.facts()["special_tokens_as_text"].keys() == {"<SPECIAL_7>", "<SPECIAL_777>"}


def test_without_special_tokens_none_is_found():
    side = SplitAudit([])
    side.add({"messages": dialogue("<s>")}, counted(LEARNED))
    assert side.facts()["special_tokens_as_text"] == {}


def test_sets_without_problems_have_no_warnings(facts):
    assert audit.warnings(facts, facts, near_in_train=0) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"without_learned_tokens": 1}, "without trained tokens (training): 1 of 1,000"),
        ({"answers_without_end": 1}, "without an end-of-turn token (training): 1;"),
        ({"duplicates": 11}, "Exact duplicates (training): 11 of 1,000, 1.1%"),
        ({"different_answers": 2}, "Questions with different answers (training): 2;"),
        ({"learned_tokens": 199}, "Only 2.0% of the tokens are trained (training)"),
        ({"structured": 500, "nothing_found": 99}, "nothing was found: 99 of 1,000, under 10%"),
        ({"with_tools": 100, "no_call": 9}, "tools but no call: 9 of 100, under 10%"),
    ],
)
def test_warns_about_the_training_set(facts, changed, words):
    (warning,) = warned({**facts, **changed}, facts)
    assert words in warning


@pytest.mark.parametrize(
    "changed",
    [
        {"duplicates": 10},
        {"learned_tokens": 200},
        {"structured": 500, "nothing_found": 100},
        {"structured": 499},
        {"with_tools": 100, "no_call": 10},
    ],
)
def test_does_not_warn_at_the_thresholds(facts, changed):
    assert warned({**facts, **changed}, facts) == []


@pytest.mark.parametrize(
    ("changed", "near", "words"),
    [
        ({"duplicates": 11}, 0, "Exact duplicates (evaluation): 11"),
        ({"conversations": 19}, 0, "records: 19, fewer than 20"),
        ({}, 3, "nearly the same as in training: 3 of 1,000"),
    ],
)
def test_warns_about_the_evaluation_set(facts, changed, near, words):
    (warning,) = warned(facts, {**facts, **changed}, near)
    assert words in warning


def test_twenty_evaluation_records_are_enough(facts):
    assert warned(facts, {**facts, "conversations": 20}) == []


def test_restraint_is_not_required_of_the_evaluation_set(facts):
    assert warned(facts, {**facts, "structured": 1000, "with_tools": 1000}) == []


def test_every_warning_is_in_russian_and_in_english(facts):
    bad = {**facts, "conversations": 10, "duplicates": 5, "without_learned_tokens": 1, "answers_without_end": 1}
    made = audit.warnings({**bad, "with_tools": 9, "structured": 1000, "learned_tokens": 1}, bad, near_in_train=1)
    assert len(made) == 11
    for warning in made:
        russian, english = warning.split(" · ")
        assert any("а" <= letter <= "я" for letter in russian)
        assert not any("а" <= letter <= "я" for letter in english)


def test_untrained_answers_are_not_counted_but_distinguish_conversations():
    said = [{"role": "user", "content": "а"}, {"role": "assistant", "content": "[1]"}]
    side = SplitAudit(SPECIAL)
    talks = ([*said, said[0], {**said[1], "content": "[]", "weight": 0}], [said[0], {**said[1], "weight": 0}, *said])
    for messages in talks:
        side.add({"messages": messages}, counted(LEARNED))
    facts = side.facts()
    assert (facts["turns"], facts["nothing_found"], facts["structured"]) == (2, 0, 2)
    side.add({"messages": [*said, *said]}, counted(LEARNED))
    side.add({"messages": [said[0], {**said[1], "weight": 0}, *said]}, counted(LEARNED))
    assert side.facts()["duplicates"] == 1
    tool = {"type": "function", "function": {"name": "f"}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        "weight": 0,
    }
    side.add(
        {"messages": [said[0], call, {"role": "tool", "content": "1"}, said[1]], "tools": json.dumps([tool])},
        counted(LEARNED),
    )
    assert side.facts()["no_call"] == 1


HISTORY = [{"role": "system", "content": "Ты — кот."}, *dialogue("Привет", "Мяу")]


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        (dialogue("а б", "[]"), dialogue("а б", '[{"term": "атом"}]'), 1),
        (dialogue("а б", "да"), dialogue("  А\n Б ", "нет"), 1),
        (dialogue("а б", "да"), dialogue("а в", "нет"), 0),
        (dialogue("а б", "да"), dialogue("а б", "да"), 0),
        (dialogue("а б", "Да, так."), dialogue("а б", "да,  так.\n"), 0),
        (dialogue("а", '{"a": 1, "b": [2]}'), dialogue("а", ' {"b":[2],"a":1.0}'), 0),
        (dialogue("а", '{"a": 1}'), dialogue("а", '{"a": "1"}'), 1),
        (dialogue("а", '{"a": 1}'), dialogue("а", '{"a": true}'), 1),
        (dialogue("а", "[1, 2]"), dialogue("а", "[2, 1]"), 1),
        ([*HISTORY, *dialogue("а", "да")], [*HISTORY, *dialogue("а", "нет")], 1),
        ([*HISTORY, *dialogue("а", "да")], dialogue("а", "нет"), 0),
        ([*HISTORY, *dialogue("а", "да")], [*HISTORY[1:], *dialogue("а", "нет")], 0),
        ([*dialogue("а", "б"), *dialogue()], [*dialogue("а", "в"), *dialogue()], 0),
        ({"messages": dialogue("а", "да"), "tools": TOOLS}, dialogue("а", "нет"), 0),
        (calling({"q": 1, "r": 2})[:2], calling({"r": 2, "q": 1.0}, call_id="2")[:2], 0),
        (calling({"q": 1})[:2], calling({"q": 2})[:2], 1),
        (calling({"q": 1})[:2], dialogue("а", "б"), 1),
        (calling({"q": 1}), [*calling({"q": 1}, call_id="2")[:3], {"role": "assistant", "content": "д"}], 1),
    ],
)
def test_one_question_with_different_answers(one, other, count):
    assert facts_of(one, other)["different_answers"] == count
    assert facts_of(other, dialogue("иной", "вопрос"), one)["different_answers"] == count


def test_questions_with_different_answers_are_counted_not_records():
    made = facts_of(*(dialogue("а", str(n)) for n in range(5)), dialogue("б", "1"), dialogue("б", "2"), dialogue("в"))
    assert (made["different_answers"], made["duplicates"]) == (2, 0)


def test_the_example_is_the_first_question_with_different_answers():
    side = SplitAudit(SPECIAL)
    for question, answer in [("в", "1"), ("а", "1"), ("б", "1"), ("б", "1"), ("а", "1"), ("б", "2"), ("а", "2")]:
        side.add({"messages": dialogue(question, answer)}, counted(LEARNED))
    assert side.facts()["different_answers_example"] == "(1, 6)"


@pytest.mark.parametrize(("count", "warns"), [(5, False), (6, True), (100, True), (0, False)])
def test_warns_if_more_than_a_twentieth_is_too_long(count, warns):
    assert [f"{count} of 100" in warning for warning in audit.length_warnings("records", count, 100, 512)] == [
        True
    ] * warns


def test_an_empty_evaluation_set_is_named_so(facts):
    (warning,) = warned(facts, facts_of())
    assert warning.startswith("There is no evaluation set")
