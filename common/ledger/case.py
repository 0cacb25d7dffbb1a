"""A bundle as the auditor reads it: entries in order, checkpoints by size, studies with their rounds.

Guarantees: everything here has been parsed, nothing has been believed; a bundle that does not parse ends in
one named error that says where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config import Study
from common.errors import BundleInvalid, FedRadError
from common.ledger.bundle import Bundle
from common.ledger.checkpoint import Checkpoint, parse_checkpoint
from common.ledger.entries import Body, Entry, RoundRecord, StudyOpened, parse_entry
from common.ledger.keys import KeyHistory, key_history
from common.ledger.merkle import Tree, hash_leaf
from common.ledger.note import Note, parse_note


@dataclass(frozen=True)
class Head:
    """One checkpoint of the bundle and the member it came from."""

    member: str
    note: Note
    checkpoint: Checkpoint


@dataclass(frozen=True)
class StudyCase:
    """One study of the log: its opening, plan and the indices of its entries."""

    index: int
    sha256: str
    opened: StudyOpened
    entries: Sequence[tuple[int, Entry]]

    @property
    def manifest(self) -> Study:
        return self.opened.manifest

    @property
    def rounds(self) -> list[tuple[int, RoundRecord]]:
        return [(index, e.body) for index, e in self.entries if isinstance(e.body, RoundRecord)]

    def bodies(self, kind: type[Body]) -> list[tuple[int, Entry]]:
        return [(index, entry) for index, entry in self.entries if isinstance(entry.body, kind)]


@dataclass(frozen=True)
class Case:
    """The whole bundle, parsed."""

    bundle: Bundle
    entries: Sequence[Entry]
    tree: Tree
    heads: Sequence[Head]
    keys: KeyHistory
    studies: Mapping[str, StudyCase]


def read_case(bundle: Bundle) -> Case:
    """Parse every leaf and checkpoint; raises BundleInvalid naming the first that does not parse."""
    leaves = bundle.leaves
    entries = []
    for index, leaf in enumerate(leaves):
        try:
            entries.append(parse_entry(leaf))
        except FedRadError as error:
            raise BundleInvalid(f"entry {index}: {error}") from error
    tree = Tree()
    tree.extend([hash_leaf(leaf) for leaf in leaves])
    heads = []
    for name, data in sorted(bundle.folder("checkpoints").items()):
        try:
            note = parse_note(data)
            checkpoint = parse_checkpoint(note.text)
        except FedRadError as error:
            raise BundleInvalid(f"checkpoints/{name}: {error}") from error
        if name != f"{checkpoint.size:012d}.note":
            raise BundleInvalid(f"checkpoints/{name}: holds the checkpoint of size {checkpoint.size}")
        heads.append(Head(f"checkpoints/{name}", note, checkpoint))
    opened = [(i, e.study, e.body) for i, e in enumerate(entries) if isinstance(e.body, StudyOpened)]
    by_study: dict[str, list[tuple[int, Entry]]] = {study: [] for _, study, _ in opened}
    for index, entry in enumerate(entries):
        if entry.study in by_study:
            by_study[entry.study].append((index, entry))
    studies: dict[str, StudyCase] = {}
    for index, study, body in opened:
        if study not in studies:
            studies[study] = StudyCase(index, study, body, by_study[study])
    keys = key_history(entries, [(i, b.manifest) for i, _, b in opened], operator_key=bundle.log.public.hex())
    return Case(bundle, entries, tree, heads, keys, studies)
