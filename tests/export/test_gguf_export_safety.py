"""A killed export or a full disk leaves nothing under the final name, and a rerun works."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

from saigakit import export
from saigakit.core import files, workspace
from saigakit.errors import SaigaError
from saigakit.export import estimate
from saigakit.export import stage as export_stage
from saigakit.export.gguf_export import Export
from saigakit.export.merge_plan import MergePlan
from saigakit.llamacpp import read_back, streaming
from saigakit.prompt import encoding
from saigakit.weights.merge import Merged

KILLS = 20
TEXTS = ["Что такое пружина?", "Упругая деталь. ё й 你好"]
# Everything heavy is imported once; each export runs in a fork, which is killed after a random time.
KILLED = """
import os, random, signal, sys, time
import gguf, llama_cpp, numpy, safetensors, tokenizers, torch, transformers
from saigakit import export; from saigakit.llamacpp import streaming; from saigakit.core import files, workspace
model, adapter, output, kills = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
streaming._ROWS, streaming._NUMBERS = 32, 1

def started(output):
    child = os.fork()
    if child == 0:
        try:
            export.to_gguf(model=model, adapter=adapter, output=output, quant_type="Q4_K_M", quant_types=["Q8_0"])
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    return child

start = time.monotonic()
assert os.waitpid(started(output + ".whole"), 0)[1] == 0
took = time.monotonic() - start
draw = random.Random(5)
for _ in range(kills):
    child = started(output)
    time.sleep(draw.uniform(0.05, 0.9) * took)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("KILL", sorted(os.listdir(os.path.dirname(output))), flush=True)
    for name in os.listdir(os.path.dirname(output)):
        if name in ("x.gguf", "x-Q8_0.gguf"):  # it was faster than the kill
            whole = output + ".whole" if name == "x.gguf" else output.replace("x.gguf", "x.gguf-Q8_0.whole")
            assert open(os.path.join(os.path.dirname(output), name), "rb").read() == open(whole, "rb").read()
            os.rename(os.path.join(os.path.dirname(output), name), output + ".early" + name)
assert os.waitpid(started(output), 0)[1] == 0
"""
FULL = """
import os, sys
from saigakit import errors, export; from saigakit.core import files, workspace
if sys.argv[4] == "unasked":  # as if another program took the room a moment later
    workspace.require_disk = lambda *_: None
try:
    export.to_gguf(model=sys.argv[1], adapter=sys.argv[2], output=sys.argv[3], quant_type="F32")
except errors.SaigaError as error:
    print(error)
print("left:", os.listdir(os.path.dirname(sys.argv[3])))
"""
SMALL_DISK = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"']


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("safety")
    base = small_models.base(directory / "base", tiny / "base", hidden_size=256, intermediate_size=512)
    return base, small_models.adapter(directory / "adapter", base)


def run(program, *arguments, before=(), **options):
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
    }
    command = [*before, sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


@pytest.mark.slow
def test_an_export_killed_at_random_leaves_no_file_and_can_be_rerun(made, tmp_path):
    output = tmp_path / "out" / "x.gguf"
    done = run(KILLED, *made, output, KILLS)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [line for line in done.stdout.splitlines() if line.startswith("KILL")]
    assert len(kills) == KILLS
    assert any(".x.gguf." in line for line in kills)  # some came while it was being written
    assert output.read_bytes() == output.with_name("x.gguf.whole").read_bytes()
    assert output.with_name("x-Q8_0.gguf").read_bytes() == output.with_name("x.gguf-Q8_0.whole").read_bytes()
    assert not list(output.parent.glob(".*"))


@pytest.mark.slow
def test_a_file_size_limit_is_reported_and_leaves_nothing(made, tmp_path):
    limit = 1_000_000  # bytes of a file
    output, limits = tmp_path / "x.gguf", (limit, limit)
    done = run(FULL, *made, output, "asked", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert f"{output} could not be written: " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "said"),
    [("asked", " GB of disk at "), ("unasked", "x.gguf could not be written: [Errno 28] No space left on device")],
)
def test_a_full_disk_is_reported_and_leaves_nothing(made, tmp_path, asked, said):
    before = [*SMALL_DISK, str(tmp_path)]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("This machine does not let a test mount a tmpfs (unshare --mount).")
    done = run(FULL, *made, tmp_path / "x.gguf", asked, before=before)
    assert said in done.stdout, done.stdout + done.stderr
    assert "left: []" in done.stdout


def test_several_types_from_one_read_equal_the_files_made_one_by_one(made, tmp_path, monkeypatch):
    base, adapter = made
    alone = {
        each: export.to_gguf(model=str(base), adapter=adapter, output=tmp_path / f"{each}.gguf", quant_type=each)
        for each in ("Q4_K_M", "Q8_0", "F16")
    }
    monkeypatch.setattr(streaming, "_NUMBERS", 1)
    monkeypatch.setattr(streaming, "_ROWS", 32)
    reads = []
    read = Merged.read
    monkeypatch.setattr(
        Merged,
        "read",
        lambda self, name, rows=None: (reads.append((name, rows.start)), read(self, name, rows))[1],
    )
    output = tmp_path / "together" / "x.gguf"
    export.to_gguf(
        model=str(base), adapter=adapter, output=output, quant_type="Q4_K_M", quant_types=["Q8_0", "F16", "Q8_0"]
    )
    assert sorted(file.name for file in output.parent.iterdir()) == ["x-F16.gguf", "x-Q8_0.gguf", "x.gguf"]
    assert output.read_bytes() == alone["Q4_K_M"].read_bytes()
    for each in ("Q8_0", "F16"):
        assert output.with_name(f"x-{each}.gguf").read_bytes() == alone[each].read_bytes()
    assert len(reads) == len(set(reads)) > 100  # every row once, for all files


def leave(final):
    """What a process that was killed while it wrote `final` leaves."""
    with files.temporary_dir(final.parent, final.name) as living:
        (living / "half").write_bytes(b"0" * 1000)
        return shutil.copytree(living.parent, final.with_name(f".{final.name}.killed.partial"))


@pytest.mark.parametrize("name", ["x.gguf", "x-Q8_0.gguf"])
def test_the_leftovers_of_a_killed_export_are_removed_before_the_disk_is_checked(made, tmp_path, monkeypatch, name):
    left, seen = leave(tmp_path / name), []
    monkeypatch.setattr(workspace, "require_disk", lambda *_: seen.append(left.exists()))
    export.to_gguf(model=str(made[0]), adapter=None, output=tmp_path / "x.gguf", quant_types=["Q8_0"])
    assert seen == [False]


def test_the_leftovers_of_a_killed_stage_are_removed_before_the_disk_is_checked(made, tmp_path, monkeypatch):
    left, seen = leave(tmp_path / "03_merge_gguf"), []
    monkeypatch.setattr(workspace, "require_disk", lambda *_: seen.append(left.exists()))
    export.merge_gguf(model=str(made[0]), adapter=None, run_dir=tmp_path)
    assert seen[0] is False


def test_none_of_several_files_is_overwritten(made, tmp_path):
    (tmp_path / "x-Q8_0.gguf").write_text("mine")
    with pytest.raises(SaigaError, match=r"x-Q8_0\.gguf already exists"):
        export.to_gguf(model=str(made[0]), adapter=None, output=tmp_path / "x.gguf", quant_types=["Q8_0"])
    assert [file.name for file in tmp_path.iterdir()] == ["x-Q8_0.gguf"]


def test_nan_in_the_base_is_reported_with_tensor_and_file(made, tmp_path):
    base = shutil.copytree(made[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][300, 7] = torch.nan
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(SaigaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN .*model\.safetensors"):
        export.to_gguf(model=str(base), adapter=None, output=tmp_path / "x.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_damaged_header_is_reported_with_the_file(made, tmp_path):
    base = shutil.copytree(made[0], tmp_path / "base")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[9] ^= 0x80
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(SaigaError, match=r"model\.safetensors is missing or damaged"):
        export.to_gguf(model=str(base), adapter=None, output=tmp_path / "x.gguf")


def test_the_estimate_lists_every_file_that_is_written(made):
    chosen = Export.of(MergePlan.of(str(made[0]), made[1]), ["Q4_K_M", "Q2_K"])
    said = str(estimate.estimate_table(chosen))
    assert f"{chosen.bytes('Q2_K') / 1e9:.2f} GB" in said
    assert all(f"write {each}" in said for each in ("Q4_K_M", "Q2_K"))


def test_ids_on_the_evaluation_set_are_compared_with_those_of_the_file(made, tmp_path, monkeypatch, capsys):
    chosen = Export.of(MergePlan.of(str(made[0]), made[1]), ["Q4_0"])
    facts = chosen.write(tmp_path / "x.gguf", TEXTS)
    assert json.loads(json.dumps(facts))["files"]["x.gguf"]["quant_type"] == "Q4_0"
    assert "2 evaluation texts have the token ids of the training" in capsys.readouterr().out
    encode = encoding.GgufTokenizer.encode_text
    monkeypatch.setattr(encoding.GgufTokenizer, "encode_text", lambda self, text: encode(self, text)[:-1])
    with pytest.raises(SaigaError):
        chosen.write(tmp_path / "y.gguf", TEXTS)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("damage", ["a byte", "metadata", "the end", "llama.cpp"])
def test_a_damaged_file_never_gets_its_final_name(made, tmp_path, monkeypatch, damage):
    chosen = Export.of(MergePlan.of(str(made[0]), made[1]), ["Q8_0"])
    write_at, write_tensors = streaming._write_at, streaming.write_tensors
    if damage == "a byte":

        def other_byte(file, content, offset):
            write_at(file, memoryview(bytes([content[0] ^ 64, *content[1:]])), offset)

        monkeypatch.setattr(streaming, "_write_at", other_byte)
    elif damage == "llama.cpp":  # as after an overflow in a scale: all checksums are right
        monkeypatch.setattr(read_back.forward, "load_weights", lambda *_, **__: refuse())
    else:

        def filled(targets, *given, **named):
            made = write_tensors(targets, *given, **named)
            content = targets[0].file.read_bytes()
            changed = (
                content.replace(b"general.sampling.temp", b"general.sampling.tEmp")
                if damage == "metadata"
                else content[:-64]
            )
            targets[0].file.write_bytes(changed)
            return made

        monkeypatch.setattr(streaming, "write_tensors", filled)

    def refuse():
        raise SaigaError("llama.cpp cannot load it")

    with pytest.raises(SaigaError):
        chosen.write(tmp_path / "x.gguf", TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_evaluation_set_is_reported(tmp_path, capsys):
    assert export_stage._evaluation_texts(tmp_path) == []
    assert capsys.readouterr().out.startswith(f"There is no 01_format/held_out.jsonl in {tmp_path} or attached: ")
