"""PRESETS: published methods as named rows of settings."""

from __future__ import annotations

from sensitivity.spec.plan import Setting

# Each row is the method as its authors describe it. Gautam et al. 2025 ("Towards Understanding Best Practices for
# Quantization of Vision-Language Models") released code that differs: its uniform path misses OPT attention
# and all of the Q-Former's feed-forwards and cross-attentions, its GPTQ sees inputs that passed earlier chunks of 32
# quantized linears (like `path` = "exposed", which goes by blocks) and quantizes the head too, and its AWQ takes the
# exponents 0, 1, ..., 19.
PRESETS: dict[str, dict[str, Setting]] = {
    "paper-uniform": {"method": "uniform", "biases": True},
    "paper-gptq": {"method": "gptq", "group": "row", "symmetric": True, "damp": 0.01, "order": "given", "clip": False},
    "paper-awq": {"method": "awq", "group": 128, "symmetric": False, "exponents": 20, "clip": True},
    # MBQ (Li et al. 2025) as its authors publish it searches scales by the L1 error of module outputs; here the same
    # token weights stand in the squared error of layer outputs. The other three are known from abstracts alone, and
    # that they weigh by this gradient is inferred.
    "mbq": {"method": "awq", "group": 128, "clip": False, "importance": "modality"},
    "tlq": {"method": "awq", "group": 128, "importance": "gradient"},
    "tlq-gptq": {"method": "gptq", "importance": "gradient"},
    "oac": {"method": "gptq", "importance": "output"},
    # the release of GPTAQ shifts by a quarter of what the objective says
    "gptaq": {"method": "gptq", "shift": "later", "strength": 0.25},
    "rsq": {"method": "gptq", "order": "given", "transform": "hadamard", "importance": "attention"},
    "squeezellm-fisher": {"method": "squeezellm", "gradient": True},
    # QIG as its authors publish it is MBQ's scale search under the weights of its integrated gradients
    "qig": {"method": "awq", "group": 128, "clip": False, "importance": "perturbation"},
    # WKVQuant learns clips of weights and sizes of channels block by block; here both are found from ranges
    "wkv": {
        **{"method": "clip", "group": 128, "symmetric": False},
        **{"cache": 4, "cache_group": 128, "cache_past": True, "cache_smooth": True},
    },
    "salq-vlm": {"method": "gptq", "shift": "later", "strength": 0.25, "importance": "block"},
    # weights and activations; what each takes from its source, and what not, is said in SOURCES
    "repq-vit": {
        **{"method": "smooth", "symmetric": False, "exponent": 1.0, "spread": "range", "scales": "norms"},
        **{"activations": 4, "activation_scale": "norm", "attention": "tensor", "softmax": "log-sqrt2"},
    },
    "ptq4sam": {
        **{"method": "gptq", "symmetric": False, "activations": 4, "activation_scale": "tensor"},
        **{"attention": "folded", "softmax": "adaptive"},
    },
    "quantvggt": {
        **{"method": "smooth", "transform": "hadamard", "learned": 15, "importance": "filtered", "activations": 4},
    },
    "quantvla": {"method": "smooth", "transform": "blocks", "exponent": 0.15, "activations": 8, "match": True},
    "qvlm": {"method": "nf4", "activations": 4, "activation_scale": "blocks"},
    "qvlm-released": {"method": "nf4", "double": True, "activations": 4, "activation_scale": "released"},
}
