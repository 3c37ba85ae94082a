"""What Kaggle serves of a finished run, and what it got of a notebook."""

import json

from click.testing import CliRunner
from kaggle_stub import DATASETS, KERNELS

from saigakit import cli
from saigakit.core import manifest

STAGES = ("01_format", "02_train", "03_merge_gguf", "04_infer")
SAVE, STATUS = KERNELS + "SaveKernel", KERNELS + "GetKernelSessionStatus"
OUTPUT = KERNELS + "ListKernelSessionOutput"


def code(text):
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def finished(stub, files, log="[]"):
    """Let the stub serve these files as the output of a finished run."""
    stub.files |= {str(number): content for number, content in enumerate(files.values())}
    listed = [{"url": f"http://files.invalid/{number}", "fileName": name} for number, name in enumerate(files)]
    stub.answer(OUTPUT, {"files": listed, "log": log})


def stage_output(directory, stage="02_train", facts=None, parameters=None, **files):
    """The files of a finished stage by their names in the output."""
    with manifest.making(directory / stage, stage=stage, parameters=parameters or {}, inputs={}, facts=facts) as made:
        for name, content in (files or {"adapter_model.safetensors": b"weights"}).items():
            (made / name).write_bytes(content)
    return {f"{stage}/{file.name}": file.read_bytes() for file in (directory / stage).iterdir()}


QUOTA = KERNELS + "GetAcceleratorQuotaStatistics"
RECORD = {"messages": [{"role": "user", "content": "Что?"}, {"role": "assistant", "content": "То."}]}
ROW = {"name": "before", "json_valid": 0, "exact": 0, "f1": 0, "tokens_per_s": 1, "bytes": 1, "n": 1}
ANSWER = {"prompt": "Что?", "reference": "То.", "answers": {"before": "—"}, "exact": {"before": False}}
FILES = {
    "01_format": {"train.jsonl": b"{}"},
    "02_train": {"adapter_model.safetensors": b"weights"},
    "03_merge_gguf": {"model.gguf": b"GGUF", "README.md": b"card"},
    "04_infer": {
        "results.json": json.dumps([ROW]).encode(),
        "answers.jsonl": json.dumps(ANSWER).encode(),
        "comparison.png": b"PNG",
    },
}


class FinishedRuns:
    """A stub that finishes every notebook at once with a small stage; `endings` of 02_train by session."""

    def __init__(self, stub, directory):
        self.stub, self.directory = stub, directory
        self.statuses, self.endings, self.versions = {}, ["finished"], 0
        stub.accept_pushes()
        stub.answer(STATUS, self.status)
        stub.answer(OUTPUT, self.output)
        gpu = {"timeUsed": "7200s", "totalTimeAllowed": "108000s", "timeReserved": "0s"}
        stub.answer(QUOTA, {"quotaRefreshTime": "2026-12-05T00:00:00Z", "gpuQuota": gpu})
        stub.answer(DATASETS + "GetDatasetStatus", self.dataset_status)

    def status(self, sent):
        is_known = f"alice/{sent['kernelSlug']}" in [body["slug"] for body in self.stub.sent(SAVE)]
        return {"status": self.statuses.get(sent["kernelSlug"], "COMPLETE") if is_known else "COMPLETE"}

    def dataset_status(self, sent):
        return {"status": "READY"}

    def output(self, sent):
        slug = sent["kernelSlug"]
        stage = next(stage for stage in STAGES if stage.replace("_", "-") in slug)
        session = len([body for body in self.stub.sent(SAVE) if "-02-train" in body["slug"]])
        ended = self.endings[min(session, len(self.endings)) - 1] if stage == "02_train" else None
        self.versions += 1
        made = self.directory / f"made-{self.versions}"
        made.mkdir()
        parameters = {"model": "saiga_tiny"}
        files = stage_output(made, stage, {"training": {"ended": ended}}, parameters, **FILES[stage])
        self.stub.files |= {f"{self.versions}/{name}": content for name, content in files.items()}
        listed = [{"url": f"http://files.invalid/{self.versions}/{name}", "fileName": name} for name in files]
        return {"files": listed, "log": json.dumps([{"data": f"log of {stage}"}])}

    def pushed(self):
        return [body["slug"].removeprefix("alice/") for body in self.stub.sent(SAVE)]


def call(records, *options, model="saiga_tiny"):
    """Run `saigakit kaggle` with results next to the records."""
    arguments = ["kaggle", str(records), "--model", model, "--run-dir", str(records.parent / "run"), *options]
    return CliRunner().invoke(cli.main, arguments)
