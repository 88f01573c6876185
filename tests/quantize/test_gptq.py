"""Column-wise error feedback: against the published algorithm step by step, and the invariants it must keep."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sensitivity.quantize.layer.curvature import Curvature
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import fake_quantize, solve
from sensitivity.quantize.stored.integer_grid import ranges, scale_and_zero
from sensitivity.spec.errors import Notice, UserError
from sensitivity.spec.plan import Scheme

WIDTH = 72


def inputs(tokens: int = 300, width: int = WIDTH, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)


def weights(rows: int = 16, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def curvature(x: Tensor, r: Tensor | None = None) -> Curvature:
    found = Curvature(x.shape[1])
    found.add(x, r)
    return found


def cost(weight: Tensor, quantized: Tensor, seen: Curvature) -> float:
    error = (weight - quantized).double()
    return float(((error @ seen.gram.double()) * error).sum())


def published(weight: Tensor, gram: Tensor, chosen: Scheme) -> Tensor:
    """Frantar et al. 2023 as written, in double precision: invert, factorize, one column after the other."""
    w, h = weight.double().clone(), gram.double().clone()
    h.diagonal().add_(float(chosen["damp"]) * h.diagonal().mean())  # type: ignore[arg-type]
    order = torch.arange(len(h))
    if chosen["order"] == "activation":
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    width = w.shape[1] if chosen.group == "row" else int(chosen.group)
    row, out, given = Scheme("rtn", chosen.bits, "row", chosen.symmetric), torch.zeros_like(w), weight
    w = w[:, order]
    for j, column in enumerate(order.tolist()):
        if chosen["order"] == "activation":  # groups of the weights as given
            start = column // width * width
            chunk = given[:, start : start + width]
        elif j % width == 0:  # all grids of 128 columns together, from the weights as they have become by then
            if j % (max(128 // width, 1) * width) == 0:
                then = w.clone()
            chunk = then[:, j : j + width].float()
        scale, zero = (t[:, 0].double() for t in scale_and_zero(chunk, row, *ranges(chunk, row), torch.float32))
        code = torch.round(w[:, j] / scale + zero).clamp(0, 2**chosen.bits - 1)
        out[:, column] = (code - zero) * scale
        w[:, j:] -= ((w[:, j] - out[:, column]) / upper[j, j])[:, None] * upper[j, j:]
    return out.float()


@pytest.mark.parametrize("group", ["row", 32, 24, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["given", "activation"])
def test_it_is_the_published_algorithm(group: int | str, symmetric: bool, order: str) -> None:
    seen, w = curvature(inputs()), weights()
    for bits in (1, 2, 3, 4, 8):
        chosen = scheme("gptq", bits, group=group, symmetric=symmetric, order=order, clip=False)
        ours, theirs = fake_quantize(w, chosen, seen), published(w, seen.gram, chosen)
        # a number that lies on the edge between two codes may fall either way, and then changes those after it
        assert (ours - theirs).abs().gt(1e-4).any(1).float().mean() <= 0.2
        assert cost(w, ours, seen) == pytest.approx(cost(w, theirs, seen), rel=0.02)


def test_grids_are_found_for_128_columns_at_a_time_as_released() -> None:
    seen, w = curvature(inputs(600, 200)), weights(16, 200)
    chosen = scheme("gptq", 3, group=48, symmetric=False, order="given", clip=False)  # spans of 96: 0, 96, 192
    ours, theirs = fake_quantize(w, chosen, seen), published(w, seen.gram, chosen)
    assert (ours - theirs).abs().gt(1e-4).any(1).float().mean() <= 0.2


@pytest.mark.parametrize("chosen", [{}, {"group": 16}, {"group": 16, "symmetric": False, "order": "given"}])
def test_a_width_has_the_same_bits_alone_and_among_others(chosen: dict[str, object]) -> None:
    linears = Linears(("q", "k"), (weights(13), weights(5, seed=2)), curvature(inputs()))
    schemes = [scheme("gptq", bits, **chosen) for bits in (2, 3, 4, 5, 6, 8)]
    together = solve(linears, schemes)
    for one, results in zip(schemes, together, strict=True):
        (alone,) = solve(linears, [one])
        for a, b in zip(alone, results, strict=True):
            assert torch.equal(a.codes, b.codes)  # type: ignore[union-attr]
            assert torch.equal(a.scale, b.scale)  # type: ignore[union-attr]


def test_another_backend_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensitivity.quantize.solvers.gptqmodel_solver.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gptqmodel is not installed; type: pip install 'vlm-sensitivity\[peers\]'"):
        scheme("gptq", 4, backend="gptqmodel")
    monkeypatch.setattr("sensitivity.quantize.solvers.gptqmodel_solver.find_spec", lambda _: "here")
    assert scheme("gptq", 4, backend="gptqmodel")["clip"] is False
    for method, bits, chosen, message in (
        ("gptq", 4, {"backend": "gptqmodle"}, "unknown backend of gptq 'gptqmodle'; choose from own, gptqmodel"),
        ("gptq", 4, {"backend": "gptqmodel", "clip": True}, "no clip search .* add --set clip=false"),
        ("gptq", 1, {"backend": "gptqmodel"}, "gptqmodel takes 2 to 8 bits, not 1"),
        ("awq", 4, {"backend": "gptqmodel"}, "awq has no backend but our own"),
    ):
        with pytest.raises(UserError, match=message):
            scheme(method, bits, **chosen)


def test_our_own_backend_is_not_written_down() -> None:
    assert scheme("gptq", 4, backend="own") == scheme("gptq", 4)


@pytest.mark.parametrize("group", ["row", 24, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_real_library_through_our_statistics_is_as_good_and_keeps_quiet(
    group: int | str, symmetric: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gptqmodel", reason="needs the extra peers")
    seen, w = curvature(inputs()), weights()
    for bits in (2, 3, 4, 8):
        how = {"group": group, "symmetric": symmetric, "clip": False}
        ours, theirs = (
            fake_quantize(w, scheme("gptq", bits, **how, **b), seen) for b in ({}, {"backend": "gptqmodel"})
        )
        assert cost(w, ours, seen) == pytest.approx(cost(w, theirs, seen), rel=0.1)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("group", ["row", 24])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_it_costs_no_more_than_nearest_on_the_same_grid(group: int | str, symmetric: bool, bits: int) -> None:
    seen, w = curvature(inputs()), weights()
    nearest = cost(w, fake_quantize(w, scheme("rtn", bits, group=group, symmetric=symmetric)), seen)
    for order in ("given", "activation"):
        for clip in (False, True):
            chosen = scheme("gptq", bits, group=group, symmetric=symmetric, order=order, clip=clip)
            assert cost(w, fake_quantize(w, chosen, seen), seen) < nearest


def test_endless_damping_is_nearest() -> None:
    for group in ("row", 24):
        chosen = scheme("gptq", 3, group=group, clip=False)  # more damping than a user may ask for
        endless = replace(
            chosen, settings=tuple({**dict(chosen.settings), "damp": 1e9}.items())
        )  # more than is allowed
        found = fake_quantize(weights(), endless, curvature(inputs()))
        torch.testing.assert_close(found, fake_quantize(weights(), scheme("rtn", 3, group=group)), rtol=0, atol=1e-6)


def test_inputs_that_know_nothing_of_each_other_are_nearest() -> None:
    found = fake_quantize(weights(), scheme("gptq", 3, clip=False), curvature(torch.eye(WIDTH)))
    assert torch.equal(found, fake_quantize(weights(), scheme("rtn", 3)))


def test_a_group_as_wide_as_the_row_is_the_row() -> None:
    seen = curvature(inputs())
    for chosen in ({}, {"order": "given"}, {"order": "given", "clip": False}):
        per_row = fake_quantize(weights(), scheme("gptq", 3, **chosen), seen)
        torch.testing.assert_close(fake_quantize(weights(), scheme("gptq", 3, group=WIDTH, **chosen), seen), per_row)


def test_the_result_is_on_its_grid() -> None:
    linears = Linears(("w",), (weights(),), curvature(inputs()))
    for chosen in (scheme("gptq", 3, group=16), scheme("gptq", 3, group=16, order="given")):
        ((result,),) = solve(linears, [chosen])
        assert result.codes.max() <= 7  # type: ignore[union-attr]
        assert result.scale.shape == (16, 5)  # type: ignore[union-attr]
        assert torch.equal(result.scale, result.scale.half().float())  # type: ignore[union-attr]


def test_a_token_twice_is_a_token_of_double_weight() -> None:
    x = inputs(40)
    r = torch.ones(40)
    r[7] = 2
    twice, weighted = curvature(torch.cat([x, x[7:8]])), curvature(x, r)
    torch.testing.assert_close(twice.gram, weighted.gram, rtol=1e-4, atol=1e-3)
    assert torch.equal(
        fake_quantize(weights(), scheme("gptq", 3), twice), fake_quantize(weights(), scheme("gptq", 3), weighted)
    )


def test_equal_weights_are_no_weights() -> None:
    x = inputs()
    plain, weighted = curvature(x), curvature(x, torch.full((len(x),), 4.0))
    assert torch.equal(
        fake_quantize(weights(), scheme("gptq", 3), plain), fake_quantize(weights(), scheme("gptq", 3), weighted)
    )


def test_a_token_of_no_weight_counts_in_mean_magnitudes_alone() -> None:
    x = inputs(10)
    r = torch.ones(10)
    r[3] = 0
    x[3] = 1e3
    seen, others = curvature(x, r), curvature(x[r > 0])
    assert seen.tokens == seen.weight == 9
    for one, other in ((seen.gram, others.gram), (seen.low, others.low), (seen.high, others.high)):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(seen.mean_magnitude, x.abs().mean(0))


def test_one_token_per_sample_makes_outer_products_a_weighting() -> None:
    """OAC: with one token the weight gradient is G = delta x', and G'G = |delta|^2 x x'."""
    x, delta = inputs(12), torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    gradients = delta[:, :, None] * x[:, None]
    exact = (gradients.mT @ gradients).sum(0)
    torch.testing.assert_close(exact, curvature(x, delta.square().sum(1)).gram, rtol=1e-4, atol=1e-3)


def test_batches_add_up() -> None:
    x = inputs()
    parts = Curvature(WIDTH)
    for chunk in torch.split(x, 77):
        parts.add(chunk)
    torch.testing.assert_close(parts.gram, curvature(x).gram, rtol=1e-4, atol=1e-2)
    assert parts.tokens == len(x)


def test_stored_and_read_again() -> None:
    seen = curvature(inputs())
    again = Curvature.of(seen.tensors())
    assert torch.equal(
        fake_quantize(weights(), scheme("gptq", 3), again), fake_quantize(weights(), scheme("gptq", 3), seen)
    )


def test_the_factor_is_computed_once() -> None:
    seen = curvature(inputs())
    first = seen.factor(0.01)
    assert seen.factor(0.01) is first
    assert seen.factor(0.02) is not first


def test_a_matrix_that_will_not_factorize_gets_more_damping_and_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default", Notice)  # as the command line has it
        for _ in range(3):  # layers; 5 tokens cannot tell 72 channels apart
            assert torch.isfinite(fake_quantize(weights(), scheme("gptq", 4, damp=0.0), curvature(inputs(5)))).all()
    (notice,) = said
    assert notice.category is Notice
    assert str(notice.message).startswith("damping raised from 0 to 0.001, since a Gram matrix would not factorize")


def test_a_channel_that_was_always_zero_is_rounded_to_nearest() -> None:
    x = inputs()
    x[:, [3, 40]] = 0
    seen = curvature(x)
    assert (seen.gram.diagonal() == 0).nonzero().flatten().tolist() == [3, 40]
    found, nearest = (
        fake_quantize(weights(), scheme("gptq", 3, clip=False), seen),
        fake_quantize(weights(), scheme("rtn", 3)),
    )
    assert torch.equal(found[:, [3, 40]], nearest[:, [3, 40]])  # and not zeroed, as in the paper's code


def test_a_layer_that_saw_nothing_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.fc received no token"):
        Curvature(4).check("model.fc")


def test_inputs_that_are_no_numbers_name_the_layer() -> None:
    x = inputs(4)
    x[2, 5] = float("inf")
    with pytest.raises(UserError, match=r"the inputs of model\.fc are NaN or infinite"):
        curvature(x).check("model.fc")


def test_inputs_of_nothing_but_zeros_leave_nearest() -> None:
    seen = curvature(torch.zeros(10, WIDTH))
    assert torch.equal(
        fake_quantize(weights(), scheme("gptq", 3, clip=False), seen), fake_quantize(weights(), scheme("rtn", 3))
    )
