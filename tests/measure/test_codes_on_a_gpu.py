"""Where codes of quantized weights lie: on the model's GPU as far as there is room, and in host memory once it ends."""

from __future__ import annotations

import pytest
import torch
from second_device import HERE, THERE, SecondDevice, where
from torch import nn

from sensitivity.measure.memory import weight_codes
from sensitivity.measure.memory.prefix_cache import PrefixCache
from sensitivity.measure.memory.weight_codes import WeightCodes, as_cached, tensors
from sensitivity.models.discovery import inspect
from sensitivity.models.loading import load
from sensitivity.quantize.layer.exact_products import exact_in_tf32
from sensitivity.quantize.layer.linears import Linears
from sensitivity.quantize.scheme_settings import scheme
from sensitivity.quantize.solving import solve

BYTES = 64 * 64 + 2 * 64 * 4  # codes of a square matrix, a scale and a zero of each row


def filled(room: int, limit: float, monkeypatch: pytest.MonkeyPatch, count: int = 4) -> WeightCodes:
    """The codes of a few matrices, in memory that has room for so many bytes on the GPU."""
    monkeypatch.setattr(weight_codes, "room_beside", lambda device, weights, one_in: room)
    model = nn.Linear(64, 64).to("cuda")
    codes, asked = WeightCodes(limit, model), scheme("rtn", 3)
    for number in range(count):
        ours = torch.randn(64, 64, generator=torch.Generator().manual_seed(number)).to("cuda")
        codes[str(number), asked] = as_cached(solve(Linears((str(number),), (ours,)), [asked])[0][0])
    return codes


def places(codes: WeightCodes) -> list[set[torch.device]]:
    return [{where(tensor) for tensor in tensors(dict.__getitem__(codes, key)).values()} for key in codes]


def test_codes_stay_on_the_gpu_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with SecondDevice():
        some, all_, none = (filled(room, 1e9, monkeypatch) for room in (2 * BYTES + 100, 10 * BYTES, 0))
        assert [THERE in one for one in places(some)] == [True, True, False, False]
        assert all(THERE in one for one in places(all_))
        assert not any(THERE in one for one in places(none))
        assert some.bytes == all_.bytes == none.bytes > some.bytes_there == some.bytes // 2
        assert (all_.bytes_on_host, none.bytes_there) == (0, 0)
        like = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
        for key in list(none):
            dense = [codes.dense(key, like) for codes in (some, all_, none)]
            assert all(torch.equal(dense[0], one) and one.dtype == like.dtype and where(one) == THERE for one in dense)


def test_only_host_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with SecondDevice():
        codes = filled(2 * BYTES + 100, 1.5 * BYTES, monkeypatch, count=5)
        codes.trim()
        assert [key[0] for key in codes] == ["0", "1", "4"]
        assert codes.bytes_on_host <= 1.5 * BYTES < codes.bytes


def test_codes_leave_a_gpu_whose_memory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with SecondDevice():
        codes = filled(2 * BYTES + 100, 1e9, monkeypatch)
        total, order, like = codes.bytes, list(codes), torch.zeros(64, 64, device="cuda")
        before = {key: codes.dequantized(key, like) for key in order}
        codes.update(dict(codes))
        assert codes.bytes == total
        assert codes.release()
        assert (codes.bytes, codes.bytes_there, list(codes)) == (total, 0, order)
        assert all(one == {HERE} for one in places(codes))
        assert not codes.release()
        assert all(torch.equal(codes.dequantized(key, like), before[key]) for key in order)
        codes["more", scheme("rtn", 3)] = codes[order[0]]
        assert places(codes)[-1] == {HERE}


@pytest.mark.parametrize("lay_there", [True, False])
def test_hidden_states_and_codes_are_given_up_together(lay_there: bool) -> None:
    """Without hidden states to free, whether an example may fit now depends on the codes."""
    vlm, asked = load("embedded:scenes-blip2"), []
    shared = PrefixCache(vlm.model, inspect(vlm, "part"), 1000, lambda: asked.append("codes") or lay_there)
    assert shared.release() is lay_there
    assert asked == ["codes"]


def test_a_model_on_a_cpu_has_its_codes_in_host_memory() -> None:
    codes = WeightCodes(beside=load("embedded:scenes-blip2").model)
    assert (codes.device, codes.room) == (HERE, 0)


@pytest.mark.parametrize("kinds", [["float16"], ["bfloat16", "float16"], ["float32"], ["bfloat16", "float32"]])
def test_only_products_of_16_bits_may_run_in_tf32(kinds: list[str]) -> None:
    factors, usual = [torch.ones(1, dtype=getattr(torch, kind)) for kind in kinds], torch.backends.cuda.matmul
    before, inside = usual.allow_tf32, []

    def fail() -> None:
        with exact_in_tf32(*factors):
            inside.append(usual.allow_tf32)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert (before, inside, usual.allow_tf32) == (False, ["float32" not in kinds], False)
