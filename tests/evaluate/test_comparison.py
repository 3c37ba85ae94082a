"""The stage 04_infer on the tiny Saiga."""

import json
import shutil
from dataclasses import replace

import pytest

from saigakit import evaluate, export, registry
from saigakit.core import install, manifest, workspace
from saigakit.core.files import sha256
from saigakit.data.conversations import spread
from saigakit.errors import SaigaError
from saigakit.evaluate import comparison, results
from saigakit.evaluate.comparison import Models, Questions
from saigakit.prompt import encoding, questions, token_view
from saigakit.prompt.questions import Question
from saigakit.weights import find, memory
from saigakit.weights.generate import Generated
from saigakit.weights.model_shape import ModelShape

TURN = [{"role": "user", "content": "Кто ты?"}, {"role": "assistant", "content": "Сайга."}]
ITEMS = '[{"term": "азот", "definition": "газ"}]'


def asking(answer):
    return Question(TURN[:1], {"role": "assistant", "content": answer})


def write_conversations(file, conversations):
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def stage_01(run_dir, conversations):
    identity = {"stage": "01_format", "parameters": {"model": "saiga_tiny"}, "inputs": {}}
    with manifest.making(run_dir / "01_format", **identity) as partial:
        write_conversations(partial / "held_out.jsonl", conversations)


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """The stages that 04_infer needs, for the tiny Saiga."""
    directory = tmp_path_factory.mktemp("run")
    records = (tiny / "records.jsonl").read_text(encoding="utf-8").splitlines()
    roles = {"system": "system", "user": "user", "bot": "assistant"}
    conversations = [
        [{"role": roles[key], "content": text} for key, text in json.loads(line).items()] for line in records[:6]
    ]
    stage_01(directory, conversations)
    export.merge_gguf(model="saiga_tiny", run_dir=directory, adapter="released", quant_type="F32")
    return directory


@pytest.fixture(scope="module")
def compared(run_dir):
    """The finished stage, and its questions."""
    made = evaluate.compare(model="saiga_tiny", run_dir=run_dir, adapter="released", max_examples=4)
    return made, evaluate.read_examples(run_dir / "01_format" / "held_out.jsonl")


@pytest.fixture
def copied(run_dir, tmp_path):
    """A copy of the stages, to change."""
    for name in ("01_format", "03_merge_gguf"):
        shutil.copytree(run_dir / name, tmp_path / name)
    return tmp_path


def test_the_prompt_is_the_conversation_up_to_its_last_answer(tmp_path):
    longer = [*TURN, {"role": "user", "content": "А я?"}, {"role": "assistant", "content": "Человек."}]
    file = write_conversations(tmp_path / "held_out.jsonl", [TURN, [*longer, {"role": "user", "content": "Да?"}]])
    assert evaluate.read_examples(file) == [
        Question(TURN[:1], TURN[1]),
        Question(longer[:3], longer[3]),
    ]


def test_the_reference_of_a_tool_call_is_the_text_that_the_model_writes(tiny):
    tools = [{"type": "function", "function": {"name": "найти"}}]
    call = {"type": "function", "function": {"name": "найти", "arguments": {"что": "азот"}}}
    example = Question(TURN[:1], {"role": "assistant", "content": "", "tool_calls": [call]}, tools)
    asked = Questions.of([example], encoding.load_tokenizer("saiga_tiny"), frozenset({2}))
    assert asked.references == ['<tool_call>\n{"name": "найти", "arguments": {"что": "азот"}}\n</tool_call>']


def test_line_separators_inside_a_text_do_not_end_a_record(tmp_path):
    strange = [{"role": "user", "content": "раз\u2028два\u2029три\x85\x0b"}, TURN[1]]
    file = write_conversations(tmp_path / "held_out.jsonl", [strange])
    assert evaluate.read_examples(file) == [Question(strange[:1], strange[1])]


def test_a_file_without_answers_is_refused(tmp_path):
    file = write_conversations(tmp_path / "held_out.jsonl", [TURN[:1], TURN[1:]])
    with pytest.raises(SaigaError, match="no conversation with an answer"):
        evaluate.read_examples(file)


@pytest.mark.parametrize(("count", "taken"), [(3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10))), (1, [0])])
def test_examples_are_spread_evenly_over_the_file(count, taken):
    assert [text for _, text in spread([([], index) for index in range(10)], count)] == taken


def test_the_length_limit_is_the_longest_reference_plus_a_margin(tiny):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    asked = Questions.of([asking("Сайга."), asking("Да.")], tokenizer, frozenset({2}))
    assert asked.max_new_tokens == len(tokenizer.encode_text("Сайга.")) + questions.MARGIN
    assert asked.prompts == [encoding.encode(TURN[:1], tokenizer, add_generation_prompt=True)["input_ids"]] * 2
    assert asked.stop_ids == {tokenizer.special_tokens["</s>"]}


def asked(tokenizer, *references):
    return Questions.of([asking(reference) for reference in references], tokenizer, frozenset({2}))


def test_the_written_files_have_the_expected_keys(tmp_path, tiny):
    answers = {
        "before": (["не знаю", "[]"], Generated([[5] * 25, [6] * 25], seconds=2.0)),
        "after": ([ITEMS, "[]"], Generated([[5] * 50, [6] * 50], seconds=4.0)),
        "Q4_K_M": ([ITEMS, "[1]"], Generated([[5] * 50, [6] * 25], seconds=1.0)),
    }
    comparison._write(tmp_path, asked(encoding.load_tokenizer("saiga_tiny"), ITEMS, "[]"), answers, [400, 410, 100])
    rows = results.read(tmp_path)
    assert rows[0] == {
        "name": "before",
        "n": 2,
        "exact": 0.5,
        "json_valid": 0.5,
        "f1": 0.0,
        "tokens_per_s": 25.0,
        "bytes": 400,
    }
    assert [(row["name"], row["exact"], row["bytes"]) for row in rows[1:]] == [
        ("after", 1.0, 410),
        ("Q4_K_M", 0.5, 100),
    ]
    first, second = map(json.loads, (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    assert first == {
        "prompt": "Кто ты?",
        "reference": ITEMS,
        "answers": {"before": "не знаю", "after": ITEMS, "Q4_K_M": ITEMS},
        "exact": {"before": False, "after": True, "Q4_K_M": True},
    }
    assert second["exact"] == {"before": True, "after": True, "Q4_K_M": False}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_examples_reads_answers_with_line_separators(tmp_path, tiny):
    answers = {"before": (["а\u2028б"], Generated([[5]], 1.0)), "after": (["[]"], Generated([[5]], 1.0))}
    comparison._write(tmp_path, asked(encoding.load_tokenizer("saiga_tiny"), "[]"), answers, [1, 2])
    assert "а\u2028б" in results.examples_table(tmp_path / "answers.jsonl").rows[0][2]


def test_answers_are_read_without_the_token_that_ends_them_but_shown_with_it(tmp_path, tiny):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    questions_asked = asked(tokenizer, "Да.")
    ids = tokenizer.encode_text("Да")
    assert questions_asked.read([[*ids, 2], ids, []]) == ["Да", "Да", ""]
    no_special_token = tokenizer.encode_text("Нет")[-1:]
    assert replace(questions_asked, stop_ids=frozenset(no_special_token)).read([[*ids, *no_special_token]]) == ["Да"]
    comparison._write(tmp_path, questions_asked, {"before": (["Да"], Generated([[*ids, 2]], 1.0))}, [1])
    shown = str(results.raw_answers(tmp_path))
    assert shown.startswith("before:\n<s>")
    assert "Кто ты?" in shown
    assert shown.endswith("Да</s>⟧")


def test_the_stage_has_a_row_for_each_model_and_no_other_files(compared):
    made, _ = compared
    assert [(row["name"], row["n"]) for row in results.read(made)] == [("before", 4), ("after", 4), ("F32", 4)]
    names = sorted(file.name for file in made.iterdir())
    assert names == ["answers.jsonl", "comparison.png", "raw.json", "results.json", "saigakit.json"]


def test_answers_are_written_next_to_the_reference_of_their_question(compared):
    made, examples = compared
    lines = [json.loads(line) for line in (made / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    asked = spread(examples, 4)
    assert [(line["prompt"], line["reference"]) for line in lines] == [
        (each.messages[-1]["content"], each.answer["content"]) for each in asked
    ]
    assert all(set(line["answers"]) == {"before", "after", "F32"} for line in lines)
    assert all(line["answers"]["before"] != line["answers"]["after"] for line in lines)


def test_the_raw_answers_are_those_to_the_exact_prompt(compared, tiny):
    made, examples = compared
    raw = json.loads((made / "raw.json").read_text(encoding="utf-8"))
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    assert raw[""] == token_view.write(spread(examples, 4)[0].prompt(tokenizer), tokenizer)
    assert list(raw) == ["", "before", "after", "F32"]
    assert all(raw.values())


def test_the_manifest_names_the_files_that_were_compared(compared, run_dir, tiny):
    content = manifest.read(compared[0])
    gguf_file = run_dir / "03_merge_gguf" / "model.gguf"
    assert content["compared"] == {
        "before": [str(tiny / "base")],
        "after": [str(tiny / "base"), str(tiny / "adapter")],
        "F32": [str(gguf_file)],
    }
    assert content["inputs"]["base"] == manifest.hashes(tiny / "base")
    assert content["inputs"]["adapter"] == manifest.hashes(tiny / "adapter")
    assert content["inputs"]["gguf"]["model.gguf"] == sha256(gguf_file)


def test_a_finished_comparison_is_reused(compared, run_dir, capsys):
    again = evaluate.compare(model="saiga_tiny", run_dir=run_dir, adapter="released", max_examples=4)
    assert again == compared[0]
    assert "up to date" in capsys.readouterr().out


def test_an_adapter_that_is_not_in_the_gguf_is_refused(copied, tiny):
    adapter = shutil.copytree(tiny / "adapter", copied / "other")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}), encoding="utf-8")
    with pytest.raises(SaigaError, match=r"was made from another adapter .*other"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="other")


def test_comparing_without_the_adapter_of_the_gguf_is_refused(copied):
    with pytest.raises(SaigaError, match="was made from another adapter than none"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter=None)


def test_another_base_than_that_of_the_gguf_is_refused(copied, tiny):
    base = shutil.copytree(tiny / "base", copied / "base")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1] + b"\x01")
    with pytest.raises(SaigaError, match="was made from another base"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="released", base_source=str(base))


def test_a_copy_of_the_base_with_another_readme_is_the_same_base(copied, tiny):
    base = shutil.copytree(tiny / "base", copied / "base")
    (base / "README.md").write_text("a copy", encoding="utf-8")
    assert Models.of("saiga_tiny", copied, "released", str(base)).base_dir == base


def test_the_gguf_of_another_model_is_refused(copied):
    file = copied / "03_merge_gguf" / "saigakit.json"
    content = manifest.read(copied / "03_merge_gguf")
    content["parameters"]["model"] = "saiga2_7b"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SaigaError, match="was made for model='saiga2_7b'"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="released")


@pytest.mark.parametrize("missing", ["01_format", "03_merge_gguf"])
def test_a_missing_stage_is_named(copied, missing):
    shutil.rmtree(copied / missing)
    with pytest.raises(SaigaError, match=f"Run {missing} first"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="released")


def test_a_gguf_with_another_chat_template_is_refused(run_dir, monkeypatch):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    asked = Questions.of([asking("Да.")], tokenizer, frozenset({2}))
    other = Questions(asked.examples, asked.references, tokenizer, [[1, *asked.prompts[0]]], asked.stop_ids, 20)
    with pytest.raises(SaigaError, match="give different ids for the same prompt"):
        comparison._ask_gguf(other, run_dir / "03_merge_gguf" / "model.gguf")


def test_too_little_memory_is_reported_before_anything_is_loaded(copied, monkeypatch):
    monkeypatch.setattr(workspace, "available_memory", lambda: 10**9)
    with pytest.raises(SaigaError, match=r"Answering with base .* needs about 1\.0 GB of memory, and 1\.0 GB are free"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="released")
    assert not (copied / "04_infer").exists()


def test_a_gpu_that_torch_cannot_use_is_refused_before_anything_is_downloaded(stub_gpus, monkeypatch, tmp_path):
    stub_gpus("Tesla T4")
    monkeypatch.setattr(find, "base_dir", lambda *_: pytest.fail("a model was looked for"))
    with pytest.raises(SaigaError, match=r"nvidia-smi lists Tesla T4, but torch cannot compute there\."):
        evaluate.compare(model="saiga2_7b", run_dir=tmp_path)


def test_with_a_gpu_its_memory_is_checked(copied, monkeypatch):
    monkeypatch.setattr(install, "require_cuda", lambda _: None)
    monkeypatch.setattr(workspace, "gpus", lambda: [workspace.Gpu("Tesla T4", (7, 5), 16 * 10**9, 5 * 10**8)])
    with pytest.raises(SaigaError, match=r"1\.0 GB of memory on Tesla T4, and 0\.5 GB of 16\.0 GB are free"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="released")


def test_a_model_that_overflows_float16_is_refused_on_a_t4(monkeypatch, tmp_path):
    monkeypatch.setattr(workspace, "gpus", lambda: [workspace.Gpu("Tesla T4", (7, 5), 16 * 10**9, 15 * 10**9)])
    with pytest.raises(SaigaError, match=r"saiga_gemma3_12b cannot run on Tesla T4 \(sm_75\).*overflow float16"):
        evaluate.compare(model="saiga_gemma3_12b", run_dir=tmp_path)


def test_the_needed_memory_is_that_of_weights_one_question_and_the_libraries(tiny, monkeypatch):
    tokenizer = encoding.load_tokenizer("saiga_tiny")
    asked = Questions.of([asking("Да.")], tokenizer, frozenset({2}))
    needed = []
    monkeypatch.setattr(workspace, "gpus", list)
    monkeypatch.setattr(workspace, "require_memory", lambda size, what, remedy, gpu: needed.append(size))
    comparison._require_memory(tiny / "base", "none", asked)
    shape = ModelShape.from_config(find.base_dir(registry.find("saiga_tiny")))
    tokens = len(asked.prompts[0]) + asked.max_new_tokens
    assert needed == [comparison.OVERHEAD + sum(memory.inference_memory(shape, "none", 4, tokens).values())]


def test_a_full_disk_is_reported_before_anything_is_loaded(copied, monkeypatch):
    monkeypatch.setattr(workspace, "free_disk", lambda path: 10**6)
    with pytest.raises(SaigaError, match=r"04_infer needs 0\.10 GB of disk"):
        evaluate.compare(model="saiga_tiny", run_dir=copied, adapter="released")


@pytest.mark.parametrize("count", [0, "240", True])
def test_max_examples_must_be_a_positive_integer(tmp_path, count):
    with pytest.raises(SaigaError, match=r"max_examples=.* must be a whole number"):
        evaluate.compare(model="saiga_tiny", run_dir=tmp_path, max_examples=count)
