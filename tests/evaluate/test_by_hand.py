"""What the notebook shows of a model, which is never an error."""

import json
from contextlib import closing

import nbclient
import nbformat
import pytest

from saigakit import evaluate, infer
from saigakit.evaluate import by_hand
from saigakit.infer.extraction import Extraction
from saigakit.prompt.questions import Question


@pytest.fixture(scope="module")
def llm(gguf_file):
    with closing(infer.load(gguf_file, n_ctx=1024, n_threads=1)) as loaded:
        yield loaded


def example(answer, text="Азот — это газ."):
    return Question([{"role": "user", "content": text}], {"role": "assistant", "content": answer})


def tool(kind):
    parameters = {"type": "object", "properties": {"city": kind}, "required": ["city"]}
    return {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}


def test_a_stream_is_one_output_of_an_executed_notebook(monkeypatch):
    code = "from saigakit import SaigaError, evaluate\ndef pieces(*given):\n    yield 'Са'\n    yield 'йга'\n"
    code += "    if given:\n        raise SaigaError('мало места')\n"
    sources = [f"{code}evaluate.show_stream(pieces())", "evaluate.show_stream(pieces(1))"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    shown = [output["data"]["text/plain"] for cell in notebook.cells for output in cell.outputs]
    assert shown == ["Сайга", "Сайга (мало места)"]


def test_an_answer_has_the_shape_of_the_examples(llm):
    shown = evaluate.show_extraction(llm, "Вчера шёл дождь.", [example("[]")])
    assert str(shown) == "Вчера шёл дождь.\n→ []"


def test_without_a_common_schema_the_answer_is_free_and_the_reason_is_shown(llm):
    shown = str(evaluate.show_extraction(llm, "Кто ты?", [example("Это газ.")]))
    assert shown.startswith("Кто ты?\n→ ")
    assert shown.endswith("(The answer 'Это газ.' is not JSON, so there is no schema to guess.)")


def test_a_text_that_fills_the_context_is_a_reason(llm):
    shown = str(evaluate.show_extraction(llm, "слово " * 2000, [example("[]")]))
    assert "→ …" in shown
    assert "but the context holds 1024" in shown


def test_quotations_are_marked_in_the_text_each_once():
    text = "Азот — это газ без цвета. Азот."
    places = [(11, 24), (0, 4), (11, 14)]
    quotes = [{"path": [], "start": start, "end": end} for start, end in places]
    parts = list(by_hand._mark_quotes(text, Extraction([], quotes)))
    assert "".join(part for part, _ in parts) == text
    assert [part for part, is_marked in parts if is_marked] == ["Азот", "газ без цвета"]


def test_a_call_is_made_even_by_a_model_that_would_not_make_one(llm):
    assert "tool_calls" not in infer.answer(llm, [{"role": "user", "content": "Кто ты?"}], [tool({"const": "Томск"})])
    message = evaluate.show_call(llm, "Кто ты?", [tool({"const": "Томск"})])
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Томск"}


def test_a_call_that_cannot_be_made_is_a_reason(llm):
    assert "uniqueItems" in evaluate.show_call(llm, "Кто ты?", [tool({"type": "array", "uniqueItems": True})])
