"""A TCP proxy that cuts all connections once enough bytes went up, and for a while lets nobody through."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_RESET = struct.pack("ii", 1, 0)


class CuttingProxy:
    """Listens on a free loopback port; `up` and `down` count the bytes that passed.

    `cut(after, …)` arms it: when `after` more bytes have gone up, it ends all connections, by FIN (`reset`
    false) or RST, and closes new ones at once for `away_s` seconds.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.up = self.down = 0
        self.cuts = 0
        self.up_at_cut = 0
        self._limit: int | None = None
        self._reset, self._away_s, self._until = False, 0.0, 0.0
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, after: int, reset: bool, away_s: float) -> None:
        with self._lock:
            self._limit, self._reset, self._away_s = self.up + after, reset, away_s

    def close(self) -> None:
        self._listener.close()
        self._end_all()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._until:
                self._end(near)
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                self._end(near)
                continue
            pair = (near, far)
            with self._lock:
                self._pairs.add(pair)
            for source, sink, upward in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._carry, args=(pair, source, sink, upward), daemon=True).start()

    def _carry(
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        sink: socket.socket,
        upward: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    self.up += len(data) * upward
                    self.down += len(data) * (not upward)
                    over = upward and self._limit is not None and self.up >= self._limit
                    if over:
                        self._limit, self._until = None, time.monotonic() + self._away_s
                        self.cuts, self.up_at_cut = self.cuts + 1, self.up
                if over:
                    self._end_all()
                    break
                sink.sendall(data)
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            self._end(end)

    def _end_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                self._end(end)

    def _end(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            else:
                end.shutdown(socket.SHUT_RDWR)
        end.close()
