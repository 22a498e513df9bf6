"""Laws of every registered partition, and what each one is for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import Rule, build, definition, names
from fedkeel.world.pool import Pool, Split, clients, label_histogram

PARTITIONS = names("partition")
EXAMPLES = {"alpha": 1.0, "classes_per_client": 2}  # for parameters without a default
CLIENTS = 8


def example(name: str) -> Rule:
    required = [p for p, spec in definition("partition", name).parameters.items() if spec.default is spec.empty]
    return build("partition", name, **{p: EXAMPLES[p] for p in required})


def pool(count: int = 800, classes: int = 10, groups: int = CLIENTS, seed: int = 0) -> Pool:
    rng = Key.root(seed).numpy()
    x, y = rng.standard_normal((count, 3), dtype=np.float32), np.arange(count) % classes
    rng.shuffle(y)
    group = np.concatenate([np.arange(groups), rng.integers(0, groups, count - groups)])
    return Pool.from_arrays(x, y, x[:10], y[:10], group=group)


POOL = pool()


def same(a: Split, b: Split) -> bool:
    return (
        a.names == b.names
        and a.noise == b.noise
        and all(torch.equal(x, y) for x, y in zip(a.shares, b.shares, strict=True))
    )


@pytest.mark.parametrize("name", PARTITIONS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_example_goes_to_exactly_one_client_and_none_is_empty(name: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(5, CLIENTS))
    some = pool(data.draw(st.integers(200, 600)), data.draw(st.integers(2, 10)), groups=count)
    split = example(name)(some, count, Key.root(data.draw(st.integers(0, 1000))))
    assert len(split.shares) == len(split.names) == count
    assert min(map(len, split.shares)) >= example(name).needs
    assert torch.equal(torch.cat(split.shares).sort().values, torch.arange(len(some)))
    for share in split.shares:
        assert share.dtype == torch.int64
        assert (share.diff() > 0).all()


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_same_key_gives_the_same_split_whatever_the_global_generators_say(name: str) -> None:
    rule, key = example(name), Key.root(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = rule(POOL, CLIENTS, key)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert same(rule(POOL, CLIENTS, key), first)


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_key_gives_another_split(name: str) -> None:
    rule = example(name)
    asked = CLIENTS - 1  # one less than there are groups, so that natural has a choice
    splits = [rule(POOL, asked, Key.root(seed)) for seed in range(20)]
    assert not all(same(split, splits[0]) for split in splits)


@pytest.mark.parametrize("name", PARTITIONS)
def test_one_client_holds_everything(name: str) -> None:
    one = pool(classes=2, groups=1)
    split = example(name)(one, 1, Key.root(0))
    assert torch.equal(split.shares[0], torch.arange(len(one)))


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("count", [0, 801])
def test_more_clients_than_examples_or_none_are_refused(name: str, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} clients of at least . examples do not fit 800 examples"):
        example(name)(POOL, count, Key.root(0))


def test_iid_counts_differ_by_at_most_one_and_labels_are_even() -> None:
    split = build("partition", "iid")(POOL, 7, Key.root(0))
    sizes = [len(s) for s in split.shares]
    assert max(sizes) - min(sizes) <= 1
    shares = histogram(POOL, split) / torch.tensor(sizes)[:, None]
    assert (shares - 0.1).abs().max() < 0.1


def histogram(some: Pool, split: Split) -> torch.Tensor:
    return label_histogram(clients(some, split, Key.root(0))[0], some.classes)


def entropy(some: Pool, split: Split) -> float:
    """Mean over clients of the entropy of their labels, in nats."""
    counts = histogram(some, split).double()
    shares = counts / counts.sum(1, keepdim=True)
    return float(-(shares * shares.clamp_min(1e-300).log()).sum(1).mean())


def test_dirichlet_labels_are_the_more_skewed_the_smaller_alpha_is() -> None:
    some = pool(5000)
    found = [
        np.mean([entropy(some, build("partition", "dirichlet", alpha=a)(some, 20, Key.root(s))) for s in range(5)])
        for a in (0.1, 0.5, 2.0, 100.0)
    ]
    assert all(a + 0.1 < b for a, b in itertools.pairwise(found))
    assert found[-1] > 0.97 * np.log(10)


def test_dirichlet_has_the_moments_of_its_distribution() -> None:
    """A client's share of a class has mean 1/n and variance (n - 1) / (n^2 (n alpha + 1)): 400 shares per draw."""
    some, n, alpha = pool(20_000), 10, 0.5
    rule = build("partition", "dirichlet", alpha=alpha)
    shares = torch.cat([histogram(some, rule(some, n, Key.root(s))).double() / 2000 for s in range(40)])
    assert shares.mean() == pytest.approx(1 / n, abs=1e-9)
    assert shares.var() == pytest.approx((n - 1) / (n**2 * (n * alpha + 1)), rel=0.1)


def test_a_capped_dirichlet_gives_a_full_client_no_more_classes() -> None:
    """Classes are dealt in order: none goes to who held an equal share of all examples before."""
    some = pool(count=4000)
    split = build("partition", "dirichlet", alpha=0.1, capped=True)(some, 20, Key.root(2))
    for share in split.shares:
        counts = torch.bincount(some.y[share], minlength=some.classes).tolist()
        held = 0
        for count in counts:
            assert not (count and held >= 4000 / 20)
            held += count
    assert sum(len(share) for share in split.shares) == 4000
    free = build("partition", "dirichlet", alpha=0.1)(some, 20, Key.root(2))
    assert max(map(len, split.shares)) < max(map(len, free.shares))


def test_dirichlet_quantity_alpha_skews_the_sizes_but_not_evenly_mixed_labels() -> None:
    some = pool(5000)
    even = build("partition", "dirichlet", alpha=100.0)(some, 10, Key.root(1))
    skewed = build("partition", "dirichlet", alpha=100.0, quantity_alpha=1.0)(some, 10, Key.root(1))
    spread = [torch.tensor([len(s) for s in split.shares]).double().std() / 500 for split in (even, skewed)]
    assert spread[0] < 0.1
    assert spread[1] > 0.4
    assert entropy(some, skewed) > 0.9 * np.log(10)


def test_a_minimum_that_no_draw_reaches_ends_in_a_sentence() -> None:
    rule = build("partition", "dirichlet", alpha=0.01, min_examples=50)
    with pytest.raises(InputError, match=r"dirichlet\(alpha=0.01\).*fewer than min_examples=50 in 100 draws.*higher"):
        rule(POOL, 10, Key.root(0))
    with pytest.raises(InputError, match=r"quantity_skew\(alpha=0.01\)"):
        build("partition", "quantity_skew", alpha=0.01)(POOL, 10, Key.root(0))


@given(count=st.integers(2, 30), k=st.integers(1, 10), classes=st.integers(2, 10), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_shards_give_k_classes_with_even_holders(count: int, k: int, classes: int, seed: int) -> None:
    some, rule = pool(1000, classes), build("partition", "shards", classes_per_client=k)
    if not k <= classes <= count * k:
        with pytest.raises(InputError, match=f"choose {-(-classes // count)} to {classes}"):
            rule(some, count, Key.root(seed))
        return
    held = histogram(some, rule(some, count, Key.root(seed)))
    assert ((held > 0).sum(1) == k).all()
    holders = (held > 0).sum(0)
    assert holders.max() - holders.min() <= 1


def test_shards_combine_classes_freely() -> None:
    held = histogram(POOL, build("partition", "shards", classes_per_client=2)(POOL, 40, Key.root(0))) > 0
    assert len({tuple(row.tolist()) for row in held}) > 10


def test_quantity_skew_changes_sizes_and_keeps_the_labels_even() -> None:
    some = pool(10_000)
    split = build("partition", "quantity_skew", alpha=1.0, min_examples=100)(some, 10, Key.root(0))
    sizes = torch.tensor([len(s) for s in split.shares])
    assert sizes.max() > 4 * sizes.min()
    assert entropy(some, split) > 0.95 * np.log(10)


def test_feature_noise_is_iid_with_the_papers_variances() -> None:
    some = pool(40_000)
    split = build("partition", "feature_noise", sigma=0.4)(some, 4, Key.root(0))
    assert split.noise == pytest.approx([0.1**0.5, 0.2**0.5, 0.3**0.5, 0.4**0.5])
    data, held = clients(some, split, Key.root(5), holdout=0.5)
    assert held is not None
    for part, share in ((data, 0.5), (held, 0.5)):
        assert len(part.x) == 40_000 * share
    whole, _ = clients(some, split, Key.root(5))
    for client, rows in enumerate(split.shares):
        start, stop = whole.range(client)
        noise = whole.x[start:stop] - some.x[rows]
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
        assert float(noise.var()) == pytest.approx(0.1 * (client + 1), rel=0.03)
    assert torch.equal(clients(some, split, Key.root(5))[0].x, whole.x)
    assert not torch.equal(clients(some, split, Key.root(6))[0].x, whole.x)


def test_feature_noise_is_in_the_units_of_the_models_input() -> None:
    grey = torch.full((4000, 1, 2, 2), 255, dtype=torch.uint8)
    from fedkeel.train.contract import Scale, Tokens

    images = Pool.from_arrays(grey, torch.arange(4000) % 2, grey[:2], torch.tensor([0, 1]), prepare=Scale(0.0, 1 / 255))
    split = build("partition", "feature_noise", sigma=0.01)(images, 1, Key.root(0))
    data, _ = clients(images, split, Key.root(0))
    inputs = data.prepare(data.x)
    assert inputs.shape == grey.shape
    assert float(inputs.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(inputs.std()) == pytest.approx(0.1, rel=0.05)
    symbols = Pool.from_arrays(grey, torch.arange(4000) % 2, grey[:2], torch.tensor([0, 1]), prepare=Tokens())
    with pytest.raises(InputError, match="noise cannot be added to symbols"):
        clients(symbols, split, Key.root(0))


def test_natural_clients_are_the_groups() -> None:
    some = pool(groups=12)
    split = build("partition", "natural")(some, 12, Key.root(0))
    assert some.group is not None
    assert split.names == some.group_names
    for number, share in enumerate(split.shares):
        assert (some.group[share] == number).all()
    fewer = build("partition", "natural")(some, 5, Key.root(0))
    assert set(fewer.names) < set(split.names)
    for name, share in zip(fewer.names, fewer.shares, strict=True):
        assert torch.equal(share, split.shares[split.names.index(name)])


def test_natural_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="9 clients of 8 natural groups with at least 1 examples: ask for at most 8"):
        build("partition", "natural")(POOL, 9, Key.root(0))
    with pytest.raises(InputError, match="needs data with groups"):
        build("partition", "natural")(Pool.from_arrays(torch.rand(9, 2), torch.zeros(9).long()), 2, Key.root(0))
    rare = Pool.from_arrays(torch.rand(9, 2), torch.zeros(9).long(), torch.rand(1, 2), [0], group=["a"] * 7 + ["b"] * 2)
    assert build("partition", "natural", min_examples=3)(rare, 1, Key.root(0)).names == ("a",)
    with pytest.raises(InputError, match="2 clients of 1 natural groups with at least 3"):
        build("partition", "natural", min_examples=3)(rare, 2, Key.root(0))


@pytest.mark.parametrize("name", ["dirichlet", "shards"])
def test_label_partitions_need_labels(name: str) -> None:
    targets = Pool.from_arrays(torch.rand(50, 2), torch.rand(50))
    with pytest.raises(InputError, match=f"partition '{name}' needs one class label per example"):
        example(name)(targets, 2, Key.root(0))


def test_a_shard_too_small_for_its_holders_is_refused() -> None:
    few = Pool.from_arrays(torch.rand(20, 2), torch.tensor([0] * 19 + [1]), torch.rand(1, 2), [0])
    with pytest.raises(InputError, match="leaves one of 10 clients without examples"):
        build("partition", "shards", classes_per_client=1)(few, 10, Key.root(0))
