"""Progress lines: how often they are printed and what they say."""

import pytest

from saigakit.core import display
from saigakit.core.display import Every, Progress, Table, printable


@pytest.fixture
def clock(monkeypatch):
    """The current second, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_a_line_is_due_every_ten_seconds(clock):
    is_due, seen = Every(), []
    for second in (101, 109, 110, 111, 119, 125, 134, 135):
        clock[0] = second
        seen.append(is_due())
    assert seen == [False, False, True, False, False, True, False, True]


def test_the_remaining_time_follows_from_the_speed_so_far(clock):
    is_due = Every()
    clock[0] += 30
    assert (is_due.spent, is_due.left(60, 240)) == (30, 90)


def test_progress_is_silent_between_lines(capsys):
    progress = Progress("after")
    for done in range(5):
        progress(done, 4)
    assert capsys.readouterr().out == "after: 4 of 4 texts, 0 s\n"


def test_progress_reports_the_remaining_time(capsys, clock):
    progress = Progress("after")
    clock[0] += 30
    progress(60, 240)
    assert capsys.readouterr().out == "after: 60 of 240 texts, about 90 s left\n"


def test_progress_reports_the_elapsed_time_while_nothing_is_done(capsys, clock):
    progress = Progress("after")
    clock[0] += 12
    progress(0, 240)
    assert capsys.readouterr().out == "after: 0 of 240 texts, 12 s so far\n"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 records"), (1, "1 record"), (2, "2 records"), (1000, "1,000 records")]
)
def test_a_noun_follows_its_number(number, text):
    assert display.count(number, "record") == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;evil\x07", "]0;evil"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x9b31mx\x85\x7f\x00\x08", "31mx"),
        ("a\r\nb\rc\r", "a\nb\nc\n"),
        ("a\u202eb\u2066c\u2069d\u202a", "abcd"),
        ("a\ud800b\udcffc", "abc"),
        (
            "Ёж\t«№»\n👨\u200d👩\u200d👧\u00a0\u200b\ufeff\U000f0002",
            "Ёж\t«№»\n👨\u200d👩\u200d👧\u00a0\u200b\ufeff\U000f0002",
        ),
    ],
)
def test_a_terminal_gets_no_control_characters(text, shown):
    assert printable(text) == shown
    assert "".join(map(printable, text.replace("\x1b[1;31m", "").replace("\x1b[0m", "").replace("\r\n", "\n"))) == shown


def test_a_table_is_aligned_without_control_characters():
    shown = str(Table(("name", "size"), [("\x1b]0;e\x07a", "1"), ("b", "22")], "a\x07 note"))
    assert shown.splitlines() == ["name   size", "-----------", "]0;ea     1", "b        22", "a note"]
