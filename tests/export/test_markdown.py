"""Cards show file names, models and prompts as they are, and none of them becomes Markdown, HTML or YAML."""

import re

import mistune
import pytest
import yaml

from saigakit.core.display import Table
from saigakit.export import markdown
from saigakit.registry import ModelSpec

EVIL = "a `b` ``c`` | <script>alert(1)</script> **d** [e](javascript:f) & \\| g"


def html(text):
    return str(mistune.create_markdown(escape=False, plugins=["table"])(text))


def cells(text):
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", html(text))]


@pytest.mark.parametrize("text", ["a", "a`b", "``", "`a", "a``b`c", "<script>", "a  b\nc"])
def test_code_keeps_backticks(text):
    assert html(markdown.code(text)) == f"<p><code>{mistune.escape(' '.join(text.split()))}</code></p>\n"


@pytest.mark.parametrize("text", ["a", "```\nb", "a\n```\n<script>\n~~~~", "`````\n# x"])
def test_a_block_ends_only_at_its_end_and_keeps_its_text(text):
    assert html(markdown.block(text, "bash")) == (
        f'<pre><code class="language-bash">{mistune.escape(text)}\n</code></pre>\n'
    )


def test_a_cell_of_a_table_does_not_break_out():
    shown = html(markdown.table(("file", "type"), [(markdown.code(EVIL), "Q8_0")]))
    assert "<script" not in shown and "href" not in shown and shown.count("<td") == 2
    shown = html(markdown.of_table(Table(("file", EVIL), [(EVIL, "Q8_0"), ("100 % (a_b_c), «ё»", "1")], EVIL)))
    assert "<script" not in shown and "href" not in shown and "<code" not in shown and shown.count("<td") == 4
    assert cells(markdown.of_table(Table(("a", "b"), [("100 % (a_b_c), «ё»", "1")], ""))) == ["100 % (a_b_c), «ё»", "1"]


@pytest.mark.parametrize("name", [EVIL, "x\n---\n# y", "base_model: z"])
def test_a_directory_with_a_hostile_name_leaves_the_card_intact(name):
    spec = ModelSpec(name=name, base_model=f"/models/{name}")
    card = markdown.Card(
        spec=spec,
        title=name,
        library="gguf",
        tags=["gguf"],
        chat_template="```\n<script>",
        system_prompt=EVIL,
        versions={"peft": "1"},
    )
    text = card.text(f"Of {markdown.linked(spec.base_model)}.", "Из.", {"Files": "a"})
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {
        "language": ["ru"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf"],
    }
    shown = html(body)
    assert "<script" not in shown and "href" not in shown
    assert re.findall("<h[12]>", shown) == ["<h1>", "<h2>", "<h2>", "<h2>"]
