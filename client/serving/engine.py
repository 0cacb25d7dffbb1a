"""What an engine is: asked one study's question, it answers token by token, then with a result.

The types here are all that serving, page and PACS loop know of a model. `client/serving/workers.py` gives an
engine in supervised worker processes, `decoding.py` the loop inside a worker. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """What every answer names: the release that wrote it.

    `version` is the number in this site's model store, 0 for a release folder given by path;
    `release_epsilon` is None where none is claimed; `protected` is False for mode plain or seeded draws.
    """

    version: int
    study: str
    study_id: str
    round: int
    adapter_sha256: str
    base: str
    mode: str
    release_epsilon: float | None
    delta: float
    protected: bool

    @property
    def label(self) -> str:
        """One line for people and headers."""
        privacy = "no ε" if self.release_epsilon is None else f"ε {self.release_epsilon:.2f}"
        adapter = self.adapter_sha256[:12]
        return f"{self.study_id} v{self.version} round {self.round} ({privacy}) adapter {adapter}"


@dataclass(frozen=True, slots=True)
class Options:
    """How one answer is written. Decoding is greedy; 0 means the model's own or off.

    `no_repeat_ngram` forbids a repeated n-gram of that length (Hugging Face's `no_repeat_ngram_size`);
    `stop_loops` ends an answer that runs in a circle, which never changes an answer that does not.
    """

    max_new_tokens: int = 0
    no_repeat_ngram: int = 0
    stop_loops: bool = True


AS_TRAINED = Options()


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # the model said so
    LENGTH = "length"  # max_new_tokens; the broken last sentence is cut off
    LOOP = "loop"  # it went in a circle; the repetitions are cut off
    REFUSED = "refused"  # the guard; no token was written
    NOT_FINITE = "not-finite"  # the model computed NaN or infinity


@dataclass(frozen=True, slots=True)
class Ask:
    """One study's question: prepared pixels float32 [3, H, W] and the words that fill the prompt.

    `picture_key` names the pixels in caches; `written` are tokens already answered (a resumed answer).
    """

    picture_key: str
    pixels: NDArray[np.float32] = field(repr=False, compare=False)
    indication: str = ""
    options: Options = AS_TRAINED
    written: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One token; `text` is what it adds to the text shown so far, and may be empty."""

    text: str
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence: `text == result.text[start:end]`, written by tokens `first_token` up to `end_token`.

    `uncertainty` is 1 - exp(mean log-probability) of its tokens, 0 to 1; `least_probability` that of its
    least likely token. Both say how sure the model was of its words, not whether they are true.
    """

    text: str
    start: int
    end: int
    first_token: int
    end_token: int
    uncertainty: float
    least_probability: float


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. `text` is final: it replaces what was streamed where the end was cut (`cut`)."""

    text: str
    sentences: tuple[Sentence, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    cut: bool
    prompt_tokens: int
    cached_tokens: int
    model: ModelVersion


class Engine(Protocol):
    """Answers questions about pictures with one model version."""

    @property
    def model(self) -> ModelVersion:
        """The version that answers what is submitted now."""
        ...

    def submit(self, ask: Ask) -> AsyncIterator[Token | Result]:
        """Write one answer: tokens as they come, the result last.

        Raises PromptTooLong, EngineWorkerDied (this question's own worker died twice) or EngineStopped.
        Leaving the iterator early cancels the answer.
        """
        ...

    async def image_vector(self, ask: Ask) -> NDArray[np.float32]:
        """Return the frozen vision tower's features of the picture, [tokens, D] float32."""
        ...

    async def attention(self, ask: Ask, token_ids: tuple[int, ...]) -> NDArray[np.float32]:
        """Return each written token's attention to the image tokens, [len(token_ids), image tokens].

        Computed in the worker by `client.serving.grounding.image_attention` on a second, teacher-forced
        pass. Raises GroundingUnavailable where that does not exist for this model.
        """
        ...
