"""Our decode loop against plain `model.generate` on one random Llava of 56 million weights, in one process.

224-pixel images of 256 tokens, a LoRA of rank 16 unmerged on all language linears as it is served, answers of
128 tokens, greedy, float32, one thread. Times are CPU seconds of this process from question to last token,
prefill and vision tower included; the best of several interleaved rounds. The eight studies are other images
in each round, so nothing is kept from before; the plain side writes them one after the other, and once more
as one padded batch, which needs all eight to have come before it begins.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

ROUNDS, NEW_TOKENS, WAITING, PIXELS, PATCH = 3, 128, 8, 224, 14
INDICATION = "shortness of breath and fever for three days. follow up of a nodule in the right upper lobe"


def run(progress: Callable[[str], None]) -> dict[str, float]:
    """Ratios of tokens per CPU second, and of the CPU seconds to the first token with a known image."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, engine, ask = _subject()
        best: dict[str, float] = {}

        def measure(name: str, body: Callable[[], None]) -> None:
            started = time.process_time()
            body()
            best[name] = min(best.get(name, 1e9), time.process_time() - started)

        for turn in range(ROUNDS + 1):
            progress(f"generate {turn}/{ROUNDS}")
            one = ask()
            ids = torch.tensor([engine.prompt_ids(one)])
            plain = _Plain(model, ids)
            if turn == 0:
                plain([one.pixels])
                _write(engine, [one])
                if plain.last != _last(engine, one):
                    raise SystemExit("expected the same tokens from both, got others")
                continue
            measure("plain_1", lambda one=one, plain=plain: plain([one.pixels]))
            measure("own_1", lambda: _write(engine, [ask()]))
            eight = [ask() for _ in range(WAITING)]
            measure("own_8", lambda eight=eight: _write(engine, eight))
            measure("plain_8", lambda eight=eight, plain=plain: plain([one.pixels for one in eight]))
            new = ask()
            measure("first_new", lambda new=new: _first_token(engine, new))
            again = ask(picture=new, indication="chest pain and cough. " + INDICATION)
            measure("first_again", lambda again=again: _first_token(engine, again))
    rate = {
        "plain_1": NEW_TOKENS / best["plain_1"],
        "own_1": NEW_TOKENS / best["own_1"],
        "own_8": WAITING * NEW_TOKENS / best["own_8"],
        "plain_8": WAITING * NEW_TOKENS / best["plain_8"],
    }
    return {
        "generate_tokens_per_cpu_s_plain_1": rate["plain_1"],
        "generate_tokens_per_cpu_s_plain_batch_8": rate["plain_8"],
        "generate_tokens_per_cpu_s_1": rate["own_1"],
        "generate_tokens_per_cpu_s_8": rate["own_8"],
        "generate_ratio_1": rate["own_1"] / rate["plain_1"],
        "generate_ratio_8": rate["own_8"] / rate["plain_1"],
        "generate_ratio_8_to_plain_batch": rate["own_8"] / rate["plain_8"],
        "first_token_cpu_s": best["first_new"],
        "first_token_ratio_cached_image": best["first_again"] / best["first_new"],
    }


class _Plain:
    """`model.generate` for pictures with one prompt."""

    def __init__(self, model: Any, ids: Any) -> None:
        self.model, self.ids = model, ids
        self.last: list[int] = []

    def __call__(self, pictures: list[Any]) -> None:
        import numpy as np
        import torch

        ids = self.ids.expand(len(pictures), -1)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=torch.from_numpy(np.stack(pictures)),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        self.last = out[0, ids.shape[1] :].tolist()


def _write(engine: Any, asks: list[Any]) -> None:
    for number, ask in enumerate(asks):
        engine.submit(number, ask)
    while not engine.idle:
        engine.step()


def _last(engine: Any, ask: Any) -> list[int]:
    engine.submit(0, ask)
    events = []
    while not engine.idle:
        events += engine.step()
    return list(events[-1][1].token_ids)


def _first_token(engine: Any, ask: Any) -> None:
    engine.submit(0, ask)
    engine.step()
    engine.cancel(0)


def _subject() -> tuple[Any, Any, Callable[..., Any]]:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from client.serving.decoding import BatchDecoder
    from client.serving.engine import Ask, Options
    from common.model import tiny
    from tests.client.serving.models import VERSION

    torch.manual_seed(0)
    words = tiny.tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=2048,
        pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS,
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tiny.IMAGE,
            vision_feature_layer=-2,
            image_seq_length=(PIXELS // PATCH) ** 2,
        )
    )
    llava.lm_head.weight.data *= 8
    llava.lm_head.weight.data[tiny.EOS] = 0  # answers end at NEW_TOKENS
    model = get_peft_model(
        llava,
        LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*_proj", init_lora_weights=False),
    ).eval()
    engine = BatchDecoder(
        model, words, version=VERSION, template=tiny.PROMPT, default_tokens=NEW_TOKENS, max_batch=WAITING
    )
    draw = np.random.default_rng(0)

    def ask(picture: Any = None, indication: str = INDICATION) -> Ask:
        pixels = draw.standard_normal((3, PIXELS, PIXELS)).astype(np.float32)
        name = str(draw.integers(1 << 60))
        if picture is not None:
            pixels, name = picture.pixels, picture.picture_key
        return Ask(name, pixels, indication, Options(stop_loops=False))

    return model, engine, ask
