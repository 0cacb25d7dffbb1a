"""The SuperNode gives up a reply whose ClientApp died while handing it over, and takes the next message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from client.supernode import STALLED_S, StalledStore
from common.errors import RelayInvalid


@pytest.fixture
def content() -> RecordDict:
    return RecordDict({"fedrad": ConfigRecord({"stage": "keys", "envelope": b"reply"})})


def awaited(content: RecordDict, clock: Callable[[], float]) -> tuple[StalledStore, str, bytes]:
    """A store that knows of an object's parts and holds none; one part's id and bytes."""
    store = InMemoryObjectStore()
    store.preregister(1, get_object_tree(content))
    object_id, part = next(iter(get_all_nested_objects(content).items()))
    return StalledStore(store, clock), object_id, part.deflate()


def test_a_part_that_never_comes_ends_the_wait(content: RecordDict) -> None:
    now = [100.0]
    store, object_id, _ = awaited(content, lambda: now[0])
    assert store.get(object_id) == b""
    now[0] += STALLED_S
    assert store.get(object_id) == b""
    now[0] += 0.5
    with pytest.raises(RelayInvalid, match="rest of a ClientApp's reply"):
        store.get(object_id)


def test_a_part_that_comes_late_is_given(content: RecordDict) -> None:
    now = [100.0]
    store, object_id, part = awaited(content, lambda: now[0])
    assert store.get(object_id) == b""
    now[0] += STALLED_S - 1
    store.put(object_id, part)
    now[0] += STALLED_S
    assert store.get(object_id) == part


def test_each_part_has_a_time_of_its_own(content: RecordDict) -> None:
    now = [100.0]
    store, object_id, part = awaited(content, lambda: now[0])
    store.get(object_id)
    now[0] += STALLED_S
    store.put(object_id, part)
    store.get(object_id)
    assert store.get("0" * 64) is None, "a part that nobody announced is none that is awaited"
