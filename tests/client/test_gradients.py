"""The per-patient engine against explicit autograd, against Opacus, and its refusals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.gradients import PatientGradients, patient_loss, per_sample_loss
from common.errors import ModelUntreatable, PatientGradientMisuse
from tests.client.llava import LlavaSize, llava_with_lora, random_batch, trainable

SIZE = LlavaSize()
CLIP = 0.5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return per_sample_loss(logits, batch["labels"])


def rows_of(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    each = batch["pixel_values"].shape[0] // batch["input_ids"].shape[0]
    images = [row * each + i for row in rows for i in range(each)]
    return {k: v[images] if k == "pixel_values" else v[list(rows)] for k, v in batch.items()}


def by_hand(model: nn.Module, batch: dict[str, Tensor], patients: Sequence[int], clip: float | None) -> Any:
    """One patient at a time through plain autograd: (clipped sum, norms)."""
    parameters = [p for _, p in trainable(model)]
    total: Any = 0.0
    norms = []
    for patient in sorted(set(patients)):
        own = rows_of(batch, [row for row, p in enumerate(patients) if p == patient])
        grads = torch.autograd.grad(losses_of(model, own).mean(), parameters)
        flat = torch.cat([g.reshape(-1).double() for g in grads]).numpy()
        norms.append(float(np.linalg.norm(flat)))
        total = total + flat * (1.0 if clip is None else min(1.0, clip / norms[-1]))
    return total, np.array(norms)


def by_engine(
    engine: PatientGradients,
    model: nn.Module,
    batch: dict[str, Tensor],
    patients: Sequence[int],
    clip: float | None,
) -> Any:
    rows = torch.tensor(patients)
    each = batch["pixel_values"].shape[0] // len(patients)
    with engine.microbatch(
        units=max(patients) + 1, row_to_unit=rows, image_to_unit=rows.repeat_interleave(each)
    ):
        patient_loss(losses_of(model, batch), rows).backward()
    norms = engine.accumulate(clip)
    return engine.take(), norms.numpy()


def relative(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("patients", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2], [3, 1, 0, 1, 2, 0]])
def test_clipped_sum_equals_one_patient_at_a_time(patients: list[int], checkpointing: str | None) -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=6, tokens=14)
    _, norms = by_hand(model, batch, patients, None)
    clip = float(np.median(norms))
    expected, _ = by_hand(model, batch, patients, clip)
    with PatientGradients(model, trainable(model)) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if checkpointing is not None:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
            )
            model.enable_input_require_grads()
        got, got_norms = by_engine(engine, model, batch, patients, clip)
    assert relative(got, expected) < 2e-6
    assert np.allclose(got_norms, norms, rtol=1e-5)


def test_two_images_in_each_study_belong_to_their_patient() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=4, tokens=18, images_each=2)
    expected, _ = by_hand(model, batch, [0, 0, 1, 2], CLIP)
    with PatientGradients(model, trainable(model)) as engine:
        got, _ = by_engine(engine, model, batch, [0, 0, 1, 2], CLIP)
    assert relative(got, expected) < 2e-6


def test_unclipped_sum_is_the_sum_of_patient_gradients() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=4, tokens=14)
    expected, _ = by_hand(model, batch, [0, 1, 2, 3], None)
    with PatientGradients(model, trainable(model)) as engine:
        got, _ = by_engine(engine, model, batch, [0, 1, 2, 3], None)
    assert relative(got, expected) < 2e-6


def test_layers_that_hold_activations_agree_with_layers_that_hold_gradients() -> None:
    """A wide projector holds activations, a thin LoRA holds gradients; both are used and both are exact."""
    size = LlavaSize(hidden=64, vision_hidden=64)
    model = llava_with_lora(size)
    batch = random_batch(size, samples=4, tokens=40)
    expected, norms = by_hand(model, batch, [0, 1, 1, 2], 0.1)
    with PatientGradients(model, trainable(model)) as engine:
        rows = torch.tensor([0, 1, 1, 2])
        with engine.microbatch(units=3, row_to_unit=rows):
            patient_loss(losses_of(model, batch), rows).backward()
        held = [layer.name for layer in engine._layers if layer.held]
        stored = [layer.name for layer in engine._layers if layer.weight is not None]
        got_norms = engine.accumulate(0.1)
        got = engine.take()
    assert len(held) == 2 and all("projector" in name for name in held)
    assert len(stored) == 20
    assert relative(got, expected) < 2e-6
    assert np.allclose(got_norms, norms, rtol=1e-5)


def test_microbatches_add_up() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=6, tokens=14)
    expected, _ = by_hand(model, batch, range(6), CLIP)
    with PatientGradients(model, trainable(model)) as engine:
        for rows in ([0, 1, 2], [3, 4], [5]):
            own = torch.arange(len(rows))
            with engine.microbatch(units=len(rows), row_to_unit=own):
                patient_loss(losses_of(model, rows_of(batch, rows)), own).backward()
            engine.accumulate(CLIP)
        assert relative(engine.take(), expected) < 2e-6


def test_sum_of_one_patient_never_exceeds_the_clip() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=1, tokens=14)
    with PatientGradients(model, trainable(model)) as engine:
        for clip in (1e-3, 0.1, 1e6):
            got, norms = by_engine(engine, model, batch, [0], clip)
            assert np.linalg.norm(got) <= clip * (1 + 1e-9)
            assert np.linalg.norm(got) == pytest.approx(min(clip, float(norms[0])), rel=1e-6)


def test_neighbouring_patients_do_not_move_a_patients_gradient() -> None:
    """Removing one patient changes the sum by that patient's clipped gradient and nothing else."""
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=6, tokens=14)
    other = {k: v.clone() for k, v in batch.items()}
    other["labels"][5, 3:] = -100  # the neighbour's report shrinks to two tokens
    other["labels"][5, 6:8] = 7
    other["pixel_values"][5] *= 50.0
    with PatientGradients(model, trainable(model)) as engine:
        everyone, _ = by_engine(engine, model, batch, range(6), CLIP)
        changed, _ = by_engine(engine, model, other, range(6), CLIP)
        without, _ = by_engine(engine, model, rows_of(batch, range(5)), range(5), CLIP)
        alone, _ = by_engine(engine, model, rows_of(batch, [5]), [0], CLIP)
        alone_changed, _ = by_engine(engine, model, rows_of(other, [5]), [0], CLIP)
    assert np.linalg.norm(everyone - without - alone) < 1e-5 * CLIP
    assert np.linalg.norm(changed - without - alone_changed) < 1e-5 * CLIP
    assert np.linalg.norm(everyone - without) <= CLIP * (1 + 1e-5)


def test_opacus_hooks_agree() -> None:
    """Opacus is the oracle where it can be one: a study per patient, an image per study."""
    from opacus.grad_sample import GradSampleModule

    batch = random_batch(SIZE, samples=4, tokens=14)
    model = llava_with_lora(SIZE)
    with PatientGradients(model, trainable(model)) as engine:
        got, norms = by_engine(engine, model, batch, range(4), CLIP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
        losses_of(wrapped, batch).sum().backward()
    each = torch.cat([p.grad_sample.flatten(1).double() for p in wrapped.parameters() if p.requires_grad], 1)
    oracle_norms = each.norm(dim=1)
    factors = (CLIP / oracle_norms).clamp(max=1.0)
    assert np.allclose(norms, oracle_norms, rtol=1e-5)
    assert relative(got, (factors @ each).numpy()) < 2e-6


def test_patient_with_a_non_finite_gradient_counts_as_zero_and_is_counted() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=3, tokens=14)
    expected, _ = by_hand(model, rows_of(batch, [0, 2]), [0, 1], CLIP)
    batch["pixel_values"][1] = float("nan")
    with PatientGradients(model, trainable(model)) as engine:
        rows = torch.arange(3)
        with engine.microbatch(units=3, row_to_unit=rows):
            patient_loss(losses_of(model, batch), rows).backward()
        norms = engine.accumulate(CLIP)
        assert engine.non_finite_patients == 1
        assert norms[1] == 0.0 and norms[0] > 0
        assert relative(engine.take(), expected) < 2e-6


def test_empty_draw_gives_zeros_without_a_forward() -> None:
    model = llava_with_lora(SIZE)
    with PatientGradients(model, trainable(model)) as engine:
        got = engine.take()
    assert got.dtype == np.float64
    assert got.shape == (sum(p.numel() for _, p in trainable(model)),)
    assert not got.any()


def test_take_starts_afresh_and_repeats_byte_for_byte() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=5, tokens=14)
    with PatientGradients(model, trainable(model)) as engine:
        first, _ = by_engine(engine, model, batch, [0, 1, 1, 2, 3], CLIP)
        second, _ = by_engine(engine, model, batch, [0, 1, 1, 2, 3], CLIP)
        assert not engine.take().any()
    assert first.tobytes() == second.tobytes()


def test_close_restores_every_forward() -> None:
    model = llava_with_lora(SIZE)
    batch = random_batch(SIZE, samples=2, tokens=14)
    before = losses_of(model, batch)
    engine = PatientGradients(model, trainable(model))
    patched = losses_of(model, batch)
    engine.close()
    assert torch.equal(before, patched)
    losses_of(model, batch).sum().backward()
    assert all(p.grad is not None for _, p in trainable(model))
    PatientGradients(model, trainable(model)).close()


def test_per_sample_loss_is_each_samples_own_mean() -> None:
    logits = torch.randn(3, 5, 11)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 7, 8, -100], [-100] * 5])
    got = per_sample_loss(logits, labels)
    logp = logits.log_softmax(-1)
    first = -torch.stack([logp[0, t, labels[0, t + 1]] for t in range(4)]).mean()
    second = -(logp[1, 1, 7] + logp[1, 2, 8]) / 2
    assert torch.allclose(got, torch.stack([first, second, torch.tensor(0.0)]), atol=1e-6)


class Net(nn.Module):
    layers: Any

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def refused(model: nn.Module, match: str, parameters: Any = None) -> None:
    with pytest.raises(ModelUntreatable, match=match):
        PatientGradients(model, trainable(model) if parameters is None else parameters)


def test_trainable_layer_that_is_not_linear_is_refused() -> None:
    refused(Net(nn.Linear(3, 3), nn.LayerNorm(3)), "must be Linear, got LayerNorm")


def test_subclass_of_linear_is_refused() -> None:
    refused(Net(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3)), "must be Linear")


def test_tied_weights_are_refused() -> None:
    net = Net(nn.Linear(3, 3), nn.Linear(3, 3))
    net.layers[1].weight = net.layers[0].weight
    refused(net, "tied")
    view = Net(nn.Linear(3, 3), nn.Linear(3, 3))
    view.layers[1].weight = nn.Parameter(view.layers[0].weight.data.T)
    refused(view, "tied")
    frozen = Net(nn.Embedding(3, 3), nn.Linear(3, 3, bias=False))
    frozen.layers[0].weight.requires_grad_(False)
    frozen.layers[1].weight = nn.Parameter(frozen.layers[0].weight.data)
    refused(frozen, "tied")


def test_batch_norm_in_training_mode_is_refused_at_start_and_later() -> None:
    net = Net(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    refused(net, "mixes patients")
    with PatientGradients(net.eval(), trainable(net)) as engine:
        net.train()
        with pytest.raises(ModelUntreatable), engine.microbatch(units=1, row_to_unit=torch.tensor([0])):
            pass
    refused(Net(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False, track_running_stats=False)).eval(), "mixes")


def test_uncovered_foreign_or_double_parameters_are_refused() -> None:
    net = Net(nn.Linear(3, 3))
    refused(net, "not in the list", trainable(net)[:1])
    refused(net, "not a trainable", [*trainable(net), ("x", nn.Parameter(torch.zeros(2)))])
    refused(net, "twice", trainable(net) * 2)


def test_dropout_half_precision_and_a_second_engine_are_refused() -> None:
    refused(Net(nn.Linear(3, 3), nn.Dropout(0.1)), "dropout")
    refused(Net(nn.Linear(3, 3)).half(), "float32")
    net = Net(nn.Linear(3, 3))
    with PatientGradients(net, trainable(net)):
        refused(net, "already patched")


def test_calls_out_of_order_and_wrong_maps_are_refused() -> None:
    net, x = Net(nn.Linear(3, 3)), torch.randn(2, 3)
    rows = torch.arange(2)
    with PatientGradients(net, trainable(net)) as engine:
        with pytest.raises(PatientGradientMisuse, match="outside"):
            net(x).sum().backward()
        with pytest.raises(PatientGradientMisuse, match="needs a microbatch"):
            engine.accumulate(1.0)
        with (
            pytest.raises(PatientGradientMisuse, match="2 rows"),
            engine.microbatch(units=1, row_to_unit=rows[:1]),
        ):
            net(x).sum().backward()
        with (
            pytest.raises(PatientGradientMisuse, match="hold patients 0"),
            engine.microbatch(units=1, row_to_unit=rows),
        ):
            pass
        with pytest.raises(PatientGradientMisuse, match="int64"):  # noqa: SIM117
            with engine.microbatch(units=1, row_to_unit=rows.float()):
                pass
        with engine.microbatch(units=2, row_to_unit=rows):
            net(x).sum().backward()
        with pytest.raises(PatientGradientMisuse, match="not accumulated"):
            engine.take()
        with pytest.raises(PatientGradientMisuse, match="not accumulated"):  # noqa: SIM117
            with engine.microbatch(units=2, row_to_unit=rows):
                pass
        with pytest.raises(PatientGradientMisuse, match="positive"):
            engine.accumulate(0.0)
