"""`fedrad-site doctor`: what was found of a site's machine becomes findings, each with what to do.

Pure: facts in (`client/doctor_facts.py` gathers them), findings out. A `fail` means that rounds or drafting
cannot work as things are; a `warn`, that they will not for long, or less well. Nothing that is found names a
patient or counts one, so the output may be sent to a colleague or the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from client.hardware import (
    AGENT_TRAINS_ON_CARD,
    GIB,
    BaseSize,
    Card,
    MemoryPlan,
    Wheel,
    check_architecture,
    check_driver,
    choose_plan,
    largest_card,
    wheel_for,
)

CLOCK_WARN_S = 60.0
CLOCK_FAIL_S = 300.0
DISK_FAIL_BYTES = 2 * GIB
DISK_WARN_BYTES = 10 * GIB
_EXPIRES_SOON_S = 86_400.0
_PINNED = {"flwr": "1.41.0"}


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, and what to do where that is not well."""

    check: str
    state: State
    seen: str
    todo: str = ""


@dataclass(frozen=True)
class ServerFacts:
    """How the server answered. `failed` names the step that did not work, empty where all did.

    The steps are `dns`, `proxy`, `connect`, `tls` and `answer`; `date_unix_s` is the server's own clock.
    """

    address: str
    proxy: str
    addresses: tuple[str, ...] = ()
    failed: str = ""
    error: str = ""
    date_unix_s: float | None = None
    asked_unix_s: float = 0.0
    took_s: float = 0.0


@dataclass(frozen=True)
class CertificateFacts:
    """A certificate's life in Unix seconds and whether it is for the key that lies beside it."""

    not_before_unix_s: float
    not_after_unix_s: float
    renew_after_unix_s: float
    fits_key: bool = True


@dataclass(frozen=True)
class DataFacts:
    """The prepared data folder: `problem` is an error's name, empty where the folder holds together."""

    directory: str
    problem: str = ""
    patients: str = ""
    image_missing: bool = False


@dataclass(frozen=True)
class BaseFacts:
    """A base that this site names: `problem` is an error's name; `pinned_by` the studies that pin it."""

    name: str
    directory: str
    size: BaseSize | None = None
    problem: str = ""
    hashed: str = ""
    pinned_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineFacts:
    """What of the machine has to do with training and drafting; `kernel` is a trial computation's outcome."""

    python: str
    packages: Mapping[str, str]
    cards: tuple[Card, ...] = ()
    wheel: Wheel | None = None
    kernel: str = ""
    memory_bytes: int = 0
    disk_free_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteFacts:
    """Everything that the doctor looks at; parts that do not exist yet are None or empty."""

    now_unix_s: float
    machine: MachineFacts
    site: str = ""
    home_problem: str = ""
    enrolment_problem: str = ""
    key_problems: tuple[str, ...] = ()
    certificate: CertificateFacts | None = None
    server: ServerFacts | None = None
    data: DataFacts | None = None
    bases: tuple[BaseFacts, ...] = ()
    budget_problem: str = ""
    damaged_cases: tuple[str, ...] | None = None


def examine(facts: SiteFacts, *, gpu_required: bool = False) -> tuple[Finding, ...]:
    """Make all findings, in the order in which things build on one another."""
    found = [check_software(facts.machine)]
    found += check_gpu(facts.machine, required=gpu_required)
    found += [check_disk(path, free) for path, free in sorted(facts.machine.disk_free_bytes.items())]
    found.append(check_home(facts))
    if facts.home_problem:
        return tuple(found)
    found.append(check_enrolment(facts))
    if facts.certificate is not None:
        found.append(check_certificate(facts.certificate, now_unix_s=facts.now_unix_s))
    if facts.server is not None:
        found += check_server(facts.server)
    if facts.data is not None:
        found.append(check_data(facts.data))
    for base in facts.bases:
        found.append(check_base(base))
        if base.size is not None:
            found += check_memory(base.size, facts.machine)
    found.append(check_budget(facts.budget_problem))
    if facts.damaged_cases is not None:
        found.append(check_worklist(facts.damaged_cases))
    return tuple(found)


def worst(findings: tuple[Finding, ...]) -> State:
    """The worst state among findings."""
    states = {finding.state for finding in findings}
    return next((state for state in (State.FAIL, State.WARN) if state in states), State.OK)


def check_software(machine: MachineFacts) -> Finding:
    """Python and the packages that a site needs, those that are pinned in their version."""
    seen = f"Python {machine.python}, " + ", ".join(
        f"{k} {v or 'missing'}" for k, v in machine.packages.items()
    )
    missing = [name for name, version in machine.packages.items() if not version]
    if missing:
        return Finding(
            "software", State.FAIL, seen, f"pip install 'fedrad[site]': {', '.join(missing)} missing"
        )
    if not machine.python.startswith(("3.11.", "3.12.")):
        return Finding("software", State.FAIL, seen, "run it with Python 3.11 or 3.12")
    for name, version in _PINNED.items():
        if machine.packages.get(name, version) != version:
            return Finding("software", State.FAIL, seen, f"pip install {name}=={version}")
    return Finding("software", State.OK, seen)


def check_gpu(machine: MachineFacts, *, required: bool = False) -> list[Finding]:
    """Card, driver and torch build; no card is well unless one is required."""
    card = largest_card(machine.cards)
    if card is None:
        seen = "no NVIDIA card found: drafting and training run on the CPU"
        if required:
            seen = f"expected a graphics card (--gpu), got none; {seen.partition(': ')[2]}"
        todo = "install the driver (`nvidia-smi` must answer) and pass the card into the container or unit"
        return [Finding("gpu", State.FAIL, seen, todo) if required else Finding("gpu", State.OK, seen)]
    found = [
        Finding("gpu", State.OK, f"{card.name}, {card.memory_bytes / GIB:.1f} GiB, driver {card.driver}")
    ]
    if machine.wheel is None:
        return [*found, Finding("torch", State.FAIL, "torch is not installed", f"install {wheel_for(card)}")]
    if not machine.wheel.cuda:
        seen = f"torch {machine.wheel.version} has no CUDA: the card is not used"
        state = State.FAIL if required else State.WARN
        return [*found, Finding("torch", state, seen, f"install {wheel_for(card)}")]
    for name, verdict in (
        ("driver", check_driver(card, machine.wheel)),
        ("torch", check_architecture(card, machine.wheel)),
    ):
        found.append(Finding(name, State.OK if verdict.holds else State.FAIL, verdict.seen, verdict.todo))
    if machine.kernel:
        worked = machine.kernel == "ok"
        todo = "" if worked else "compare driver and torch build above; a restart of the machine may be due"
        seen = (
            "a float16 product was computed on it" if worked else f"a trial product failed: {machine.kernel}"
        )
        found.append(Finding("gpu computes", State.OK if worked else State.FAIL, seen, todo))
    return found


def check_disk(path: str, free_bytes: int) -> Finding:
    """Room for state, cached features and the next release."""
    seen = f"{free_bytes / GIB:.1f} GiB free at {path}"
    if free_bytes < DISK_FAIL_BYTES:
        return Finding(
            "disk", State.FAIL, seen, f"free at least {DISK_WARN_BYTES // GIB} GiB: a full disk stops rounds"
        )
    if free_bytes < DISK_WARN_BYTES:
        return Finding("disk", State.WARN, seen, f"free at least {DISK_WARN_BYTES // GIB} GiB")
    return Finding("disk", State.OK, seen)


def check_home(facts: SiteFacts) -> Finding:
    """The site's directory and who can read its keys."""
    if facts.home_problem:
        return Finding("site", State.FAIL, facts.home_problem, "run `fedrad-site enrol SITE --data DIR`")
    if facts.key_problems:
        return Finding(
            "site", State.FAIL, "; ".join(facts.key_problems), "chmod 700 HOME/keys; chmod 600 HOME/keys/*"
        )
    return Finding("site", State.OK, f"site {facts.site}; keys are this user's alone")


def check_enrolment(facts: SiteFacts) -> Finding:
    """Whether the operator's answer is installed."""
    if facts.enrolment_problem:
        todo = "send enrolment-request.json to the operator, then `fedrad-site enrol --bundle FILE`"
        return Finding("enrolment", State.FAIL, facts.enrolment_problem, todo)
    return Finding("enrolment", State.OK, "the operator's bundle is installed")


def check_certificate(facts: CertificateFacts, *, now_unix_s: float) -> Finding:
    """Validity by this machine's clock; it renews itself while `fedrad-site up` runs."""
    end = datetime.fromtimestamp(facts.not_after_unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    left = facts.not_after_unix_s - now_unix_s
    if not facts.fits_key:
        return Finding(
            "certificate", State.FAIL, "it is for another TLS key", "`fedrad-site rotate`, then telephone"
        )
    if now_unix_s < facts.not_before_unix_s:
        return Finding(
            "certificate", State.FAIL, "it is not valid yet by this clock", "set this machine's clock (NTP)"
        )
    if left <= 0:
        todo = "keep `fedrad-site up` running: it renews it; where that fails, `fedrad-site renew`"
        return Finding("certificate", State.FAIL, f"it ended {end}", todo)
    if left < _EXPIRES_SOON_S or now_unix_s > facts.renew_after_unix_s + _EXPIRES_SOON_S:
        todo = "it should have renewed itself: is `fedrad-site up` running and connected?"
        return Finding("certificate", State.WARN, f"valid until {end}, renewal is overdue", todo)
    return Finding("certificate", State.OK, f"valid until {end}")


def check_server(facts: ServerFacts) -> list[Finding]:
    """Name, proxy, connection, certificates of both sides and the clock, up to the first that fails."""
    via = f" through the proxy {facts.proxy}" if facts.proxy else ""
    steps = {
        "dns": (
            "dns",
            ", ".join(facts.addresses),
            "have the name added to the hospital's DNS, or to /etc/hosts",
        ),
        "proxy": (
            "proxy",
            facts.proxy or "none",
            "ask for CONNECT to this host and port to be allowed, or set --proxy (FEDRAD_PROXY), "
            "http://HOST:PORT",
        ),
        "connect": (
            "connection",
            f"{facts.address}{via}",
            "ask the operator whether the server runs; else have outbound TCP to this host and port opened "
            "in the firewall (nothing inbound is needed)",
        ),
        "tls": (
            "tls",
            "both sides' certificates are accepted",
            "compare this machine's clock; an intercepting proxy must let this host pass untouched",
        ),
        "answer": (
            "server",
            f"answered in {facts.took_s:.2f} s",
            "telephone the operator: the server is there and does not answer, or refuses this site",
        ),
    }
    found: list[Finding] = []
    for step, (name, seen, todo) in steps.items():
        if step == facts.failed:
            return [*found, Finding(name, State.FAIL, facts.error, todo)]
        looked_up = facts.addresses or step != "dns"  # nothing is, for a proxy that is refused by its form
        if looked_up and (step != "proxy" or facts.proxy):
            found.append(Finding(name, State.OK, seen))
    if facts.date_unix_s is not None:
        found.append(check_clock(facts.asked_unix_s - facts.date_unix_s, uncertain_s=1.0 + facts.took_s))
    return found


def check_clock(ahead_s: float, *, uncertain_s: float = 1.0) -> Finding:
    """This clock against the server's; the server's `Date` has whole seconds."""
    off = max(0.0, abs(ahead_s) - uncertain_s)
    seen = f"this clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"
    if off > CLOCK_FAIL_S:
        return Finding("clock", State.FAIL, seen, "switch on NTP: deadlines and certificates are missed")
    if off > CLOCK_WARN_S:
        return Finding("clock", State.WARN, seen, "switch on NTP")
    return Finding("clock", State.OK, f"within {off + uncertain_s:.0f} s of the server's")


def check_data(facts: DataFacts) -> Finding:
    """The prepared data: that it is there and holds together; counts only as the card's buckets."""
    if facts.problem:
        todo = "`fedrad-site data check` says more; `fedrad-site data import` makes it"
        if facts.problem == "PermissionError":
            todo = "let the site's user read the folder and all in it; it needs no right to write"
        return Finding("data", State.FAIL, f"{facts.directory}: {facts.problem}", todo)
    if facts.image_missing:
        return Finding(
            "data", State.FAIL, f"{facts.directory}: an image is missing", "`fedrad-site data check` names it"
        )
    return Finding(
        "data", State.OK, f"{facts.directory}: training patients {facts.patients or 'not on the card'}"
    )


def check_base(facts: BaseFacts) -> Finding:
    """A base's files against what the studies pin."""
    name = f"base {facts.name}"
    if facts.problem:
        return Finding(name, State.FAIL, facts.problem, "copy the base again, then `fedrad-site doctor`")
    if facts.pinned_by:
        return Finding(name, State.OK, f"its files are those that {', '.join(facts.pinned_by)} pin")
    return Finding(name, State.OK, f"{facts.hashed or 'present'}; no received study pins it yet")


def check_memory(size: BaseSize, machine: MachineFacts) -> list[Finding]:
    """How the base fits: precision, what drafting and training need, and what there is; computed."""
    card = _usable_card(machine)
    plan = choose_plan(size, card, host_bytes=machine.memory_bytes)
    found = [_memory_finding(f"memory {size.name}", size, plan, card)]
    if card is not None and not AGENT_TRAINS_ON_CARD:
        host = choose_plan(size, None, host_bytes=machine.memory_bytes)
        finding = _memory_finding(f"rounds {size.name}", size, host, None)
        seen = f"this release's agent computes its rounds on the CPU; {finding.seen}"
        found.append(Finding(finding.check, finding.state, seen, finding.todo))
    return found


def _memory_finding(name: str, size: BaseSize, plan: MemoryPlan, card: Card | None) -> Finding:
    where = f"on {card.name}" if card else "on the CPU"
    seen = (
        f"{plan.precision.value} {where}: drafting {plan.inference / GIB:.1f} GiB, training "
        f"{plan.training / GIB:.1f} GiB computed, of {plan.available / GIB:.1f} GiB"
    )
    if not plan.infers:
        return Finding(name, State.FAIL, seen, _more_memory(plan, card))
    if not plan.trains:
        return Finding(
            name, State.WARN, seen, f"drafting fits, training does not: {_more_memory(plan, card)}"
        )
    return Finding(name, State.OK, seen)


def check_budget(problem: str) -> Finding:
    """Whether the privacy ledger can be read."""
    if problem:
        todo = "do not delete it: without it the site cannot know what it spent; restore it from its backup"
        return Finding("budget", State.FAIL, f"the privacy ledger cannot be used: {problem}", todo)
    return Finding("budget", State.OK, "the privacy ledger is whole")


def _usable_card(machine: MachineFacts) -> Card | None:
    card = largest_card(machine.cards)
    usable = card and machine.wheel and machine.wheel.cuda and check_architecture(card, machine.wheel).holds
    return card if usable else None


def _more_memory(plan: MemoryPlan, card: Card | None) -> str:
    if card is None:
        return f"at least {plan.training / GIB:.0f} GiB of memory, a card, or a smaller base"
    return "a card with more memory, or a smaller base"


def check_worklist(damages: tuple[str, ...]) -> Finding:
    """The cases that wait for a reader: each damaged one names its file."""
    if damages:
        seen = f"damaged cases, which no reader can open and no term deletes: {len(damages)}"
        return Finding("worklist", State.WARN, seen, "; ".join(damages[:3]))
    return Finding("worklist", State.OK, "every case of the worklist can be read")
