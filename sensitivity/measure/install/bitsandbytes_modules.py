"""Replaces a plan's linear layers by real bitsandbytes modules (extra `bnb`), and restores them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn

from sensitivity.measure.install.plan_in_model import targets
from sensitivity.spec.components import ComponentMap
from sensitivity.spec.errors import UserError
from sensitivity.spec.plan import Plan, Scheme


@contextmanager
def with_bitsandbytes(model: nn.Module, parts: ComponentMap, plan: Plan) -> Iterator[dict[str, nn.Module]]:
    """Inside the `with` block the plan's linear layers are bitsandbytes modules, by path; the type of each is checked.

    Loaders take lists of modules to skip, in which a path that is spelled differently silently matches nothing. Here
    each module is replaced by name, and the replaced modules are compared with those that the plan asks for.
    """
    schemes = {name.rpartition(".")[0]: scheme for name, scheme in targets(parts, plan).items()}
    originals = {path: _linear(model, path) for path in schemes}
    types = _types()
    try:
        for path, scheme in schemes.items():
            model.set_submodule(path, _bitsandbytes_module(originals[path], scheme))
        wrong = [p for p, scheme in schemes.items() if type(model.get_submodule(p)) is not types[scheme.method]]
        surplus = [p for p, m in model.named_modules() if isinstance(m, tuple(types.values())) and p not in schemes]
        if wrong or surplus:
            raise UserError(f"bitsandbytes: not replaced {wrong[:4]}, replaced without being asked {surplus[:4]}")
        yield {path: model.get_submodule(path) for path in schemes}
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    """A linear layer by its path; an embedding has no module in bitsandbytes."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise UserError(f"bitsandbytes replaces linear layers, and {path} is none; leave it out of the plan")
    return module


def _library() -> ModuleType:
    """The bitsandbytes library, or an error that says how to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("bitsandbytes is not installed; type: pip install 'vlm-sensitivity[bnb]'") from error
    library: ModuleType = bitsandbytes
    return library


def _types() -> dict[str, type[nn.Module]]:
    """The module class of each method."""
    bnb = _library()
    return {"nf4": bnb.nn.Linear4bit, "fp4": bnb.nn.Linear4bit, "llm-int8": bnb.nn.Linear8bitLt}


def _bitsandbytes_module(linear: nn.Linear, scheme: Scheme) -> nn.Module:
    """The bitsandbytes module for a linear layer under a scheme."""
    makers: dict[str, Callable[[nn.Linear, Scheme], nn.Module]] = {
        "nf4": _linear_4bit,
        "fp4": _linear_4bit,
        "llm-int8": _linear_8bit,
    }
    if scheme.method not in makers:
        raise UserError(f"bitsandbytes has no {scheme.method}; choose from {', '.join(makers)}")
    made = makers[scheme.method](linear, scheme)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made.to(linear.weight.device).eval()


def _linear_4bit(linear: nn.Linear, scheme: Scheme) -> nn.Module:
    """A 4-bit module, which quantizes the weight when it is moved to a device."""
    bnb, weight = _library(), linear.weight.detach()
    options = {"compress_statistics": bool(scheme["double"]), "quant_type": scheme.method}
    made: nn.Module = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], linear.bias is not None, compute_dtype=weight.dtype, **options
    )
    made.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, blocksize=int(scheme.group), **options)
    return made


def _linear_8bit(linear: nn.Linear, scheme: Scheme) -> nn.Module:
    """An LLM.int8 module."""
    bnb, weight = _library(), linear.weight.detach()
    if scheme["outliers"] != "call":
        raise UserError("bitsandbytes finds outliers in each call; make the scheme with outliers='call'")
    made: nn.Module = bnb.nn.Linear8bitLt(
        weight.shape[1],
        weight.shape[0],
        linear.bias is not None,
        has_fp16_weights=False,
        threshold=float(scheme["threshold"] or 0),
    )
    # from another dtype, bitsandbytes would round the weight to half precision first and compute the codes in it
    made.weight = bnb.nn.Int8Params(weight.to(torch.float32).clone(), requires_grad=False, has_fp16_weights=False)
    return made
