"""Fills the items of a document: what the sources state, what a person answered, and the gaps that stay open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crcjax.validation.study.drafts.documents import Document, Item
from crcjax.validation.study.drafts.evidence import Evidence
from crcjax.validation.study.drafts.records import Fact, facts

# Facts that may be absent without leaving a gap.
_OPTIONAL = ("messages", "synthetic")


@dataclass(frozen=True)
class FilledItem:
    """An item with what is known of it.

    Attributes:
      item: the item.
      facts: what the sources state.
      answer: what a person wrote; empty if nothing.
      gaps: what is missing, each named; a person closes all of an item's gaps by an answer.
    """

    item: Item
    facts: tuple[Fact, ...]
    answer: str
    gaps: tuple[str, ...]

    @property
    def is_open(self) -> bool:
        """Whether a person still has to write something."""
        return bool(self.gaps) and not self.answer


@dataclass(frozen=True)
class Draft:
    """A document with its items filled as far as possible."""

    document: Document
    items: tuple[FilledItem, ...]

    @property
    def open_items(self) -> tuple[FilledItem, ...]:
        """The items that a person still has to write."""
        return tuple(item for item in self.items if item.is_open)


def fill(document: Document, evidence: Evidence, answers: Mapping[str, str]) -> Draft:
    """Fills a document; `answers` are texts by the id of the item."""
    return Draft(document, tuple(_fill_item(item, evidence, answers.get(item.id, "")) for item in document.items))


def _fill_item(item: Item, evidence: Evidence, answer: str) -> FilledItem:
    by_record = {name: facts(evidence, name) for name in item.records}
    gaps = [_gap(name, evidence) for name, stated in by_record.items() if not stated and name not in _OPTIONAL]
    if item.person:
        gaps.insert(0, item.person)
    stated = tuple(dict.fromkeys(fact for of_record in by_record.values() for fact in of_record))
    return FilledItem(item, stated, answer.strip(), tuple(gaps))


def _gap(name: str, evidence: Evidence) -> str:
    """Why a record is empty."""
    kind, _, argument = name.partition(" ")
    if kind == "card":
        reason = f"the model card has no part {argument!r}" if evidence.card else "no bundle was given"
        return f"What the model card says under {argument!r}: {reason}."
    if kind in ("estimate", "test"):
        section = next((s for s in evidence.results["sections"] if argument.startswith(f"{s['id']}.")), None)
        why = section["missing"] if section and section["missing"] else "the results do not have it."
        return f"{kind.capitalize()} {argument}: {why}"
    return f"The plan or the results state no {name}."
