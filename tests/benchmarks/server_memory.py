"""Memory of the whole server side in rounds of a real masked study, under `fedrad-server up` with nginx.

Everything is what a consortium runs: `up`, nginx, SuperLink, SuperExec, the real ServerApp with its sum, its
optimizer and its ledger; sites with their own `fedrad-site up`, training, masking and noise. Only the base is
made for it: the tiny one with random weights and as many layers as an adapter of 20 MB needs.

A process counts with its resident set (RSS), and with its proportional one (PSS), where a page that several
processes share counts once, and with its anonymous pages alone, which no file can give back. All sums are
looked at every 0.2 s: the peak of the sum is what a machine needs, the sum of the peaks is more than was ever
used at once.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from client.enrolment import install_bundle, request_enrolment
from client.home import create_home
from common.enrolment import fingerprint_of
from common.model.tiny import tiny_base_directory
from deploy.local.flower import free_port
from deploy.local.guardian import marked_processes
from deploy.local.processes import command_line
from deploy.local.synthetic import write_synthetic_sites
from server.consortium import create_server_home
from server.enrolment import approve
from server.studies import TINY, study_template
from server.submission import submit_study
from tests.deploy.lab import RealConsortium

_ROUNDS = 2
_RANK, _LAYERS = 456, 5  # 20.0 MB of float32 over the tiny base's other dimensions
_PROGRAMS = {
    "deploy.server.cli": "up",
    "deploy.server.superlink": "superlink",
    "flower-superexec": "superexec",
    "flwr-serverapp": "serverapp",
    "nginx": "nginx",
}

Progress = Callable[[str], None]


@dataclass
class Peaks:
    """MB: each program's peak RSS, and the peaks of the sums over all programs."""

    programs: dict[str, float] = field(default_factory=dict)
    rss: float = 0.0
    pss: float = 0.0
    anonymous: float = 0.0

    def look(self, pids: set[int]) -> None:
        by_program: dict[str, float] = {}
        pss = anonymous = 0.0
        for pid in pids:
            command = command_line(pid)
            name = next((name for part, name in _PROGRAMS.items() if part in command), "other")
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                by_program[name] = by_program.get(name, 0.0) + _mb(text, "Rss:")
                pss += _mb(text, "\nPss:")
                anonymous += _mb(text, "Anonymous:")
        for name, value in by_program.items():
            self.programs[name] = max(self.programs.get(name, 0.0), value)
        self.rss, self.pss = max(self.rss, sum(by_program.values())), max(self.pss, pss)
        self.anonymous = max(self.anonymous, anonymous)


def _mb(text: str, name: str) -> float:
    return int(text.split(name)[1].split()[0]) * 1.024 / 1000 if name in text else 0.0


def run(progress: Progress) -> dict[str, float]:
    """Measure 2, 5 and 8 sites; returns MB by number of sites and program."""
    results: dict[str, float] = {}
    for sites in (2, 5, 8):
        peaks = measure(sites, progress)
        results |= {f"server_{name}_mb_{sites}x20mb": mb for name, mb in sorted(peaks.programs.items())}
        results[f"server_all_mb_{sites}x20mb"] = peaks.rss
        results[f"server_all_pss_mb_{sites}x20mb"] = peaks.pss
        results[f"server_all_anonymous_mb_{sites}x20mb"] = peaks.anonymous
    return results


def measure(sites: int, progress: Progress) -> Peaks:
    """Run two rounds of a masked study of as many sites, and watch the server's processes."""
    with tempfile.TemporaryDirectory(prefix="fedrad-memory-") as name:
        folder = Path(name)
        base = _wide_base(folder / "base")
        names = tuple(f"site{number}" for number in range(sites))
        consortium = RealConsortium(folder, free_port())
        create_server_home(
            folder / "srv", consortium="lab", address=f"localhost:{consortium.port}", now=datetime.now(UTC)
        )
        write_synthetic_sites(folder / "data", sites=names, patients=dict.fromkeys(names, 24), seed=77)
        try:
            for site in names:
                _enrol(consortium, site, base)
            recipe = replace(TINY, rank=_RANK, strategy="joint", microbatch_patients=1, sampling_rate=0.05)
            text = study_template(
                id="wide", base="wide", sites=names, rounds=_ROUNDS, patients=24 * sites, recipe=recipe
            )
            submit_study(consortium.server, text, source="benchmark", base=base)
            consortium.start_server()
            consortium.wait(lambda: consortium.status()["ready"], "the SuperLink")
            with _watched(consortium) as peaks:
                for site in names:
                    consortium.start_site(site)
                for site in names:
                    consortium.approve(site)
                progress(f"server memory: {sites} sites are approved")
                started = time.monotonic()
                for done in range(1, _ROUNDS + 1):
                    consortium.wait(lambda d=done: consortium.rounds("wide") >= d, "a round", timeout_s=1500)
                    progress(
                        f"server memory: {sites} sites: round {done}, {time.monotonic() - started:.0f} s"
                    )
                consortium.wait(lambda: consortium.study_state("wide") == "finished", "its end")
            return peaks
        finally:
            for process in consortium.processes.values():
                process.terminate()
            for process in consortium.processes.values():
                process.wait(timeout=120)


def _enrol(consortium: RealConsortium, site: str, base: Path) -> None:
    server, now = consortium.server, datetime.now(UTC)
    home = create_home(
        consortium.directory / site,
        site=site,
        operator_key=server.message_key().public,
        data=consortium.directory / "data" / site,
        bases={"wide": base},
        epsilon=1000.0,
    )
    request = request_enrolment(home, software="fedrad 0.1.0", now=now)
    signed = approve(server, server.authority(), request, fingerprint=fingerprint_of(request.keys), now=now)
    install_bundle(home, signed)


def _wide_base(folder: Path) -> Path:
    """Make the tiny base with more layers of the language model, and random weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    shutil.copytree(tiny_base_directory(), folder)
    config = LlavaConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = _LAYERS
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _watched(consortium: RealConsortium) -> Iterator[Peaks]:
    peaks, over = Peaks(), threading.Event()
    server = consortium.directory / "srv"
    token = (server / "state" / "supervisor.token").read_text()

    def pids() -> set[int]:
        master = int((server / "proxy" / "nginx.pid").read_text())
        children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        return {consortium.processes["srv"].pid, master, *map(int, children), *marked_processes(token)}

    def watch() -> None:
        while not over.wait(0.2):
            with contextlib.suppress(OSError):
                peaks.look(pids())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()
