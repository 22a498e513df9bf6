"""Normals of a cryptographic generator, and the grid on which nothing is told by rounding."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedkeel.core.keys import Key
from fedkeel.core.noise import Noise, cut, rounded, unit_of


def test_normals_are_normal_and_independent() -> None:
    z = Noise(Key(7)).normals(400_000)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    first, second = z.chunk(2)  # Box and Muller's pairs
    assert abs(float((first * second).mean())) < 5 / math.sqrt(200_000)
    assert stats.kstest((first**2 + second**2).numpy(), "chi2", args=(2,)).pvalue > 1e-3


def test_words_are_uniform_in_every_bit() -> None:
    words = Noise(Key(8)).words(100_000)
    for bit in range(64):
        ones = int(((words >> bit) & 1).sum())
        assert abs(ones - 50_000) < 5 * math.sqrt(25_000), f"bit {bit}"


def test_a_key_gives_the_same_stream_in_parts_and_without_one_none_repeats() -> None:
    assert torch.equal(Noise(Key(1)).normals(9), Noise(Key(1)).normals(9))
    noise = Noise(Key(1))
    assert torch.equal(torch.cat([noise.words(3), noise.words(5)]), Noise(Key(1)).words(8))
    assert not torch.equal(Noise(Key(1)).normals(9), Noise(Key(2)).normals(9))
    assert not torch.equal(Noise().normals(9), Noise().normals(9))
    assert Noise().normals(0).shape == (0,)


def _tell(noise: Noise, to: multiprocessing.queues.SimpleQueue[list[int]]) -> None:
    to.put(noise.words(4).tolist())


def test_a_forked_process_does_not_repeat_its_parents_noise() -> None:
    noise = Noise()
    noise.words(1)
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=_tell, args=(noise, told))
    child.start()
    theirs = told.get()
    child.join()
    assert theirs != noise.words(4).tolist()


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8),
    st.floats(min_value=1e-6, max_value=1e6),
)
def test_cutting_to_the_grid_lengthens_no_row_and_moves_it_by_less_than_a_unit(
    values: list[float], scale: float
) -> None:
    row, unit = torch.tensor(values).clamp(-scale, scale), unit_of(scale)
    back = cut(row, unit).to(torch.float64) * unit
    assert float(back.norm()) <= float(row.double().norm())
    assert bool(((row.double() - back).abs() < unit).all())


@pytest.mark.parametrize("scale", [1e-9, 0.3, 1.0, 7.5, 1e9])
def test_a_grid_is_a_power_of_two_a_billion_times_finer(scale: float) -> None:
    unit = unit_of(scale)
    assert math.frexp(unit)[0] == 0.5
    assert 2.0**30 <= scale / unit < 2.0**31


def test_noise_on_the_grid_is_noise_rounded() -> None:
    noise, unit = Noise(Key(3)).normals(1000) * 5, 0.25
    v = torch.arange(1000)
    assert torch.equal(v + rounded(noise, unit), ((v * unit + noise) / unit).round().to(torch.int64))
