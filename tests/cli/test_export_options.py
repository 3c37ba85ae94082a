"""The commands that `saigakit export` prints, and names that it refuses."""

import shlex

import pytest
from click.testing import CliRunner

from saigakit import cli


def exported(*options):
    return CliRunner().invoke(cli.main, ["export", "--model", "saiga_tiny", *map(str, options)])


def test_an_exported_file_with_special_characters_is_quoted_in_the_command(tiny, tmp_path):
    output = tmp_path / "a b" / "c'd$(touch evil);`e`|<f>.gguf"
    done = exported("--output", output, "--quant-type", "Q8_0")
    assert done.exit_code == 0, done.output
    (talk,) = [line.removeprefix("talk:  ") for line in done.stdout.splitlines() if line.startswith("talk:")]
    assert shlex.split(talk) == ["saigakit", "chat", str(output)]
    card = output.with_name(f"{output.stem}.README.md").read_text(encoding="utf-8")
    assert "| `` c'd$(touch evil);`e`\\|<f>.gguf `` | Q8_0 |" in card
    lora = tmp_path / "a b" / "lora.gguf"
    shown = exported("--adapter", "released", "--output", lora, "--format", "lora")
    assert shown.stdout.rstrip().endswith(f"--lora '{lora}'")


def test_an_export_to_a_name_that_a_modelfile_cannot_hold_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("saigakit.export.gguf_export.Export.of", lambda *_: pytest.fail("it is computed"))
    done = exported("--output", tmp_path / "a\nb.gguf")
    assert done.exit_code == 1 and "'a\\nb.gguf' cannot be the name of a GGUF file" in done.stderr
