"""GGUFModel: an export opened in llama.cpp, which gets images as transformers' processor prepared them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, byref, c_float, c_int8, c_int32, c_ubyte, c_void_p
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from sensitivity.formats.gguf.exporter import FILES
from sensitivity.formats.gguf.image_bytes import as_bytes
from sensitivity.formats.gguf.library import F32, FLASH_OFF, IMAGE, LlamaBatch, Text, xllamacpp_library
from sensitivity.formats.gguf.names import QWEN, TILED
from sensitivity.formats.halved.halves import LANGUAGE, VISION, Array
from sensitivity.formats.halved.model import HalvedModel
from sensitivity.models.config_only import without_weights
from sensitivity.spec.errors import UserError

CACHE_STEP = 1024  # the size of the cache, in tokens, is a multiple of this
AHEAD = 256  # when a prompt begins, there is room for at least this many new tokens


class GGUFModel(HalvedModel):
    """Both files of an export, opened in llama.cpp; one prompt with its images at a time."""

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        """Open both files; `threads` is how many llama.cpp uses, and 0 leaves that to llama.cpp."""
        self.folder, self.threads, self.lib = Path(folder), threads, xllamacpp_library()
        self.vlm = without_weights(str(folder))
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.language = self._opened(LANGUAGE, self.lib.llama_model_load_from_file(self._path(LANGUAGE), params))
        self.vision = self._opened(VISION, self.lib.mtmd_init_from_file(*self._vision_arguments()))
        self.width = self.lib.llama_model_n_embd_inp(self.language)
        self.vocabulary_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.language))
        self.uses_mrope = self.lib.mtmd_decode_use_mrope(self.vision)
        self.context: int | None = None
        self.room, self.ahead = 0, AHEAD  # tokens that fit in the cache, and how many of them a prompt leaves free
        self.grids: list[tuple[int, int]] = []  # rows and columns of each image's features
        self.forget()

    def _path(self, half: str) -> bytes:
        return str(self.folder / FILES[half]).encode()

    def _opened(self, half: str, handle: int | None) -> int:
        if not handle:
            raise UserError(f"llama.cpp cannot open {self.folder / FILES[half]}")
        return handle

    def _vision_arguments(self) -> tuple[bytes, int, ctypes.Structure]:
        """Arguments with which llama.cpp does not resize an image of the processor's size."""
        params = self.lib.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup, params.flash_attn_type = False, False, False, FLASH_OFF
        if self.threads:
            params.n_threads = self.threads
        config = self.vlm.model.config
        if config.model_type in TILED:  # each tile is read as it is
            side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
            params.image_max_tokens = side * side
        elif config.model_type in QWEN:
            params.image_min_tokens, params.image_max_tokens = 1, 1 << 20
        return self._path(VISION), self.language, params

    def image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Array:
        """The rows that the language model reads in place of an image's placeholder tokens."""
        images = as_bytes(self.vlm, pixel_values, image_grid_thw)
        if image_grid_thw is not None:
            merged = int(self.vlm.model.config.vision_config.spatial_merge_size)
            self.grids = [(int(rows) // merged, int(cols) // merged) for _, rows, cols in image_grid_thw]
        return np.concatenate([self._encoded(image) for image in images])

    def _encoded(self, image: Array) -> Array:
        """The features of one image of rows x columns x 3 bytes."""
        lib, (height, width, _) = self.lib, image.shape
        pixels = np.ascontiguousarray(image).ctypes.data_as(POINTER(c_ubyte))
        bitmap, chunks = lib.mtmd_bitmap_init(width, height, pixels), lib.mtmd_input_chunks_init()
        try:
            marker = lib.mtmd_default_marker()
            text = Text(marker, len(marker), False, True)
            code = lib.mtmd_tokenize(self.vision, chunks, byref(text), (c_void_p * 1)(bitmap), 1)
            found = [lib.mtmd_input_chunks_get(chunks, i) for i in range(lib.mtmd_input_chunks_size(chunks))]
            found = [chunk for chunk in found if lib.mtmd_input_chunk_get_type(chunk) == IMAGE]
            # the first is the whole image; Idefics3 has one tile more, which is the same image
            if code or not found or lib.mtmd_encode_chunk(self.vision, found[0]):
                raise UserError(f"llama.cpp cannot read an image with {self.folder / FILES[VISION]}")
            rows = lib.mtmd_input_chunk_get_n_tokens(found[0])
            return np.ctypeslib.as_array(lib.mtmd_get_output_embd(self.vision), (rows, self.width)).copy()
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def logits(self, ids: Sequence[int], keep: int, features: Array | None = None) -> Array:
        """Read the next tokens of the prompt that `forget` began; returns logits at the last `keep` of them."""
        self._make_room(len(ids))
        first, made, rows = len(ids) - keep, [], 0
        grids = iter(self.grids)
        for begin, end in self._runs(ids, features is not None):
            wanted = np.arange(begin, end) >= first
            if features is not None and ids[begin] == self._image_token():
                given = features[rows : rows + end - begin]
                rows += end - begin
                self._decode(wanted, self._image_positions(end - begin, grids), embd=given)
            else:
                self._decode(wanted, np.arange(self.next, self.next + end - begin), token=ids[begin:end])
                self.next += end - begin
            made += [self._row(int(i)) for i in np.flatnonzero(wanted)]
        self.read += len(ids)
        return np.stack(made)

    def generate(
        self,
        ids: Sequence[int],
        features: Array,
        ends: set[int],
        max_new_tokens: int,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        """Greedy decoding, up to an end token, or until `stop` is true for the tokens so far."""
        self.ahead = max(self.ahead, max_new_tokens)
        return super().generate(ids, features, ends, max_new_tokens, stop)

    def forget(self) -> None:
        """Begin a new prompt."""
        self.read = self.next = 0  # cached tokens, next position: images can take fewer positions than tokens
        if self.context:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _image_token(self) -> int:
        return int(self.vlm.model.config.image_token_id)

    def _runs(self, ids: Sequence[int], images: bool) -> Iterator[tuple[int, int]]:
        """Start and end of each run of text tokens or of image placeholders."""
        is_image = np.equal(ids, self._image_token()) & images
        edges = [0, *(np.flatnonzero(is_image[1:] != is_image[:-1]) + 1), len(ids)]
        yield from pairwise(edges)

    def _image_positions(self, count: int, grids: Iterator[tuple[int, int]]) -> Array:
        """The positions of an image's features: one after the other, or by time, row and column, as in Qwen2-VL."""
        begin = self.next
        if not self.uses_mrope:
            self.next += count
            return np.arange(begin, begin + count)
        rows, cols = next(grids)
        self.next += max(rows, cols)
        along, across = np.divmod(np.arange(rows * cols), cols)
        return np.concatenate([np.full(count, begin), begin + along, begin + across, np.zeros(count, int)])

    def _decode(
        self, wanted: Array, positions: Array, token: Sequence[int] | None = None, embd: Array | None = None
    ) -> None:
        """Let llama.cpp read tokens, or the features of an image."""
        pos, flags = positions.astype(np.int32), wanted.astype(np.int8)
        batch = LlamaBatch(n_tokens=len(wanted), pos=pos.ctypes.data_as(POINTER(c_int32)))
        batch.logits = flags.ctypes.data_as(POINTER(c_int8))
        values = np.array(token, np.int32) if embd is None else np.ascontiguousarray(embd, np.float32)
        if embd is None:
            batch.token = values.ctypes.data_as(POINTER(c_int32))
        else:
            batch.embd = values.ctypes.data_as(POINTER(c_float))
        if self.lib.llama_decode(self.context, batch):
            raise UserError(f"llama.cpp cannot read a prompt of {self.read + len(wanted)} tokens with {self.folder}")

    def _row(self, index: int) -> Array:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, index), (self.vocabulary_size,)).copy()

    def _make_room(self, count: int) -> None:
        """Make the cache large enough for a new prompt; it stores float32, as torch's cache does."""
        if self.read or count + self.ahead <= self.room:
            return
        if self.context:
            self.lib.llama_free(self.context)
            self.context = None  # if the next one cannot be made, this one must not be freed again
        params = self.lib.llama_context_default_params()
        self.room = params.n_ctx = params.n_batch = -(-(count + self.ahead) // CACHE_STEP) * CACHE_STEP
        params.n_seq_max, params.flash_attn_type, params.type_k, params.type_v = 1, FLASH_OFF, F32, F32
        if self.threads:
            params.n_threads = params.n_threads_batch = self.threads
        self.context = self._opened(LANGUAGE, self.lib.llama_init_from_model(self.language, params))

    def __del__(self) -> None:
        """Free the memory that llama.cpp allocated."""
        for free, name in (("llama_free", "context"), ("mtmd_free", "vision"), ("llama_model_free", "language")):
            if handle := getattr(self, name, None):
                getattr(self.lib, free)(handle)
