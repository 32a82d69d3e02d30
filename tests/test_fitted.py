"""Fitted rounding of one matrix: what it promises, in cases whose answer is known."""

import pytest
import torch
from moyu_ext.packing.fitted import Elimination, pack_fitted, second_moment
from moyu_ext.packing.rounding import pack_matrix
from moyu_ext.packing.rows import Format, unpack_rows


def inputs(tokens: int, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    return torch.randn(tokens, n, generator=g) @ torch.randn(n, n, generator=g) / n**0.5


def fitted(weight, x, fmt, transposed):
    group = 1 if transposed else fmt.group
    rows = weight.t().contiguous() if transposed else weight
    packed = pack_fitted(rows, Elimination.of(second_moment(x), group), fmt, transposed=transposed)
    wide = unpack_rows(packed, rows.shape[1])
    return wide.t() if transposed else wide


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(96, 64), (40, 130), (200, 576)])
@pytest.mark.parametrize("fmt", [Format(3, 64), Format(4, 32), Format(5, 64)])
def test_outputs_are_nearer_than_by_nearest_levels(size, fmt, transposed):
    n, d = size
    weight, x = torch.randn(n, d, generator=torch.Generator().manual_seed(1)), inputs(1000, d)
    nearest = weight.t().contiguous() if transposed else weight
    nearest = unpack_rows(pack_matrix(nearest, fmt), nearest.shape[1])
    nearest = nearest.t() if transposed else nearest
    right = x @ weight.t()
    lost = (x @ fitted(weight, x, fmt, transposed).t() - right).square().mean()
    assert lost < 0.7 * (x @ nearest.t() - right).square().mean()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_on_levels_stay(transposed):
    g = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 16, (128, 128), generator=g).float() * 0.25 - 2
    rows[:, ::32], rows[:, 1::32] = -2, 1.75  # every group reaches both ends
    weight = rows.t() if transposed else rows
    got = fitted(weight, inputs(500, 128), Format(4, 32), transposed)
    assert torch.equal(got, weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_inputs_that_say_nothing(transposed, value):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    got = fitted(weight, torch.full((10, 64), value), Format(6, 32), transposed)
    assert (got - weight).abs().max() < 0.06  # a step of 6 bits over some 4 deviations


def test_groups_stay_together_and_large_inputs_come_first():
    moment = torch.diag(torch.tensor([1.0, 2, 3, 4, 9, 8, 7]))
    assert Elimination.of(moment, 4).order.tolist() == [4, 5, 6, 3, 2, 1, 0]
    assert Elimination.of(moment, 1).order.tolist() == [4, 5, 6, 3, 2, 1, 0]
