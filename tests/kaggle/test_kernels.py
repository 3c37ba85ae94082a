"""Push, watch and stop with the real kaggle command line against a stub of Kaggle's server."""

import json
import re

import pytest
from click.testing import CliRunner
from kaggle_runs import OUTPUT, SAVE, STATUS
from kaggle_stub import KERNELS
from small_wheels import pretend_installed
from terminal_output import control_characters, run_on_terminal

from saigakit import cli
from saigakit.core import install, workspace
from saigakit.errors import SaigaError
from saigakit.kaggle import kernels


@pytest.mark.parametrize(
    ("kind", "word"), [("invalidDatasetSources", "dataset sources"), ("invalidKernelSources", "kernel sources")]
)
def test_a_dropped_source_is_an_error_despite_exit_status_0(kaggle, folder, kind, word):
    kaggle.answer(
        KERNELS + "SaveKernel", {"url": "https://kaggle.invalid", "versionNumber": 1, kind: ["alice/saigakit-gone"]}
    )
    with pytest.raises(SaigaError, match=rf"{word}.*alice/saigakit-gone"):
        kernels.push(folder)


def test_watch_shows_each_status_once_and_returns_when_complete(kaggle, capsys):
    kaggle.answer(STATUS, {"status": "QUEUED"}, {"status": "RUNNING"}, {"status": "RUNNING"}, {"status": "COMPLETE"})
    kernels.watch("02_train", poll_s=0.01)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == ["QUEUED", "RUNNING", "COMPLETE"]
    assert all(line.startswith("alice/saigakit-02-train:") for line in shown)


def test_a_failed_run_raises_with_kaggles_message_and_the_end_of_the_log(kaggle):
    kaggle.answer(STATUS, {"status": "ERROR", "failureMessage": "Your notebook ran out of memory"})
    lines = [{"stream_name": "stderr", "time": i, "data": f"line {i}\n"} for i in range(30)]
    kaggle.answer(OUTPUT, {"files": [], "log": json.dumps(lines)})
    with pytest.raises(SaigaError, match=r"ran out of memory") as caught:
        kernels.watch("alice/saigakit-02-train", poll_s=0.01)
    assert "line 29" in str(caught.value) and "line 14\n" not in str(caught.value)


def test_the_log_of_a_failed_run_reaches_a_terminal_without_control_characters(kaggle):
    kaggle.answer(STATUS, {"status": "ERROR", "failureMessage": "\x1b]0;evil\x07"})
    lines = [{"data": "loss 0.5\x1b]52;c;ZXZpbA==\x07\u202e\x9b\n"}]
    kaggle.answer(OUTPUT, {"files": [], "log": json.dumps(lines)})
    written = run_on_terminal("-m", "saigakit.cli", "watch", "alice/saigakit-02-train")
    assert b"]0;evil" in written and b"loss 0.5]52;c;" in written
    assert control_characters(written) == set()
    with pytest.raises(SaigaError) as caught:
        kernels.watch("alice/saigakit-02-train")
    assert control_characters(str(caught.value).encode()) == set()


def test_a_cancelled_run_is_an_error(kaggle):
    kaggle.answer(STATUS, {"status": "CANCEL_ACKNOWLEDGED"})
    with pytest.raises(SaigaError, match="was cancelled"):
        kernels.watch("alice/saigakit-02-train", poll_s=0.01)


@pytest.mark.parametrize(
    "arguments", [["push", "02_train"], ["push", "example-data"], ["watch", "me/x"], ["fetch", "me/x", "out"]]
)
def test_a_kaggle_command_that_is_too_old_is_never_called(kaggle, tmp_path, monkeypatch, arguments):
    """2.2.4 would write a file of an output that is called ../name outside the directory."""
    monkeypatch.setattr(install.metadata, "requires", {"saigakit": ['kaggle>=2.2.5; extra == "kaggle"']}.get)
    pretend_installed(monkeypatch, tmp_path, "kaggle", "2.2.4")
    ended = CliRunner().invoke(cli.main, arguments)
    needed = f"kaggle>=2.2.5 instead of 2.2.4. Run: {install.pip_install(['kaggle', 'run'])}"
    assert (ended.exit_code, ended.output) == (1, f"error: This needs {needed}\n")
    assert kaggle.calls == []


def error(code, message="none"):
    return {"code": code, "message": message}


REFUSALS = {
    "a quota": (200, {"error": "Maximum weekly GPU quota of 30.00 hours reached."}, "weekly GPU quota of 30.00 hours"),
    "running sessions": (200, {"error": "Maximum batch GPU session count of 2 reached."}, "count of 2 reached.*stop"),
    "a taken name": (409, error(409, "A notebook with this title exists"), "with this title exists.*choose another"),
    "another owner": (403, error(403, "Permission 'kernels.update' was denied"), "'kernels.update' was denied"),
    "a bad request": (400, error(400, "Source is invalid"), "Source is invalid"),
    "what does not exist": (404, error(404, "Kernel not found"), "Kernel not found"),
    "too many requests": (429, error(429, "Too many requests"), "too many requests.*Wait a few minutes"),
    "a fault of Kaggle": (500, error(500, "boom"), "a fault of its own .boom.. Try again later"),
    "a page": (200, b"<html>Maintenance</html>", "something other than JSON.*Open kaggle.com"),
    "a page with an error": (503, b"<html>Maintenance</html>", "a fault of its own .503"),
    "a token that expired": (401, error(401, "Unauthenticated"), "no longer valid.*kaggle auth login"),
    "no confirmation": (200, {}, "did not confirm|Kaggle refused"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refused_push_ends_with_the_reason_in_one_line(kaggle, folder, what):
    code, answer, message = REFUSALS[what]
    kaggle.answer(SAVE, answer, code=code)
    ended = CliRunner().invoke(cli.main, ["push", str(folder)])
    assert (ended.exit_code, ended.output.count("\n")) == (1, 1), ended.output
    assert re.search(message, ended.output), ended.output
    assert "/tmp" not in ended.output and "http://localhost" not in ended.output


def test_without_a_connection_the_error_says_what_to_check(kaggle, folder, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(SaigaError, match=r"^No connection to Kaggle .*Check the internet connection") as caught:
        kernels.push(folder)
    assert "\n" not in str(caught.value)
    assert "localhost" not in str(caught.value)


def test_without_a_login_the_error_says_how_to_log_in(kaggle, folder, monkeypatch):
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(SaigaError, match="kaggle auth login"):
        kernels.push(folder)


def test_a_notebook_that_kaggle_started_under_another_name_is_an_error(kaggle, folder):
    kaggle.answer(SAVE, {"url": "https://www.kaggle.com/code/alice/saigakit-02-train-2", "versionNumber": 1})
    with pytest.raises(SaigaError, match="started it as 'saigakit-02-train-2' instead of 'saigakit-02-train'"):
        kernels.push(folder)


def test_watch_survives_lost_answers_with_growing_pauses(kaggle, capsys):
    lost = [(500, error(500)), (429, error(429)), (200, b"<html>"), (400, error(400)), (503, b"<html>")]
    kaggle.answers[STATUS] = [(200, {"status": "RUNNING"}), *lost, (200, {"status": "COMPLETE"})]
    kernels.watch("02_train", poll_s=0.004)
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "alice/saigakit-02-train: COMPLETE after 0 min"
    assert shown.count("Asking again") == len(lost)


def test_the_pauses_double_up_to_ten_minutes(kaggle, monkeypatch):
    kaggle.answers[STATUS] = [(200, {"status": "RUNNING"}), *[(500, error(500))] * 4, (200, {"status": "COMPLETE"})]
    pauses = []
    monkeypatch.setattr(kernels.time, "sleep", pauses.append)
    kernels.watch("02_train", poll_s=100)
    assert pauses == [100, 200, 400, 600, 600]


def test_watch_gives_up_after_twelve_hours_without_an_answer(kaggle, monkeypatch):
    kaggle.answers[STATUS] = [(200, {"status": "RUNNING"}), (500, error(500))]
    monkeypatch.setattr(kernels.time, "sleep", lambda _: monkeypatch.setattr(kernels, "_PATIENCE_S", 0))
    with pytest.raises(SaigaError, match="a fault of its own"):
        kernels.watch("02_train")


@pytest.mark.parametrize("code", [403, 404, 500])
def test_watching_what_cannot_be_asked_fails_at_once(kaggle, code):
    kaggle.answer(STATUS, error(code, "Permission 'kernels.get' was denied"), code=code)
    with pytest.raises(SaigaError, match="denied"):
        kernels.watch("alice/saigakit-99-none", poll_s=0.01)
    assert len(kaggle.sent(STATUS)) == 1


def test_a_failed_run_without_a_log_says_so(kaggle):
    kaggle.answer(STATUS, {"status": "ERROR"})
    kaggle.answer(OUTPUT, {"files": []})
    ended = CliRunner().invoke(cli.main, ["watch", "alice/saigakit-02-train"])
    assert ended.exit_code == 1
    assert "failed on Kaggle. The end of its log:\n  (Kaggle has no log of it)" in ended.output


CANCEL = KERNELS + "CancelKernelSession"


def running(stub, log):
    """A run that goes on, whose log the stub streams as Kaggle does."""
    stub.answer(STATUS, {"status": "RUNNING"})
    stub.files["api/v1/kernels/logs/stream/alice/saigakit-02-train"] = json.dumps(
        [{"data": line} for line in log.splitlines(keepends=True)]
    ).encode()


def test_stop_cancels_the_session_that_the_run_has_printed(kaggle, capsys, monkeypatch):
    monkeypatch.setenv("KAGGLE_CONTAINER_NAME", "kaggle_u1A2b_session-123456789")
    running(kaggle, f"Installing …\n{workspace.describe_machine()}\nloss 0.5\n")
    kaggle.answer(CANCEL, {})
    kernels.stop("02_train")
    assert kaggle.sent(CANCEL) == [{"kernelSessionId": 123456789}]
    assert "asked to stop alice/saigakit-02-train (session 123456789)" in capsys.readouterr().out


def test_stop_repeats_why_kaggle_did_not_stop(kaggle):
    running(kaggle, "Kaggle session  123456789\n")
    kaggle.answer(CANCEL, {"errorMessage": "Session not found"})
    with pytest.raises(SaigaError, match="did not stop alice/saigakit-02-train: Session not found"):
        kernels.stop("02_train")


def test_a_run_that_has_not_printed_its_session_is_never_guessed(kaggle):
    running(kaggle, "Installing …\n")
    with pytest.raises(SaigaError, match="saigakit-02-train and choose Cancel run"):
        kernels.stop("02_train")
    assert kaggle.sent(CANCEL) == []


def test_a_run_without_a_log_is_not_stopped_and_says_why(kaggle, capsys):
    kaggle.answer(STATUS, {"status": "QUEUED"})
    with pytest.raises(SaigaError, match="has not printed its session into its log yet"):
        kernels.stop("alice/saigakit-02-train")
    assert "Kaggle refused alice/saigakit-02-train: 404" in capsys.readouterr().out


def test_a_finished_run_is_not_stopped(kaggle):
    kaggle.answer(STATUS, {"status": "COMPLETE"})
    with pytest.raises(SaigaError, match="is not running: its status is COMPLETE"):
        kernels.stop("02_train")


def test_quota_shows_what_is_left(kaggle):
    gpu = {"timeUsed": "7200s", "totalTimeAllowed": "108000s", "timeReserved": "0s"}
    answer = {"quotaRefreshTime": "2026-12-05T00:00:00Z", "gpuQuota": gpu}
    kaggle.answer(KERNELS + "GetAcceleratorQuotaStatistics", answer)
    ended = CliRunner().invoke(cli.main, ["quota"])
    assert ended.exit_code == 0, ended.output
    assert re.search(r"GPU +2\.00h +28\.00h +30\.00h +2026-12-05", ended.output)
