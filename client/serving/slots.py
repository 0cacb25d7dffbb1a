"""Keys and values of the answers being written, one slot per answer, and those kept per picture.

`SlotCache` stands in for a transformers cache: its memory is allocated once and grows in steps, rows of
different length lie side by side, and a row is added or taken away without touching the others.
`PrefixCache` keeps what a picture's prompt computed, so that the next question about it starts behind the
image tokens. Guarantees: a prefix is used only for the same picture, up to the first differing token, and the
bytes held stay under the limit.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_GROW = 64


class SlotCache:
    """Keys and values [slots, heads, positions, D] per layer; slots 0 … rows-1 are in use."""

    def __init__(self) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._slots = self._positions = 0
        self._filling: tuple[int, int] | None = None
        self._rows: Any = None
        self._at: Any = None
        self._many = self._reach = 0

    def reserve(self, *, slots: int, positions: int) -> None:
        """Make room for that many rows of that length; what is there stays."""
        if slots <= self._slots and positions <= self._positions:
            return
        self._slots = max(slots, self._slots)
        self._positions = max(-(-positions // _GROW) * _GROW, self._positions)
        for held in (self._keys, self._values):
            for layer, old in enumerate(held):
                new = old.new_zeros(self._slots, old.shape[1], self._positions, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                held[layer] = new

    def fill(self, slot: int, start: int) -> None:
        """From now on `update` writes a run of positions of one slot, from `start`."""
        self._filling = (slot, start)

    def step(self, at: torch.Tensor, *, reach: int) -> None:
        """From now on `update` writes position `at[row]` of every row; attention sees `reach` positions."""
        import torch

        self._filling = None
        if self._many != len(at):
            self._many = len(at)
            self._rows = torch.arange(len(at), device=at.device)
        self._at, self._reach = at, reach

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new keys and values; return all attention may see (called by transformers)."""
        if layer == len(self._keys):
            shape = (self._slots, self._positions)
            self._keys.append(key.new_zeros(shape[0], key.shape[1], shape[1], key.shape[3]))
            self._values.append(value.new_zeros(shape[0], value.shape[1], shape[1], value.shape[3]))
        keys, values = self._keys[layer], self._values[layer]
        if self._filling is not None:
            slot, start = self._filling
            end = start + key.shape[2]
            keys[slot, :, start:end] = key[0]
            values[slot, :, start:end] = value[0]
            return keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]
        if self._many == 1:  # a plain slice costs less than an index
            at = self._reach - 1
            keys[0, :, at] = key[0, :, 0]
            values[0, :, at] = value[0, :, 0]
        else:
            keys[self._rows, :, self._at] = key[:, :, 0]
            values[self._rows, :, self._at] = value[:, :, 0]
        return keys[: self._many, :, : self._reach], values[: self._many, :, : self._reach]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one row's first `length` positions into another slot."""
        for held in (self._keys, self._values):
            for layer in held:
                layer[target, :, :length] = layer[source, :, :length]

    def read(self, slot: int, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Copy out one slot's first `length` positions, per layer [heads, length, D]."""
        return (
            [layer[slot, :, :length].clone() for layer in self._keys],
            [layer[slot, :, :length].clone() for layer in self._values],
        )

    def write(self, slot: int, held: tuple[list[torch.Tensor], list[torch.Tensor]], length: int) -> None:
        """Copy a prefix's first `length` positions into a slot."""
        if not self._keys:
            for mine, given in ((self._keys, held[0]), (self._values, held[1])):
                mine += [
                    one.new_zeros(self._slots, one.shape[0], self._positions, one.shape[2]) for one in given
                ]
        for mine, given in ((self._keys, held[0]), (self._values, held[1])):
            for layer, one in zip(mine, given, strict=True):
                layer[slot, :, :length] = one[:, :length]


@dataclass(frozen=True)
class Prefix:
    """What one prompt computed: its ids and their keys and values per layer."""

    ids: tuple[int, ...]
    held: Any
    size_bytes: int


class PrefixCache:
    """Prefixes by picture, the least recently used leaving first; `max_bytes` 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_picture: OrderedDict[str, Prefix] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._by_picture)

    def find(self, picture: str, ids: tuple[int, ...]) -> tuple[int, Any]:
        """Return how many leading ids are held for this picture (never all of them) and their values."""
        prefix = self._by_picture.get(picture)
        if prefix is None:
            return 0, None
        self._by_picture.move_to_end(picture)
        return common_prefix(prefix.ids, ids[:-1]), prefix.held

    def wants(self, picture: str, ids: tuple[int, ...]) -> bool:
        """Tell whether storing these ids would be new, and keeping any is allowed."""
        prefix = self._by_picture.get(picture)
        return self._max_bytes > 0 and (prefix is None or prefix.ids != ids)

    def store(
        self, picture: str, ids: tuple[int, ...], held: tuple[list[torch.Tensor], list[torch.Tensor]]
    ) -> None:
        """Keep a picture's prefix in place of its former one; too large a one is not kept."""
        size = sum(one.numel() * one.element_size() for part in held for one in part)
        if size > self._max_bytes:
            return
        self.drop(picture)
        self._by_picture[picture] = Prefix(ids, held, size)
        self.size_bytes += size
        while self.size_bytes > self._max_bytes:
            self.drop(next(iter(self._by_picture)))

    def drop(self, picture: str) -> None:
        prefix = self._by_picture.pop(picture, None)
        if prefix is not None:
            self.size_bytes -= prefix.size_bytes


def common_prefix(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Count the leading ids that two prompts share."""
    same = 0
    for mine, asked in zip(one, other, strict=False):
        if mine != asked:
            break
        same += 1
    return same
