"""A SaigaError is shown as its message, a DataError as a list of problems."""

import pickle
import sys

from IPython.core.interactiveshell import InteractiveShell

from saigakit import DataError, SaigaError


def test_a_data_error_is_a_saiga_error():
    assert issubclass(DataError, SaigaError)


def test_a_data_error_lists_every_problem_under_its_summary():
    error = DataError("records.jsonl: 2 problems", ["line 3: no user", "line 9: no answer"])
    assert str(error) == "records.jsonl: 2 problems\n  line 3: no user\n  line 9: no answer"


def test_only_fifty_problems_are_shown_and_the_rest_are_counted():
    error = DataError("bad", [f"line {i}" for i in range(53)])
    assert str(error).splitlines()[-2:] == ["  line 49", "  … and 3 more"]
    assert len(error.problems) == 53


def test_fifty_problems_are_all_shown():
    assert str(DataError("bad", [f"line {i}" for i in range(50)])).splitlines()[-1] == "  line 49"


def test_problems_that_were_not_kept_are_counted_too():
    assert str(DataError("bad", ["line 1"], more=7)).splitlines()[-1] == "  … and 7 more"
    assert str(DataError("bad", ["line"] * 60, more=7)).splitlines()[-1] == "  … and 17 more"


def test_a_notebook_shows_the_message_instead_of_the_traceback(capsys):
    shell = InteractiveShell()
    try:
        raise SaigaError("model='x' is unknown.")
    except SaigaError:
        shell.showtraceback(sys.exc_info())
    shown = capsys.readouterr()
    assert (shown.out + shown.err).strip() == "SaigaError: model='x' is unknown."


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(DataError("bad", ["line 1"], more=2)))
    assert (str(error), error.problems) == ("bad\n  line 1\n  … and 2 more", ["line 1"])
