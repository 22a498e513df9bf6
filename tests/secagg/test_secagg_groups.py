"""Groups: everybody is in one, none is too small, and only the key decides who meets whom. And terms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkeel.core.errors import CohortError, InputError
from fedkeel.core.keys import Key
from fedkeel.secagg.groups import deal
from fedkeel.secagg.terms import Terms, threshold_of


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_groups_are_a_partition_and_even(count, size, data):
    threshold = data.draw(st.integers(2, size))
    names = [f"c{i}" for i in range(count)]
    if count < threshold:
        with pytest.raises(CohortError, match=f"{threshold} are needed"):
            deal(names, size, Key(1), threshold)
        return
    groups = deal(names, size, Key(1), threshold)
    sizes = [len(group) for group in groups]
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, count) >= threshold
    assert groups == deal(names[::-1], size, Key(1), threshold)


def test_other_keys_deal_otherwise():
    names = [f"c{i}" for i in range(40)]
    assert deal(names, 10, Key(1)) != deal(names, 10, Key(2))
    with pytest.raises(InputError, match="size = 3"):
        deal(names, 3, Key(1), threshold=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"session": b"short"}, "draw 16 at random"),
        ({"members": ("a",)}, "a group of 1"),
        ({"members": ("a", "b", "a")}, "each once"),
        ({"members": ("a", "")}, "empty or longer"),
        ({"members": ("a", "b" * 257)}, "empty or longer"),
        ({"threshold": 1}, "more than half .* as 4"),
        ({"threshold": 2}, "more than half"),
        ({"threshold": 6}, "threshold = 6 of 5"),
        ({"degree": 3}, "even number below 4"),
        ({"degree": 4}, "even number below 4"),
        ({"columns": 0}, "columns = 0"),
        ({"bits": 16}, "bits = 16"),
    ],
)
def test_terms_that_would_not_protect_are_refused(change, said):
    fields = {"session": bytes(16), "members": tuple("abcde"), "threshold": 4, "columns": 3} | change
    with pytest.raises(InputError, match=said):
        Terms(**fields)


@given(st.integers(2, 60))
def test_the_usual_threshold_is_more_than_two_thirds(holders):
    threshold = threshold_of(holders)
    assert 3 * threshold > 2 * holders
    assert 2 <= threshold <= holders


@given(st.integers(5, 40), st.data())
def test_the_neighbour_graph_is_regular_symmetric_and_connected(size, data):
    degree = 2 * data.draw(st.integers(1, (size - 2) // 2))
    terms = Terms.drawn([str(i) for i in range(size)], 3, degree=degree)
    near = [terms.holders(place) for place in range(size)]
    assert all(len(each) == degree + 1 and place in each for place, each in enumerate(near))
    assert all(place in near[other] for place, each in enumerate(near) for other in each)
    reached, edge = {0}, {0}
    while edge:
        edge = {other for place in edge for other in near[place]} - reached
        reached |= edge
    assert len(reached) == size


def test_small_groups_have_no_graph_and_other_sessions_other_rings():
    assert Terms.drawn("abc", 3, degree=8).degree == 0
    rings = {Terms.drawn([str(i) for i in range(20)], 3, degree=4).holders(0) for _ in range(20)}
    assert len(rings) > 1


def test_the_digest_is_of_every_field():
    terms = Terms(bytes(16), tuple("abcdefg"), 6, 9)
    others = [
        Terms(bytes(15) + b"x", terms.members, 6, 9),
        Terms(bytes(16), (*"abcdef", "gg"), 6, 9),
        Terms(bytes(16), terms.members, 5, 9),
        Terms(bytes(16), terms.members, 6, 8),
        Terms(bytes(16), terms.members, 6, 9, bits=64),
        Terms(bytes(16), terms.members, 5, 9, degree=4),
        Terms(bytes(16), terms.members, 6, 9, signed=True),
    ]
    assert len({each.digest for each in (terms, *others)}) == 8
