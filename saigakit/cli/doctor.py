"""Check this machine: each line of `saigakit doctor` is ✓, or ✗ with what to do."""

import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from saigakit.config import TrainConfig
from saigakit.core import hub, install, workspace
from saigakit.core.workspace import GB, GIB
from saigakit.errors import SaigaError, masked
from saigakit.kaggle import command_line
from saigakit.registry import MODELS
from saigakit.weights import load

_MODEL = MODELS["saiga2_7b"]  # memory and disk are compared with what it needs
_BYTES = int(_MODEL.parameters_b * GB)  # of its 4-bit weights with context or checkpoints; its float16 base has twice


def report() -> None:
    """Print each line when it is known. Raises SaigaError if no stage can run."""
    _show("Python", lambda: f"{platform.python_version()} at {sys.executable}")
    enough = partial(workspace.require_memory, _BYTES, _MODEL.name, "Close other programs or take a smaller model.")
    _show("memory", enough, lambda: f"{workspace.available_memory() / GB:.1f} GB free")
    enough = partial(workspace.require_disk, Path.cwd(), _BYTES, f"A run of {_MODEL.name}")
    _show("run directory", enough, lambda: _disk(Path.cwd()))
    enough = partial(hub.require_room, _MODEL.base_model, "model", 2 * _BYTES)
    _show("scratch", enough, lambda: _disk(workspace.scratch_dir()))
    if _show("GPU", _gpus):
        _show("torch on GPU", lambda: install.require_cuda(workspace.gpus()), lambda: "computes")
    _show("Hub token", lambda: hub.writing_token() and "present")
    if workspace.on_kaggle():
        _show("session", _session)
    else:
        _show("run, demo", lambda: _packages(install.packages("run"), install.pip_install(["run"])))
        _show("push, watch, fetch", lambda: _packages(install.packages("kaggle"), install.pip_install(["kaggle"])))
        if _show("Kaggle login", command_line.username):
            _show("Kaggle quota", _quota)
    ready = [_show(stage, partial(_stage, stage)) for stage in install.STAGES]
    if not any(ready):
        raise SaigaError("No stage can run here. Install what 01_format lacks.")


def _show(name: str, *steps: Callable[[], object]) -> bool:
    """Print what the last step returns, or the error of the first that fails: a broken machine may raise anything."""
    try:
        *_, text = [step() for step in steps]
        passed = True
    except Exception as error:
        text, passed = str(error) if isinstance(error, SaigaError) else f"{type(error).__name__}: {error}", False
    marks = ("✗", "✓") if sys.stdout.encoding.lower().startswith("utf") else ("NO", "ok")  # cp1251 has neither
    print(f"{marks[passed]} {name:<18}  {masked(' '.join(str(text).split()))}", flush=True)
    return passed


def _disk(place: Path) -> str:
    return f"{workspace.free_disk(place) / GB:.1f} GB free at {place}"


def _gpus() -> str:
    if not (gpus := workspace.gpus()):
        raise SaigaError("none visible. Train models of 4B or more on Kaggle: accelerator GPU T4 x2.")
    load.number_format(_MODEL, gpus)
    for gpu in gpus:
        workspace.require_memory(_BYTES, _MODEL.name, "nvidia-smi lists the programs that use it.", gpu)
    return "; ".join(f"{gpu}, {gpu.free / GIB:.1f} GiB free" for gpu in gpus)


def _session() -> str:
    hours = (workspace.uptime() - workspace.session_start()) / 3600
    if hours > TrainConfig.max_hours:
        raise SaigaError(f"{hours:.1f} h of 12 are used, and training stops at max_hours. Start a new session.")
    return f"{hours:.1f} h of 12 are used; training stops at {TrainConfig.max_hours:g} h"


def _quota() -> str:
    return ", ".join(f"{name} {used} used, {left} left" for name, used, left, *_ in command_line.quota().rows)


def _stage(stage: str) -> str:
    on_kaggle = workspace.on_kaggle()
    remedy = "choose the latest environment in the notebook's settings" if on_kaggle else install.pip_command(stage)
    return _packages(install.needs(stage, kaggle=on_kaggle), remedy)


def _packages(names: Sequence[str], remedy: str) -> str:
    if lacking := install.missing(names):
        if workspace.on_kaggle() and set(lacking) <= set(install.PINS):
            return f"ready when the notebook has installed {', '.join(lacking)}"
        raise SaigaError(f"lacks {install.listed(lacking)}; {remedy}")
    usual = install.packages("")
    own = [name for name in names if name not in usual] or names
    return ", ".join(f"{name} {install.installed_version(name)}" for name in own)
