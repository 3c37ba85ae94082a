"""A chat template comes with a model, from anyone: its time and memory are bounded."""

import time

import pytest

from saigakit.errors import SaigaError
from saigakit.prompt import template

MESSAGES = [{"role": "user", "content": "Привет"}]
GROWING = "{{% set n = namespace(x='ab') %}}{{% for i in range(60) %}}{}{{% endfor %}}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LONG = "{{% set s = 'a' * 9000000 %}}{{% for i in range(99999) %}}{}{{% endfor %}}"
BOMBS = {
    "nested loops": LOOPS,
    "a loop over an iterator": LOOPS.replace(") %}{% endfor", ") | reverse %}{% endfor"),
    "calls of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a product": "{{ 'a' * 1000000000 }}",
    "a product of products": "{% set n = 99999 * 1000 %}{{ ('a' * 9999) * n }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a filter": "{{ 'a' | center(1000000000) }}",
    "a method": "{{ 'a'.ljust(99999 * 99999) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "the method format": "{{ '{:1000000000}'.format(1) }}",
    "indented lines": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "a sum that doubles": GROWING.format("{% set n.x = n.x + n.x %}"),
    "a text that doubles": GROWING.format("{% set n.x = n.x ~ n.x %}"),
    "a block that doubles": GROWING.format("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
    "a list that doubles": GROWING.format("{% set n.x = n.x + n.x %}").replace("'ab'", "[1]"),
    "a method that multiplies two texts": "{{ ('a' * 30000).join('b' * 30000) }}",
    "a filter that multiplies two texts": "{{ ('a' * 30000) | replace('a', 'b' * 30000) }}",
    "a computed width": "{{ '%*d' % (99999999 * 99, 1) }}",
    "a width that is an argument": "{{ '{:>{}}'.format(1, 99999999) }}",
    "a long text that is searched often": LONG.format("{% if 'ab' in s %}{% endif %}"),
    "a long text that is tested often": LONG.format("{% if s is upper %}{% endif %}"),
    "a long text that is cut often": LONG.format("{% set t = s[1:] %}"),
    "a method that reads a long text often": LONG.format("{% set t = s.count('ab') %}"),
    "a filter that reads a long text often": LONG.format("{% set t = s | wordcount %}"),
    "output of a list that is in itself": GROWING.format("{% set n.x = [n.x, n.x] %}") + "{{ n.x }}",
    "JSON of a list that is in itself": GROWING.format("{% set n.x = [n.x, n.x] %}") + "{{ n.x | tojson }}",
    "lists that are compared": GROWING.format("{% set n.x = [n.x, n.x] %}") + "{{ n.x == [n.x, 1] }}",
    "long output": "{% for a in range(99999) %}" + "b" * 100_000 + "{% endfor %}",
    "3,000 brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "150 lists": "{{ " + "[" * 150 + "1" + "]" * 150 + " }}",
    "many blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "many branches": "{% if 1 %}" + "{% elif 2 %}" * 9000 + "{% endif %}",
    "a long template": "a" * 300_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_template_without_end_is_one_sentence_in_bounded_time(text):
    start = time.process_time()
    with pytest.raises(SaigaError, match=r"^The chat template cannot render this conversation: [^\n]{5,200}$"):
        template.render(MESSAGES, text)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", ["3,000 brackets", "many blocks", "a long template", "a format"])
def test_a_template_that_cannot_be_read_is_named_with_its_file(tmp_path, name):
    file = tmp_path / "own.jinja"
    file.write_text(BOMBS[name], encoding="utf-8")
    with pytest.raises(SaigaError, match=r"^The chat template in .*own\.jinja is broken: [^\n]+$"):
        template.find_chat_template(str(file))


def test_every_rendering_has_its_own_limit():
    text = "{% for a in range(90000) %}{% for b in range(60) %}{% endfor %}{% endfor %}."
    assert [template.render(MESSAGES, text) for _ in range(3)] == ["."] * 3


def test_long_conversations_are_rendered():
    text = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content | trim + '</s>' }}{% endfor %}"
    messages = [{"role": "user", "content": "слово " * 20_000}] * 100
    assert len(template.render(messages, text)) > 10**7
    messages = [{"role": "user", "content": "да"}] * 50_000
    assert template.render(messages, text).count("<s>user") == 50_000


def test_conversations_as_long_as_a_context_are_rendered_with_checks_of_all_kinds():
    text = (
        "{% macro show(t, more) %}{{ t | replace(' ', '_') }}{{ more }}{% endmacro %}{% for m in messages[1:] %}"
        "{% if m.content is string and '</think>' not in m.content and m != messages[0] %}{{ messages | length - 1 }}"
        "{{ show(m.content, m.content) }}{{ m.content.split('</s>')[-1][1:] }}{{ m | tojson }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": f"{number} слово " * 300} for number in range(200)]
    assert len(template.render(messages, text)) > 2 * 10**6


@pytest.mark.parametrize("text", ["call 1234567890", "{{ 'call_1234567890' }}", "{{ '100 % 123' }}", "{{ 99999999 }}"])
def test_long_numbers_in_text_are_no_danger(text):
    shown = text.removeprefix("{{ ").removesuffix(" }}").strip("'")
    assert template.render(MESSAGES, text) == shown
