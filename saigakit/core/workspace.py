"""Find inputs and directories, on Kaggle and locally, and measure disk, memory, GPUs and session time."""

import errno
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from saigakit.errors import SaigaError

GIB = 1024**3
GB = 10**9
SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # `python -m` would import from the current directory first
SESSION = "Kaggle session"  # `saigakit stop` reads its number from the log
_SESSION_START = "SAIGAKIT_SESSION_START"
_CACHE_REMEDY = "name a directory with room in the environment variable SAIGAKIT_CACHE"


class Gpu(NamedTuple):
    """A GPU as nvidia-smi reports it; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.capability[0]}{self.capability[1]}, {self.memory / GIB:.1f} GiB"


def on_kaggle() -> bool:
    """Other KAGGLE_* variables do not count: users of the kaggle command line set them at home."""
    working = Path(os.environ.get("SAIGAKIT_WORKING", "/kaggle/working"))
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or working.is_dir()


def input_roots() -> list[Path]:
    """Where Kaggle mounts attached data sets, models and notebook outputs; SAIGAKIT_INPUT_ROOT replaces it at home."""
    root = Path(os.environ.get("SAIGAKIT_INPUT_ROOT", "/kaggle/input"))
    return [root] if root.is_dir() else []


def scratch_dir() -> Path:
    """For temporary files: Kaggle keeps 20 GB of /kaggle/working and has about 60 GiB elsewhere."""
    root = _scratch_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaigaError(f"{root} could not be created: {error}; {_CACHE_REMEDY}.") from None
    return root


def _scratch_root() -> Path:
    if named := os.environ.get("SAIGAKIT_CACHE"):
        return Path(named)
    if on_kaggle():
        return Path(tempfile.gettempdir()) / "saigakit"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "saigakit"


def child_environment() -> dict[str, str]:
    """For a Python child: UTF-8, unbuffered, without modules of the current directory and kernels from the Hub."""
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "USE_HUB_KERNELS": "NO", **SAFE_PATH}


def find_input(name: str, *, run_dir: str | Path | None = None) -> Path:
    """Find a path in `run_dir`, as given, or by the end of its path in an attached input."""
    if (found := find_optional_input(name, run_dir=run_dir)) is not None:
        return found
    first = f" Run {stage[0]} first." if (stage := re.match(r"\d\d_\w+(?=/|$)", name)) else ""
    looked = ", ".join(map(str, _places(name, run_dir)))
    attached = [str(path) for root in input_roots() for path in sorted(root.glob("*/*"))[:20]] or ["none"]
    raise SaigaError(f"{name!r} is not there.{first} Looked at {looked}; attached inputs: {', '.join(attached)}.")


def find_optional_input(name: str, *, run_dir: str | Path | None = None) -> Path | None:
    """As `find_input`, but None if there is nothing. Raises SaigaError if several attached inputs match."""
    found = _matching(name, run_dir)
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise SaigaError(f"{name!r} is attached more than once: {places}. Give the full path, or attach one of them.")
    return found[0] if found else None


def is_local(name: str, run_dir: str | Path | None) -> bool:
    """Whether `find_input` would find it, or several."""
    return bool(_matching(name, run_dir))


def _matching(name: str, run_dir: str | Path | None) -> list[Path]:
    if existing := [path for path in _places(name, run_dir) if path.exists()]:
        return existing[:1]
    wanted = Path(name).parts
    return [
        path
        for root in input_roots()
        for path in sorted(root.rglob(glob.escape(wanted[-1])))
        if path.parts[-len(wanted) :] == wanted
    ]


def _places(name: str, run_dir: str | Path | None) -> list[Path]:
    return [*([] if run_dir is None else [Path(run_dir) / name]), Path(name).expanduser()]


def secret(name: str) -> str | None:
    """From the environment, or else from Kaggle's secrets, without the spaces around it; None if neither has it."""
    if value := os.environ.get(name, "").strip():
        return value
    if not on_kaggle():
        return None
    from kaggle_secrets import UserSecretsClient  # exists in Kaggle's image only

    for wait_s in (1, 2, 4, 0):
        try:
            return str(UserSecretsClient().get_secret(name) or "").strip() or None
        except ConnectionError:  # the secrets service is known to fail now and then
            time.sleep(wait_s)
        except Exception as error:
            print(f"Secret {name} is not attached to this notebook ({type(error).__name__}).")
            return None
    print(f"Secret {name}: Kaggle's secrets service does not answer.")
    return None


def free_disk(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    here = path.resolve()  # a stage may be a link to a larger disk
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def require_disk(path: Path, needed: int, what: str) -> None:
    """Raise SaigaError with both numbers if `needed` bytes do not fit, on Kaggle next to the notebook itself."""
    needed += 50 * 10**6 if on_kaggle() else 0  # to save the notebook and its page: without them all output is lost
    if free_disk(path) < needed:
        raise disk_full(what, needed, path)


def is_full(error: OSError) -> bool:
    """Whether it means that a file could not grow."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(what: str, needed: int, path: Path | None = None) -> SaigaError:
    """Without `path` for the scratch directory, where `needed` bytes are a lower bound."""
    place, more = (scratch_dir(), " or more") if path is None else (path, "")
    amounts = f"{needed / GB:.2f} GB of disk{more} at {place}, and {free_disk(place) / GB:.2f} GB are free"
    return SaigaError(f"{what} needs {amounts}. Delete something there, or {_elsewhere(place)}.")


def not_written(path: Path, error: OSError) -> SaigaError:
    """The error for a write that failed; what was written of `path` is deleted already."""
    remedy = _elsewhere(path)
    if is_full(error) or error.errno is None:  # numpy gives no number
        remedy = f"without it {free_disk(path):,} bytes are free there. Delete something there, or {remedy}"
    return SaigaError(f"{path} could not be written: {error}; {remedy}.")


def _elsewhere(path: Path) -> str:
    is_scratch = path.absolute().is_relative_to(_scratch_root().absolute())
    return _CACHE_REMEDY if is_scratch else "choose another place (run_dir, --output)"


def available_memory() -> int:
    """Bytes of RAM that a new process can have: the lesser of /proc/meminfo's and the cgroup's."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable: *(\d+)", meminfo.read_text(encoding="ascii"))):
        available = int(found[1]) * 1024
    return min(available, _left_in_cgroup(Path("/sys/fs/cgroup"), available))


def _left_in_cgroup(directory: Path, default: int) -> int:
    """Bytes left below a container's limit, plus the file cache, which counts as used but can be reclaimed."""
    limit = directory / "memory.max"
    if not limit.exists() or (text := limit.read_text(encoding="ascii").strip()) == "max":
        return default
    lines = (directory / "memory.stat").read_text(encoding="ascii").splitlines()
    files = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return int(text) - int((directory / "memory.current").read_text(encoding="ascii")) + files


def require_memory(needed: int, what: str, remedy: str, gpu: Gpu | None = None) -> None:
    """Raise SaigaError with the numbers if `needed` bytes of RAM, or of the memory of `gpu`, are not free."""
    free = available_memory() if gpu is None else gpu.free
    if free < needed:
        where, of = ("", "") if gpu is None else (f" on {gpu.name}", f" of {gpu.memory / GB:.1f} GB")
        raise SaigaError(
            f"{what} needs about {needed / GB:.1f} GB of memory{where}, and {free / GB:.1f} GB{of} are free. {remedy}"
        )


def gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; from nvidia-smi, which creates no CUDA context in this process."""
    if shutil.which("nvidia-smi") is None or not visible_gpus(1):
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free"]
    result = subprocess.run([*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False)
    if result.returncode != 0:  # there is a driver but no GPU
        return []
    rows = re.findall(r"^(.+), (\d+)\.(\d+), (\d+), (\d+)$", result.stdout, re.MULTILINE)
    if len(rows) < len(listed := result.stdout.strip().splitlines()):
        raise SaigaError(
            f"nvidia-smi does not state capability and memory of each GPU: {listed}. Update the driver, or set "
            "CUDA_VISIBLE_DEVICES to an empty string to use the CPU."
        )
    found = [
        Gpu(name, (int(major), int(minor)), int(total) << 20, int(free) << 20)
        for name, major, minor, total, free in rows
    ]
    return [found[number] for number in visible_gpus(len(found)) if number < len(found)]


def visible_gpus(count: int) -> list[int]:
    """The GPU numbers in CUDA_VISIBLE_DEVICES, or all of `count` if it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(count))
    if re.search("GPU-|MIG-", named):
        raise SaigaError(f"CUDA_VISIBLE_DEVICES={named!r}: give the numbers of the GPUs in nvidia-smi, such as 0,1.")
    return [int(number) for number in named.split(",") if number.strip().isdigit()]


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions; weights.load.bf16_is_faster measures whether they pay off."""
    return cpu_matmul() != "float32" and bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def cpu_matmul() -> str | None:
    """SAIGAKIT_CPU_MATMUL: "float32" where results must not depend on the CPU, "bf16", or None to measure."""
    asked = os.environ.get("SAIGAKIT_CPU_MATMUL")
    if asked not in (None, "float32", "bf16"):
        raise SaigaError(f"SAIGAKIT_CPU_MATMUL={asked!r}: use float32 or bf16, or unset it to let saigakit measure.")
    return asked


def cpu_flags() -> set[str]:
    """The instruction sets in /proc/cpuinfo; empty on systems other than Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return set(next((line.split() for line in lines if line.startswith("flags")), []))


def uptime() -> float:
    """Seconds since this machine was started: a clock that nobody sets, the same in all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def session_start() -> float:
    """The `uptime` when this session of Kaggle began, which child processes inherit; elsewhere now."""
    started = os.environ.get(_SESSION_START) or str(uptime())
    if on_kaggle():
        os.environ[_SESSION_START] = started
    return float(started)


def align(rows: Iterable[tuple[str, str]]) -> str:
    """Format rows as two aligned columns."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def describe_machine() -> str:
    """The small table that every notebook shows first."""
    rows = [("where", "Kaggle" if on_kaggle() else "local")]
    if number := re.search(r"(\d{4,})\D*$", os.environ.get("KAGGLE_CONTAINER_NAME", "")):
        rows.append((SESSION, number[1]))
    rows += [(f"GPU {index}", str(gpu)) for index, gpu in enumerate(gpus())] or [("GPU", "none")]
    rows += [
        ("CPU", f"{os.cpu_count()} cores, bf16 {'yes' if cpu_has_bf16() else 'no'}"),
        ("memory", f"{available_memory() / GB:.1f} GB free"),
        ("disk here", f"{free_disk(Path.cwd()) / GB:.1f} GB free"),
    ]
    return align(rows)
