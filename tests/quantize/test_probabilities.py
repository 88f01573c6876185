"""Grids of attention's probabilities, against a search over all levels; asymmetric ranges of inputs."""

from __future__ import annotations

import math

import pytest
import torch

from sensitivity.quantize.run_time.inputs import round_between
from sensitivity.quantize.run_time.probabilities import GRIDS, HALVINGS, round_probabilities
from sensitivity.quantize.scheme_settings import check_scheme, scheme
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Scheme


def rows(seed: int = 0) -> torch.Tensor:
    found = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    found[0, 0, 0] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0])  # a first token that sees itself alone
    return found


@pytest.mark.parametrize("largest", [1.0, 0.7])
@pytest.mark.parametrize("halving", [0, 1, 2, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_goes_to_the_nearest_level(bits: int, halving: int, largest: float) -> None:
    """In steps, or in the logarithm; there are 2^b levels, zero among them."""
    found = round_probabilities(rows(), bits, halving, largest)
    codes = 2**bits - 1
    for value, got in zip(rows().flatten().tolist(), found.flatten().tolist(), strict=True):
        if halving == 0:
            levels = [largest * k / codes for k in range(codes + 1)]
            best = min(abs(level - min(value, largest)) for level in levels)
            assert abs(got - min(value, largest)) == pytest.approx(best, abs=1e-6)
            continue
        exponents = [-k / halving for k in range(codes + 1)]  # the last stands for zero
        if value == 0:
            assert got == 0
            continue
        log = math.log2(value / largest)
        best = min(abs(log - exponent) for exponent in exponents)
        if got == 0:
            assert log < exponents[-2]
            assert log - exponents[-1] <= abs(log - exponents[-2]) + 1e-5
        else:
            assert any(math.isclose(math.log2(got / largest), exponent, abs_tol=1e-5) for exponent in exponents[:-1])
            assert abs(math.log2(got / largest) - log) <= best + 1e-5


def test_what_is_masked_stays_masked_and_one_stays_one() -> None:
    for halving in (0, 1, 2):
        found = round_probabilities(rows(), 3, halving)
        assert found[0, 0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0]
        assert torch.equal(found[1:], round_probabilities(rows()[1:], 3, halving))  # no row depends on another


def test_log_sqrt2_has_levels_between_those_of_log2() -> None:
    """The same bits: finer where probabilities are large, and coarser where they are tiny."""
    large, tiny = torch.tensor([0.7, 0.72]), torch.tensor([2.0**-10])
    fine, coarse = (round_probabilities(large, 4, HALVINGS[name]) for name in ("log-sqrt2", "log2"))
    assert (fine - large).abs().max() < 0.02
    assert (coarse - large).abs().max() > 0.2
    assert round_probabilities(tiny, 4, HALVINGS["log2"]).item() == 2.0**-10
    assert round_probabilities(tiny, 4, HALVINGS["log-sqrt2"]).item() == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_of_each_channel_has_zero_and_its_ends(bits: int) -> None:
    low, high = torch.tensor([-1.0, -4.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).mul(5)
    found, codes = round_between(x, bits, low, high), 2**bits - 1
    for column in range(2):
        step = float(high[column] - low[column]) / codes
        zero = round(-float(low[column]) / step)
        levels = [(code - zero) * step for code in range(codes + 1)]
        for value, got in zip(x[:, column].tolist(), found[:, column].tolist(), strict=True):
            assert abs(got - value) == pytest.approx(min(abs(level - value) for level in levels), abs=1e-5)
    assert torch.equal(round_between(torch.zeros(1, 3), bits, low, high), torch.zeros(1, 3))
    assert round_between(x.bfloat16(), bits, low, high).dtype == torch.bfloat16


def test_a_scheme_with_a_softmax_grid() -> None:
    chosen = scheme("rtn", 4, activations=4, softmax="log-sqrt2")
    assert chosen["softmax"] == "log-sqrt2"
    assert Scheme.from_json(chosen.to_json()) == chosen
    check_scheme(chosen)
    assert chosen.without_rounding == scheme("rtn", 4)
    # what rounds nothing is not recorded, so that a scheme is the one that it was before there were these settings
    nothing = scheme("rtn", 4, activations=4, softmax="none", attention="none", match=False)
    assert nothing == scheme("rtn", 4, activations=4)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("softmax", "log10", f"unknown softmax of rtn 'log10'; choose from {', '.join(GRIDS)}"),
        ("attention", "channel", "unknown attention of rtn 'channel'; choose from none, tensor, folded"),
        ("match", "yes", "match of rtn takes a value like False, not 'yes'"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_sentence(setting: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scheme("rtn", 4, activations=4, **{setting: value})
    with pytest.raises(UserError, match=f"unknown setting of rtn '{setting}'"):
        scheme("rtn", 4, **{setting: value})
