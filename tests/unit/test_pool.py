"""Pools of the user's own data, and client data made of a pool and a split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.train.contract import Scale, Tokens
from fedkeel.world.pool import Pool, Split, clients, label_histogram

KEY = Key.root(0)


def numbered(count: int, classes: int = 2, **more: object) -> Pool:
    """Row i holds the number i."""
    x = torch.arange(count, dtype=torch.float32)[:, None]
    return Pool.from_arrays(x, torch.arange(count) % classes, x[:1], torch.tensor([0]), **more)


class TestFromArrays:
    def test_arrays_are_taken_as_they_are(self) -> None:
        x = np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2)
        pool = Pool.from_arrays(x, [0, 1, 2, 0, 1, 2], x[:2], [0, 3], prepare=Scale(0.0, 0.5))
        assert (len(pool), pool.classes, pool.inputs) == (6, 4, (1, 2, 2))
        assert (pool.x.dtype, pool.y.dtype) == (torch.uint8, torch.int64)
        assert pool.prepare(pool.x[5:]).flatten().tolist() == [10.0, 10.5, 11.0, 11.5]
        assert pool.x.data_ptr() == x.ctypes.data

    @pytest.mark.parametrize(
        ("given_type", "stored"),
        [("float64", torch.float32), ("bool", torch.uint8), ("uint16", torch.int64), (">i4", torch.int32)],
    )
    def test_other_types_are_converted(self, given_type: str, stored: torch.dtype) -> None:
        values = np.array([[0, 1], [1, 0]]).astype(given_type)
        pool = Pool.from_arrays(values, [0, 1], values[::-1], [0, 1])
        assert pool.x.dtype == stored
        assert pool.x.tolist() == [[0, 1], [1, 0]]
        assert pool.test_x.tolist() == [[1, 0], [0, 1]]

    def test_read_only_arrays_are_copied_not_warned_about(self) -> None:
        x = np.ones((2, 2), dtype=np.float32)
        x.flags.writeable = False
        assert Pool.from_arrays(x, [0, 1], x, [0, 1]).x.sum() == 4

    def test_float_targets_make_a_regression(self) -> None:
        pool = Pool.from_arrays(np.random.default_rng(0).random((10, 3)), np.linspace(0, 1, 10))
        assert (pool.classes, pool.y.dtype) == (0, torch.float32)

    @given(count=st.integers(10, 300), fraction=st.floats(0.06, 0.94), seed=st.integers(0, 99))
    @settings(max_examples=50, deadline=None)
    def test_the_test_rows_are_an_even_fraction(self, count: int, fraction: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        x, y, group = np.arange(count), rng.integers(0, 3, count), rng.integers(0, 4, count)
        pool = Pool.from_arrays(x, y, group=group, test_fraction=fraction, key=Key.root(seed))
        assert sorted([*pool.x.tolist(), *pool.test_x.tolist()]) == x.tolist()
        assert abs(len(pool.test_x) - count * fraction) <= 0.5 + 1e-9
        assert np.array_equal(y[pool.x.numpy()], pool.y.numpy())
        assert pool.group is not None
        assert np.array_equal(group[pool.x.numpy()], np.array([int(n) for n in pool.group_names])[pool.group.numpy()])
        for g in range(4):
            for label in range(3):
                cell = (group == g) & (y == label)
                taken = cell[pool.test_x.numpy()].sum()
                assert abs(taken - cell.sum() * fraction) <= 1 + 1e-9

    def test_the_test_rows_are_the_keys(self) -> None:
        x, y = np.arange(100), np.zeros(100, dtype=int)
        first, again, other = (Pool.from_arrays(x, y, key=Key.root(s)).test_x for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (([[1.0]] * 3, [0, 1]), r"data lengths differ \(x 3, y 2\)"),
            (([[1.0]] * 3, [0, 1, 0], [[1.0]]), "one of test_x and test_y"),
            (([[1.0], [1.0, 2.0]], [0, 1]), "data x is no array"),
            (([[1.0]] * 3, ["cat", "dog", "cat"]), "data y is an array of <U3: give numbers"),
            ((1.0, [0]), "data x is a single number"),
            (([[1.0]], [0]), "test_fraction = 0.2 of 1 rows leaves no test or no training rows"),
            (([[1.0]] * 3, [0, 1, -1], [[1.0]], [0]), "data y holds -1, outside 0..1"),
            (([[1.0]] * 3, [0, 1, 0], [[1.0]] * 2, [0]), "data test_x has 2 rows, test_y 1"),
            (([[1.0]] * 3, [0, 1, 0], [[1.0, 2.0]], [0]), r"shape \(1,\), test_x of \(2,\)"),
            (([[1.0], [float("nan")], [1.0]], [0, 1, 0], [[1.0]], [0]), "data x holds NaN or infinity in row 1"),
            (([[1.0]] * 3, [0.0, 1.0, float("inf")], [[1.0]], [0.0]), "data y holds NaN or infinity in row 2"),
            ((np.zeros((0, 2)), np.zeros(0, int), [[1.0, 1.0]], [0]), "data x is empty"),
            (([[1.0]] * 3, [0, 1, 0], [[1.0]], [0.5]), "data test_y is torch.float32: labels of 2 classes"),
        ],
    )
    def test_bad_data_is_refused_with_a_sentence(self, arguments: tuple[object, ...], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            Pool.from_arrays(*arguments)

    def test_bad_groups_and_labels_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"data lengths differ \(x 10, y 10, group 2\)"):
            numbered(10, group=[0, 1])
        with pytest.raises(InputError, match=r"data y holds 2, outside 0\.\.1"):
            numbered(10, classes=3, labels=["a", "b"])
        with pytest.raises(InputError, match="complex"):
            Pool.from_arrays(torch.ones(2, 2, dtype=torch.complex64), [0, 1], torch.ones(1, 2), [0])
        x, y = torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(InputError, match="integers but classes is 0"):
            Pool(x, y, x, y, 0)
        with pytest.raises(InputError, match=r"data group holds 1, outside 0\.\.0"):
            Pool(x, y, x, y, 1, group=torch.tensor([0, 1]), group_names=("a",))
        with pytest.raises(InputError, match=r"data group has shape \(1,\)"):
            Pool(x, y, x, y, 1, group=torch.tensor([0]), group_names=("a",))
        with pytest.raises(InputError, match="labels name 2 classes of 1"):
            Pool(x, y, x, y, 1, labels=("a", "b"))


class TestFromClients:
    def test_names_pairs_and_datasets(self) -> None:
        hospital = (np.ones((10, 2)), np.zeros(10, dtype=int))
        ward = TensorDataset(torch.full((5, 2), 2.0), torch.ones(5, dtype=torch.int64))
        pool = Pool.from_clients({"hospital": hospital, "ward": ward})
        assert pool.group_names == ("hospital", "ward")
        assert (len(pool), len(pool.test_x), pool.classes) == (12, 3, 2)
        assert pool.group is not None
        assert torch.equal(pool.group, pool.y)
        assert torch.equal(pool.x[:, 0], pool.y + 1.0)
        assert Pool.from_clients([hospital, ward]).group_names == ("0", "1")
        tested = Pool.from_clients([hospital], test=(np.zeros((1, 2)), [0]))
        assert (len(tested), len(tested.test_x)) == (10, 1)

    @pytest.mark.parametrize(
        ("data", "sentence"),
        [
            ({}, "data holds no client"),
            (
                {"a": (np.ones((2, 2)), [0, 1]), "b": (np.ones((2, 3)), [0, 1])},
                r"client 'b' has examples of shape \(3,",
            ),
            ({"a": (np.ones((2, 2)), [0])}, "client 'a' has 2 rows of x and 1 of y"),
            ({"a": (np.ones((0, 2)), [])}, "client 'a' has 0 rows"),
            ({"a": 5}, "client 'a' is neither a pair"),
        ],
    )
    def test_bad_clients_are_refused_by_name(self, data: dict[str, object], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            Pool.from_clients(data)


class TestClients:
    def test_rows_lie_client_by_client(self) -> None:
        pool = numbered(10, classes=3)
        split = Split((torch.tensor([7, 2]), torch.tensor([0, 9, 4])))
        data, held = clients(pool, split, KEY)
        assert held is None
        assert split.names == ("client-0", "client-1")
        assert data.x.flatten().tolist() == [7, 2, 0, 9, 4]
        assert data.y.tolist() == [1, 2, 0, 0, 1]
        assert data.offsets.tolist() == [0, 2, 5]
        assert label_histogram(data, 3).tolist() == [[0, 1, 1], [2, 1, 0]]
        assert data.prepare is pool.prepare

    @given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=8), holdout=st.floats(0.01, 0.99))
    @settings(max_examples=50, deadline=None)
    def test_a_holdout_parts_every_clients_rows(self, sizes: list[int], holdout: float) -> None:
        pool = numbered(sum(sizes))
        split = Split(torch.arange(sum(sizes)).split(sizes))
        data, held = clients(pool, split, KEY, holdout=holdout)
        assert held is not None
        for client, share in enumerate(split.shares):
            kept, out = (part.x[slice(*part.range(client))].flatten().tolist() for part in (data, held))
            assert sorted(kept + out) == share.tolist()
            assert len(out) == max(1, int(len(share) * holdout))
            assert kept

    def test_a_holdout_is_random_by_key_but_the_last_rows_in_order_of_time(self) -> None:
        pool, split = numbered(100), Split(torch.arange(100).split(50))
        draws = [clients(pool, split, Key.root(s), holdout=0.2)[1] for s in (1, 1, 2)]
        assert torch.equal(draws[0].x, draws[1].x)
        assert not torch.equal(draws[0].x, draws[2].x)
        ordered = Pool(pool.x, pool.y, pool.test_x, pool.test_y, 2, ordered=True)
        held = clients(ordered, split, KEY, holdout=0.2)[1]
        assert held.x.flatten().tolist() == [*range(40, 50), *range(90, 100)]

    def test_bad_splits_are_refused(self) -> None:
        pool = numbered(5)
        some, none = torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64)
        with pytest.raises(InputError, match="client 'client-1' has no examples: use fewer clients, a higher alpha"):
            clients(pool, Split((some, none)), KEY)
        with pytest.raises(InputError, match="gives row 1 to two clients"):
            clients(pool, Split((some, torch.tensor([1]))), KEY)
        with pytest.raises(InputError, match=r"partition index holds 5, outside 0\.\.4"):
            clients(pool, Split((some, torch.tensor([5]))), KEY)
        with pytest.raises(InputError, match="the partition made no clients"):
            clients(pool, Split(()), KEY)
        with pytest.raises(InputError, match="client 'client-1' has 1 example and cannot hold one out"):
            clients(pool, Split((some, torch.tensor([2]))), KEY, holdout=0.1)
        with pytest.raises(InputError, match=r"holdout = 1.0 is no fraction"):
            clients(pool, Split((some,)), KEY, holdout=1.0)
        with pytest.raises(InputError, match="2 clients has 1 different names"):
            Split((some, none), names=("a", "a"))

    def test_symbols_stay_as_stored(self) -> None:
        x = torch.randint(0, 5, (6, 4), dtype=torch.uint8, generator=KEY.torch())
        pool = Pool.from_arrays(x, torch.arange(6) % 5, x[:1], [0], prepare=Tokens())
        data, _ = clients(pool, Split((torch.arange(6),)), KEY)
        assert data.x.dtype == torch.uint8
        assert data.prepare(data.x).dtype == torch.int64
