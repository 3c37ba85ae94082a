"""Go's own text/template, from the package go-template (x86-64 Linux), in a child: it brings Go's runtime along."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_RENDER = """
import sys
from pathlib import Path
import go_template
for number in range(int(sys.argv[1])):
    go_template.render_template("template", f"{number}.yml", f"{number}.txt")
"""
# Ollama's own function, which Go has not; its JSON of a text differs from %q in nothing that the tests hold.
_OLLAMAS = "{{ json . }}"
_GOS = '{{ if eq (printf "%T" .) "string" }}{{ printf "%q" . }}{{ else }}{{ print . }}{{ end }}'


def rendered(template: str, conversations: Sequence[dict[str, Any]], directory: Path) -> list[str]:
    """With the values that Ollama gives to its templates; skips where the package is not installed."""
    if importlib.util.find_spec("go_template") is None:
        pytest.skip("the package go-template, which holds Go's text/template, is not installed")
    directory.mkdir(parents=True)
    (directory / "template").write_text(template.replace(_OLLAMAS, _GOS), encoding="utf-8")
    for number, conversation in enumerate(conversations):
        values = json.dumps(ollamas_values(**conversation))  # JSON is YAML, which the package reads
        (directory / f"{number}.yml").write_text(values, encoding="utf-8")
    command = [sys.executable, "-c", _RENDER, str(len(conversations))]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=60)
    return [(directory / f"{number}.txt").read_text(encoding="utf-8") for number in range(len(conversations))]


def ollamas_values(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """As template.go of Ollama hands a conversation to a template: fields of its structures by their Go names."""
    return {
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Tools": [{"Type": tool["type"], "Function": _function(tool["function"])} for tool in tools],
        "Messages": [
            {
                "Role": message["role"],
                "Content": message["content"],
                "ToolCalls": [
                    {
                        "ID": "",
                        "Function": {"Name": call["function"]["name"], "Arguments": call["function"]["arguments"]},
                    }
                    for call in message.get("tool_calls", [])
                ],
            }
            for message in messages
        ],
    }


def _function(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters", {})
    properties = {
        name: {key.capitalize(): value for key, value in found.items()}
        for name, found in parameters.get("properties", {}).items()
    }
    return {
        "Name": function["name"],
        "Description": function.get("description", ""),
        "Parameters": {
            "Type": parameters.get("type", ""),
            "Required": parameters.get("required", []),
            "Properties": properties,
        },
    }
