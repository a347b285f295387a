"""The documents of drafts: their items, each with what fills it and what a person must write."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Item(_Part):
    """An item of a document.

    Attributes:
      id: unique in the document; the number of the standard where it has one.
      section: the heading it stands under.
      topic: in a few words.
      asks: what a reader wants to know, in our own words.
      records: names of facts (`records.facts`) that fill it.
      person: what only a person can write; the item is open until someone does. Empty if the records are enough.
    """

    id: _Text
    section: _Text
    topic: _Text
    asks: str = ""
    records: list[str] = []
    person: str = ""


class Document(_Part):
    """A document.

    Attributes:
      id: names its files.
      title: its heading.
      basis: the standard or regulation that it follows, and what was not compared with it.
      layout: a table of items, or a text with headings.
      items: in the order of the standard.
    """

    id: _Text
    title: _Text
    basis: _Text
    layout: Literal["checklist", "text"]
    items: Annotated[list[Item], Field(min_length=1)]


def load_documents() -> tuple[Document, ...]:
    """All documents, by file name."""
    folder = resources.files("crcjax.validation.study.drafts").joinpath("documents")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return tuple(Document.model_validate(tomllib.loads(file.read_text())) for file in files)
