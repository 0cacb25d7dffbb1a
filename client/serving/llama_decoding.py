"""The decode loop with the language model in llama.cpp: the second engine behind the same interface.

Pictures go through the base's own tower and projector with transformers, words through its own tokenizer;
what llama.cpp computes are keys, values and logits. Guarantees: as for `decoding`, except that answers equal
transformers' only as far as the parity gate measured. A question about the picture that a free place of
the batch answered last begins behind the image.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.serving.copies import kept_copy
from client.serving.decoding import BatchDecoder, Row
from client.serving.gguf_export import export_gguf
from client.serving.gguf_parity import measure_parity, verify_parity
from client.serving.llama_cpp import LlamaCpp
from client.serving.plan import GgufType
from client.serving.slots import common_prefix
from common.model.llava import embed

if TYPE_CHECKING:
    import torch

MAX_POSITIONS = 2048
_GATE_TOKENS = 64
_FILE = "model.gguf"


class LlamaDecoder(BatchDecoder):
    """Writes answers with a GGUF file; `close` frees it."""

    def __init__(
        self,
        path: Path,
        model: Any,
        tokenizer: Any,
        *,
        threads: int,
        on_card: bool,
        max_batch: int,
        **more: Any,
    ) -> None:
        super().__init__(model, tokenizer, max_batch=max_batch, prefix_bytes=0, **more)
        self._positions = min(self._positions, MAX_POSITIONS)
        self._llama = LlamaCpp(
            path,
            slots=max_batch,
            positions=self._positions,
            threads=threads,
            layers_on_card=-1 if on_card else 0,
        )
        self._path = path
        self._places: list[int] = []  # which of llama.cpp's sequences each running row has
        self._held: list[tuple[str, tuple[int, ...]]] = [("", ())] * max_batch

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that each token of one answer reads."""
        import gguf

        sizes = {one.name: int(one.n_bytes) for one in gguf.GGUFReader(self._path).tensors}
        unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
        return sum(sizes.values()) - unread

    def close(self) -> None:
        """Free llama.cpp's memory."""
        self._llama.close()

    def _begin(self, row: Row, slot: int, ids: tuple[int, ...]) -> torch.Tensor:
        import torch

        place, start = self._free_place(row)
        inputs = embed(
            self._model,
            input_ids=torch.tensor([ids], device=self._device),
            features=self.features(row.ask),
        )[0, start:]
        self._held[place] = ("", ())
        logits = self._llama.fill(place, start, inputs.float().cpu().numpy(), last=len(row.ask.written) + 1)
        self._held[place] = (row.ask.picture_key, row.prompt)
        self._places.append(place)
        row.cached = start
        return torch.from_numpy(logits)

    def _next(self) -> torch.Tensor:
        import torch

        tokens = [row.text.ids[-1] for row in self._rows]
        return torch.from_numpy(self._llama.step(self._places, tokens, [row.length for row in self._rows]))

    def _vacate(self, slot: int, last: int) -> None:
        self._places[slot] = self._places[last]
        self._places.pop()

    def _free_place(self, row: Row) -> tuple[int, int]:
        """Choose the free sequence that holds most of this question already, and say how much."""
        best = (-1, 0)
        for place, (picture, held) in enumerate(self._held):
            if place in self._places:
                continue
            same = common_prefix(held, row.prompt[:-1]) if picture == row.ask.picture_key else 0
            if self._image_id in row.prompt[same:]:
                same = 0
            if best[0] < 0 or same > best[1]:
                best = (place, same)
        return best


def gguf_copy(merged: Path, *, into: Path, kind: GgufType, make_decoder: Any) -> Path:
    """Find the GGUF file of a merged copy, or write it and pass it through the parity gate; returns it.

    `make_decoder` makes a decoder of a model and tokenizer. Raises ParityFailed or ServingRefused.
    """

    def make(folder: Path) -> None:
        from common.model.loading import load_base

        export_gguf(merged, folder / _FILE, kind=kind, name=merged.name)
        model, tokenizer = load_base(merged)
        found = measure_parity(
            make_decoder(model, tokenizer), model, folder / _FILE, base=merged, tokens=_GATE_TOKENS
        )
        verify_parity(found, kind=kind)
        (folder / "parity.json").write_text(json.dumps(asdict(found)))

    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    return kept_copy(into, f"{merged.name}-{kind}", needed_bytes=size, make=make) / _FILE
