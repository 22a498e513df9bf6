"""Noise on sums: what one client can move, what is added, what cancels over the rounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.noise import Noise, unit_of
from fedkeel.core.registry import parse
from fedkeel.core.types import Claims, Mechanism
from fedkeel.round.privacy import WITHIN, Account, Noiser, Privacy, banded_root

COLUMNS = 5
COLUMN = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROW = st.lists(COLUMN, min_size=COLUMNS, max_size=COLUMNS).map(torch.tensor)


def promise(text: str, secret: Key | None = None, cohort: int = 10, **others: object) -> Privacy:
    mechanism: Mechanism = parse("mechanism", text)()
    fields = {"sampling": "poisson", "rounds": 20, "uses": 20, "population": 100, "delta": 1e-5, **others}
    return Privacy(mechanism=mechanism, cohort=cohort, secret=secret, **fields)  # type: ignore[arg-type]


def claims(within: float | None = None) -> Claims:
    return Claims("c", 0, 0, "", 1, 1, {} if within is None else {WITHIN: within})


def summed(rows: list[Tensor], weights: list[float], norm: float = 1.0) -> Tensor:
    """The exact sum, in units."""
    noiser = Noiser(promise(f"central(norm={norm!r}, noise=1.0)"), {})
    for row, weight in zip(rows, weights, strict=True):
        noiser.add(row, weight, claims())
    return torch.zeros(COLUMNS, dtype=torch.int64) if noiser._sum is None else noiser._sum


@given(st.lists(st.tuples(ROW, st.floats(0, 1)), max_size=5), ROW, st.floats(0, 1), st.sampled_from([1e-6, 1.0, 3e5]))
@settings(deadline=None)
def test_no_row_moves_the_sum_by_more_than_the_norm(
    others: list[tuple[Tensor, float]], row: Tensor, weight: float, norm: float
) -> None:
    rows, weights = [r for r, _ in others], [w for _, w in others]
    moved = summed([*rows, row], [*weights, weight], norm) - summed(rows, weights, norm)
    length = math.sqrt(sum(int(v) ** 2 for v in moved.tolist())) * unit_of(norm)  # whole numbers: nothing is rounded
    assert length <= norm * max(weight, 1e-30)


@given(st.lists(ROW, min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_sum_does_not_depend_on_the_order_of_rows(rows: list[Tensor], shuffle: object) -> None:
    mixed = rows.copy()
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    assert torch.equal(summed(rows, [1.0] * len(rows)), summed(mixed, [1.0] * len(rows)))


def test_short_rows_come_out_as_they_are_but_for_the_noise() -> None:
    noiser, row = Noiser(promise("central(norm=1.0, noise=1e-6)", Key(1)), {}), torch.tensor([0.3, -0.1, 0.0])
    noiser.add(row, 1.0, claims())
    assert torch.allclose(noiser.release(3, 2.0, 0).direction, row / 2, atol=1e-5)


@pytest.mark.parametrize("text", ["central(norm=0.5, noise=2.0)", "adaptive(norm=0.5, noise=0.7)"])
def test_noise_has_the_deviation_that_is_accounted_for(text: str) -> None:
    privacy = promise(text, Key(5), cohort=50)
    direction = Noiser(privacy, {}).release(200_000, 50, 3).direction.double()
    wanted = privacy.noise
    if privacy.mechanism.quantile is not None:  # Andrew et al. 2021, theorem 1
        wanted = (wanted**-2 - (2 * 50 / 20) ** -2) ** -0.5
        assert (wanted**-2 + (2 * 50 / 20) ** -2) ** -0.5 == pytest.approx(privacy.noise)
    assert stats.kstest((direction / (wanted * 0.5 / 50)).numpy(), "norm").pvalue > 1e-3


def test_noise_differs_from_round_to_round_and_run_to_run() -> None:
    known = Noiser(promise("central(norm=1.0, noise=1.0)", Key(1)), {})
    first, second = known.release(8, 1.0, 0).direction, known.release(8, 1.0, 1).direction
    assert not torch.equal(first, second)
    assert torch.equal(Noiser(promise("central(norm=1.0, noise=1.0)", Key(1)), {}).release(8, 1.0, 0).direction, first)
    fresh = [Noiser(promise("central(norm=1.0, noise=1.0)"), {}).release(8, 1.0, 0).direction for _ in range(2)]
    assert not torch.equal(*fresh)


def test_bands_undone_are_independent_noise_of_the_deviation_that_is_accounted_for() -> None:
    bands, rounds, key = 4, 12, Key(9)
    privacy, kept, released = promise(f"ftrl(norm=1.0, noise=1.5, bands={bands})", key), {}, []
    for round in range(rounds):  # resumed in every round, from what is kept
        found = Noiser(privacy, kept).release(50, 1.0, round)
        kept = dict(found.kept)
        released.append(found.direction.double())
    root = banded_root(bands)
    length = math.sqrt(sum(c * c for c in root))
    for round in range(rounds):
        undone = sum(c * released[round - i] for i, c in enumerate(root) if i <= round)
        drawn = Noise(key.fold(round)).normals(50) * 1.5 * length
        assert torch.allclose(undone, drawn, atol=1e-5)
    assert len(kept) == bands - 1


def test_the_root_squared_is_the_matrix_of_prefix_sums() -> None:
    root = torch.tensor(banded_root(30), dtype=torch.float64)
    C = torch.stack([torch.cat([torch.zeros(i), root[: 30 - i]]) for i in range(30)], dim=1)
    assert torch.allclose(C @ C, torch.ones(30, 30, dtype=torch.float64).tril(), atol=1e-12)


@pytest.mark.parametrize("bands", [2, 3, 5])
def test_a_client_that_rests_moves_all_rounds_together_by_the_root_of_its_uses(bands: int) -> None:
    rounds, root = 9, torch.tensor(banded_root(bands), dtype=torch.float64)
    C = torch.zeros(rounds, rounds, dtype=torch.float64)
    for i, c in enumerate(root):
        C += torch.diag(c.expand(rounds - i), -i)
    length = float(root.norm())
    for pattern in itertools.product([0, 1], repeat=rounds):
        at = [i for i, used in enumerate(pattern) if used]
        if any(b - a < bands for a, b in itertools.pairwise(at)):
            continue
        for signs in itertools.product([-1.0, 1.0], repeat=len(at)):  # one column each: the worst is a corner
            moved = torch.zeros(rounds, dtype=torch.float64)
            moved[at] = torch.tensor(signs, dtype=torch.float64)
            assert float((C @ moved).norm()) <= length * math.sqrt(len(at)) + 1e-12


def test_correlated_noise_leaves_a_model_with_less_of_it() -> None:
    rounds, columns = 32, 4000

    def left(text: str) -> float:
        privacy, kept, total = promise(text, Key(4)), {}, torch.zeros(columns, dtype=torch.float64)
        worst = 0.0
        for round in range(rounds):
            found = Noiser(privacy, kept).release(columns, 1.0, round)
            kept, total = dict(found.kept), total + found.direction
            worst += float(total.square().mean()) / rounds
        return math.sqrt(worst)

    # The same promise for a client that takes part every eighth round: deviation 1 a use.
    assert left("ftrl(norm=1.0, noise=1.0, bands=8)") < 0.75 * left("central(norm=1.0, noise=1.0)")


def test_an_adaptive_norm_goes_to_the_quantile_of_the_clients_norms() -> None:
    privacy, kept, norms = promise("adaptive(norm=0.1, noise=0.5, quantile=0.8)", Key(2), cohort=200), {}, []
    lengths = torch.linspace(0.01, 2.0, 200).tolist()
    for round in range(60):
        noiser = Noiser(privacy, kept)
        for length in lengths:
            noiser.add(torch.tensor([length, 0.0]), 1.0, claims(float(length <= noiser.norm)))
        kept = dict(noiser.release(2, 200, round).kept)
        norms.append(float(kept["norm"]))
    assert sum(norms[-20:]) / 20 == pytest.approx(1.6, rel=0.05)


def test_what_was_added_to_a_round_that_is_not_released_is_gone() -> None:
    noiser = Noiser(promise("central(norm=1.0, noise=1e-6)"), {})
    noiser.add(torch.ones(2), 1.0, claims())
    noiser.clear()
    assert float(noiser.release(2, 1.0, 0).direction.abs().max()) < 1e-3


# -- what is spent


def test_an_account_goes_on_from_what_it_kept() -> None:
    privacy = promise("central(norm=1.0, noise=1.0)", epsilon=3.0)
    account, rounds = Account(privacy, {}), 0
    while not account.spent(["a"]):
        account = Account(privacy, account.state())
        account.count()
        account.count()  # of the same round
        rounds += 1
    assert account.epsilon <= 3.0
    assert privacy.spent({privacy.event(): rounds + 1}) > 3.0


def test_the_client_that_took_part_most_is_what_counts() -> None:
    privacy = promise("local(norm=1.0, noise=8.0)", epsilon=2.0, sampling="uses", limit=3)
    account = Account(privacy, {})
    for clients in (["a", "b"], ["a"], ["a", "c"]):
        for client in clients:
            account.give(client)
        account.count()
        account.begin()
    assert account.state() == {"events": {}, "uses": {"a": 3, "b": 1, "c": 1}}
    assert account.epsilon == privacy.spent({privacy.event(): 3})
    assert privacy.most_uses == 3
    assert account.used_up == {"a"}


def test_rounds_are_charged_by_who_was_there() -> None:
    privacy = promise("central(norm=1.0, noise=4.0)", sampling="fixed")
    account = Account(privacy, {})
    account.sampled(60, 10)
    account.count()
    assert account.cost == {"events": {"Fixed(among=60, chosen=10, noise=4.0)": 1}, "uses": {}}
    account.begin()
    account.count()
    assert Account(privacy, account.state()).epsilon == account.epsilon > privacy.spent({privacy.event(): 2})
