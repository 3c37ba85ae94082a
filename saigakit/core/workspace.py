"""Where am I: Kaggle or local, its inputs and directories, its disk, memory, GPUs, secrets and time."""

import errno
import glob
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from saigakit.errors import SaigaError

GIB = 1024**3
GB = 10**9
_IN_CACHE = "name a directory with room in the environment variable SAIGAKIT_CACHE"
_SESSION_START = "SAIGAKIT_SESSION_START"
_CPU_MATMUL = "SAIGAKIT_CPU_MATMUL"


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi names it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int


def on_kaggle() -> bool:
    """KAGGLE_KERNEL_RUN_TYPE or the working directory: other KAGGLE_* variables are also set at home."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or Path("/kaggle/working").is_dir()


def input_roots() -> list[Path]:
    """Where attached data sets, models and notebook outputs are mounted, both Kaggle layouts; may be empty.

    SAIGAKIT_INPUT_ROOT replaces /kaggle/input, so that the same search runs at home.
    """
    root = Path(os.environ.get("SAIGAKIT_INPUT_ROOT", "/kaggle/input"))
    return [root] if root.is_dir() else []


def scratch_dir() -> Path:
    """For what need not be kept: Kaggle keeps 20 GB of /kaggle/working and has about 60 GiB elsewhere."""
    named = os.environ.get("SAIGAKIT_CACHE")
    if named:
        root = Path(named)
    elif on_kaggle():
        root = Path(tempfile.gettempdir()) / "saigakit"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "saigakit"
    root.mkdir(parents=True, exist_ok=True)
    return root


def find_input(name: str, *, run_dir: str | Path | None = None) -> Path:
    """A path inside `run_dir`, a path, or the tail of a path inside an attached input.

    Raises SaigaError that lists what is attached when nothing or more than one thing fits.
    """
    if (found := look_for(name, run_dir=run_dir)) is not None:
        return found
    first = f" Run {stage[0]} first." if (stage := re.match(r"\d\d_\w+(?=/|$)", name)) else ""
    looked = ", ".join(map(str, _candidates(name, run_dir)))
    raise SaigaError(f"{name!r} is not there.{first} Looked at {looked}; attached inputs: {_attached()}.")


def is_here(name: str, run_dir: str | Path | None) -> bool:
    """Whether a name is a path here, inside `run_dir` or in an attached input."""
    places = [Path(name), *([] if run_dir is None else [Path(run_dir) / name])]
    attached = (path for root in input_roots() for path in root.rglob(glob.escape(name)))
    return any(path.exists() for path in places) or any(attached)


def look_for(name: str, *, run_dir: str | Path | None = None) -> Path | None:
    """As `find_input`; None when nothing fits."""
    for path in _candidates(name, run_dir):
        if path.exists():
            return path
    wanted = Path(name).parts
    found = [
        path
        for root in input_roots()
        for path in sorted(root.rglob(glob.escape(wanted[-1])))
        if path.parts[-len(wanted) :] == wanted
    ]
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise SaigaError(f"{name!r} is attached more than once: {places}. Give the full path, or attach one of them.")
    return found[0] if found else None


def _candidates(name: str, run_dir: str | Path | None) -> list[Path]:
    return [*([] if run_dir is None else [Path(run_dir) / name]), Path(name).expanduser()]


def _attached() -> str:
    names = [str(path) for root in input_roots() for path in sorted(root.glob("*/*"))[:20]]
    return ", ".join(names) or "none"


def secret(name: str) -> str | None:
    """From the environment, else from Kaggle's secrets; None where it is in neither."""
    if os.environ.get(name):
        return os.environ[name]
    if not on_kaggle():
        return None
    from kaggle_secrets import UserSecretsClient  # exists in Kaggle's image only

    for wait_s in (1, 2, 4, 0):
        try:
            value: str = UserSecretsClient().get_secret(name)
            return value
        except ConnectionError:  # a known flake of the secrets service
            time.sleep(wait_s)
        except Exception as error:
            print(f"Secret {name} is not attached to this notebook ({type(error).__name__}).")
            return None
    print(f"Secret {name}: Kaggle's service of secrets does not answer.")
    return None


def free_disk(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def require_disk(path: Path, needed: int, what: str) -> None:
    """Raises SaigaError with both numbers when `needed` bytes do not fit."""
    free = free_disk(path)
    in_cache = path.absolute().is_relative_to(scratch_dir().absolute())
    if free < needed:
        raise SaigaError(
            f"{what} needs {needed / GB:.2f} GB of disk at {path}, and {free / GB:.2f} GB are free. "
            f"Delete something there, or {_IN_CACHE if in_cache else 'choose another place (run_dir, --output)'}."
        )


def is_full(error: OSError) -> bool:
    """Whether it says that a file could not grow."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def scratch_full(what: str, needed: int) -> SaigaError:
    """`needed`: bytes at least."""
    directory = scratch_dir()
    return SaigaError(
        f"{what} needs {needed / GB:.2f} GB of disk or more at {directory}, and {free_disk(directory) / GB:.2f} GB are "
        f"free. Delete something there, or {_IN_CACHE}."
    )


def available_memory() -> int:
    """Bytes of RAM that a new process can have: /proc/meminfo and the cgroup's limit, whichever is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return min(available, _left_in_cgroup(Path("/sys/fs/cgroup"), available))


def _left_in_cgroup(directory: Path, otherwise: int) -> int:
    """Bytes below a container's limit. The cache of files counts as used there, and gives way when asked."""
    limit = directory / "memory.max"
    if not limit.exists() or (text := limit.read_text(encoding="ascii").strip()) == "max":
        return otherwise
    lines = (directory / "memory.stat").read_text(encoding="ascii").splitlines()
    files = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return int(text) - int((directory / "memory.current").read_text(encoding="ascii")) + files


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raises SaigaError with both numbers when `needed` bytes of RAM are not there."""
    available = available_memory()
    if available < needed:
        raise SaigaError(
            f"{what} needs about {needed / GB:.1f} GB of memory, and {available / GB:.1f} GB are free. {remedy}"
        )


def gpus() -> list[Gpu]:
    """By nvidia-smi, so that asking makes no CUDA context in this process; empty without a driver.

    Those that CUDA_VISIBLE_DEVICES names by number, where it is set.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free"]
    result = subprocess.run([*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False)
    if result.returncode != 0:  # driver present, no GPU attached
        return []
    found = [_parse_gpu(line) for line in result.stdout.splitlines() if line.strip()]
    numbers = visible_gpus(len(found))
    return [found[number] for number in numbers if number < len(found)]


def visible_gpus(count: int) -> list[int]:
    """Numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves; all of `count` where it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(count))
    return [int(number) for number in named.split(",") if number.strip().isdigit()]


def _parse_gpu(line: str) -> Gpu:
    name, capability, total, free = (part.strip() for part in line.split(","))
    major, minor = capability.split(".")
    return Gpu(name, (int(major), int(minor)), int(total) * 1024**2, int(free) * 1024**2)


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions. Whether they are faster is measured: weights.load.bf16_is_faster.

    SAIGAKIT_CPU_MATMUL=float32 turns them off, where results must not depend on the CPU.
    """
    return cpu_matmul() != "float32" and bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def cpu_matmul() -> str | None:
    """What SAIGAKIT_CPU_MATMUL asks for, "float32" or "bf16"; None where it is not set. Raises SaigaError for more."""
    asked = os.environ.get(_CPU_MATMUL)
    if asked not in (None, "float32", "bf16"):
        raise SaigaError(f"{_CPU_MATMUL}={asked!r}: write float32 or bf16, or leave it unset to let saigakit measure.")
    return asked


def cpu_flags() -> set[str]:
    """Instruction sets as Linux names them; empty on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return set(next((line.split() for line in lines if line.startswith("flags")), []))


def session_start() -> float:
    """Seconds since the epoch when this session began; children inherit it by the environment."""
    if _SESSION_START not in os.environ:
        os.environ[_SESSION_START] = str(time.time())
    return float(os.environ[_SESSION_START])


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns as text."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def describe() -> str:
    """This machine in a small table: the first thing a notebook shows."""
    rows = [("where", "Kaggle" if on_kaggle() else "local")]
    rows += [
        (f"GPU {index}", f"{gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}, {gpu.memory / GIB:.1f} GiB")
        for index, gpu in enumerate(gpus())
    ] or [("GPU", "none")]
    rows += [
        ("CPU", f"{os.cpu_count()} cores, bf16 {'yes' if cpu_has_bf16() else 'no'}"),
        ("memory", f"{available_memory() / GB:.1f} GB free"),
        ("disk here", f"{free_disk(Path.cwd()) / GB:.1f} GB free"),
    ]
    return table(rows)
