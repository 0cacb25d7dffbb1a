"""A GGUF language model in llama.cpp: embeddings and ids in, logits out, several answers side by side.

Guarantees: what goes in at a slot's positions is seen by that slot alone; a failure of llama.cpp is named. It
holds no vocabulary, no picture and no prompt. One thread uses it; `close` frees it. Nothing is fetched.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import EngineFailed, ServingRefused

Array = NDArray[np.float32]


class LlamaCpp:
    """A model file and `slots` answers of up to `positions` each.

    `exact` keeps keys and values in float32 and flash attention off, for comparing with float32 logits.
    """

    def __init__(
        self,
        path: Path,
        *,
        slots: int,
        positions: int,
        threads: int = 1,
        exact: bool = False,
        layers_on_card: int = 0,
    ) -> None:
        self._library = library = _library()
        told = library.llama_model_default_params()
        told.n_gpu_layers = layers_on_card
        self._model = library.llama_model_load_from_file(str(path).encode(), told)
        if not self._model:
            raise EngineFailed(f"{path}: expected a model that llama.cpp loads, got another file")
        asked = library.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max, asked.kv_unified = slots * positions, slots, False
        asked.n_batch = max(positions, slots)
        asked.n_threads = asked.n_threads_batch = threads
        if exact:
            asked.type_k = asked.type_v = library.GGML_TYPE_F32
            asked.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = library.llama_init_from_model(self._model, asked)
        if not self._context:
            library.llama_model_free(self._model)
            raise EngineFailed(f"{path}: expected memory for {slots} answers of {positions} tokens, got none")
        self.hidden = int(library.llama_model_n_embd(self._model))
        vocabulary = library.llama_model_get_vocab(self._model)
        self.vocabulary = int(library.llama_vocab_n_tokens(vocabulary))
        self._memory = library.llama_get_memory(self._context)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free model and memory; twice is once."""
        if self._context:
            self._library.llama_free(self._context)
            self._library.llama_model_free(self._model)
            self._context = self._model = None

    def fill(self, slot: int, start: int, embeddings: Array, *, last: int = 1) -> Array:
        """Put embeddings [n, hidden] at positions from `start`; returns the logits [last, V] of the last.

        What the slot held from `start` on is forgotten.
        """
        many = len(embeddings)
        self.forget(slot, start)
        batch = self._library.llama_batch_init(many, self.hidden, 1)
        try:
            flat = np.ascontiguousarray(embeddings, np.float32)
            ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
            wanted = [place >= many - last for place in range(many)]
            return self._decode(batch, [slot] * many, range(start, start + many), wanted)
        finally:
            self._library.llama_batch_free(batch)

    def step(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Array:
        """Put one token at the end of each slot; returns their logits [slots, V]."""
        batch = self._library.llama_batch_init(len(slots), 0, 1)
        try:
            for place, token in enumerate(tokens):
                batch.token[place] = token
            return self._decode(batch, slots, positions, [True] * len(slots))
        finally:
            self._library.llama_batch_free(batch)

    def forget(self, slot: int, start: int = 0) -> None:
        """Drop what a slot holds from a position on."""
        self._library.llama_memory_seq_rm(self._memory, slot, start, -1)

    def _decode(
        self, batch: Any, slots: Sequence[int], positions: Sequence[int], wanted: Sequence[bool]
    ) -> Array:
        batch.n_tokens = len(slots)
        for place, (slot, position, asked) in enumerate(zip(slots, positions, wanted, strict=True)):
            batch.pos[place], batch.n_seq_id[place] = position, 1
            batch.seq_id[place][0], batch.logits[place] = slot, asked
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise EngineFailed(f"expected llama.cpp to compute {len(slots)} positions, got code {code}")
        places = [place for place, asked in enumerate(wanted) if asked]
        logits = np.empty((len(places), self.vocabulary), np.float32)
        for row, place in enumerate(places):
            pointer = self._library.llama_get_logits_ith(self._context, place)
            logits[row] = np.ctypeslib.as_array(pointer, (self.vocabulary,))
        return logits


@functools.cache
def _library() -> Any:
    """Load llama.cpp, silent; raises ServingRefused without it."""
    try:
        from llama_cpp import llama_cpp as library
    except ImportError as error:
        raise ServingRefused("expected llama-cpp-python, got none; install the extra llamacpp") from error
    library.llama_log_set(_silence(library), ctypes.c_void_p())
    return library


@functools.cache
def _silence(library: Any) -> Any:
    return library.llama_log_callback(lambda level, text, data: None)
