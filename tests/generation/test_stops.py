"""StopStrings against an oracle that sees the whole text at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelrig.generation.stops import StopStrings


def cut(text, stops):
    """The oracle: the text before the first match."""
    places = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(places)], True) if places else (text, False)


def feed(pieces, stops):
    watcher, out = StopStrings(stops), []
    for piece in pieces:
        emitted, stopped = watcher.push(piece)
        out.append(emitted)
        if stopped:
            return out, True
    emitted, stopped = watcher.flush()
    return [*out, emitted], stopped


few_letters = st.text(alphabet="abc", max_size=6)


@given(st.lists(few_letters, max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4))
def test_the_text_is_cut_at_the_earliest_match_wherever_the_pieces_end(pieces, stops):
    emitted, stopped = feed(pieces, stops)
    assert cut("".join(pieces), stops) == ("".join(emitted), stopped)


@given(st.lists(few_letters, max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4))
def test_nothing_that_could_become_a_stop_is_shown_and_nothing_else_is_held(pieces, stops):
    watcher, arrived, shown = StopStrings(stops), "", ""
    for piece in pieces:
        emitted, stopped = watcher.push(piece)
        arrived, shown = arrived + piece, shown + emitted
        if stopped:
            break
        held = arrived[len(shown) :]
        unfinished = {stop[:n] for stop in stops for n in range(1, len(stop))}
        assert not any(stop in shown for stop in stops)
        assert not any(arrived[at:] in unfinished for at in range(len(shown)))
        assert held == "" or held in unfinished


def test_a_longer_stop_that_began_earlier_wins():
    watcher = StopStrings(["abcd", "bc"])
    assert ("", False) == watcher.push("abc")
    assert ("", True) == watcher.push("d")


def test_a_shorter_stop_is_taken_when_the_longer_one_fails():
    watcher = StopStrings(["abcd", "bc"])
    assert ("", False) == watcher.push("abc")
    assert ("a", True) == watcher.push("x")


def test_flush_shows_the_text_that_was_held_back():
    watcher = StopStrings(["<end>"])
    assert ("text", False) == watcher.push("text<en")
    assert ("<en", False) == watcher.flush()


def test_flush_still_finds_a_complete_stop():
    watcher = StopStrings(["abcd", "bc"])
    watcher.push("abc")
    assert ("a", True) == watcher.flush()


def test_after_a_stop_nothing_comes_any_more():
    watcher = StopStrings(["."])
    assert ("one", True) == watcher.push("one. two")
    assert ("", True) == watcher.push("three")
    assert ("", True) == watcher.flush()


def test_without_stops_all_text_passes_at_once():
    watcher = StopStrings()
    assert ("abc", False) == watcher.push("abc")
    assert ("", False) == watcher.flush()


@pytest.mark.parametrize("stop", ["\n\n", "é", "😀😀"])
def test_any_text_can_stop(stop):
    assert (["before"], True) == feed([f"before{stop}after"], [stop])
