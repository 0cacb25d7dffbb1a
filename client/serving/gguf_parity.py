"""Whether a GGUF file computes what the merged release computes: made-up studies, logits beside logits.

Guarantees: every position of every answer is compared over the whole vocabulary, with the same picture
embeddings in front; a file that differs more than its storage explains is refused. The studies are the
canary's and hold no patient's data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.serving.engine import Ask, Options, Result, Token
from client.serving.gguf_export import Array
from client.serving.llama_cpp import LlamaCpp
from client.serving.plan import GgufType
from common.errors import ParityFailed

if TYPE_CHECKING:
    from client.serving.decoding import BatchDecoder


@dataclass(frozen=True)
class Parity:
    """How far two computations are apart over `positions` next-token distributions.

    `largest` is the largest difference of a log-probability among tokens of at least one in a million,
    `divergence` the mean Kullback-Leibler divergence, `same_first` how often the likeliest is the same.
    """

    positions: int
    largest: float
    divergence: float
    same_first: float


LIMITS = {
    GgufType.F32: Parity(1, 1e-2, 1e-6, 0.999),
    GgufType.F16: Parity(1, 0.25, 1e-3, 0.98),
    GgufType.Q8_0: Parity(1, 1.0, 1e-2, 0.95),
}


def verify_parity(found: Parity, *, kind: GgufType) -> None:
    """Raise ParityFailed unless a file computes what its kind of storage allows for."""
    limit = LIMITS[kind]
    fits = (
        found.positions >= limit.positions
        and found.largest <= limit.largest
        and found.divergence <= limit.divergence
        and found.same_first >= limit.same_first
    )
    if not fits:  # also where something is not a number
        raise ParityFailed(f"{kind}: expected at least as close as {limit}, got {found}")


def measure_parity(decoder: BatchDecoder, model: Any, path: Path, *, base: Path, tokens: int) -> Parity:
    """Write the canary's studies with transformers, at most `tokens` each, and compute them with llama.cpp.

    `decoder` writes with `model`, which should be float32. Raises EngineFailed or ServingRefused.
    """
    import torch

    from client.serving.canary import canary_asks
    from common.model.images import read_processor
    from common.model.llava import embed, llava_of

    asks = canary_asks(read_processor(base), Options(max_new_tokens=tokens, stop_loops=False))
    head, language = llava_of(model).lm_head, llava_of(model).model.language_model
    words = llava_of(model).get_input_embeddings()
    ours, theirs = [], []
    with LlamaCpp(path, slots=1, positions=_positions(decoder, asks, tokens), exact=True) as other:
        for ask in asks:
            written = _write(decoder, ask)
            prompt = torch.tensor([decoder.prompt_ids(ask)])
            with torch.inference_mode():
                inputs = embed(model, input_ids=prompt, features=decoder.features(ask))
                whole = torch.cat([inputs, words(torch.tensor([written], dtype=torch.long))], dim=1)
                hidden = language(inputs_embeds=whole, use_cache=False).last_hidden_state
                ours.append(head(hidden[0, prompt.shape[1] - 1 :]).float().numpy())
            logits = [other.fill(0, 0, inputs[0].float().numpy())]
            for place, token in enumerate(written, start=prompt.shape[1]):
                logits.append(other.step([0], [token], [place]))
            theirs.append(np.concatenate(logits))
    return compare(np.concatenate(ours), np.concatenate(theirs))


def compare(ours: Array, theirs: Array) -> Parity:
    """Compare two arrays of logits [positions, V]."""
    a, b = (_log_softmax(logits.astype(np.float64)) for logits in (ours, theirs))
    likely = np.maximum(a, b) > np.log(1e-6)
    return Parity(
        positions=len(a),
        largest=float(np.abs(a - b)[likely].max()),
        divergence=float((np.exp(a) * (a - b)).sum(-1).mean()),
        same_first=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _positions(decoder: BatchDecoder, asks: list[Ask], tokens: int) -> int:
    return max(len(decoder.prompt_ids(ask)) for ask in asks) + tokens + 1


def _write(decoder: BatchDecoder, ask: Ask) -> list[int]:
    decoder.submit(0, ask)
    while True:
        for _, event in decoder.step():
            if isinstance(event, Result):
                return list(event.token_ids)
            if not isinstance(event, Token):
                raise event
