"""The cost of quantising for the files of a stage: measured once and kept next to it."""

import shutil

import pytest

from saigakit import export
from saigakit.core import files, manifest, workspace
from saigakit.data import report
from saigakit.errors import SaigaError
from saigakit.export import calibration, quality
from saigakit.export import stage as export_stage
from saigakit.export.gguf_export import Export
from saigakit.export.merge_plan import MergePlan

MODEL = "saiga_tiny"


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A finished 01_format, and a finished 03_merge_gguf with a matrix computed on the records."""
    made = tmp_path_factory.mktemp("run")
    records = str(tiny / "records.jsonl")
    report.check_records(model=MODEL, records=records, held_out=records, run_dir=made)
    options = {"model": MODEL, "adapter": "released", "run_dir": made}
    matrix = calibration.importance_matrix("records", max_tokens=500, **options)
    export.merge_gguf(**options, quant_type="Q4_K_M", importance=matrix)
    return made


@pytest.fixture
def stage(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "run") / "03_merge_gguf"


def scratch():
    return sorted(workspace.scratch_dir().rglob("reference*.gguf"))


def test_a_stage_and_further_types_are_measured_once(stage, capsys):
    matrix = stage.parent / "03_importance" / "imatrix.gguf"
    table = quality.measure_quality(stage, quant_types=("Q2_K", "Q8_0", "Q4_K_M"), importance=matrix, max_tokens=300)
    divergence = {row[0]: float(row[4]) for row in table.rows}
    assert list(divergence) == ["Q8_0", "Q4_K_M", "Q2_K"]  # the largest first
    assert 0 <= divergence["Q8_0"] < divergence["Q4_K_M"] < divergence["Q2_K"]
    assert not scratch()
    again = quality.measure_quality(stage, quant_types=("Q2_K", "Q8_0", "Q4_K_M"), importance=matrix, max_tokens=300)
    assert again == table and "03_quality: " in capsys.readouterr().out
    content = manifest.read(stage)
    card = (stage.parent / "03_quality" / "README.md").read_text(encoding="utf-8")
    assert "## Measured" in card and f"| Q4_K_M | {table.rows[1][1]} | " in card and table.note in card
    assert quality.read_table(stage, content) == table
    assert quality.read_table(stage, {**content, "outputs": {"model.gguf": "of another"}}) is None


def test_an_export_of_the_runs_adapter_is_read_back_with_the_runs_evaluation_set(tiny, run_dir, tmp_path, capsys):
    run = shutil.copytree(run_dir, tmp_path / "run")
    shutil.copytree(tiny / "adapter", run / "02_train")
    export.to_gguf(model=MODEL, adapter=run / "02_train", output=tmp_path / "x.gguf")
    assert "texts" in capsys.readouterr().out


def test_changed_settings_are_measured_again_and_a_users_directory_stays(stage, tiny, capsys):
    run_dir, options = stage.parent, {"model": MODEL, "adapter": "released"}
    for tokens in (20, 30):
        assert quality.measure_quality(stage, max_tokens=tokens)
        assert manifest.read(run_dir / "03_quality")["parameters"]["max_tokens"] == tokens
        calibration.importance_matrix("records", max_tokens=tokens, run_dir=run_dir, **options)
        made = manifest.read(run_dir / "03_importance")
        assert made["parameters"]["max_tokens"] == tokens
        assert made["inputs"]["base"] == manifest.hashes(tiny / "base")
    assert "max_tokens: 20 there, 30 now). Making it again." in capsys.readouterr().out
    (run_dir / "03_quality" / manifest.NAME).unlink()
    (run_dir / "03_quality" / "mine.txt").write_text("mine")
    with pytest.raises(SaigaError, match=r"03_quality has no saigakit\.json.* Delete it"):
        quality.measure_quality(stage, max_tokens=30)
    assert (run_dir / "03_quality" / "mine.txt").is_file()


def test_an_interrupted_measurement_leaves_nothing_but_the_stage(stage, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "compare_files", interrupted)
    before = manifest.hashes(stage)
    with pytest.raises(KeyboardInterrupt):
        quality.measure_quality(stage)
    assert manifest.hashes(stage) == before
    assert not (stage.parent / "03_quality").exists() and not scratch()


@pytest.mark.parametrize(
    ("free", "reference"), [(10**12, "F16"), (350_000, "Q8_0"), (1000, None)], ids=["room", "little", "none"]
)
def test_the_reference_is_the_best_type_that_the_disk_has_room_for(stage, monkeypatch, capsys, free, reference):
    monkeypatch.setattr(workspace, "free_disk", lambda _: free)
    monkeypatch.setattr(Export, "require_room", lambda *_: None)
    table = quality.measure_quality(stage, max_tokens=20)
    said = capsys.readouterr().out
    assert (table is None) == (reference is None)
    assert ("is not measured: A comparison with Q8_0 needs 0.00 GB of disk at " in said) == (reference is None)
    if reference:
        assert f'"reference": "{reference}"' in (stage.parent / "03_quality" / "quality.json").read_text("utf-8")


def test_the_reference_may_be_one_of_the_further_types(stage, monkeypatch):
    monkeypatch.setattr(workspace, "free_disk", lambda _: 700_000)  # for Q2_K, Q4_0 and Q8_0, each once
    monkeypatch.setattr(Export, "require_room", lambda *_: None)
    table = quality.measure_quality(stage, quant_types=("Q2_K", "Q4_0", "Q4_K_M", "Q8_0"), max_tokens=20)
    assert [row[0] for row in table.rows] == ["Q4_K_M", "Q4_0", "Q2_K"]  # not the reference, of itself
    assert "эталон Q8_0" in table.note


def test_a_single_file_is_not_compared_with_itself(tiny, run_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(run_dir / "01_format", tmp_path / "01_format")
    stage = export.merge_gguf(model=MODEL, adapter=None, run_dir=tmp_path, quant_type="F16")
    assert quality.measure_quality(stage) is None
    assert "there is no file other than F16" in capsys.readouterr().out
    assert not (tmp_path / "03_quality").exists() and not scratch()


def test_reference_and_file_must_fit_into_memory_together(stage, monkeypatch, capsys):
    sizes = {each: Export.of(MergePlan.of(MODEL, None), [each]).bytes(each) for each in ("F16", "Q8_0", "Q4_K_M")}
    monkeypatch.setattr(workspace, "available_memory", lambda: sizes["F16"] + 1000)
    monkeypatch.setattr(Export, "require_room", lambda *_: None)
    assert "эталон Q8_0" in quality.measure_quality(stage, max_tokens=20).note
    monkeypatch.setattr(workspace, "available_memory", lambda: sizes["Q8_0"] + 1000)
    assert quality.measure_quality(stage, max_tokens=21) is None
    assert "needs about 0.0 GB of memory, and 0.0 GB are free" in capsys.readouterr().out


def test_an_impossible_export_is_reported_before_its_matrix_is_computed(run_dir, monkeypatch):
    monkeypatch.setattr(calibration.imatrix, "compute_importance", lambda *_, **__: pytest.fail("it is computed"))
    options = {"model": MODEL, "adapter": "released", "run_dir": run_dir, "max_tokens": 400}
    with pytest.raises(SaigaError, match="quant_type='Q4_KM' is unknown"):
        calibration.importance_matrix("records", quant_type="Q4_KM", **options)
    monkeypatch.setattr(workspace, "free_disk", lambda _: 1000)
    with pytest.raises(SaigaError, match=r"The Q4_K_M GGUF of saiga_tiny needs 0\.00 GB of disk"):
        calibration.importance_matrix("records", quant_type="Q4_K_M", **options)


@pytest.mark.parametrize(("tokens", "said"), [(0, "quality_tokens is 0"), (10, "no 01_format/held_out.jsonl in ")])
def test_the_reason_for_not_measuring_is_printed(stage, capsys, tokens, said):
    if tokens:
        (stage.parent / "01_format" / "held_out.jsonl").unlink()
    assert quality.measure_quality(stage, max_tokens=tokens) is None
    assert "The cost of quantising is not measured: " in (printed := capsys.readouterr().out) and said in printed


def test_a_matrix_is_computed_once_and_an_existing_file_is_used_unchanged(run_dir, tmp_path, capsys):
    options = {"model": MODEL, "adapter": "released"}
    made = calibration.importance_matrix("records", max_tokens=500, run_dir=run_dir, **options)
    assert made == run_dir / "03_importance" / "imatrix.gguf" and "up to date" in capsys.readouterr().out
    assert manifest.read(run_dir / "03_merge_gguf")["inputs"]["importance"] == files.sha256(made)
    assert calibration.importance_matrix(None, run_dir=tmp_path, **options) is None
    assert calibration.importance_matrix(str(made), run_dir=tmp_path, **options) == made
    with pytest.raises(SaigaError, match=r"needs 01_format/train\.jsonl, which is not in .*\. Run 01_format first"):
        calibration.importance_matrix("records", run_dir=tmp_path, **options)


def test_attached_records_and_an_attached_matrix_are_found(stage, monkeypatch, capsys):
    run_dir, options = stage.parent, {"model": MODEL, "adapter": "released"}
    attached = run_dir.with_name("input") / "notebooks" / "earlier"
    attached.mkdir(parents=True)
    (run_dir / "01_format").rename(attached / "01_format")
    shutil.copy(run_dir / "03_importance" / "imatrix.gguf", attached / "mine.gguf")
    monkeypatch.setenv("SAIGAKIT_INPUT_ROOT", str(run_dir.with_name("input")))
    assert export_stage._evaluation_texts(run_dir) and not capsys.readouterr().out
    assert quality.measure_quality(stage, max_tokens=20)
    made = calibration.importance_matrix("records", max_tokens=500, run_dir=run_dir, **options)
    assert made == run_dir / "03_importance" / "imatrix.gguf" and "up to date" in capsys.readouterr().out
    assert calibration.importance_matrix("mine.gguf", run_dir=run_dir, **options) == attached / "mine.gguf"
    with pytest.raises(SaigaError, match=r"'yours\.gguf' is not there"):
        calibration.importance_matrix("yours.gguf", run_dir=run_dir, **options)
