"""Layout: every tensor in its columns, nothing copied, nothing that must not travel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedkeel.core.errors import InputError
from fedkeel.core.layout import Layout


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(7), persistent=False)


def test_columns_are_parameters_then_float_buffers():
    layout = Layout.of(Net())
    kinds = {e.name: e.kind for e in layout.entries}
    assert kinds == {
        "body.weight": "param",
        "body.bias": "param",
        "norm.weight": "param",
        "norm.bias": "param",
        "head.weight": "param",
        "head.bias": "param",
        "scale": "param",
        "norm.running_mean": "buffer",
        "norm.running_var": "buffer",
    }
    parameters = 12 + 4 + 4 + 4 + 8 + 2 + 1
    assert layout.params == slice(0, parameters)
    assert layout.columns == layout.width == parameters + 8
    assert layout.trainable == slice(0, parameters)


def test_private_columns_stand_outside_the_shared_ones():
    layout = Layout.of(Net(), private=["head", "norm.*"])
    assert layout.width - layout.columns == 8 + 2 + 8 + 8
    assert layout.shared == slice(8 + 2 + 8, 8 + 2 + 8 + 12 + 4 + 1)
    assert layout.trainable == slice(0, layout.shared.stop)  # no shared buffers here: one run of trainable columns
    shared = layout.views(torch.zeros(layout.columns))
    assert set(shared) == {"body.weight", "body.bias", "scale"}
    assert set(layout.views(torch.zeros(layout.width))) == {e.name for e in layout.entries}


@given(st.integers(0, 2**31), st.booleans())
def test_flatten_then_load_is_the_identity(seed, private):
    module = Net()
    layout = Layout.of(module, ["head"] if private else [])
    vector = torch.randn(layout.width, generator=torch.Generator().manual_seed(seed))
    layout.load_(module, vector)
    assert torch.equal(layout.flatten(module), vector)
    assert torch.equal(layout.flatten(module)[layout.shared], vector[layout.shared])
    shared = vector[layout.shared] + 1
    layout.load_(module, shared)
    assert torch.equal(layout.flatten(module)[layout.shared], shared)


def test_views_share_memory_and_take_leading_rows():
    layout = Layout.of(Net())
    vector = torch.zeros(layout.columns)
    layout.views(vector)["body.weight"][1, 2] = 5.0
    assert vector[layout.offsets["body.weight"]][5] == 5.0
    rows = torch.zeros(6, layout.columns)
    assert layout.views(rows)["body.weight"].shape == (6, 4, 3)
    assert layout.views(rows)["scale"].shape == (6,)
    with pytest.raises(ValueError, match="fits neither"):
        layout.views(torch.zeros(layout.columns + 1))


def test_slices_name_layers_in_an_update():
    layout = Layout.of(Net(), private=["head"])
    row = torch.zeros(layout.columns)
    for columns in layout.slices("norm.*"):
        row[columns] = 1.0
    views = layout.views(row)
    assert all(bool((view == float(name.startswith("norm"))).all()) for name, view in views.items())
    assert layout.slices("norm") == layout.slices("norm.*")
    assert layout.slices("head.*") == []


def test_tied_tensors_are_one_entry():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    assert Layout.of(module).columns == 9


def test_the_digest_sees_every_difference():
    base = Layout.of(Net())
    assert base.digest == Layout.of(Net()).digest
    renamed = nn.Sequential(nn.Linear(3, 4))
    others = [Layout.of(Net(), ["head"]), Layout.of(renamed), Layout.of(nn.Linear(3, 4)), Layout.of(nn.Linear(4, 3))]
    others.append(Layout.of(nn.Linear(3, 4).double()))
    assert len({base.digest, *(o.digest for o in others)}) == 6


def test_what_cannot_federate_is_refused():
    with pytest.raises(InputError, match=r"'tail\.\*' matches no tensor"):
        Layout.of(Net(), ["tail.*"])
    with pytest.raises(InputError, match="complex"):
        Layout.of(nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]))
    with pytest.raises(InputError, match="no trainable parameter"):
        Layout.of(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(InputError, match="no trainable parameter"):
        Layout.of(nn.BatchNorm1d(2), ["weight", "bias"])  # its statistics alone would travel
