"""A consortium in memory: the real server loop and real site agents over a transport without ports.

`build(tmp_path, …)` makes a small signed study, its sites and their data; `Consortium.run()` runs the server
to its end. `before` and `after` see every signed request and reply and may alter it, drop it (None) or raise
`NodeDown`; `crash(site)` rebuilds an agent from its directory. The clock is simulated: it moves on whenever
somebody waits for what does not come, so no test waits for a deadline.

It does not go through Flower's ClientApp or the agent's socket (tests/client/test_service.py does).
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from client.agent import SiteAgent
from client.data.store import write_dataset
from client.home import open_home
from client.models import ModelPool
from common.canonical import sha256_hex
from common.compatibility import Speaks
from common.config import Study, parse_study
from common.errors import FedRadError
from common.identity import SigningKey, load_key
from common.protocol import Envelope, Header, Kind, Stage, cut_envelope, read_header, seal, unpack_body
from common.relay import RECORD, join_envelope, split_envelope
from deploy.local.consortium import set_up
from server.acceptance import Judge
from server.app import run_study
from server.checkpoint import StudyState

SITES = ("alpha", "beta", "gamma", "delta")
START_UNIX_S = 1_800_000_000.0
WAIT_S = 400.0
POOL = ModelPool()  # one base in memory for all agents of all tests
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []

Hook = Callable[[str, Header, bytes], bytes | None]

_STUDY = """\
schema = 1
[study]
id = "small"
purpose = "Test of the protocol"
[base]
name = "tiny"
[adapter]
rank = 2
alpha = 4
targets = '.*language_model.*\\.(q_proj|v_proj)'
strategy = "{strategy}"
init_seed = 7
[[stage]]
name = "tune"
rounds = {rounds}
learning_rate = 0.002
schedule = "constant"
[training]
sampling_rate = 0.5
patients = 40
studies_per_patient = 2
max_tokens = 96
max_new_tokens = 8
microbatch_patients = 8
local_steps = {local_steps}
[optimizer]
name = "adam"
max_step_norm = 5
[privacy]
{privacy}
[cohort]
min_sites = {min_sites}
deadline_s = 600
max_attempts = {max_attempts}
witness_quorum = {min_sites}
on_failed_round = "{on_failed_round}"
{grace}{sites}
[audit]
retain_every_rounds = 2
"""

_PRIVACY = {
    "plain": 'mode = "plain"',
    "consortium": """\
mode = "consortium"
site_epsilon = 900
release_epsilon = 900
delta = 0.001
dropouts = 1
spare_rounds = {spare_rounds}
site_noise = 0.6
release_noise = 0.7
masking = {masking}
""",
    "local": """\
mode = "local"
site_epsilon = 900
delta = 0.001
spare_rounds = {spare_rounds}
site_noise = 0.6
release_noise = 0.6
""",
}


class NodeDown(Exception):
    """Raised by a hook or an injected fault: the site's process died while it had the message."""


class Clock:
    """Simulated seconds since 1970; only waiting moves it."""

    def __init__(self) -> None:
        self.now = START_UNIX_S

    def __call__(self) -> float:
        return self.now


class SimulatedGrid:
    """What `server.cohort` uses of Flower's Grid, over agents in this process; one node per site."""

    def __init__(self, world: Consortium) -> None:
        self._world = world
        self._replies: dict[str, Message] = {}
        self._ready_unix_s: dict[str, float] = {}
        self._busy_unix_s: dict[str, float] = {}
        self._next = 0
        self._looked = False
        self.nodes = {number: site for number, site in enumerate(sorted(world.study.site_ids), start=101)}

    def get_node_ids(self) -> list[int]:
        if self._world.away or self._looked:  # whoever looks twice without asking anybody is waiting
            self._world.clock.now += self._world.wait_s
        self._looked = True
        return [node for node, site in self.nodes.items() if site not in self._world.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            content: Any = message.content
            self._looked = self._looked and content[RECORD]["stage"] == "whoami"
            self._next += 1
            message_id = f"m{self._next}"
            message.metadata.__dict__["_message_id"] = message_id
            self._ready_unix_s[message_id] = self._ready(message)
            self._replies |= self._serve(message_id, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        now = self._world.clock.now
        come = [n for n in sorted(message_ids) if n in self._replies and self._ready_unix_s[n] <= now]
        if not come:
            self._world.clock.now += self._world.wait_s
        return [self._replies.pop(name) for name in come]

    def _ready(self, message: Message) -> float:
        """When the node will have answered: one message after another, each as long as `takes_s` says."""
        site, content = self.nodes[message.metadata.dst_node_id], message.content
        record: Any = content[RECORD]
        now = self._world.clock.now
        takes_s = self._world.takes_s.get((site, str(record["stage"])), 0.0)
        self._busy_unix_s[site] = max(now, self._busy_unix_s.get(site, now)) + takes_s
        return self._busy_unix_s[site]

    def _serve(self, message_id: str, message: Message) -> dict[str, Message]:
        site = self.nodes[message.metadata.dst_node_id]
        content: Any = message.content
        if content[RECORD]["stage"] == "whoami":
            who = ConfigRecord({"site": site})
            return {message_id: Message(RecordDict({RECORD: who}), reply_to=message)}
        stage, envelope = join_envelope(content)
        try:
            reply = self._world.relay(site, bytes(envelope))
        except (NodeDown, FedRadError) as failure:
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(failure).__name__}: {failure}")
            return {message_id: Message(error, reply_to=message)}
        if reply is None:
            return {}
        try:
            answer = cut_envelope(reply)
        except FedRadError:
            answer = Envelope(b"", reply)
        records = {name: ConfigRecord(record) for name, record in split_envelope(stage, answer).items()}
        return {message_id: Message(RecordDict(records), reply_to=message)}


@dataclass
class Consortium:
    """A signed study with its server directory and site homes below `out`, and agents in this process.

    `sent` lists (site, stage, round, attempt) of every request that reached a site's machine; `takes_s` says
    how long a site is busy with a stage, and `wait_s` how long who waits in vain waits at a time; `release`
    and `releases` are what the server and single sites speak where it is not what is installed.
    """

    out: Path
    study: Study
    operator: SigningKey
    clock: Clock = field(default_factory=Clock)
    before: Hook = lambda site, header, request: request
    after: Hook = lambda site, header, reply: reply
    away: set[str] = field(default_factory=set)
    sent: list[tuple[str, Stage, int, int]] = field(default_factory=list)
    judge: Judge | None = None
    wait_s: float = WAIT_S
    takes_s: dict[tuple[str, str], float] = field(default_factory=dict)
    release: Speaks | None = None
    releases: dict[str, Speaks] = field(default_factory=dict)
    expected: Callable[[], tuple[str, ...]] | None = None
    _agents: dict[str, SiteAgent] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        return self.out / "server"

    def agent(self, site: str) -> SiteAgent:
        """The site's running agent, started where there is none."""
        if site not in self._agents:
            home = open_home(self.out / "sites" / site)
            self._agents[site] = SiteAgent(
                home, models=POOL, clock=self.clock, release=self.releases.get(site)
            )
        return self._agents[site]

    def crash(self, site: str) -> None:
        """Kill the site's agent; the next message meets a new one on the same directory."""
        if site in self._agents:
            self._agents.pop(site).close()

    def relay(self, site: str, envelope: bytes) -> bytes | None:
        """Carry one request to a site and its reply back, through the hooks."""
        header = read_header(envelope, max_body_bytes=1 << 40, spoken=range(1, 100))
        self.sent.append((site, header.stage, header.round, header.attempt))
        request = self.before(site, header, envelope)
        if request is None:
            return None
        try:
            reply = bytes(self.agent(site).handle(header.stage, request))
        except NodeDown:
            self.crash(site)
            raise
        return self.after(site, header, reply)

    def run(self) -> StudyState:
        """Run the server's remaining rounds, as a new server process would."""
        grid: Any = SimulatedGrid(self)
        with server_identity():
            return run_study(
                grid, self.server, clock=self.clock, judge=self.judge, release=self.release,
                expected=self.expected,
            )  # fmt: skip

    def close(self) -> None:
        for site in list(self._agents):
            self.crash(site)


@contextmanager
def server_identity() -> Any:
    """Give this process the identity that Flower's messages name as their source."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, 1, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def build(
    directory: Path,
    *,
    mode: str = "plain",
    masking: bool = True,
    rounds: int = 3,
    sites: tuple[str, ...] = SITES,
    min_sites: int = 3,
    max_attempts: int = 3,
    on_failed_round: str = "repeat",
    spare_rounds: int = 2,
    strategy: str = "alternating",
    local_steps: int = 1,
    seed: int | None = 5,
    acceptance: str = "",
    evaluation: str = "",
    grace_s: int | None = None,
) -> Consortium:
    """Copy a small signed consortium into `directory`; equal settings give the same study and keys."""
    template = _template(
        study_text(
            mode=mode, masking=masking, rounds=rounds, sites=sites, min_sites=min_sites, seed=seed,
            max_attempts=max_attempts, on_failed_round=on_failed_round, spare_rounds=spare_rounds,
            strategy=strategy, local_steps=local_steps, acceptance=acceptance, evaluation=evaluation,
            grace_s=grace_s,
        )
    )  # fmt: skip
    out = directory / "consortium"
    shutil.copytree(template, out)
    study = parse_study((out / "server" / "study.json").read_bytes())
    return Consortium(out, study, load_key(out / "server" / "keys" / "message.key"))


@dataclass
class Tape:
    """Every request that a site got in an undisturbed run, its reply, and its directory before it."""

    world: Consortium
    site: str
    directory: Path
    requests: dict[tuple[Stage, int], bytes] = field(default_factory=dict)
    replies: dict[tuple[Stage, int], bytes] = field(default_factory=dict)

    def home_before(self, stage: Stage, round: int) -> Path:
        return self.directory / f"{stage.value}-{round}"

    def agent_before(self, stage: Stage, round: int, directory: Path, **settings: Any) -> SiteAgent:
        """The site's agent as it was before a request, on a copy of its directory in `directory`."""
        home = directory / "home"
        shutil.copytree(self.home_before(stage, round), home, dirs_exist_ok=True)
        return SiteAgent(open_home(home), **{"models": POOL, "clock": Clock(), **settings})

    def forge(
        self,
        stage: Stage,
        round: int,
        /,
        *,
        body: bytes | None = None,
        key: SigningKey | None = None,
        **header: Any,
    ) -> bytes:
        """The recorded request with another body or header, signed again by the operator (or `key`)."""
        old, _, body_before = split_message(self.requests[(stage, round)])
        body = body_before if body is None else body
        about = {"body_bytes": len(body), "body_sha256": sha256_hex(body)}
        return bytes(seal(key or self.world.operator, replace(old, **about | header), body))


def record(world: Consortium, site: str, directory: Path) -> Tape:
    """Run a study and keep one site's part of it."""
    tape = Tape(world, site, directory)

    def before(to: str, header: Header, request: bytes) -> bytes:
        if to == site:
            tape.requests[(header.stage, header.round)] = request
            shutil.copytree(world.agent(site).home.directory, tape.home_before(header.stage, header.round))
        return request

    def after(of: str, header: Header, reply: bytes) -> bytes:
        if of == site:
            tape.replies[(header.stage, header.round)] = reply
        return reply

    world.before, world.after = before, after
    world.run()
    world.close()
    return tape


def split_message(message: bytes | Envelope) -> tuple[Header, bytes, bytes]:
    """Header, signature and body of a message, nothing verified."""
    envelope = message if isinstance(message, Envelope) else cut_envelope(message)
    header = read_header(envelope, max_body_bytes=1 << 40, spoken=range(1, 100))
    return header, envelope.frame[-64:], bytes(envelope.body)


def refusal_of(reply: bytes | Envelope) -> str:
    """The name of the error in a signed refusal, empty for a reply."""
    header, _, body = split_message(reply)
    if header.kind is not Kind.REFUSAL:
        return ""
    return str(unpack_body(body, fields={"error": str, "message": str})[0]["error"])


def study_text(
    *,
    mode: str = "plain",
    masking: bool = True,
    rounds: int = 3,
    sites: tuple[str, ...] = SITES,
    min_sites: int = 3,
    max_attempts: int = 3,
    on_failed_round: str = "repeat",
    spare_rounds: int = 2,
    strategy: str = "alternating",
    local_steps: int = 1,
    seed: int | None = 5,
    acceptance: str = "",
    evaluation: str = "",
    grace_s: int | None = None,
) -> str:
    """Write the manifest of a small study."""
    privacy = _PRIVACY[mode].format(spare_rounds=spare_rounds, masking=str(masking).lower())
    text = _STUDY.format(
        strategy=strategy, rounds=rounds, privacy=privacy, min_sites=min_sites, max_attempts=max_attempts,
        on_failed_round=on_failed_round, local_steps=local_steps,
        grace="" if grace_s is None else f"grace_s = {grace_s}\n",
        sites="".join(f'[[cohort.site]]\nid = "{site}"\n' for site in sites),
    )  # fmt: skip
    text += f"[acceptance]\n{acceptance}\n" if acceptance else ""
    text += f"[federated_evaluation]\n{evaluation}\n" if evaluation else ""
    return text if seed is None else f"{text}[testing]\nseed = {seed}\n"


@functools.cache
def data_folder() -> Path:
    """Prepared data of all sites, written once per process: eight training patients each, two for tests."""
    folder = _folder()
    for number, site in enumerate(SITES):
        write_dataset(folder / site, _records(site, number), card={"source": "synthetic"})
    return folder


def _records(site: str, number: int) -> Iterable[Any]:
    import io

    import numpy as np
    from PIL import Image

    from client.data.store import Pair
    from deploy.local.synthetic import draw_patient, hospital_of

    for patient in range(10):
        rng = np.random.default_rng([11, number, patient])
        for visit, (picture, report) in enumerate(draw_patient(hospital_of(site, number), rng)):
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            name = f"{site}-p{patient}-s{visit}"
            pair = Pair(
                patient=f"{site}-p{patient}", study=name, images=(f"images/{name}.png",), view="PA",
                indication=report.indication, findings=report.findings, impression="",
                split="train" if patient < 8 else "test",
            )  # fmt: skip
            yield pair, [stream.getvalue()]


@functools.cache
def _template(text: str) -> Path:
    folder = _folder()
    manifest = folder / "study.toml"
    manifest.write_text(text)
    out = folder / "out"
    made = set_up(manifest, data=data_folder(), out=out, base=None)
    for site, home in made.homes.items():  # features are the same for all studies of these tests
        cache = data_folder().parent / f"cache-{data_folder().name}-{site}"
        if not cache.is_dir():
            agent = SiteAgent(home, models=POOL)
            agent._training_data(agent._open_study(made.study.sha256))
            shutil.copytree(home.cache, cache)
        shutil.copytree(cache, home.cache, dirs_exist_ok=True)
        shutil.rmtree(home.directory / "state", ignore_errors=True)
    return out


def _folder() -> Path:
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="fedrad-test-"))
    return Path(_FOLDERS[-1].name)
