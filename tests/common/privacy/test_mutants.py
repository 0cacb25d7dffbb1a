"""Each planted defect must fail the very check that the real code passes.

A mutant is the module's source with one expression replaced, run under a name of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.client import budget_crash
from tests.common.privacy import checks

ROOT = Path(__file__).resolve().parents[3]
_numbers = itertools.count()


def load(path: str, *replacements: tuple[str, str]) -> types.ModuleType:
    """The module at `path`, with each `old` that must occur exactly once replaced by `new`."""
    source = (ROOT / path).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {path}"
        source = source.replace(old, new)
    name = f"mutant_{next(_numbers)}"
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / path)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(source, f"{path} (mutant)", "exec"), module.__dict__)  # noqa: S102
    return module


@dataclass(frozen=True)
class Mutant:
    what: str
    path: str
    replacements: tuple[tuple[str, str], ...]
    check: Callable[[Any, Path], None]


def clip_holds(gradients: Any, _: Path) -> None:
    checks.check_a_patient_moves_the_sum_by_at_most_the_clip(gradients)


def canaries_hide(gradients: Any, _: Path) -> None:
    from common.privacy.mechanism import privatise
    from common.privacy.sampling import Csprng

    plan = checks.plan_of()
    checks.check_canaries_are_as_hidden_as_planned(
        gradients, lambda total: privatise(total, plan, Csprng.for_test(5)), plan
    )


def losses_separate(gradients: Any, _: Path) -> None:
    checks.check_losses_are_separable(gradients)


def broken_patient_left_out(gradients: Any, _: Path) -> None:
    checks.check_a_broken_patient_is_left_out(gradients)


def noise_is_as_wide_as_planned(mechanism: Any, _: Path) -> None:
    from common.privacy.sampling import Csprng

    plan = checks.plan_of(sites=10, colluders=2, dropouts=3)
    honest = checks.plan_of(sites=10, colluders=2, dropouts=3).site_share_sigma_units
    checks.check_noise_width(
        lambda v: mechanism.privatise(v, _like(mechanism, plan), Csprng.for_test(1)), honest
    )


def canaries_hide_behind(mechanism: Any, _: Path) -> None:
    from client import gradients
    from common.privacy.sampling import Csprng

    plan = _like(mechanism, checks.plan_of())
    checks.check_canaries_are_as_hidden_as_planned(
        gradients, lambda total: mechanism.privatise(total, plan, Csprng.for_test(5)), plan
    )


def rounding_is_covered(mechanism: Any, _: Path) -> None:
    checks.check_rounding_is_within_the_sensitivity(
        mechanism, _like(mechanism, checks.plan_of(dimension=100_000, units_per_clip=1 << 14))
    )


def draws_are_poisson(sampling: Any, _: Path) -> None:
    checks.check_draws_are_poisson(
        lambda s, people, rate: sampling.poisson_sample(sampling.Csprng.for_test(s), people, rate)
    )


def purposes_are_drawn_once(sampling: Any, _: Path) -> None:
    checks.check_a_purpose_is_drawn_once(sampling)


def noise_is_gaussian(noise: Any, _: Path) -> None:
    from common.privacy.sampling import Csprng

    checks.check_noise_width(
        lambda zeros: noise.discrete_gaussian(Csprng.for_test(3), sigma=2.0**20, size=zeros.size), 2.0**20
    )


def ledger_covers_releases(budget: Any, directory: Path) -> None:
    budget_crash.check_ledger_survives_each_system_call(budget, directory)


def _like(mechanism: Any, plan: Any) -> Any:
    return mechanism.PrivacyPlan.from_json(plan.to_json())


GRADIENTS, MECHANISM = "client/gradients.py", "common/privacy/mechanism.py"
SAMPLING, NOISE, BUDGET = "common/privacy/sampling.py", "common/privacy/noise.py", "client/budget.py"
NO_CLIP = (("(clip_norm / squares.sqrt().clamp(min=tiny)).clamp(max=1.0)", "torch.ones_like(squares)"),)
HALF_NOISE = (("sigma=plan.site_share_sigma_units, size", "sigma=plan.site_share_sigma_units / 2, size"),)

MUTANTS = [
    Mutant("no clip", GRADIENTS, NO_CLIP, clip_holds),
    Mutant("no clip, by canaries", GRADIENTS, NO_CLIP, canaries_hide),
    Mutant(
        "clip of each layer's part only",
        GRADIENTS,
        (("squares += _norm(values.flatten(1)).square_()", "squares += 0 * _norm(values.flatten(1))"),),
        clip_holds,
    ),
    Mutant(
        "no patient grouping",
        GRADIENTS,
        (
            (
                '_RowMap.parse(row_to_unit, units, "row_to_unit")',
                "_RowMap(tuple(range(len(row_to_unit))), True)",
            ),
            ("            units,\n            _RowMap", "            len(row_to_unit),\n            _RowMap"),
        ),
        clip_holds,
    ),
    Mutant(
        "batch-mean loss",
        GRADIENTS,
        (
            (
                "return tokens.view(shifted.shape).sum(1) / own",
                "return tokens.view(shifted.shape).sum(1) / own.sum()",
            ),
        ),
        losses_separate,
    ),
    Mutant(
        "non-finite patient kept",
        GRADIENTS,
        (("values[~finite] = 0.0", "pass"),),
        broken_patient_left_out,
    ),
    Mutant("half noise", MECHANISM, HALF_NOISE, noise_is_as_wide_as_planned),
    Mutant("half noise, by canaries", MECHANISM, HALF_NOISE, canaries_hide_behind),
    Mutant(
        "share as if no site dropped or colluded",
        MECHANISM,
        (("shares = self.honest_floor if", "shares = self.sites if"),),
        noise_is_as_wide_as_planned,
    ),
    Mutant(
        "rounding left out of the sensitivity",
        MECHANISM,
        (("(1 + _ARITHMETIC_SLACK) + math.sqrt(self.dimension)", "(1 + _ARITHMETIC_SLACK)"),),
        rounding_is_covered,
    ),
    Mutant(
        "sampling without replacement, accounted as Poisson",
        SAMPLING,
        (
            (
                "np.flatnonzero(words < np.uint64(threshold)).tolist()",
                "sorted(np.argsort(words)[: round(rate * len(patients))].tolist())",
            ),
        ),
        draws_are_poisson,
    ),
    Mutant(
        "the first patients drawn more often",
        SAMPLING,
        (
            (
                "words < np.uint64(threshold)",
                "words < np.uint64(threshold) * np.linspace(1.5, 0.5, len(words))",
            ),
        ),
        draws_are_poisson,
    ),
    Mutant("generator reused", SAMPLING, (("self._taken.add(label)", "pass"),), purposes_are_drawn_once),
    Mutant(
        "each value used twice",
        NOISE,
        (("        yield values", "        yield np.repeat(values, 2)[:count]"),),
        noise_is_gaussian,
    ),
    Mutant(
        "outer table left out",
        NOISE,
        (("if parts.y is not None:", "if False:"),),
        noise_is_gaussian,
    ),
    Mutant(
        "ledger charged after release",
        BUDGET,
        (
            (
                "        self._append(entry)\n        return Charge(seed, repeated=False)",
                "        late, self._late = getattr(self, '_late', None), entry\n"
                "        account.served[key] = entry\n"
                "        if late is not None:\n            self._append(late)\n"
                "        return Charge(seed, repeated=False)",
            ),
        ),
        ledger_covers_releases,
    ),
    Mutant(
        "seed not stored",
        BUDGET,
        (('seed_sha256": sha256_hex(seed)', 'seed_sha256": sha256_hex(os.urandom(32))'),),
        ledger_covers_releases,
    ),
]

CHECKS = sorted({(m.path, m.check.__name__): m for m in MUTANTS}.items())


@pytest.mark.parametrize("mutant", [m for _, m in CHECKS], ids=[f"{k[1]}" for k, _ in CHECKS])
def test_real_code_passes_the_check(mutant: Mutant, tmp_path: Path) -> None:
    mutant.check(load(mutant.path), tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.what for m in MUTANTS])
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    module = load(mutant.path, *mutant.replacements)
    with pytest.raises(AssertionError):
        mutant.check(module, tmp_path)


def test_a_mutant_is_loaded_from_the_real_source() -> None:
    assert importlib.util.find_spec("client.gradients") is not None
    with pytest.raises(AssertionError, match="0 times"):
        load(GRADIENTS, ("this text is not there", ""))
