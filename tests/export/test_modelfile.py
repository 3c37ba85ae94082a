"""The Modelfile and the llama-server command, with the settings of the training and of the machine."""

import ast
import subprocess

import llama_cpp_chain
import pytest

from saigakit.errors import SaigaError
from saigakit.export import fit, modelfile
from saigakit.registry import MODELS, Sampling
from saigakit.weights.model_shape import ModelShape

LLAMA2 = ModelShape(
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000, tied=False
)


def choose(**sizes):
    return fit.ModelFiles(shape=LLAMA2, longest=4096, files=sizes).choose()


SMALL = choose(Q4_K_M=4_081_004_224)  # on 6 GiB
LARGE = choose(Q8_0=7_161_089_728)  # on 16 GiB


def settings(system_prompt=None, **changed):
    given = {"name": "model.gguf", "stops": [], "sampling": Sampling(), "choice": SMALL, "system_prompt": system_prompt}
    return modelfile.RunSettings(**given | changed)


def made_with(system_prompt=None, **changed):
    return settings(system_prompt, **changed).modelfile()


def instructions(text):
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_modelfile_has_the_settings_that_the_model_was_trained_with():
    spec = MODELS["saiga2_7b"]
    made = made_with(spec.system_prompt, stops=["</s>", "<eos>"], sampling=Sampling(**spec.sampling))
    assert instructions(made) == [
        "FROM ./model.gguf",
        "REQUIRES 0.30.11",
        f'SYSTEM """{spec.system_prompt}"""',
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<eos>"',
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 30",
        "PARAMETER repeat_penalty 1.1",
        "PARAMETER num_ctx 2048",
    ]


def test_the_modelfile_leaves_the_prompt_to_the_template_inside_the_gguf():
    made = made_with()
    assert "TEMPLATE" not in made
    assert made.startswith("# Needs Ollama 0.30.11 or later")


def test_a_model_without_a_system_prompt_has_no_system_line():
    assert "SYSTEM" not in made_with(None) + made_with("")


def test_a_system_prompt_with_several_lines_is_unchanged():
    prompt = 'Ты — кот.\n\n\tОтвечай: «мяу» & "кавычки".'
    assert f'\nSYSTEM """{prompt}"""\n' in made_with(prompt)


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [("Ты\u00a0— кот", "'\\xa0'"), ('Ты """кот"""', '\'"""\''), ("a\u200bb", "'\\u200b'")],
    ids=["no-break space", "three quotes", "zero-width space"],
)
def test_a_system_prompt_that_a_modelfile_cannot_hold_is_left_out_with_a_note(prompt, lost):
    made = made_with(prompt)
    assert instructions(made) == instructions(made_with(None))
    assert f"# The Modelfile has no SYSTEM, because it cannot hold {lost} of the system prompt" in made


def test_the_server_command_uses_the_template_of_the_file_and_keeps_the_sampling():
    made = settings(name="m.gguf", sampling=Sampling(**MODELS["saiga2_7b"].sampling), choice=LARGE).llama_server()
    assert made.splitlines()[1] == (
        "llama-server -m m.gguf -c 4096 --jinja --temp 0.2 --top-p 0.9 --top-k 30 --min-p 0 --repeat-penalty 1.1 "
        f"--cache-ram {LARGE.free_mib}"
    )


def test_with_little_memory_the_cache_is_quantised_and_the_servers_cache_limited():
    made = settings().llama_server()
    assert made.endswith(f"--cache-type-k q8_0 --cache-type-v q8_0 --cache-ram {SMALL.free_mib}\n")
    assert SMALL.needs.total + SMALL.free_mib * 2**20 <= 6 * 2**30
    made = made_with(choice=SMALL)
    assert "OLLAMA_FLASH_ATTENTION=1 and OLLAMA_KV_CACHE_TYPE=q8_0" in made
    assert "PARAMETER num_ctx 2048" in made


def test_llama_cpp_knows_every_option_of_the_server_command(callers_cache):
    known = llama_cpp_chain.server_options(llama_cpp_chain.download_source(callers_cache))
    made = settings().llama_server().splitlines()[-1].split()
    given = {word for word in made if word.startswith("-") and not word[1:].isdecimal()}
    assert len(given) >= 10 and given <= known, given - known


def test_a_model_that_fits_no_machine_is_reported():
    choice = choose(F32=27 * 10**9)
    said = "# F32 with 2048 tokens of context, KV cache in q8_0: DOES NOT FIT a machine with 16 GiB; it needs 27.3 GiB"
    made = made_with(choice=choice)
    server = settings(choice=choice).llama_server()
    assert said in made and server.startswith(said)
    assert server.endswith("--cache-ram 0\n")


EVIL = "a b'c\"d$(touch evil);`touch evil`|&\\e<f>«ё».gguf"


def arguments(command):
    """Those that a shell passes to the program of a command."""
    program = command.split()[0]
    shown = ["bash", "-c", f"{program}() {{ printf '%s\\n' \"$@\"; }}\n{command}"]
    return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_commands_and_the_modelfile_name_a_file_with_special_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = settings(name=EVIL)
    assert f"FROM ./{EVIL}" in made.modelfile().splitlines()
    assert arguments(made.llama_server().splitlines()[-1])[:2] == ["-m", EVIL]
    (loaded,) = [node for node in ast.walk(ast.parse(made.python())) if isinstance(node, ast.Call) and node.args[:1]
                 and isinstance(node.args[0], ast.Constant)]  # fmt: skip
    assert loaded.args[0].value == EVIL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\nSYSTEM evil.gguf", "a\rb.gguf", "a\x1b.gguf", "a\u00a0b.gguf", "-m.gguf"])
def test_a_name_that_a_modelfile_or_a_command_cannot_hold_is_refused(name):
    with pytest.raises(SaigaError, match="cannot be the name of a GGUF file"):
        settings(name=name).modelfile()
