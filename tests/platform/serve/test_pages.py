"""Page accounting: after any steps each page is in one place, and the tail is kept."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_platform.serve.page_pool import OutOfPages, PagePool
from nsa_platform.serve.pages import ABSENT, PageBook, SequencePages


def check(book: PageBook, sequences: list[SequencePages]) -> None:
    held = [page for sequence in sequences for page in sequence.pages]
    assert len(held) == len(set(held)) and set(held) == book.pool.in_use()
    assert book.pool.num_free + len(held) == book.pool.num_pages - 1
    assert 0 not in held
    for sequence in sequences:
        assert len(sequence.pages) == -(-sequence.num_tokens // book.page_size)
    if book.window_pool is None:
        assert not any(sequence.window_pages for sequence in sequences)
        return
    held = [p for sequence in sequences for p in sequence.window_pages if p != ABSENT]
    assert len(held) == len(set(held)) and set(held) == book.window_pool.in_use()
    assert book.window_pool.num_free + len(held) == book.window_pool.num_pages - 1
    assert 0 not in held
    for sequence in sequences:
        assert len(sequence.window_pages) == len(sequence.pages)
        tail = range(max(0, sequence.num_tokens - book.tail_tokens), sequence.num_tokens)
        assert all(sequence.window_pages[t // book.page_size] != ABSENT for t in tail)


STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(1, 40))), max_size=40
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    page_size=st.sampled_from([1, 4, 8]),
    tail=st.integers(1, 30),
    num_pages=st.integers(2, 40),
    num_window_pages=st.one_of(st.none(), st.integers(2, 20)),
)
def test_invariants_hold_after_any_steps(steps, page_size, tail, num_pages, num_window_pages):
    book = PageBook(
        page_size=page_size,
        num_pages=num_pages,
        tail_tokens=tail,
        num_window_pages=num_window_pages,
    )
    sequences = [SequencePages() for _ in range(4)]
    for which, count in steps:
        sequence = sequences[which]
        if count is None:
            book.release(sequence)
            assert sequence == SequencePages()
        elif count <= book.room(sequence):
            start = sequence.num_tokens
            book.extend(sequence, count)
            assert sequence.num_tokens == start + count
            if book.window_pool is not None:  # what this step reads is still there
                first = max(0, start - tail) // page_size
                assert ABSENT not in sequence.window_pages[first:]
        else:
            before = (sequence.num_tokens, list(sequence.pages), list(sequence.window_pages))
            with pytest.raises(OutOfPages, match="needed"):
                book.extend(sequence, count)
            after = (sequence.num_tokens, list(sequence.pages), list(sequence.window_pages))
            assert before == after
        check(book, sequences)
    for sequence in sequences:
        book.release(sequence)
    assert book.pool.num_free == num_pages - 1


def test_trim_leaves_the_tail_alone():
    book = PageBook(page_size=4, num_pages=20, tail_tokens=6, num_window_pages=20)
    sequence = SequencePages()
    book.extend(sequence, 30)
    book.trim(sequence)
    # Tokens 24 to 29 are the tail: pages 6 and 7 of eight.
    assert [page != ABSENT for page in sequence.window_pages] == [False] * 6 + [True] * 2
    check(book, [sequence])


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="scratch"):
        PagePool(1)
    allocator = PagePool(3)
    pages = allocator.allocate(2)
    with pytest.raises(OutOfPages, match="1 pages are needed and 0 of 2 are free"):
        allocator.allocate(1)
    allocator.release(pages[:1])
    with pytest.raises(ValueError, match="not in use"):
        allocator.release(pages[:1])
    book = PageBook(page_size=4, num_pages=3, tail_tokens=1, num_window_pages=None)
    with pytest.raises(ValueError, match="num_new_tokens=0"):
        book.extend(SequencePages(), 0)
