"""The agent's socket: who may connect, how often and how slowly; what may pass goes on to gRPC behind it.

gRPC does not tell who is at the other end of a Unix socket. So the agent listens itself, asks the kernel for
the peer's user and groups (SO_PEERCRED, SO_PEERGROUPS), and hands accepted connections, byte by byte, to a
gRPC server on a second socket in a directory of mode 0700 that only the agent's own user can enter.

Guarantees: bytes of a peer that is neither the agent's own user nor in the socket's group reach no parser;
the relay's connections and the own user's are counted apart, so that neither can shut the other out; a silent
or stuck connection ends; the socket lies in a directory that nobody else can write. It reads nothing of what
passes (`client.service` does), and does not protect against the agent's own user or root.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import AgentUnavailable, FedRadError, PeerRefused, PeerTooSlow, SocketInvalid, TooFrequent
from common.pace import TokenBucket as TokenBucket  # client.service has its rates from here

log = logging.getLogger("fedrad.agent")

_SO_PEERGROUPS = 59
_CREDENTIALS = struct.Struct("iII")
_BUFFER_BYTES = 256 << 10


@dataclass(frozen=True)
class Limits:
    """What one class of peers (the own user, or the relay's group) may do."""

    connections: int = 4
    burst: int = 300
    per_minute: float = 600.0
    idle_s: float = 30.0
    stuck_s: float = 60.0
    request_s: float = 60.0
    request_bytes_per_s: float = 1 << 20
    waiting_calls: int = 4
    watchers: int = 4


LIMITS = Limits()


@dataclass(frozen=True)
class Peer:
    """What the kernel says of a connected process; groups hold its supplementary ones."""

    uid: int
    gid: int
    pid: int
    groups: frozenset[int] = frozenset()


def verify_peer(peer: Peer, *, own_uid: int, group: int | None) -> None:
    """Raise PeerRefused unless the peer is the agent's own user or in the socket's group."""
    if peer.uid == own_uid or (group is not None and group in {peer.gid, *peer.groups}):
        return
    allowed = f"user {own_uid}" if group is None else f"user {own_uid} or group {group}"
    raise PeerRefused(f"expected a process of {allowed}, got pid {peer.pid} of user {peer.uid}")


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who connected; raises PeerRefused where it does not say."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError as error:
        raise PeerRefused(f"expected the peer's credentials, got {error.strerror}") from error
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    groups: tuple[int, ...] = ()
    with contextlib.suppress(OSError):  # over 256 groups: only the primary one counts
        listed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        groups = struct.unpack(f"{len(listed) // 4}I", listed)
    return Peer(uid, gid, pid, frozenset(groups))


def verify_directory(directory: Path, *, own_uid: int, group: int | None) -> None:
    """Raise SocketInvalid unless only the own user can write the directory and only the group enter it."""
    if directory.is_symlink() or not directory.is_dir():
        raise SocketInvalid(f"{directory}: expected a directory for the socket, got a link or none")
    found = directory.stat()
    allowed = 0o700 if group is None else 0o750
    if found.st_uid != own_uid or found.st_mode & 0o777 & ~allowed:
        raise SocketInvalid(
            f"{directory}: expected it to be user {own_uid}'s with mode {allowed:o} at most, got user "
            f"{found.st_uid} and mode {found.st_mode & 0o777:o}"
        )
    for parent in directory.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise SocketInvalid(f"{parent}: expected no directory above the socket that all can write")
        if group is not None and not mode & 0o001 and not (mode & 0o010 and parent.stat().st_gid == group):
            raise SocketInvalid(f"{parent}: expected group {group} to be able to enter it; see --socket")


def listen(path: Path, *, group: int | None) -> socket.socket:
    """Bind and listen on a new socket at `path`, of mode 0600, or 0660 for `group`.

    Raises SocketInvalid for an unsafe place, AgentUnavailable where another agent listens.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if group is not None:
        _give(path.parent, group, 0o750)
    verify_directory(path.parent, own_uid=os.geteuid(), group=group)
    _verify_free(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        if group is None:
            path.chmod(0o600)
        else:
            _give(path, group, 0o660)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise SocketInvalid(f"{path}: expected to listen here, got: {error.strerror or error}") from error
    except FedRadError:
        listener.close()
        raise
    return listener


class SocketGuard:
    """Accepts connections at `path` and joins each allowed one with a new connection to `inner`."""

    def __init__(
        self,
        path: Path,
        inner: Path,
        *,
        group: int | None = None,
        limits: Limits = LIMITS,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._path, self._inner, self._group, self._limits, self._busy = path, inner, group, limits, busy
        self._listener = listen(path, group=group)
        self._inode = path.stat().st_ino
        self._own_uid = os.geteuid()
        self._rates = {
            own: TokenBucket(burst=limits.burst, per_minute=limits.per_minute) for own in (True, False)
        }
        self._lines = TokenBucket(burst=30, per_minute=30)
        self._open: dict[socket.socket, bool] = {}
        self._lock = threading.Lock()
        self._accepting = threading.Thread(target=self._accept, name="socket guard", daemon=True)

    def open(self) -> None:
        """Begin to accept; what connected before has waited."""
        self._accepting.start()

    def stop_accepting(self) -> None:
        """Let nobody in any more, and remove the socket if it is still this guard's."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(timeout=5.0)
        self._listener.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (23, 24):  # no file descriptor left: let some connection end first
                    time.sleep(0.2)
                    continue
                return
            try:
                peer = self._admit(connection)
            except FedRadError as error:
                connection.close()
                self._say(error)
                continue
            threading.Thread(target=self._join, args=(connection, peer), daemon=True).start()

    def _admit(self, connection: socket.socket) -> Peer:
        """Check a new connection and count it; raises PeerRefused or TooFrequent."""
        peer = peer_of(connection)
        verify_peer(peer, own_uid=self._own_uid, group=self._group)
        own = peer.uid == self._own_uid
        who = f"pid {peer.pid} of user {peer.uid}"
        try:
            self._rates[own].take()
        except TooFrequent as error:
            raise TooFrequent(f"connections of {who}: {error}") from error
        with self._lock:
            if list(self._open.values()).count(own) >= self._limits.connections:
                raise PeerRefused(
                    f"expected at most {self._limits.connections} connections at once, got one more of {who}"
                )
            self._open[connection] = own
        return peer

    def _join(self, connection: socket.socket, peer: Peer) -> None:
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            inner.connect(str(self._inner))
            self._carry(connection, inner, peer)
        except PeerTooSlow as error:
            self._say(error)
        except OSError:
            pass
        finally:
            with self._lock:
                self._open.pop(connection, None)
            inner.close()
            connection.close()

    def _carry(self, connection: socket.socket, inner: socket.socket, peer: Peer) -> None:
        """Carry bytes both ways until one side ends; raises PeerTooSlow."""
        other = {connection: inner, inner: connection}
        buffer = bytearray(_BUFFER_BYTES)
        view = memoryview(buffer)
        for end in other:
            end.settimeout(self._limits.stuck_s)
        waiting = select.poll()
        by_number = {end.fileno(): end for end in other}
        for number in by_number:
            waiting.register(number, select.POLLIN)
        while True:
            ready = waiting.poll(1000 * self._limits.idle_s)
            if not ready and not self._busy():
                raise PeerTooSlow(
                    f"pid {peer.pid} of user {peer.uid}: expected a request within "
                    f"{self._limits.idle_s:g} s, got none"
                )
            for number, _ in ready:
                size = by_number[number].recv_into(buffer)
                if not size:
                    return
                try:
                    other[by_number[number]].sendall(view[:size])
                except TimeoutError as error:
                    raise PeerTooSlow(
                        f"pid {peer.pid} of user {peer.uid}: expected {size} bytes to pass within "
                        f"{self._limits.stuck_s:g} s, got stuck"
                    ) from error

    def _say(self, error: FedRadError) -> None:
        """Log a refusal by name; a flood of them is not written down line by line."""
        with contextlib.suppress(TooFrequent):
            self._lines.take()
            log.warning("refused a connection: %s: %s", error.code, error)


def group_id(name: str) -> int:
    """Return the number of a group by name or number; raises SocketInvalid."""
    import grp

    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise SocketInvalid(f"--socket-group: expected a group of this machine, got {name!r}") from error


def _give(path: Path, group: int, mode: int) -> None:
    try:
        os.chown(path, -1, group)
        path.chmod(mode)
    except OSError as error:
        raise SocketInvalid(
            f"{path}: expected to give it to group {group}, got: {error.strerror}; is this user in the group?"
        ) from error


def _verify_free(path: Path) -> None:
    """Remove a socket that nobody listens on; raises AgentUnavailable or SocketInvalid."""
    if path.is_symlink() or (path.exists() and not path.is_socket()):
        raise SocketInvalid(f"{path}: expected a socket or nothing, got a link or another file")
    if not path.exists():
        return
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.connect(str(path))
    except OSError:
        path.unlink()
    else:
        raise AgentUnavailable(f"{path}: expected a free socket, got another agent listening on it")
    finally:
        probe.close()
