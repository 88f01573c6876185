"""PRESETS: published methods as named rows of settings."""

from __future__ import annotations

from sensitivity.spec.plan import Setting

# Where released code differs from its paper, rows follow the paper, unless a comment says otherwise. The code of Gautam
# et al. 2025 ("Towards Understanding Best Practices for Quantization of Vision-Language Models") differs: its uniform
# path misses OPT attention and all of the Q-Former's feed-forwards and cross-attentions; its GPTQ goes by chunks of 32
# linear layers and calibrates each on inputs that passed the quantized chunks before it (like `path` = "exposed", which
# goes by blocks), and quantizes the head too; its AWQ takes the exponents 0, 1, ..., 19.
PRESETS: dict[str, dict[str, Setting]] = {
    "paper-uniform": {"method": "uniform", "biases": True},
    "paper-gptq": {"method": "gptq", "group": "row", "symmetric": True, "damp": 0.01, "order": "given", "clip": False},
    "paper-awq": {"method": "awq", "group": 128, "symmetric": False, "exponents": 20, "clip": True},
    # MBQ (Li et al. 2025) as its authors publish it searches scales by the L1 error of module outputs; here its token
    # weights are used in the squared error of layer outputs. tlq, tlq-gptq and oac are known from abstracts alone; that
    # they weigh by the gradient is inferred.
    "mbq": {"method": "awq", "group": 128, "clip": False, "importance": "modality"},
    "tlq": {"method": "awq", "group": 128, "importance": "gradient"},
    "tlq-gptq": {"method": "gptq", "importance": "gradient"},
    "oac": {"method": "gptq", "importance": "output"},
    # the released code of GPTAQ takes a quarter of the shift that its objective gives
    "gptaq": {"method": "gptq", "shift": "later", "strength": 0.25},
    "rsq": {"method": "gptq", "order": "given", "transform": "hadamard", "importance": "attention"},
    "squeezellm-fisher": {"method": "squeezellm", "gradient": True},
    # QIG as its authors publish it is MBQ's scale search, with token weights from integrated gradients
    "qig": {"method": "awq", "group": 128, "clip": False, "importance": "perturbation"},
    # WKVQuant learns the clipping of weights and the factors of channels block by block; here clipping is searched, and
    # a channel of keys or values is divided by its largest value
    "wkv": {
        **{"method": "clip", "group": 128, "symmetric": False},
        **{"cache": 4, "cache_group": 128, "cache_past": True, "cache_smooth": True},
    },
    # 30 gradient steps, each on all calibration data: about as many as one pass with a step for each batch takes
    "norm-tweak": {"method": "gptq", "tweak": 30},
    "salq-vlm": {"method": "gptq", "shift": "later", "strength": 0.25, "importance": "block"},
    # the presets below quantize weights and activations; SOURCES says how each differs from what was published
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
