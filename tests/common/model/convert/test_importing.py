"""Published forms become Llava directories with the same logits, whole or not at all, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from client.evaluate.questions import question_template
from common.config import AdapterSection
from common.errors import BaseHashMismatch, BaseInvalid, ConversionRefused
from common.model.convert.importing import import_base, verify_import
from common.model.convert.kinds import Kind, detect_kind
from common.model.llava import vision_features
from common.model.loading import load_base
from common.model.lora import adapter_tensors, initial_vector
from common.model.prompts import encode_prompt, prompt_template
from common.model.tiny import tiny_base_directory
from tests.common.model.convert.foreign import (
    MED_TRUE,
    RAD_TRUE,
    Size,
    write_llava_med,
    write_llava_rad,
    write_safetensors_shards,
)

WRITERS = {Kind.LLAVA_RAD: write_llava_rad, Kind.LLAVA_MED: write_llava_med}


def last_logits(model: LlavaForConditionalGeneration, size: Size, keep: int = 3) -> torch.Tensor:
    """Logits after an image and three words; image features are put in by hand, no image token is needed."""
    picture = torch.randn(1, 3, size.pixels, size.pixels, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        seen = model.model.multi_modal_projector(vision_features(model, picture))
        words = model.get_input_embeddings()(torch.tensor([[1, 5, 6, 7]]))
        inputs = torch.cat([words[:, :1], seen, words[:, 1:]], dim=1)
        hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state[:, -keep:]
        logits: torch.Tensor = model.lm_head(hidden)[..., : size.vocabulary]
        return logits


@pytest.mark.parametrize("kind", list(WRITERS))
def test_conversion_keeps_every_logit(kind: Kind, tmp_path: Path) -> None:
    """In float32 to the bit, LoRA merged as peft merges it."""
    original = WRITERS[kind](tmp_path / "source", Size())
    assert detect_kind(tmp_path / "source") is kind
    made = import_base(tmp_path / "source", tmp_path / "out", dtype="float32")
    assert question_template(tmp_path / "out").count("<image>") == 1
    model, tokenizer = load_base(tmp_path / "out")
    assert torch.equal(last_logits(model, Size()), last_logits(original, Size()))
    assert (made.kind, made.sha256) == (kind.value, verify_import(tmp_path / "out").sha256)
    # The whole Llava through its own forward: the image mark is a token of its own, right after the old.
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 300
    ids = encode_prompt(
        tokenizer,
        image_tokens=16,
        image_token_id=300,
        indication="no",
        template=prompt_template(tmp_path / "out"),
    )
    picture = torch.zeros(1, 3, 56, 56)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=picture).logits
    assert logits.shape == (1, len(ids), 320)
    assert int(logits[0, -1].argmax()) < 300  # an added row is the mean of the others and never wins


def test_float16_output_is_close_and_half_as_large(tmp_path: Path) -> None:
    original = write_llava_rad(tmp_path / "source", Size())
    import_base(tmp_path / "source", tmp_path / "out")
    model, _ = load_base(tmp_path / "out")
    assert torch.allclose(last_logits(model, Size()), last_logits(original, Size()), atol=2e-3)
    values = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * values <= (tmp_path / "out" / "model.safetensors").stat().st_size < 2 * values + 20_000


def test_an_adapter_fits_the_imported_base(tmp_path: Path) -> None:
    write_llava_rad(tmp_path / "source", Size())
    import_base(tmp_path / "source", tmp_path / "out")
    targets = r".*language_model.*\.(q_proj|down_proj)"
    draft = AdapterSection(rank=2, alpha=4.0, targets=targets, init_seed=3)
    tensors = adapter_tensors(tmp_path / "out", draft)
    assert len(tensors) == 4 + 2 * 2 * 2
    assert initial_vector(tmp_path / "out", draft).size == sum(spec.size for spec in tensors)


def test_hugging_face_llava_is_taken_as_it_is(tmp_path: Path) -> None:
    base = tiny_base_directory()
    source = tmp_path / "source"
    source.mkdir()
    for path in base.iterdir():
        if path.suffix == ".json":
            (source / path.name).write_bytes(path.read_bytes())
    original, _ = load_base(base)
    write_safetensors_shards(source, dict(original.state_dict()), shards=2)
    made = import_base(source, tmp_path / "out", dtype="float32")
    assert made.kind == "llava-hf"
    again, tokenizer = load_base(tmp_path / "out")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    assert prompt_template(tmp_path / "out") == prompt_template(base)
    assert tokenizer.encode("no effusion") == load_base(base)[1].encode("no effusion")


def test_interrupted_import_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write_llava_med(tmp_path / "source", Size())

    def run(out: Path, stop_after: int | None = None) -> None:
        def progress(what: str, done: int, total: int) -> None:
            if stop_after is not None and what == "converting tensors" and done >= stop_after:
                raise KeyboardInterrupt

        import_base(tmp_path / "source", out, dtype="float32", shard_bytes=400_000, progress=progress)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=30)
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert kept
    run(tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert verify_import(tmp_path / "out").sha256 == verify_import(tmp_path / "whole").sha256
    assert not (tmp_path / ".out.partial").exists()


def test_changed_source_starts_over(tmp_path: Path) -> None:
    write_llava_med(tmp_path / "source", Size())
    calls: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        calls.append(done)
        if what == "converting tensors" and done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_base(tmp_path / "source", tmp_path / "out", shard_bytes=400_000, progress=stop)
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text() + "\n")
    before = {path.name for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    with pytest.raises(KeyboardInterrupt):
        import_base(
            tmp_path / "source",
            tmp_path / "out",
            shard_bytes=400_000,
            progress=lambda what, done, total: stop(what, 99, total),
        )
    assert before and not list((tmp_path / ".out.partial").glob("*.safetensors"))


def test_origin_names_sources_and_licences_and_catches_changes(tmp_path: Path) -> None:
    write_llava_rad(tmp_path / "source", Size())
    import_base(tmp_path / "source", tmp_path / "out")
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    named = {entry["file"] for entry in origin["sources"]}
    assert {"source/adapter_model.bin", "vicuna-7b-v1.5/tokenizer.model"} <= named
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Llama 2 Community" in card and origin["sources"][0]["sha256"] in card
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BaseHashMismatch, match=r"model\.safetensors"):
        verify_import(tmp_path / "out")
    weights.unlink()
    with pytest.raises(BaseInvalid, match="expected this file"):
        verify_import(tmp_path / "out")
    (tmp_path / "out" / "extra.json").write_text("{}")
    with pytest.raises(BaseInvalid, match="only files of the import"):
        verify_import(tmp_path / "out")


def test_two_imports_into_one_directory_are_refused(tmp_path: Path) -> None:
    write_llava_med(tmp_path / "source", Size())

    def inner(what: str, done: int, total: int) -> None:
        if what == "converting tensors":
            import_base(tmp_path / "source", tmp_path / "out")

    with pytest.raises(BaseInvalid, match="one running"):
        import_base(tmp_path / "source", tmp_path / "out", progress=inner)
    import_base(tmp_path / "source", tmp_path / "out")
    with pytest.raises(BaseInvalid, match="no directory here yet"):
        import_base(tmp_path / "source", tmp_path / "out")


def test_unknown_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConversionRefused, match="expected LLaVA-Rad's files"):
        import_base(tmp_path, tmp_path / "out")
    with pytest.raises(ConversionRefused, match="expected a folder"):
        import_base(tmp_path / "absent", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "stored"),
    [(Kind.LLAVA_RAD, RAD_TRUE, torch.float16), (Kind.LLAVA_MED, MED_TRUE, torch.bfloat16)],
)
def test_logits_agree_at_the_true_widths(kind: Kind, size: Size, stored: torch.dtype, tmp_path: Path) -> None:
    """One language layer, two tower layers at the published widths; float16 on disk, float32 in memory."""
    original = WRITERS[kind](tmp_path / "source", size, kind=stored)
    expected = last_logits(original, size)
    del original
    import_base(tmp_path / "source", tmp_path / "out")
    model, tokenizer = load_base(tmp_path / "out")
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 32000
    got = last_logits(model, size)
    error = (got - expected).abs().max() / expected.abs().max()
    print(f"{kind.value}: largest difference {error:.2e} of the largest logit")
    assert error < 5e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_not_the_model(tmp_path: Path) -> None:
    """A source of 1.2 GB in shards costs less than a quarter of its size beyond what the libraries take."""
    size = Size(1024, 4096, 16, 16, 14, 8000, 128, 2, 512, 56)
    write_llava_med(tmp_path / "small", Size())
    write_llava_med(tmp_path / "large", size)
    bytes_of_source = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    peaks = [_peak_bytes(tmp_path / name, tmp_path / f"out-{name}") for name in ("small", "large")]
    print(f"source {bytes_of_source >> 20} MiB, peaks {[peak >> 20 for peak in peaks]} MiB")
    assert bytes_of_source > 1_000_000_000
    assert peaks[1] - peaks[0] < bytes_of_source / 4


def _peak_bytes(source: Path, out: Path) -> int:
    code = (
        "import sys; from pathlib import Path\n"
        "from common.model.convert.importing import import_base\n"
        "import_base(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[4],
        env=environment,
    )
    return int(ran.stdout.split()[-1]) * 1024
