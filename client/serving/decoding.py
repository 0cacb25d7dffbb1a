"""The loop that writes: many studies' answers in one running batch, a token each per step.

Answers join and leave between two tokens. A picture's vision features and the keys and values of its prompt
are kept, so that the next question about it begins behind the image. Guarantees: greedy answers equal those
of `model.generate` on the same prompt and do not depend on what else is being written, up to rounding; the
model's weights are never changed. One thread uses it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from client.serving.engine import Ask, Finish, ModelVersion, Result, Token
from client.serving.slots import PrefixCache, SlotCache
from client.serving.wording import (
    StreamedText,
    banned_tokens,
    cut_at_sentence,
    loop_start,
    sentences_of,
)
from common.errors import EngineFailed, FedRadError, PromptTooLong
from common.model.llava import embed, llava_of, vision_features
from common.model.prompts import encode_prompt

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Event = Token | Result | FedRadError


@dataclass(slots=True)
class Row:
    """One answer in the making; `length` positions of its slot are filled."""

    number: int
    ask: Ask
    prompt: tuple[int, ...]
    limit: int
    text: StreamedText
    logprobs: list[float] = field(default_factory=list)
    length: int = 0
    cached: int = 0


class BatchDecoder:
    """Writes answers with one model; `submit`, then `step` until `idle`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        version: ModelVersion,
        template: str,
        default_tokens: int,
        max_batch: int = 8,
        prefix_bytes: int = 256 << 20,
        feature_bytes: int = 64 << 20,
    ) -> None:
        llava = llava_of(model)
        self._model, self._tokenizer, self._llava = model, tokenizer, llava
        self._version, self._template = version, template
        self._default_tokens, self._max_batch = default_tokens, max_batch
        self._language, self._head = llava.model.language_model, llava.lm_head
        self._embedding = llava.get_input_embeddings()
        self._device = self._embedding.weight.device
        self._image_id = llava.config.image_token_id
        self._ends = _end_tokens(llava, tokenizer)
        self._positions = int(getattr(llava.config.text_config, "max_position_embeddings", 1 << 20))
        window = getattr(llava.config.text_config, "sliding_window", None)
        if window:
            self._positions = min(self._positions, int(window))
        self._cache = SlotCache()
        self._prefixes = PrefixCache(prefix_bytes)
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._feature_bytes = feature_bytes
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()

    @property
    def version(self) -> ModelVersion:
        """The release that writes."""
        return self._version

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that each token of one answer reads."""
        read = [*self._language.parameters(), *self._head.parameters()]
        unread = {id(one) for one in self._embedding.parameters()} - {
            id(one) for one in self._head.parameters()
        }
        several = {id(one): one.numel() * one.element_size() for one in read if id(one) not in unread}
        return sum(several.values())

    @property
    def idle(self) -> bool:
        return not self._rows and not self._waiting

    @property
    def running(self) -> int:
        return len(self._rows)

    def submit(self, number: int, ask: Ask) -> None:
        """Queue a question under a number of the caller's; raises PromptTooLong."""
        prompt = self.prompt_ids(ask)
        wanted = ask.options.max_new_tokens or self._default_tokens
        limit = min(wanted, self._positions - len(prompt))
        if limit <= 0:
            raise PromptTooLong(f"expected a prompt under {self._positions} tokens, got {len(prompt)}")
        text = StreamedText(self._decode)
        for token in ask.written:
            text.add(token)
        self._waiting.append(Row(number, ask, prompt, limit, text))

    def cancel(self, number: int) -> None:
        """Forget a question; unknown numbers are ignored."""
        import torch

        self._waiting = deque(row for row in self._waiting if row.number != number)
        with torch.inference_mode():
            for slot, row in enumerate(self._rows):
                if row.number == number:
                    self._leave(slot)
                    return

    def step(self) -> list[tuple[int, Event]]:
        """Let one waiting question join, or all where nothing runs, and write one token of each answer.

        A question that cannot be begun gives its error as its only event.
        """
        import torch

        events: list[tuple[int, Event]] = []
        with torch.inference_mode():
            running = len(self._rows)
            if running:
                self._advance(events)
            while self._waiting and len(self._rows) < self._max_batch:
                row = self._waiting.popleft()
                try:
                    self._admit(row, events)
                except FedRadError as error:
                    events.append((row.number, error))
                if running:
                    break
        return events

    def features(self, ask: Ask) -> torch.Tensor:
        """Return the frozen tower's features [1, N, D] of the question's picture, kept for the next time."""
        import torch

        found = self._features.get(ask.picture_key)
        if found is None:
            with torch.inference_mode():
                pixels = torch.from_numpy(ask.pixels)[None].to(self._device)
                found = vision_features(self._model, pixels)
            self._features[ask.picture_key] = found
            size = found.numel() * found.element_size()
            while len(self._features) > 1 and len(self._features) * size > self._feature_bytes:
                self._features.popitem(last=False)
        self._features.move_to_end(ask.picture_key)
        return found

    def image_vector(self, ask: Ask) -> NDArray[np.float32]:
        """Return the picture's features [N, D] as float32."""
        array: NDArray[np.float32] = self.features(ask)[0].float().cpu().numpy()
        return array

    def attention(self, ask: Ask, token_ids: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the attention of written tokens to image tokens; raises GroundingUnavailable."""
        from client.serving.grounding import image_attention

        found: NDArray[np.float32] = image_attention(
            self._model,
            input_ids=list(self.prompt_ids(ask)),
            features=self.features(ask).clone(),  # outside inference mode: it is differentiated
            written=list(token_ids),
        )
        return found

    def prompt_ids(self, ask: Ask) -> tuple[int, ...]:
        """Return the whole prompt's ids, image placeholders included."""
        return encode_prompt(
            self._tokenizer,
            image_tokens=self._image_tokens(ask),
            image_token_id=self._image_id,
            indication=ask.indication,
            template=self._template,
        )

    def _image_tokens(self, ask: Ask) -> int:
        vision = self._llava.config.vision_config
        _, height, width = ask.pixels.shape
        patch = int(vision.patch_size)
        count = (int(height) // patch) * (int(width) // patch)
        return count if self._llava.config.vision_feature_select_strategy == "default" else count + 1

    def _admit(self, row: Row, events: list[tuple[int, Event]]) -> None:
        import torch

        slot, written = len(self._rows), row.ask.written
        ids = (*row.prompt, *written)
        logits = self._begin(row, slot, ids)
        row.length = len(ids)
        if written:  # a resumed answer: what was said keeps its probabilities
            known = torch.log_softmax(logits[:-1], -1)
            row.logprobs = [float(known[i, token]) for i, token in enumerate(written)]
        self._rows.append(row)
        finish = _ended(row)
        if finish is not None:
            events.append((row.number, self._result(row, finish)))
            self._leave(slot)
            return
        self._choose([row], logits[-1:], events)

    def _begin(self, row: Row, slot: int, ids: tuple[int, ...]) -> torch.Tensor:
        """Compute a question; returns the logits from the prompt's last position on, [1 + written, V]."""
        import torch

        self._cache.reserve(slots=slot + 1, positions=len(row.prompt) + row.limit)
        start, held = self._prefixes.find(row.ask.picture_key, row.prompt)
        if self._image_id in ids[start:]:
            start = 0
        if start:
            self._cache.write(slot, held, start)
            inputs = self._embedding(torch.tensor([ids[start:]], device=self._device))
        else:
            inputs = embed(
                self._model,
                input_ids=torch.tensor([ids], device=self._device),
                features=self.features(row.ask),
            )
        self._cache.fill(slot, start)
        positions = torch.arange(start, len(ids), device=self._device)
        seen = torch.arange(len(ids), device=self._device)[None] <= positions[:, None]
        hidden = self._language(
            inputs_embeds=inputs,
            attention_mask=seen[None, None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        row.cached = start
        if self._prefixes.wants(row.ask.picture_key, row.prompt):
            self._prefixes.store(row.ask.picture_key, row.prompt, self._cache.read(slot, len(row.prompt)))
        logits: torch.Tensor = self._head(hidden[:, len(row.prompt) - 1 - start :])[0].float()
        return logits

    def _advance(self, events: list[tuple[int, Event]]) -> None:
        logits = self._next()
        for row in self._rows:
            row.length += 1
        self._choose(list(self._rows), logits, events)

    def _next(self) -> torch.Tensor:
        """Compute the last token of every row; returns the logits behind it, [rows, V]."""
        import torch

        last = torch.tensor([[row.text.ids[-1]] for row in self._rows], device=self._device)
        lengths = [row.length for row in self._rows]
        at = torch.tensor(lengths, device=self._device)
        reach = max(lengths) + 1
        seen = torch.arange(reach, device=self._device)[None] <= at[:, None]
        self._cache.step(at, reach=reach)
        hidden = self._language(
            inputs_embeds=self._embedding(last),
            attention_mask=seen[:, None, None],
            position_ids=at[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        logits: torch.Tensor = self._head(hidden[:, -1]).float()
        return logits

    def _choose(self, rows: list[Row], logits: torch.Tensor, events: list[tuple[int, Event]]) -> None:
        import torch

        shown = logits
        for index, row in enumerate(rows):
            banned = banned_tokens(row.text.ids, row.ask.options.no_repeat_ngram)
            if banned:
                shown = logits.clone() if shown is logits else shown
                shown[index, list(banned)] = -math.inf
        chosen = shown.argmax(-1)
        probable = logits.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(logits, -1)
        for row, token, logprob in zip(rows, chosen.tolist(), probable.tolist(), strict=True):
            self._take(row, token, logprob, events)

    def _take(self, row: Row, token: int, logprob: float, events: list[tuple[int, Event]]) -> None:
        finish = None
        if not math.isfinite(logprob):
            finish = Finish.NOT_FINITE
        elif token in self._ends:
            finish = Finish.STOP
        else:
            row.logprobs.append(logprob)
            events.append((row.number, Token(row.text.add(token), token, logprob)))
            finish = _ended(row)
        if finish is not None:
            events.append((row.number, self._result(row, finish)))
            self._leave(self._rows.index(row))

    def _leave(self, slot: int) -> None:
        last = len(self._rows) - 1
        self._vacate(slot, last)
        self._rows[slot] = self._rows[last]
        self._rows.pop()

    def _vacate(self, slot: int, last: int) -> None:
        """Put what the last row has computed in the place of a row that leaves."""
        if slot < last:
            self._cache.move(last, slot, self._rows[last].length)

    def _result(self, row: Row, finish: Finish) -> Result:
        text, ends = row.text.text, list(row.text.ends)
        if finish is Finish.LOOP:
            turn = loop_start(row.text.ids)
            if turn is None:
                raise EngineFailed("expected a loop where one was found, got none")
            text = text[: ends[turn - 1]]
        if finish is not Finish.STOP:
            text = cut_at_sentence(text)
        return Result(
            text=text,
            sentences=sentences_of(text, ends=ends, logprobs=row.logprobs),
            token_ids=tuple(row.text.ids),
            logprobs=tuple(row.logprobs),
            finish=finish,
            cut=finish is not Finish.STOP,
            prompt_tokens=len(row.prompt),
            cached_tokens=row.cached,
            model=self._version,
        )

    def _decode(self, ids: Any) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def _ended(row: Row) -> Finish | None:
    if row.ask.options.stop_loops and loop_start(row.text.ids) is not None:
        return Finish.LOOP
    return Finish.LENGTH if len(row.text.ids) >= row.limit else None


def _end_tokens(llava: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(llava.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(int(one) for one in [*many, tokenizer.eos_token_id] if one is not None)
