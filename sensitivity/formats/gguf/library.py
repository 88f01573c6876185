"""The C functions and structures of libllama and libmtmd (package xllamacpp) that this package and its tests use."""

from __future__ import annotations

import ctypes
import importlib
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_ubyte,
    c_uint32,
    c_void_p,
)  # fmt: skip
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from sensitivity.spec.errors import UserError

VERSION = "2026.10.11549"  # structures carry no version, so only the build whose headers they follow is called
F32, FLASH_OFF, IMAGE = 0, 0, 1  # ggml_type, llama_flash_attn_type, mtmd_input_chunk_type
LOG = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        *((name, c_bool) for name in (
            "vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp",
        )),
    ]  # fmt: skip


class ContextParams(Structure):
    """llama_context_params."""

    _fields_ = [
        *((name, c_uint32) for name in (
            "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq",
        )),
        *((name, c_int32) for name in (
            "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type",
            "flash_attn_type",
        )),
        *((name, c_float) for name in (
            "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
            "yarn_beta_slow",
        )),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("moe_cache_size", c_size_t), ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in (
            "embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified",
        )),
        ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class LlamaBatch(Structure):
    """llama_batch: tokens or their embeddings, their positions, and at which of them logits are computed."""

    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


class VisionParams(Structure):
    """mtmd_context_params."""

    _fields_ = [
        ("use_gpu", c_bool), ("device", c_void_p), ("print_timings", c_bool), ("n_threads", c_int32),
        ("image_marker", c_char_p), ("media_marker", c_char_p), ("flash_attn_type", c_int32), ("warmup", c_bool),
        ("image_min_tokens", c_int32), ("image_max_tokens", c_int32), ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p), ("batch_max_tokens", c_int32), ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    ]  # fmt: skip


class Text(Structure):
    """mtmd_input_text."""

    _fields_ = [("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool)]


# function -> what it returns, and what it takes
FUNCTIONS = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LOG, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_save_to_file": (None, (c_void_p, c_char_p)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_n_embd_inp": (c_int32, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_context_default_params": (ContextParams, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, LlamaBatch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "mtmd_helper_log_set": (None, (LOG, c_void_p)),
    "mtmd_default_marker": (c_char_p, ()),
    "mtmd_context_params_default": (VisionParams, ()),
    "mtmd_init_from_file": (c_void_p, (c_char_p, c_void_p, VisionParams)),
    "mtmd_free": (None, (c_void_p,)),
    "mtmd_decode_use_mrope": (c_bool, (c_void_p,)),
    "mtmd_bitmap_init": (c_void_p, (c_uint32, c_uint32, POINTER(c_ubyte))),
    "mtmd_bitmap_free": (None, (c_void_p,)),
    "mtmd_input_chunks_init": (c_void_p, ()),
    "mtmd_input_chunks_size": (c_size_t, (c_void_p,)),
    "mtmd_input_chunks_get": (c_void_p, (c_void_p, c_size_t)),
    "mtmd_input_chunks_free": (None, (c_void_p,)),
    "mtmd_input_chunk_get_type": (c_int32, (c_void_p,)),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, (c_void_p,)),
    "mtmd_tokenize": (c_int32, (c_void_p, c_void_p, POINTER(Text), POINTER(c_void_p), c_size_t)),
    "mtmd_encode_chunk": (c_int32, (c_void_p, c_void_p)),
    "mtmd_get_output_embd": (POINTER(c_float), (c_void_p,)),
}


def _silent(level: int, text: bytes, data: object) -> None:
    """Drop what llama.cpp would print."""


SILENT = LOG(_silent)  # kept in a constant, since llama.cpp calls it as long as it runs


def check_installed() -> None:
    """Raise an error unless the installed build of llama.cpp is the one that has the structures above."""
    how = "type `pip install 'vlm-sensitivity[gguf]'`"
    try:
        found = version("xllamacpp")
    except PackageNotFoundError:
        raise UserError(f"running a GGUF export takes the package xllamacpp, which is not installed; {how}") from None
    if found != VERSION:
        raise UserError(f"GGUF exports are run with xllamacpp {VERSION}, and {found} is installed; {how}")


@cache
def xllamacpp_library() -> ctypes.CDLL:
    """The library of xllamacpp, initialized, and set to print nothing."""
    check_installed()
    found = ctypes.CDLL(str(importlib.import_module("xllamacpp.xllamacpp").__file__))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(SILENT, None)
    found.mtmd_helper_log_set(SILENT, None)
    found.llama_backend_init()
    return found
