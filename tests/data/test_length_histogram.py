"""Plot the lengths of conversations on both sides of the limit."""

import pytest

from saigakit.data import length_histogram


def bars(figure):
    """(left edge, right edge, height) of every bar."""
    found = [bar for container in figure.axes[0].containers for bar in container]
    return [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in found if bar.get_height()]


def test_the_plot_shows_every_conversation_and_no_bar_crosses_the_limit():
    counted = [*range(1, 300), 1000, 5000]
    drawn = bars(length_histogram.plot(counted, 256))
    assert sum(height for _, _, height in drawn) == len(counted)
    assert sum(height for left, _, height in drawn if left > 256) == sum(length > 256 for length in counted)
    assert all(right <= 256.5 or left >= 256.5 for left, right, _ in drawn)


@pytest.mark.parametrize(("counted", "entries"), [([5, 7], 2), ([5, 9], 3), ([9], 3), ([8], 2), ([1], 2)])
def test_the_legend_mentions_long_conversations_only_if_there_are_any(counted, entries):
    figure = length_histogram.plot(counted, 8)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == entries
    assert "max_seq_length" in texts[-1]
    assert sum(height for _, _, height in bars(figure)) == len(counted)


def test_the_terminal_has_the_same_bars_as_the_plot():
    counted = [*range(1, 300), 1000, 5000]
    found = length_histogram.count_bars(counted, 256)
    assert [count for *_, count in found] == [height for _, _, height in bars(length_histogram.plot(counted, 256))]
    assert all(last <= 256 or first > 256 for first, last, _ in found)
    assert sum(count for *_, count in found) == len(counted)
    lines = str(length_histogram.make_table(found, 256)).splitlines()
    assert "░" in lines[-2] and "█" in lines[2]
