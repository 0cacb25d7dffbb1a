"""Per-patient gradients of a model whose trainable part is plain Linear layers.

A custom autograd Function on every trainable Linear keeps, in the ordinary backward pass, what is needed to
separate patients: the per-patient gradient itself where it is small (LoRA), or the layer's input and output
gradient where those are smaller (projector). Both are exact; no norm is estimated. `accumulate` clips each
patient and adds the sum to float64 totals.

Guarantees: every clipped patient has norm at most `clip_norm` up to 1e-9 relative, measured on the very
values that are added; a patient with a non-finite gradient adds zero; the order of additions is fixed; a
model that cannot be treated exactly is refused when the engine is built.

It does not check that the loss is separable over samples: use `per_sample_loss` and `patient_loss`. All rows
of a patient must be in one microbatch. Floating-point kernels may round a patient's gradient differently when
the microbatch around it has another shape (about 1e-6 relative); the mechanism does not account for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.errors import ModelUntreatable, PatientGradientMisuse


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy of each sample, a mean over the sample's own labelled tokens.

    logits [B, T, V], labels [B, T] with -100 where no loss is wanted -> float32 [B]. A sample without labels
    has loss 0. Never a mean over the batch: that would let one patient move another's gradient.
    """
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    tokens = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), shifted.reshape(-1), reduction="none", ignore_index=-100
    )
    own = (shifted != -100).sum(1).clamp(min=1)
    return tokens.view(shifted.shape).sum(1) / own


def patient_loss(losses: Tensor, row_to_unit: Tensor) -> Tensor:
    """Sum over patients of the mean loss of each patient's own samples.

    losses [B], row_to_unit int64 [B] -> scalar whose gradient, split by patient, is the mean over studies.
    """
    counts = torch.bincount(row_to_unit).to(losses.dtype).to(losses.device)
    return (losses / counts[row_to_unit.to(losses.device)]).sum()


@dataclass(frozen=True)
class _RowMap:
    """Which patient each row of a layer's input belongs to."""

    units: tuple[int, ...]
    identity: bool

    @classmethod
    def parse(cls, rows: Tensor, units: int, what: str) -> _RowMap:
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise PatientGradientMisuse(f"{what} must be a one-dimensional int64 tensor")
        values = tuple(rows.tolist())
        if any(not 0 <= value < units for value in values):
            raise PatientGradientMisuse(f"{what} must hold patients 0..{units - 1}")
        return cls(values, values == tuple(range(units)))


@dataclass(frozen=True)
class _Microbatch:
    units: int
    samples: _RowMap
    images: _RowMap


@dataclass(eq=False)
class _Layer:
    """One trainable Linear and what the backward pass left for it."""

    name: str
    module: nn.Linear
    per_image: bool
    weight_total: Tensor | None
    bias_total: Tensor | None
    current: Callable[[], _Microbatch]
    weight: Tensor | None = None  # [U, out, in]
    bias: Tensor | None = None  # [U, out]
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (input, output gradient), [R, T, ·]

    def row_map(self, rows: int) -> _RowMap:
        batch = self.current()
        row_map = batch.images if self.per_image else batch.samples
        if len(row_map.units) != rows:
            raise PatientGradientMisuse(
                f"layer {self.name} got {rows} rows, its patient map has {len(row_map.units)}"
            )
        return row_map

    def receive(self, inputs: Tensor, grads: Tensor) -> None:
        """Take one backward call: inputs [R, T, in], grads [R, T, out]."""
        row_map, units = self.row_map(inputs.shape[0]), self.current().units
        if self.bias_total is not None:
            self.bias = _sum_by_unit(grads.sum(1), row_map, units, self.bias)
        if self.weight_total is None:
            return
        if inputs[0].numel() + grads[0].numel() < self.weight_total.numel():
            self.held.append((inputs, grads))
        else:
            rows = torch.bmm(grads.transpose(1, 2), inputs)
            self.weight = _sum_by_unit(rows, row_map, units, self.weight)

    def held_gradient(self, unit: int) -> Tensor | None:
        """The weight gradient of one patient, from held activations: [out, in]."""
        total: Tensor | None = None
        for inputs, grads in self.held:
            rows = [r for r, u in enumerate(self.row_map(inputs.shape[0]).units) if u == unit]
            if rows:
                one = grads[rows].flatten(0, 1).T @ inputs[rows].flatten(0, 1)
                total = one if total is None else total + one
        return total

    def forget(self) -> None:
        self.weight, self.bias, self.held = None, None, []


def _sum_by_unit(rows: Tensor, row_map: _RowMap, units: int, before: Tensor | None) -> Tensor:
    if not row_map.identity:
        grouped = rows.new_zeros((units, *rows.shape[1:]))
        for row, unit in enumerate(row_map.units):  # index_add_ has no fixed order on CUDA
            grouped[unit].add_(rows[row])
        rows = grouped
    return rows if before is None else before.add_(rows)


class _PatientLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            y = nn.functional.linear(x.to(weight.dtype), weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        rows = x.shape[0]
        if rows:
            inputs = x.detach().reshape(rows, -1, x.shape[-1]).float()
            ctx.layer.receive(inputs, grad.reshape(rows, -1, grad.shape[-1]).float())
        upstream = grad.matmul(weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return upstream, None, None, None


def projector_rows(name: str) -> bool:
    """Whether a layer's rows are images rather than samples, by its Llava module name."""
    return "multi_modal_projector" in name


class PatientGradients:
    """Clipped sums of per-patient gradients of a model's trainable Linears.

    `parameters` are (name, parameter) in the order of the flat vector; they must be exactly the trainable
    parameters of `model`. `close()` restores every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        rows_are_images: Callable[[str], bool] = projector_rows,
    ) -> None:
        _verify_treatable(model, parameters)
        self.non_finite_patients = 0
        self._batch: _Microbatch | None = None
        self._backward_open = False
        self._totals = [torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for _, p in parameters]
        self._norms = [
            module
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)  # also SyncBatchNorm
        ]
        totals = {id(p): total for (_, p), total in zip(parameters, self._totals, strict=True)}
        self._layers: list[_Layer] = []
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own and isinstance(module, nn.Linear):
                self._layers.append(self._attach(name, module, rows_are_images(name), totals))

    def _attach(self, name: str, module: nn.Linear, per_image: bool, totals: dict[int, Tensor]) -> _Layer:
        layer = _Layer(
            name,
            module,
            per_image,
            totals.get(id(module.weight)),
            totals.get(id(module.bias)) if module.bias is not None else None,
            self._current,
        )

        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return nn.functional.linear(x.to(module.weight.dtype), module.weight, module.bias)
            y: Tensor = _PatientLinear.apply(x, module.weight, module.bias, layer)
            return y

        module.__dict__["forward"] = forward
        return layer

    def _current(self) -> _Microbatch:
        if self._batch is None or not self._backward_open:
            raise PatientGradientMisuse("backward ran outside of microbatch()")
        return self._batch

    @contextmanager
    def microbatch(
        self, *, units: int, row_to_unit: Tensor, image_to_unit: Tensor | None = None
    ) -> Iterator[None]:
        """Run the backward pass of one microbatch inside; then call `accumulate` once.

        units: number of patients; row_to_unit int64 [B]; image_to_unit int64 [I], default row_to_unit.
        """
        if self._batch is not None:
            raise PatientGradientMisuse("the last microbatch was not accumulated")
        if any(module.training or not module.track_running_stats for module in self._norms):
            raise ModelUntreatable("batch normalisation in training mode mixes patients")
        images = row_to_unit if image_to_unit is None else image_to_unit
        self._batch = _Microbatch(
            units,
            _RowMap.parse(row_to_unit, units, "row_to_unit"),
            _RowMap.parse(images, units, "image_to_unit"),
        )
        self._backward_open = True
        try:
            yield
        except BaseException:
            self._drop()
            raise
        finally:
            self._backward_open = False

    @torch.no_grad()
    def accumulate(self, clip_norm: float | None) -> Tensor:
        """Clip each patient of the microbatch to `clip_norm`, add the sum to the totals, return the norms.

        Returns float64 [units] on the CPU: L2 norms before clipping, 0 where not finite. They are patient
        data and must not leave the site. `clip_norm` None clips nothing. Raises PatientGradientMisuse.
        """
        if self._batch is None:
            raise PatientGradientMisuse("accumulate needs a microbatch")
        if clip_norm is not None and not clip_norm > 0:
            raise PatientGradientMisuse(f"clip_norm must be positive, got {clip_norm}")
        self._backward_open = True
        try:
            return self._accumulate(self._batch.units, clip_norm)
        finally:
            self._drop()

    def _accumulate(self, units: int, clip_norm: float | None) -> Tensor:
        device = self._totals[0].device if self._totals else torch.device("cpu")
        squares = torch.zeros(units, dtype=torch.float64, device=device)
        stored = [
            (total, values)
            for layer in self._layers
            for total, values in ((layer.weight_total, layer.weight), (layer.bias_total, layer.bias))
            if total is not None and values is not None
        ]
        for _, values in stored:
            squares += _norm(values.flatten(1)).square_()
        holding = [layer for layer in self._layers if layer.held]
        coefficients = torch.zeros(units, dtype=torch.float64, device=device)
        if holding:
            for unit in range(units):
                gradients = [layer.held_gradient(unit) for layer in holding]
                for gradient in gradients:
                    if gradient is not None:
                        squares[unit] += _norm(gradient.reshape(1, -1))[0].square_()
                coefficients[unit] = factor = _coefficient(squares[unit], clip_norm)
                if factor > 0:
                    for layer, gradient in zip(holding, gradients, strict=True):
                        if gradient is not None and layer.weight_total is not None:
                            layer.weight_total.add_(gradient, alpha=float(factor))
        else:
            coefficients = _coefficient(squares, clip_norm)
        finite = squares.isfinite()
        for total, values in stored:
            if not bool(finite.all()):
                values[~finite] = 0.0
            total += (coefficients @ values.flatten(1).double()).view_as(total)
        self.non_finite_patients += int((~finite).sum())
        return torch.where(finite, squares.sqrt(), 0.0).cpu()

    def take(self) -> NDArray[np.float64]:
        """The flat sum of all accumulated patients, float64, and a fresh start; zeros after an empty draw."""
        if self._batch is not None:
            raise PatientGradientMisuse("the last microbatch was not accumulated")
        flat = torch.cat([total.reshape(-1) for total in self._totals]) if self._totals else torch.zeros(0)
        result: NDArray[np.float64] = flat.double().cpu().numpy()
        for total in self._totals:
            total.zero_()
        self.non_finite_patients = 0
        return result

    def close(self) -> None:
        """Restore the forward of every layer; the engine is of no use afterwards."""
        for layer in self._layers:
            layer.module.__dict__.pop("forward", None)
        self._layers = []

    def __enter__(self) -> PatientGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop(self) -> None:
        for layer in self._layers:
            layer.forget()
        self._batch, self._backward_open = None, False


def _norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norm


def _coefficient(squares: Tensor, clip_norm: float | None) -> Tensor:
    finite = squares.isfinite()
    if clip_norm is None:
        return finite.double()
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(finite, (clip_norm / squares.sqrt().clamp(min=tiny)).clamp(max=1.0), 0.0)


def _verify_treatable(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    listed = {id(p) for _, p in parameters}
    if len(listed) != len(parameters):
        raise ModelUntreatable("a parameter is listed twice")
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters:
        if id(p) not in trainable:
            raise ModelUntreatable(f"listed parameter {name} is not a trainable parameter of the model")
        if p.dtype != torch.float32:
            raise ModelUntreatable(f"trainable {name} must be float32, got {p.dtype}")
    for key, name in trainable.items():
        if key not in listed:
            raise ModelUntreatable(f"trainable {name} is not in the list of parameters")
    _verify_untied(model, trainable)
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and type(module) is not nn.Linear:
            raise ModelUntreatable(f"trainable {name} must be Linear, got {type(module).__name__}")
        if own and "forward" in module.__dict__:
            raise ModelUntreatable(f"layer {name} is already patched")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not module.track_running_stats
        ):
            raise ModelUntreatable(f"batch normalisation {name} in training mode mixes patients")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ModelUntreatable(f"dropout {name} must be 0, got {module.p}")


def _verify_untied(model: nn.Module, trainable: dict[int, str]) -> None:
    owners: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        storage = p.untyped_storage().data_ptr()
        if storage in owners and (id(p) in trainable or owners[storage] in trainable.values()):
            raise ModelUntreatable(f"trainable {name} is tied to {owners[storage]}")
        owners.setdefault(storage, name)
