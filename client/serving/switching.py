"""Which release a running server runs: as an administrator asks, or as `fedrad-site model` decided elsewhere.

Guarantees: a release answers only after it was verified against the ledger and passed the canary beside the
one in use; one that fails is put back in the model store too, so that a restart does not run it; of several
decisions the last one stands. A server that starts takes the version in use as it is, without a canary.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

from client.releases import Current, ModelStore
from client.serving.canary import CanaryFigures
from client.serving.service import DraftingService
from client.serving.source import ReleaseSource
from common.errors import FedRadError, SwitchSuperseded

_LOOK_EVERY_S = 2.0
_LOOK_AGAIN_WITHIN_S = 300.0
_LOG = logging.getLogger("fedrad.serving")


class ReleaseSwitch:
    """Switches one service between the releases of one model store, one switch at a time."""

    def __init__(
        self,
        service: DraftingService,
        store: ModelStore,
        source: ReleaseSource,
        *,
        wall_s: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._service, self._store, self._source = service, store, source
        self._wall_s, self._sleep = wall_s, sleep
        self._served = Current(service.model.version, 0)
        self._switching = asyncio.Lock()

    async def use(self, version: int, pin: str, user: str) -> dict[str, Any]:
        """Switch as an administrator asks; the model store is told only when the canary has passed.

        Where the access log then takes no record, nothing is switched and the model store is told that too.
        """
        told = False

        async def commit() -> None:
            nonlocal told
            await asyncio.to_thread(
                self._store.use,
                version,
                time_s=int(self._wall_s()),
                by=user,
                pin_reason=pin,
                allow_unprotected=self._source.allow_unprotected,
            )
            told = True

        async with self._switching:
            try:
                figures = await self._switch(version, user=user, commit=commit)
            except (FedRadError, OSError) as error:
                if told:
                    await self._put_back(version, error)
                raise
            self._note_served(await asyncio.to_thread(self._store.current))
        return {"version": version, "model": self._service.model.label, "canary": asdict(figures)}

    async def follow(self) -> None:
        """Take up, until cancelled, what `fedrad-site model use` and `rollback` decide.

        Where that fails (a full disk takes no record of a switch), it is said once and tried again, each time
        after twice the wait up to 5 minutes: every trial starts an engine. The release in use goes on.
        """
        wait_s, said = _LOOK_EVERY_S, ""
        while True:
            try:
                await self.look()
            except Exception as error:  # following must not end while the server runs
                why = type(error).__name__
                if why != said:
                    _LOG.warning("cannot follow the model store: %s; it is tried again", why)
                wait_s, said = min(2 * wait_s, _LOOK_AGAIN_WITHIN_S), why
            else:
                if said:
                    _LOG.warning("the model store is followed again")
                wait_s, said = _LOOK_EVERY_S, ""
            await self._sleep(wait_s)

    async def look(self) -> None:
        """Take up the version in use where it is another than the one that answers, or put it back."""
        async with self._switching:
            current = await asyncio.to_thread(self._store.current)
            if current is None or current.version == self._service.model.version:
                self._note_served(current)
                return
            chosen = current.version

            async def still_chosen() -> None:
                now = await asyncio.to_thread(self._store.current)
                if now is None or now.version != chosen:
                    raise SwitchSuperseded(f"expected version {chosen} to be in use still, got another one")

            try:
                await self._switch(chosen, user="local:model-use", commit=still_chosen)
                self._note_served(current)
            except SwitchSuperseded as error:
                _LOG.info("%s", error)
            except FedRadError as error:
                await self._put_back(chosen, error)

    async def _switch(
        self, version: int, *, user: str, commit: Callable[[], Awaitable[None]]
    ) -> CanaryFigures:
        unprotected = self._source.allow_unprotected
        await asyncio.to_thread(self._store.verify, version, allow_unprotected=unprotected)
        source = replace(self._source, release=self._store.folder(version), version=version)
        back = version < self._service.model.version
        figures = await self._service.switch(source, user=user, commit=commit, must_pass=not back)
        _LOG.info("%s answers now", self._service.model.label)
        self._service.switch_failure = ""
        return figures

    async def _put_back(self, failed: int, error: FedRadError | OSError) -> None:
        try:
            await asyncio.to_thread(
                self._store.put_back,
                failed,
                self._served,
                time_s=int(self._wall_s()),
                by="local:canary",
                why=type(error).__name__,
            )
        finally:
            said = error.strerror if isinstance(error, OSError) else error  # no path of the site in /health
            self._service.switch_failure = f"version {failed}: {type(error).__name__}: {said}"
            _LOG.warning("%s goes on; %s", self._service.model.label, self._service.switch_failure)

    def _note_served(self, current: Current | None) -> None:
        if current is not None and current.version == self._service.model.version:
            self._served = current
