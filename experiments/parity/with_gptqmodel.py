"""GPTQ by GPTQModel on stored layers; runs in an environment that has GPTQModel.

python with_gptqmodel.py LAYERS.safetensors OUT.safetensors ROOT-OF-THIS-REPOSITORY
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors import safe_open
from safetensors.torch import save_file


def quantize(weight: torch.Tensor, inputs: torch.Tensor, how: dict) -> tuple[torch.Tensor, float]:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    activation = how.get("order") == "activation"
    config = QuantizeConfig(
        bits=how["bits"],
        group_size=-1 if how["group"] == "row" else how["group"],
        sym=how["symmetric"],
        desc_act=activation,
        static_groups=activation,
        act_group_aware=bool(how.get("aware")),
        damp_percent=0.01,
        offload_to_disk=False,
    )
    solver = GPTQ(NamedModule(linear, "linear", "linear", 0), config)
    solver.quantizer.configure(perchannel=True)
    for chunk in torch.split(inputs, 2048):
        solver.add_batch(chunk[None], torch.zeros(1))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter  # as the benchmark's
    began = clock()
    quantized = solver.quantize(blocksize=128)[0]
    return quantized.float()[: weight.shape[0], : weight.shape[1]], clock() - began


def through(weight: torch.Tensor, inputs: torch.Tensor, how: dict) -> torch.Tensor:
    """The same through `--backend gptqmodel`, which passes the library a Gram matrix instead of inputs."""
    from sensitivity.quantize.layer.curvature import Curvature
    from sensitivity.quantize.scheme_settings import scheme
    from sensitivity.quantize.solving import fake_quantize

    seen = Curvature(weight.shape[1])
    seen.add(inputs)
    grid = {"group": how["group"], "symmetric": how["symmetric"], "order": how.get("order", "given")}
    return fake_quantize(weight, scheme("gptq", how["bits"], backend="gptqmodel", **grid), seen)


def main(source: str, target: str, root: str) -> None:
    sys.path.insert(0, root)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    results, facts = {}, {"gptqmodel": version("gptqmodel"), "torch": torch.__version__, "seconds": {}}
    with safe_open(source, "pt") as stored:
        wishes = json.loads(stored.metadata()["wishes"])
        for key, layer, how in wishes:
            weight, inputs = stored.get_tensor(f"{layer}|weight"), stored.get_tensor(f"{layer}|inputs")
            quantized, facts["seconds"][key] = quantize(weight, inputs, how)
            results[key] = quantized.contiguous()
            if not how.get("alone") and not how.get("aware"):  # an order that `--backend` does not offer
                results[f"{key}|backend"] = through(weight, inputs, how).contiguous()
    save_file(results, target, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(*sys.argv[1:])
