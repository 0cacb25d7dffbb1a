"""A real consortium for faults: small deterministic studies, its processes by role, and what must hold.

The processes are those of `fedrad-server up` and `fedrad-site up`, which start again what dies. The studies
are masked, over all sites and with a `[testing]` seed: a round has every site's sum or none, so that all
studies of one consortium that end well have the same adapter, bit for bit, disturbed or not.
`verify_outcome` is the property of the campaign, read from the server's and the sites' own files.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.home import approve_study, receive_study
from common.config import Study
from common.ledger.audit import verify_bundle
from common.ledger.entries import RoundRecord, parse_entry
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of
from common.ledger.statements import commit, parse_participation
from common.model.tiny import tiny_base_directory
from common.protocol import unpack_body
from deploy.local.guardian import marked_processes
from deploy.local.processes import command_line
from deploy.server.app import read_outcome
from server.bundles import export_run
from server.checkpoint import read_records
from server.submission import submit_study
from tests.deploy.lab import RealConsortium, running
from tests.simulator import split_message, study_text

SITES = ("alpha", "beta", "gamma")
POLL_S = 0.02
NAMED = ("RoundFailed", "CheckpointInvalid", "BudgetExceeded")
_PROGRAMS = {
    "superlink": "deploy.server.superlink",
    "superexec": "flower-superexec",
    "serverapp": "flwr-serverapp",
    "proxy": "nginx: master",
    "supernode": "client.supernode",
    "agent": "client.cli agent",
    "link": "deploy.site.cli link",
}


@dataclass
class FaultyConsortium:
    """A running consortium; each study is submitted, approved by all sites and followed to its end."""

    lab: RealConsortium
    sites: tuple[str, ...]

    def submit(
        self, name: str, *, rounds: int = 2, deadline_s: int = 120, grace_s: int | None = None,
        spare_rounds: int = 40,
    ) -> Study:  # fmt: skip
        """Submit a study that all sites approve at once."""
        text = study_text(
            mode="consortium", rounds=rounds, sites=self.sites, min_sites=len(self.sites), max_attempts=40,
            spare_rounds=spare_rounds, seed=5, grace_s=grace_s,
        )  # fmt: skip
        for old, new in (
            ('id = "small"', f'id = "{name}"'),
            ("deadline_s = 600", f"deadline_s = {deadline_s}"),
            ("dropouts = 1", "dropouts = 0"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        study = submit_study(self.lab.server, text, source=name, base=tiny_base_directory()).study
        folder = self.folder(study)
        manifest = (folder / "study.json").read_bytes()
        signature = bytes.fromhex((folder / "operator.sig").read_text())
        for site in self.sites:  # at once, where the link would take half a minute
            home = self.lab.home(site)
            receive_study(home, manifest, signature)
            approve_study(home, study.sha256)
        return study

    def folder(self, study: Study) -> Path:
        return self.lab.directory / "srv" / "studies" / study.study.id

    def state(self, study: Study, site: str) -> Path:
        return self.lab.home(site).state_directory(study.sha256)

    def over(self, study: Study) -> bool:
        return self.lab.study_state(study.study.id) in ("finished", "failed")

    def finish(self, study: Study, *, timeout_s: float = 1800.0) -> None:
        self.lab.wait(lambda: self.over(study), f"the end of {study.study.id}", timeout_s=timeout_s)

    def reached(self, study: Study, stage: str, site: str) -> bool:
        """Tell whether a stage of the first round (witness: of the end) has begun at the site."""
        if stage == "hello":
            return any(event["event"] == "started" for event in self.lab.events(study.study.id))
        if stage == "witness":
            return (self.folder(study) / "rounds" / f"{study.rounds - 1:06d}").is_dir()
        return any((self.state(study, site) / "begun").glob(f"*-{stage}.json"))

    def at(self, study: Study, stage: str, site: str, *, timeout_s: float = 600.0) -> None:
        """Wait until a stage has begun."""
        self.until(lambda: self.reached(study, stage, site) or self.over(study), stage, timeout_s=timeout_s)

    @staticmethod
    def until(ready: Callable[[], object], what: str, *, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < end, f"expected {what} within {timeout_s:g} s"
            time.sleep(POLL_S)

    # --- processes ----------------------------------------------------------------------------------------

    def pids(self, role: str, site: str = "") -> list[int]:
        """Find the processes of a role: at the server, or (agent, supernode, …) at a site."""
        marked = marked_processes(self._token(role, site))
        if role in ("clientapp", "executor"):
            forks = {pid: _parent(pid) for pid in marked if "deploy.local.executor" in command_line(pid)}
            nurseries = {
                pid for pid, parent in forks.items() if parent in forks and forks[parent] not in forks
            }
            if role == "clientapp":
                return sorted(pid for pid, parent in forks.items() if parent in nurseries)
            return sorted(pid for pid, parent in forks.items() if parent not in forks)
        return sorted(pid for pid in marked if _PROGRAMS[role] in command_line(pid))

    def _token(self, role: str, site: str) -> str:
        at_server = role in ("superlink", "superexec", "serverapp", "proxy")
        path = Path("srv", "state") if at_server else Path(site, "run")
        return (self.lab.directory / path / "supervisor.token").read_text()

    def kill(self, role: str, site: str, *, wait_s: float = 20.0) -> int:
        """Send SIGKILL to a role's process, waiting for one to be there; return its pid, 0 without one."""
        end = time.monotonic() + wait_s
        while True:
            for pid in self.pids(role, site):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                return pid
            if time.monotonic() > end:
                return 0
            time.sleep(POLL_S)

    # --- what must hold -----------------------------------------------------------------------------------

    def verify_outcome(self, study: Study, *, adapter: str) -> str:
        """Check what must hold whatever happened; returns the named refusal, empty where there was none."""
        state, reason = read_outcome(self.folder(study))
        self.verify_ledger(study)
        if state == "finished":
            assert self.adapter(study) == adapter, "another adapter than the undisturbed study's"
            return ""
        assert reason.partition(":")[0] in NAMED, f"expected a named refusal, got {state} {reason!r}"
        return reason

    def adapter(self, study: Study) -> str:
        return read_records(self.folder(study))[study.rounds - 1].record.adapter_out

    def verify_ledger(self, study: Study) -> None:
        """Every contribution the server has was charged, and was the only one of its site and attempt."""
        folder = self.folder(study)
        assert [signed.record.round for signed in read_records(folder)] == list(
            range(len(read_records(folder)))
        )
        bundle = export_run(folder, exported_s=int(time.time()), software="fedrad 0.1.0", with_adapters=False)
        findings = verify_bundle(bundle, trusted=trust_of(study).log).findings
        assert [found for found in findings if found.status is Status.FAIL] == []
        served: dict[tuple[str, int, int], str] = {}
        for line in (folder / "ledger" / "entries.jsonl").read_bytes().splitlines():
            body = parse_entry(line).body
            if isinstance(body, RoundRecord):
                for part in body.participations:
                    key = (part.site, body.number, body.attempt)
                    assert key not in served, f"two contributions of {key}"
                    served[key] = part.commitment
        for site in self.sites:
            charges = self.charges(site, study)
            assert max(charges.values(), default=0) <= 1, f"{site} charged an attempt twice"
            mine = {(number, attempt): hash for (who, number, attempt), hash in served.items() if who == site}
            assert set(mine) <= set(charges), f"{site}: served without a charge: {set(mine) - set(charges)}"
            for (number, attempt), commitment in mine.items():
                path = self.state(study, site) / "spool" / f"{number:06d}-{attempt}-contribute.reply"
                if path.is_file():
                    assert _commitment(path.read_bytes()) == commitment, (
                        f"{site}: other bytes than were logged"
                    )

    def charges(self, site: str, study: Study) -> Counter[tuple[int, int]]:
        """Count a site's charges of a study by round and attempt."""
        lines = (self.lab.directory / site / "budget.jsonl").read_bytes().splitlines()
        entries = [json.loads(line.rpartition(b" ")[0])["entry"] for line in lines]
        return Counter(
            (entry["round"], entry["attempt"])
            for entry in entries
            if entry["kind"] == "charge" and entry["study"] == study.sha256
        )


@contextmanager
def faulty(
    directory: Path,
    *,
    sites: tuple[str, ...] = SITES,
    arguments: Mapping[str, tuple[str, ...]] = {},
    environment: Mapping[str, Mapping[str, str]] = {},
    online: tuple[str, ...] | None = None,
) -> Iterator[FaultyConsortium]:
    """Run a consortium with small data; at the end no process of it may be left (`running`).

    `arguments` and `environment` are single sites' own; `online` names who is waited for (default: all).
    """
    with running(directory, enrolled=sites, patients=8) as lab:
        policy = directory / "srv" / "policy.toml"
        text = policy.read_text()
        assert "study_retry_s = 600" in text
        policy.write_text(text.replace("study_retry_s = 600", "study_retry_s = 5"))
        for site in sites:
            path = directory / site / "site.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "epsilon": 1e5}))
        lab.start_server()
        for site in sites:
            lab.start_site(site, *arguments.get(site, ()), **environment.get(site, {}))
        lab.wait(
            lambda: lab.online(*(sites if online is None else online)), "the sites online", timeout_s=900
        )
        yield FaultyConsortium(lab, sites)


def _commitment(reply: bytes) -> str:
    _, _, body = split_message(reply)
    _, (_, _, _, statement, key, sent) = unpack_body(
        body, fields={"adapter_sha256": str, "form": str}, parts=6
    )
    made = commit(bytes(key), sent)
    assert parse_participation(bytes(statement)).commitment == made
    return made


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
