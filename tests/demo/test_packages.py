import hashlib
import io
import shutil
import tarfile
import zipfile
from contextlib import closing
from threading import Thread

import gguf
import llama_cpp
import numpy as np
import pytest
from safetensors import safe_open

from saigakit.core import workspace
from saigakit.demo import packages
from saigakit.demo.packages import PackageFile
from saigakit.errors import SaigaError
from saigakit.prompt import encoding
from saigakit.weights.model_shape import ModelShape

CONTENT = b"the file that is wanted" * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch, cache):
    """A wheel in the only directory that pip can see, and the description of the file in it."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(shelf), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    archive = shelf / "toys-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("toys/data.bin", CONTENT)
        wheel.writestr("toys-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
        wheel.writestr("toys-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toys-1.0.dist-info/RECORD", "")
    return PackageFile(
        requirement="toys==1.0",
        archive_sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        member="data.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )


def kept(cache):
    return [file for file in (cache / "packages").rglob("*") if file.is_file()]


def changed(package, **values):
    return package._replace(**values)


def test_only_the_wanted_file_of_a_package_is_kept(package, cache):
    file = packages.package_file(package)
    assert file.read_bytes() == CONTENT
    assert kept(cache) == [file]


def test_a_kept_file_is_not_downloaded_again(package, tmp_path, capsys):
    file = packages.package_file(package)
    shutil.rmtree(tmp_path / "shelf")
    capsys.readouterr()
    assert packages.package_file(package) == file
    assert capsys.readouterr().out == ""


def test_a_damaged_file_is_downloaded_again(package):
    packages.package_file(package).write_bytes(b"half")
    assert packages.package_file(package).read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["archive_sha256", "sha256"])
def test_another_checksum_of_package_or_file_is_refused_and_nothing_is_kept(package, cache, field):
    with pytest.raises(SaigaError, match=r"toys==1\.0"):
        packages.package_file(changed(package, **{field: "0" * 64}))
    assert kept(cache) == []


def test_an_unavailable_package_is_reported_with_the_output_of_pip(package, cache):
    with pytest.raises(SaigaError, match=r"(?s)toys==2\.0 could not be downloaded.*No matching distribution"):
        packages.package_file(changed(package, requirement="toys==2.0"))
    assert kept(cache) == []


def test_too_little_disk_is_reported_before_the_download(package, monkeypatch, cache):
    monkeypatch.setattr(workspace, "free_disk", lambda path: 2 * len(CONTENT))
    with pytest.raises(SaigaError, match=r"Unpacking toys==1\.0 needs"):
        packages.package_file(package)
    assert kept(cache) == []


def test_a_file_is_extracted_from_a_source_archive_too(tmp_path):
    archive = tmp_path / "toys-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in {"toys-1.0/setup.py": b"1/0", "toys-1.0/toys/data.bin": CONTENT}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert packages._extract(archive, "data.bin").read_bytes() == CONTENT


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupted(partial):
        (partial / "half").write_bytes(b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.make_once(tmp_path / "models" / "one", interrupted)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_process_waits_for_the_directory_that_another_one_is_making(tmp_path):
    waiting = []

    def fill(partial):
        def fill_again(_):
            raise AssertionError

        waiting.append(Thread(target=packages.make_once, args=(tmp_path / "one", fill_again)))
        waiting[0].start()
        (partial / "mine").write_bytes(b"")

    made = packages.make_once(tmp_path / "one", fill)
    waiting[0].join()
    assert [file.name for file in made.iterdir()] == ["mine", ".sizes"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.slow
def test_a_model_that_cannot_be_unpacked_is_not_kept(package, cache, monkeypatch):
    monkeypatch.setattr(packages, "SMOLLM2", package)  # no GGUF
    with pytest.raises(SaigaError):
        packages.smollm2_base()
    assert list((cache / "models").iterdir()) == []


def test_the_tiny_saiga_is_made_once(cache):
    made = packages.tiny_saiga()
    first = (made / "base" / "model.safetensors").stat()
    assert (packages.tiny_saiga() / "base" / "model.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert sorted(item.name for item in made.iterdir()) == [".sizes", "adapter", "base", "records.jsonl"]


@pytest.mark.parametrize("how", ["truncated", "lost", "unmarked", "mark emptied"])
def test_a_damaged_directory_is_made_again_with_one_line(tmp_path, capsys, how):
    def fill(partial):
        (partial / "base").mkdir()
        (partial / "base" / "weights").write_bytes(CONTENT)

    made = packages.make_once(tmp_path / "one", fill)
    damaged = made / ("base/weights" if how in ("truncated", "lost") else ".sizes")
    if how in ("lost", "unmarked"):
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: 100 if how == "truncated" else 0])
    assert packages.make_once(tmp_path / "one", fill) == made
    assert (made / "base" / "weights").read_bytes() == CONTENT
    assert capsys.readouterr().out == f"{made} is damaged or of an earlier version: making it again.\n"
    (made / "mine").touch()
    packages.make_once(tmp_path / "one", fill)
    assert (made / "mine").exists() and capsys.readouterr().out == ""


def test_a_truncated_model_in_the_cache_is_made_again(cache):
    weights = packages.tiny_saiga() / "base" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:1000])
    packages.tiny_saiga()
    assert weights.read_bytes() == before


def test_smollm2_has_the_right_shape_and_tokenizer(smollm2):
    shape = ModelShape.from_config(smollm2)
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.tied) == (576, 30, 9, 3, True)
    tokenizer = encoding.load_tokenizer("smollm2_135m")
    assert encoding.end_of_turn_ids(tokenizer) == {2}


def test_smollm2_has_the_ids_of_the_packaged_file(smollm2, callers_cache, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(callers_cache))
    ours = encoding.load_tokenizer("smollm2_135m")
    theirs = llama_cpp.Llama(str(packages.package_file(packages.SMOLLM2)), vocab_only=True, verbose=False)
    with closing(theirs):
        for text in ("в  1984 году", "12,5 %", "а\n\n  3. б", "it's  5\t7"):
            assert ours.encode_text(text) == theirs.tokenize(text.encode(), add_bos=False, special=False), text


@pytest.mark.slow
def test_smollm2_has_the_weights_of_the_packaged_file(smollm2, callers_cache, monkeypatch):
    monkeypatch.setenv("SAIGAKIT_CACHE", str(callers_cache))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(packages.package_file(packages.SMOLLM2)).tensors}
    packed = tensors["blk.7.ffn_down.weight"]
    with safe_open(smollm2 / "model.safetensors", "numpy") as weights:
        unpacked = weights.get_tensor("model.layers.7.mlp.down_proj.weight")
    np.testing.assert_array_equal(unpacked, gguf.dequantize(packed.data, packed.tensor_type))
