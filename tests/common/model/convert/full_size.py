"""Imports a LLaVA-Med v1.5 of full size, all zeros, and prints what it took: memory, CPU, bytes.

`python -m tests.common.model.convert.full_size FOLDER` needs 16 GB of disk (the source is sparse and takes
none) and removes what it made. Values do not matter to memory; `test_importing.py` checks logits.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
from pathlib import Path

from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

from common.model.convert.importing import import_base
from common.model.convert.kinds import model_shapes
from tests.common.model.convert.foreign import pieces_file


def write_sparse_med(folder: Path, *, shards: int = 4) -> int:
    """Write a source of the published shapes in bfloat16 whose values are holes; returns its bytes."""
    text = MistralConfig(rope_theta=1e6, sliding_window=None)
    eyes = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=eyes.to_dict(), text_config=text.to_dict(), vision_feature_layer=-2)
    shapes = {_foreign(name): shape for name, shape in model_shapes(config.to_dict()).items()}
    folder.mkdir(parents=True)
    names, places = sorted(shapes), {}
    for at in range(shards):
        header, place = {}, 0
        file = f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
        for name in names[at::shards]:
            size = 2 * math.prod(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [place, place + size],
            }
            place += size
            places[name] = file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(encoded).to_bytes(8, "little") + encoded)
            handle.truncate(8 + len(encoded) + place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    own = {"model_type": "llava_mistral", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(text.to_dict() | own))
    (folder / "tokenizer.model").write_bytes(pieces_file(text.vocab_size))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _foreign(name: str) -> str:
    for new, old in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(new):
            return old + name[len(new) :]
    raise ValueError(name)


def _peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10


def main(folder: Path) -> None:
    source = write_sparse_med(folder / "source")
    before = _peak_mib()
    try:
        import_base(folder / "source", folder / "out")
        written = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
    finally:
        for name in ("source", "out", ".out.partial"):
            shutil.rmtree(folder / name, ignore_errors=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "source_mib": source >> 20,
                "written_mib": written >> 20,
                "peak_mib_before_import": before,
                "peak_mib": _peak_mib(),
                "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            }
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main(Path(sys.argv[1]))
