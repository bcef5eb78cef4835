"""Lines of several workers on one screen: prefixes, tails, progress bars, blocked readers."""

from __future__ import annotations

import fcntl
import os

import pytest
from hypothesis import given, strategies as st

from dtrun.output import TAIL_BYTES, TAIL_SECONDS, Console, LogFile, Mux, Source, same_file


class Screen(Console):
    """A console that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(fd=-1)
        self.text = b""

    def write(self, data: bytes) -> None:
        self.text += data


@pytest.fixture
def screen():
    return Screen()


@pytest.fixture
def sources(screen):
    mux = Mux()
    return [Source(b"[%d] " % rank, screen, mux) for rank in range(2)]


def test_every_line_gets_its_prefix(screen, sources):
    sources[0].feed(b"one\ntwo\n", 0.0)
    sources[1].feed(b"\nthree\n", 0.0)
    assert screen.text == b"[0] one\n[0] two\n[1] \n[1] three\n"


def test_a_line_in_pieces_is_one_line(screen, sources):
    sources[0].feed(b"hel", 0.0)
    sources[1].feed(b"between\n", 0.0)
    sources[0].feed(b"lo\n", 0.0)
    assert screen.text == b"[1] between\n[0] hello\n"


def test_a_prompt_is_shown_after_a_while_and_can_go_on(screen, sources):
    sources[0].feed(b"sure? ", 5.0)
    assert (screen.text, sources[0].deadline) == (b"", 5.0 + TAIL_SECONDS)
    sources[0].feed(b"[y]", 5.05)
    assert sources[0].deadline == 5.0 + TAIL_SECONDS
    sources[0].show_tail()
    sources[0].feed(b" yes\n", 6.0)
    assert screen.text == b"[0] sure? [y] yes\n"
    assert sources[0].deadline is None


def test_another_source_ends_an_open_line(screen, sources):
    sources[0].feed(b"50%", 0.0)
    sources[0].show_tail()
    sources[1].feed(b"hello\n", 0.0)
    sources[0].feed(b" done\n", 0.0)
    assert screen.text == b"[0] 50%\n[1] hello\n[0]  done\n"


def test_a_progress_bar_keeps_its_prefix(screen, sources):
    for step in (b"\r10%", b"\r20%", b"\r30%\n"):
        sources[0].feed(step, 0.0)
        sources[0].show_tail()
    assert screen.text == b"\r[0] 10%\r[0] 20%\r[0] 30%\n"


def test_a_bar_that_ends_in_a_carriage_return(screen, sources):
    for step in (b"10%\r", b"20%\r", b"\n"):
        sources[0].feed(step, 0.0)
        sources[0].show_tail()
    assert screen.text == b"[0] 10%\r[0] 20%\r\n"


def test_windows_line_ends_are_one_line_end(screen, sources):
    sources[0].feed(b"a\r\nb\r\n", 0.0)
    assert screen.text == b"[0] a\r\n[0] b\r\n"


def test_a_very_long_line_does_not_wait_for_its_end(screen, sources):
    sources[0].feed(b"x" * (TAIL_BYTES + 1), 0.0)
    sources[0].feed(b"y\n", 0.0)
    assert screen.text == b"[0] " + b"x" * (TAIL_BYTES + 1) + b"y\n"


def text_of(letters):
    return st.text(letters, max_size=8).map(str.encode)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(0), text_of("abc\n\r"), st.booleans()),
            st.tuples(st.just(1), text_of("xyz\n\r"), st.booleans()),
        )
    )
)
def test_the_bytes_of_each_source_stay_complete_and_in_order(writes):
    screen, mux = Screen(), Mux()
    sources = [Source(b"[0]", screen, mux), Source(b"[1]", screen, mux)]
    for rank, data, due in writes:
        sources[rank].feed(data, 0.0)
        if due:
            sources[rank].show_tail()
    for source in sources:
        source.show_tail()
    for rank, letters in enumerate((b"abc", b"xyz")):
        written = b"".join(data for one, data, _ in writes if one == rank)
        assert only(letters, screen.text) == only(letters, written)
        for line in screen.text.replace(b"\r", b"\n").split(b"\n"):
            assert not only(letters, line) or line.startswith(b"[%d]" % rank)


def only(letters, text):
    return bytes(byte for byte in text if byte in letters)


@given(st.lists(st.binary(max_size=12)))
def test_one_source_without_prefix_passes_through(writes):
    screen = Screen()
    source = Source(b"", screen, Mux())
    for data in writes:
        source.feed(data, 0.0)
    source.show_tail()
    assert screen.text == b"".join(writes)


def test_a_full_pipe_never_blocks_the_console():
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    console = Console(write)
    console.write(b"x" * (3 * size))
    assert len(console.pending) == 2 * size
    assert os.read(read, size) == b"x" * size
    console.flush()
    assert len(console.pending) == size
    os.close(read)
    os.close(write)


def test_a_reader_that_went_away_is_forgotten():
    read, write = os.pipe()
    console = Console(write)
    os.close(read)
    console.write(b"nobody\n")
    console.write(b"reads this\n")
    assert console.closed
    assert not console.pending
    os.close(write)


def test_a_log_gets_the_bytes_as_they_come(screen, tmp_path):
    log = LogFile(str(tmp_path / "log"), screen)
    source = Source(b"[0] ", screen, Mux(), log)
    source.feed(b"\xff\x00par", 0.0)
    assert (tmp_path / "log").read_bytes() == b"\xff\x00par"
    source.feed(b"tial\n", 0.0)
    log.close()
    assert (tmp_path / "log").read_bytes() == b"\xff\x00partial\n"
    assert screen.text == b"[0] \xff\x00partial\n"


def test_a_log_that_cannot_be_written_says_so_once(screen):
    log = LogFile("/dev/full", screen)
    log.write(b"one")
    log.write(b"two")
    assert screen.text == b"dtrun: /dev/full is incomplete: No space left on device\n"


def test_same_file_sees_through_numbers(tmp_path):
    one, other = os.pipe(), os.pipe()
    twin = os.dup(one[1])
    assert same_file(one[1], twin)
    assert not same_file(one[1], other[1])
    for fd in (*one, *other, twin):
        os.close(fd)
    assert not same_file(twin, twin)
