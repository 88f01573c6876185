"""A second device that every machine has: tensors that say they are elsewhere, and an error where the two are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

HERE, THERE = (
    torch.device("cpu"),
    torch.device("cuda:0"),
)  # what code that asks for a device's type does on a GPU counts
FREE = (
    torch._has_compatible_shallow_copy_type,
    Tensor.copy_,
    Tensor.data.__set__,
    Tensor.__getitem__,
    Tensor.__setitem__,
)  # may be given both kinds
ON_HOST = (Tensor.numpy, Tensor.__array__)
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


def where(tensor: Any) -> torch.device:
    return THERE if getattr(tensor, "is_there", False) else HERE


def _there(asked: Any) -> bool:
    return str(asked).startswith("cuda")


def put(result: Any, device: torch.device) -> Any:
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor):
            tensor.is_there = device == THERE
    return result


class SecondDevice(TorchFunctionMode):
    """All tensors lie in the host's memory, some say otherwise. Inside, `cuda` can be used, and a forgotten .to() is
    the error that a GPU would make of it. What is computed is what the CPU computes, to the last bit."""

    def __enter__(self) -> SecondDevice:
        super().__enter__()
        self._vmap = torch.vmap
        torch.vmap = self._mapped
        return self

    def __exit__(self, *raised: Any) -> None:
        torch.vmap = self._vmap
        super().__exit__(*raised)

    def _mapped(self, func: Any, *where_dims: Any, **more: Any) -> Any:
        """What vmap gives back lies where its arguments lie: it unwraps its results behind this mode's back."""
        mapped = self._vmap(func, *where_dims, **more)

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            return put(mapped(*args, **kwargs), self._of(tensors))

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return THERE if where(args[0]) == THERE else func(*args)  # or `meta`
        if func == Tensor.is_cuda.__get__:
            return where(args[0]) == THERE
        if func in MOVES:
            return self._moved(func, args, given)
        asked = given.pop("device", None)
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        if func in ON_HOST and where(args[0]) == THERE:
            raise TypeError("can't convert a tensor that lies elsewhere to numpy")
        if func not in FREE:
            self._same(func, tensors)
        if asked is not None:
            given["device"] = HERE if _there(asked) else asked
        result = func(*args, **given)
        if func == Tensor.data.__set__:
            put(args[0], where(args[1]))
        elif asked is not None:
            put(result, THERE if _there(asked) else HERE)
        elif tensors and not any(result is tensor for tensor in tensors):
            put(result, self._of(tensors if func not in FREE else tensors[:1]))
        return result

    def _moved(self, func: Any, args: Any, given: dict[str, Any]) -> Tensor:
        own = target = where(args[0])
        rest = list(args[1:])
        if func in (Tensor.cpu, Tensor.cuda):
            target, rest = (HERE if func == Tensor.cpu else THERE), []
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):  # its type and its place
                target, rest[i] = where(value), value.dtype
            elif isinstance(value, str | torch.device):
                target, rest[i] = (THERE, HERE) if _there(value) else (HERE, value)
        if given.get("device") is not None:
            target = THERE if _there(given["device"]) else HERE
            given["device"] = HERE if target == THERE else given["device"]
        result = args[0].to(*rest, **given) if rest or given else args[0]
        if result is args[0] and target != own:
            result = args[0].detach().clone()
        return result if result is args[0] else put(result, target)  # type: ignore[no-any-return]

    def _same(self, func: Any, tensors: list[Tensor]) -> None:
        """Numbers without dimensions may come from the host; all else lies in one place."""
        places = {where(t) for t in tensors if Tensor.dim(t)}
        if len(places) > 1:
            name = getattr(func, "__qualname__", func)
            raise RuntimeError(f"expected all tensors to be on the same device, but {name} was given both")

    def _of(self, tensors: list[Tensor]) -> torch.device:
        return THERE if any(where(tensor) == THERE for tensor in tensors) else HERE
