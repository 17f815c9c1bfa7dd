"""Keys of pages: equal exactly when everything that the page hangs on is."""

from hypothesis import given
from hypothesis import strategies as st

from nsa_platform.serve.page_keys import PageKeys

TOKENS = st.lists(st.integers(0, 3), min_size=6, max_size=14)


@given(one=TOKENS, other=TOKENS, page=st.integers(0, 2), lookahead=st.integers(0, 2))
def test_keys_are_equal_when_the_tokens_are(one, other, page, lookahead):
    for end, name in ((0, "window_key"), (lookahead, "key")):
        end += 3 * (page + 1)
        if min(len(one), len(other)) < end:
            continue
        keys = [
            getattr(PageKeys(tokens, page_size=3, lookahead=lookahead), name)(page)
            for tokens in (one, other)
        ]
        assert (keys[0] == keys[1]) == (one[:end] == other[:end])


def test_tokens_may_come_later_and_salts_part():
    whole = PageKeys(range(20), page_size=4, lookahead=3)
    grown = PageKeys(range(9), page_size=4, lookahead=3)
    assert grown.key(0) == whole.key(0)
    grown.append(range(9, 20))
    assert grown.num_tokens == 20
    assert [grown.key(page) for page in range(4)] == [whole.key(page) for page in range(4)]
    salted = PageKeys(range(20), page_size=4, lookahead=3, salt="tenant")
    empty = PageKeys(range(20), page_size=4, lookahead=3, salt="")
    assert len({whole.key(0), salted.key(0), empty.key(0)}) == 3
