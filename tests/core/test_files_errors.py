"""A full, limited or read-only disk gives a sentence with the place, the bytes and what to do, and leaves nothing."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saigakit.core import files, manifest
from saigakit.data.conversations import write_conversations
from saigakit.errors import SaigaError
from saigakit.llamacpp.imatrix import Importance, Squares

ROOT = Path(__file__).parents[2]
IN_TMPFS = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs -o OPTIONS tmpfs "$0" && exec "$@"']


@pytest.fixture
def small_files():
    """No file can grow beyond 20,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def make_stage(final, write):
    with manifest.making(final, stage="02_train", parameters={}, inputs={}) as directory:
        write(directory)


def draw(file):
    Image.effect_noise((400, 400), 90).save(file)


def zeros(name, count):
    return Importance({name: Squares(np.zeros(count, np.float32), 1.0)})


CONVERSATION = {"messages": [{"role": "user", "content": "да" * 20_000}, {"role": "assistant", "content": "нет"}]}
WRITERS = {
    "text": lambda final: files.write_text(final, "x" * 50_000),
    "records": lambda final: write_conversations([CONVERSATION], final),
    "importance": lambda final: zeros("blk.0.attn_q.weight", 20_000).write(final),
    "stage": lambda final: make_stage(final, lambda made: (made / "adapter").write_bytes(bytes(50_000))),
    "picture": lambda final: make_stage(final, lambda made: draw(made / "curve.png")),
    "array": lambda final: make_stage(final, lambda made: np.zeros(9_000).tofile(made / "numbers")),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_names_place_and_bytes_and_leaves_nothing(tmp_path, small_files, kind):
    final = tmp_path / "run" / "x"
    with pytest.raises(SaigaError) as caught:
        WRITERS[kind](final)
    assert re.fullmatch(
        rf"{final} could not be written: .+; without it [\d,]{{5,}} bytes are free there\. Delete something there, or "
        r"choose another place \(run_dir, --output\)\.",
        str(caught.value),
    )
    assert list(final.parent.iterdir()) == []


def test_a_full_scratch_directory_is_named_with_its_variable(tmp_path, small_files, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path))
    named = pytest.raises(SaigaError, match=r"tmp/scratch could not be written.*environment variable SAIGAKIT_CACHE\.$")
    with named, files.scratch() as directory:
        (directory / "q8_0.gguf").write_bytes(bytes(50_000))
    assert list((tmp_path / "tmp").iterdir()) == []


READ_ONLY = """
import os, sys
from pathlib import Path
from saigakit.core import files, manifest, workspace
from saigakit.errors import SaigaError
disk = Path(sys.argv[1])
os.environ["SAIGAKIT_CACHE"] = str(disk / "cache")

def stage():
    with manifest.making(disk / "run" / "02_train", stage="02_train", parameters={}, inputs={}):
        print("worked in vain")

for write in (lambda: files.write_text(disk / "x", ""), stage, workspace.scratch_dir):
    try:
        write()
    except SaigaError as error:
        print(error)
"""


def test_a_read_only_disk_is_refused_before_the_work(tmp_path):
    before = [each.replace("OPTIONS", "ro") for each in IN_TMPFS] + [str(tmp_path)]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("This machine does not let a test mount a tmpfs (unshare --mount).")
    command, environment = [*before, sys.executable, "-c", READ_ONLY, str(tmp_path)], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    file, stage, cache = done.stdout.splitlines()
    assert file.startswith(f"{tmp_path}/x could not be written: [Errno 30] Read-only file system: ")
    assert stage.startswith(f"{tmp_path}/run/.saigakit.lock could not be written: [Errno 30] Read-only file system: ")
    assert file.endswith("; choose another place (run_dir, --output).") and "bytes" not in file
    assert cache.startswith(f"{tmp_path}/cache could not be created: [Errno 30] ") and "SAIGAKIT_CACHE" in cache


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused_before_the_work(tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(SaigaError, match=r"saigakit\.lock could not be written: .*Permission denied.*; choose another"):
        make_stage(tmp_path / "run" / "02_train", lambda _: pytest.fail("worked in vain"))


@pytest.mark.parametrize(
    "error", [OSError("Error no file named model.safetensors"), OSError(errno.ENOMEM, "no memory")]
)
def test_an_error_that_is_none_of_the_disk_stays_as_it_is(tmp_path, error):
    with pytest.raises(OSError) as caught, files.explaining(tmp_path / "run"):
        raise error
    assert caught.value is error
