"""Run a pushed notebook as Kaggle does: its tree, its environment, papermill without parameters, then nbconvert."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK, PAGE = "__notebook__.ipynb", "__results__.html"
# papermill saves after each cell, and its exit status is the kernel's; a red one gets its page too.
_EXECUTE = f"""
cd "$1" && {sys.executable} -m papermill --log-output --no-progress-bar "$2" {NOTEBOOK}
status=$?
{sys.executable} -m nbconvert --log-level ERROR --to html --output {PAGE} {NOTEBOOK} && [ $status = 0 ]
"""
# In namespaces of its own: a root with everything that the real one has, and /kaggle.
_MOUNT = """
root=$1 tree=$2 size=$3; shift 3
mount -t tmpfs none $root || exit 99
for each in /*; do
  if [ $each = /kaggle ]; then :
  elif [ -L $each ]; then cp -a $each $root
  elif [ $each = /proc ]; then mkdir $root/proc && mount -t proc proc $root/proc
  elif [ -d $each ]; then mkdir $root$each && mount --rbind $each $root$each
  fi || exit 99
done
mkdir $root/kaggle && mount --rbind $tree $root/kaggle || exit 99
mount --rbind $tree/input $root/kaggle/input && mount -o remount,bind,ro $root/kaggle/input || exit 99
if [ $size != 0 ]; then mount -t tmpfs -o size=$size none $root/kaggle/working || exit 99; fi
chroot $root "$@"
status=$?
if [ $size != 0 ]; then cp -a $root/kaggle/working $tree/kept; fi
exit $status
"""
# Kaggle's image has this module. A secret that is not attached is an error of a class of its own.
_SECRETS = """
import json, os
class BackendError(Exception): ...
class UserSecretsClient:
    def get_secret(self, name):
        attached = json.loads(os.environ["ATTACHED_SECRETS"])
        if name not in attached: raise BackendError("No user secrets exist for kernel")
        return attached[name]
"""


@cache
def can_mount() -> bool:
    """Whether this user may have mounts of its own."""
    probe = "mount -t tmpfs none /mnt && mount -t proc proc /proc && chroot / true"
    return shutil.which("unshare") is not None and _unshared("sh", "-c", probe).returncode == 0


def _unshared(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*_unshare(), *command], capture_output=True, check=False)


def _unshare() -> list[str]:
    """Its end ends everything in it, as on Kaggle."""
    return [
        "unshare",
        *([] if os.geteuid() == 0 else ["--map-root-user"]),
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
    ]


@dataclass
class Ended:
    """A kernel after its run: exit status, what was printed, and what Kaggle keeps of /kaggle/working."""

    status: int
    printed: str
    output: Path

    @property
    def last_lines(self) -> str:
        """What a red kernel's log ends with."""
        return "\n".join(self.printed.strip().splitlines()[-6:])


@dataclass
class Machine:
    """A session: what is attached, and the image's environment. `real`: at /kaggle itself, in private mounts.

    `working_bytes`: the size of /kaggle/working, where it is not the disk of the tests.
    """

    directory: Path
    real: bool
    gpus: tuple[str, ...] = ()  # as nvidia-smi prints them
    secrets: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    working_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("input", "working", "src"):
            (self.tree / name).mkdir(parents=True)
        for name in ("bin", "home", "modules", "root"):
            (self.directory / name).mkdir()
        (self.directory / "modules" / "kaggle_secrets.py").write_text(_SECRETS, encoding="utf-8")
        if self.gpus:
            lines = "".join(f"{gpu}\\n" for gpu in self.gpus)
            (smi := self.directory / "bin" / "nvidia-smi").write_text(
                f"#!/bin/sh\nprintf '{lines}'\n", encoding="utf-8"
            )
            smi.chmod(0o755)

    @property
    def tree(self) -> Path:
        return self.directory / "kaggle"

    @property
    def working(self) -> str:
        """The path of /kaggle/working for the notebook."""
        return "/kaggle/working" if self.real else str(self.tree / "working")

    def attach(self, source: Path, place: str) -> None:
        """Mount a file or an output below /kaggle/input, such as notebooks/OWNER/SLUG; nobody may write to it."""
        target = self.tree / "input" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target)
        for path in [target, *target.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)

    def run(self, text: str) -> Ended:
        """Run a notebook to its end."""
        with self.running(text) as (process, log):
            process.wait()
        kept = self.tree / ("kept" if self.working_bytes else "working")
        return Ended(process.returncode, log.read_text(encoding="utf-8"), kept)

    @contextmanager
    def running(self, text: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """The process of a session, which is killed at the end, and the file of what it prints."""
        source = self.tree / "src" / "script.ipynb"
        source.write_text(text, encoding="utf-8")
        tree = Path("/kaggle") if self.real else self.tree
        command = ["sh", "-c", _EXECUTE, "sh", self.working, str(tree / "src" / "script.ipynb")]
        if self.real:
            mount = ["sh", "-c", _MOUNT, "sh", str(self.directory / "root"), str(self.tree), str(self.working_bytes)]
            command = [*_unshare(), *mount, *command]
        log = self.directory / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, env=self._environment(), stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                yield process, log
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _environment(self) -> dict[str, str]:
        modules = [str(self.directory / "modules"), str(ROOT)]
        places = {"SAIGAKIT_INPUT_ROOT": str(self.tree / "input"), "SAIGAKIT_WORKING": self.working}
        inherited = ("SAIGAKIT_CACHE", "SAIGAKIT_CPU_MATMUL", "OMP_NUM_THREADS", "LANG")
        return {
            **{name: os.environ[name] for name in inherited if name in os.environ},
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.directory / "home"),
            "PYTHONPATH": os.pathsep.join(modules),
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "ATTACHED_SECRETS": json.dumps(dict(self.secrets)),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HUB_DISABLE_XET": "1",
            **({} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}),
            **({} if self.real else places),
            **self.settings,
        }


def pushed(stub: object, stage: str, **parameters: object) -> str:
    """The notebook of a stage as `saigakit push` sends it to Kaggle."""
    from kaggle_stub import KERNELS

    from saigakit.kaggle import kernels

    stub.answer(KERNELS + "SaveKernel", {"ref": "/code/alice/x", "url": "https://kaggle.invalid/x", "versionNumber": 1})
    kernels.push(stage, parameters)
    return stub.sent(KERNELS + "SaveKernel")[-1]["text"]
