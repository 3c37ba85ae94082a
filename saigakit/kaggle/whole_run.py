"""From records on this machine to a model on this machine: data sets, four notebooks on Kaggle, and their results."""

import gzip
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saigakit import data
from saigakit.core import hub, install, manifest
from saigakit.core.display import Table
from saigakit.core.files import lock_file, require_absent, scratch, sha256, sha256_of_text, write_text
from saigakit.errors import SaigaError
from saigakit.kaggle import command_line, datasets, kernels, notebook, wheels
from saigakit.kaggle.kernels import Pushed

STAGES = tuple(install.STAGES)
_TRAIN = STAGES[1]
STATE = "on_kaggle.json"
_SUBTITLES = {
    datasets.WHEELS: "The wheel files that the notebooks of saigakit install",
    "records": "Records to train a model with saigakit",
}  # by data set


@dataclass
class WholeRun:
    """One run on Kaggle. What was done is kept in `directory`/on_kaggle.json, so that the same call goes on from there.

    `stages`: notebook and parameters of each. `sessions`: how many sessions of Kaggle 02_train may take. `offline`: a
    model of Kaggle, owner/model/framework/variation/version, to be the base of a run without internet.
    """

    records: Sequence[Path]
    directory: Path
    name: str
    stages: Mapping[str, tuple[Path, Mapping[str, Any]]]
    sessions: int = 3
    accelerator: str | None = None
    offline: str | None = None
    poll_s: float = 30.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", self.name) or not 3 <= len(self.name) <= 30:
            raise SaigaError(f"name={self.name!r}: give 3 to 30 characters of a-z, 0-9 and '-', such as saiga-terms.")
        if self.offline and not re.fullmatch(r"[\w-]+(/[\w.-]+){3}/\d+", self.offline):
            raise SaigaError(
                f"offline={self.offline!r}: give owner/model/framework/variation/version of a Kaggle model."
            )
        if self.name == "saigakit":
            raise SaigaError("The name saigakit is that of the published notebooks. Choose another --name.")
        self._state = self._read_state()
        for stage, (_, values) in self.stages.items():
            notebook.require_valid(stage, values)
            for name, value in values.items():
                if name == "records" or (value not in STAGES and isinstance(value, str) and Path(value).exists()):
                    raise SaigaError(f"{name}={value!r} would not be on Kaggle: of this machine, it gets FILES only.")
            if stage not in self._state.get("home", {}):
                require_absent(self.directory / stage)
        start = notebook.train_config(self.stages[_TRAIN][1]).start_adapter or ""
        if self.offline and hub.is_hub_id(start.partition("@")[0]):
            raise SaigaError(f"Without internet, {start} is not there to train on. Add -p 02_train.adapter None.")
        data.read_conversations(data.records_files([str(file) for file in self.records], None))
        self._owner = command_line.username()

    def _read_state(self) -> dict[str, dict[str, Any]]:
        file = self.directory / STATE
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError):
            raise SaigaError(f"{file} is damaged. Move {self.directory} away or choose another name.") from None

    def plan(self) -> Table:
        """What the run will do, and what of it is done."""
        rows = [(f"data set {self._dataset(part)}", "kept if unchanged") for part in _SUBTITLES]
        for stage in STAGES:
            content = self._content(stage)
            machine, state = content.get("machine_shape", "CPU, no quota"), self._state.get(stage, {}).get("is", "new")
            sessions = f", up to {self.sessions} sessions" if stage == _TRAIN else ""
            rows.append((f"notebook {content['id']}", f"{machine}{sessions}; {state}"))
        return Table(("on Kaggle", "what"), rows, f"Model, card and report arrive in {self.directory}.")

    def run(self) -> Path:
        """Do what is left to do; returns the GGUF file. Raises SaigaError as `kernels.watch` does."""
        with lock_file(self.directory / ".saigakit.lock", self.directory, patience_s=5.0):
            self._state = self._read_state()  # another run may have changed it while this one waited
            done = [self._push(part) for part in _SUBTITLES]
            last = _TRAIN
            for stage in STAGES:
                sources = [self._slug(last if each == _TRAIN else each) for each in STAGES[: STAGES.index(stage)]]
                self._finish(stage, sources, done)
                if stage == _TRAIN:
                    last = self._train_on(done)
                self._bring_home(stage, self._state[last if stage == _TRAIN else stage]["reference"])
        return self.directory / "03_merge_gguf" / "model.gguf"

    def describe_interruption(self) -> str:
        """What goes on without this machine, and how to follow it."""
        started = [done["reference"] for done in self._state.values() if done.get("is") == "started"]
        going_on = "".join(
            f"\n{each} goes on there. Follow it: saigakit watch {each}\nStop it: saigakit stop {each}"
            for each in started
        )
        return f"{going_on}\nRun the same command to go on from here, also after days.".lstrip()

    def _train_on(self, done: list[str]) -> str:
        """Start 02_train again as long as it ended by max_hours; returns the name of the last session."""
        last, pattern = _TRAIN, rf"^{_TRAIN}/{re.escape(manifest.NAME)}$"
        for session in range(2, self.sessions + 1):
            with scratch() as directory:
                made = kernels.fetch(self._state[last]["reference"], directory / "made", pattern=pattern)
                training = manifest.read(made / _TRAIN).get("training", {})
            if training.get("ended") != "max_hours":
                break
            print(f"{self._slug(last)} ended by max_hours: session {session} continues it.", flush=True)
            before, last = last, f"{_TRAIN}-{session}"
            self._finish(last, [self._slug(STAGES[0]), self._slug(before)], done)
        return last

    def _finish(self, step: str, sources: Sequence[str], done: list[str]) -> None:
        """Start a notebook unless it was started with the same inputs, and wait for its end."""
        stage = step.partition("-")[0]
        content = self._content(step) | {"kernel_sources": list(sources)}
        content["dataset_sources"] = [self._dataset(datasets.WHEELS)]
        file, given = self.stages[stage]
        values = dict(given)
        if self.offline:
            values["base_source"] = self.offline.partition("/")[2]  # the end of its path there
        if stage == STAGES[0]:
            records = self._dataset("records")
            content["dataset_sources"].append(records)
            values["records"] = [f"{records.split('/')[1]}/{name}" for name in self._remote_names()]
        fingerprint = _hash([file.read_text(encoding="utf-8"), values, content, done])
        before = self._state.get(step, {})
        if before.get("fingerprint") != fingerprint or before["is"] in ("failed", "pushing"):
            before = self._start(step, fingerprint, lambda: kernels.push_notebook(file, content, values))
        if before["is"] != "finished":
            try:
                kernels.watch(before["reference"], poll_s=self.poll_s)
            except kernels.RunFailedError:
                self._remember(step, before | {"is": "failed"})
                raise
            self._remember(step, before | {"is": "finished"})
        done.append(fingerprint)

    def _start(self, step: str, fingerprint: str, push: Callable[[], Pushed]) -> dict[str, Any]:
        """Push a notebook that does not run yet; one that was pushed when this was killed is taken as it is."""
        slug, new = self._slug(step), {"fingerprint": fingerprint, "is": "pushing"}
        if kernels.is_running(slug):
            if self._state.get(step) != new:
                raise SaigaError(
                    f"{slug} runs on Kaggle already, with other inputs. Wait for its end, or stop it: `saigakit stop "
                    f"{slug}`. Then run this again."
                )
            pushed = Pushed(slug, "already running")
        else:
            self._remember(step, new)
            pushed = push()
        print(f"{step}: {pushed.address}", flush=True)
        started = {"fingerprint": fingerprint, "reference": pushed.reference, "is": "started"}
        self._remember(step, started)
        return started

    def _push(self, part: str) -> str:
        """Upload one of the data sets unless Kaggle has its files; returns their fingerprint."""
        reference = self._dataset(part)
        with scratch() as directory:
            if part == datasets.WHEELS:
                files = [wheels.own_wheel(directory), *(wheels.download(directory) if self.offline else ())]
            else:
                for name, file in self._remote_names().items():
                    with (
                        gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as source,
                        (directory / name).open("wb") as target,
                    ):
                        shutil.copyfileobj(source, target)
                files = sorted(directory.iterdir())
            fingerprint = _hash([[file.name, _hash_file(file)] for file in files])
            if self._state.get(part, {}).get("fingerprint") != fingerprint or datasets.status(reference) != "ready":
                title = reference.split("/")[1].replace("-", " ")
                content = {"id": reference, "title": title, "subtitle": _SUBTITLES[part]}
                datasets.upload(content | {"licenses": [{"name": "other"}]}, files)
                self._remember(part, {"fingerprint": fingerprint, "reference": reference})
        return fingerprint

    def _bring_home(self, stage: str, reference: str) -> None:
        """Fetch the results of a notebook, unless they are here; those of an earlier run stay until these are."""
        final, home = self.directory / stage, self._state.get("home", {})
        if final.is_dir() and home.get(stage) == reference:
            return
        arrived = self.directory / f".{reference.replace('/', '.')}"
        if not arrived.is_dir():  # else it was complete when this was killed
            kernels.fetch(reference, arrived)
        for log in arrived.glob("*.log"):
            log.replace(self.directory / f"{stage}.log")
        shutil.rmtree(final, ignore_errors=True)
        self._remember("home", {**home, stage: reference})
        (arrived / stage).rename(final)
        shutil.rmtree(arrived)

    def _content(self, step: str) -> dict[str, Any]:
        """The metadata of a notebook under this run's name."""
        stage = step.partition("-")[0]
        content = notebook.read_metadata(notebook.find_folder(stage) / notebook.KERNEL, self._owner)
        content |= {"id": self._slug(step), "is_private": True}
        content["title"] = content["id"].split("/")[1].replace("-", " ")
        if self.offline:
            content |= {"enable_internet": False, "model_sources": [self.offline]}
        return notebook.with_accelerator(content, self.accelerator if content["enable_gpu"] else None)

    def _slug(self, step: str) -> str:
        """The reference of a notebook; sessions of 02_train take turns, for it may not be possible to attach itself."""
        stage, _, session = step.partition("-")
        second = "-again" if session and int(session) % 2 == 0 else ""
        return f"{self._owner}/{self.name}-{stage.replace('_', '-')}{second}"

    def _remote_names(self) -> dict[str, Path]:
        """Files by their names on Kaggle, which unpacks archives."""
        names = [file.name.lower().removesuffix(".gz") for file in self.records]
        suffixes = [Path(name.removesuffix(".zst")).suffix + ".zst" * name.endswith(".zst") for name in names]
        return {
            f"records-{i}{suffix}": file for i, (suffix, file) in enumerate(zip(suffixes, self.records, strict=True), 1)
        }

    def _dataset(self, part: str) -> str:
        return f"{self._owner}/{self.name}-{part}"

    def _remember(self, step: str, what: dict[str, Any]) -> None:
        self._state[step] = what
        write_text(self.directory / STATE, json.dumps(self._state, ensure_ascii=False, indent=2))


def _hash(content: object) -> str:
    return sha256_of_text(json.dumps(content, sort_keys=True, ensure_ascii=False))


def _hash_file(file: Path) -> str:
    """Of a wheel only what the sources decide: another setuptools writes its version into WHEEL."""
    if file.suffix != ".whl":
        return sha256(file)
    packed = [[item.filename, item.CRC] for item in zipfile.ZipFile(file).infolist()]
    return _hash(sorted(each for each in packed if not str(each[0]).endswith(("WHEEL", "RECORD"))))


def push_everything(notebooks: Sequence[str] = STAGES, *, public: bool = False, poll_s: float = 30.0) -> None:
    """Push the wheels, the example data and the notebooks of kaggle-metadata, each when the one before is finished."""
    with scratch() as directory:
        datasets.push_dataset(datasets.WHEELS, [wheels.own_wheel(directory)], public=public)
    datasets.push_dataset("example-data", public=public)
    for stage in notebooks:
        kernels.watch(kernels.push(stage, public=public), poll_s=poll_s)
