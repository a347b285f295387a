"""open_items.toml: the items that a person has to write, and what was written so far."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from crcjax.errors import InputError
from crcjax.validation.study.drafts.documents import Document
from crcjax.validation.study.drafts.fill import Draft

NAME = "open_items.toml"
_HEAD = (
    "# What crcjax cannot know. Write a text for each item, and run crcjax drafts again: it reads this file and keeps every text.\n"
    "# An item whose text is empty stays open. Texts may span lines between three quotes.\n"
)
Answers = Mapping[str, Mapping[str, str]]


def read_answers(path: Path, further: Path | None, documents: Sequence[Document]) -> dict[str, dict[str, str]]:
    """Reads what a person wrote, by document and item.

    Args:
      path: the file of an earlier start; it may be absent.
      further: a file whose texts replace those of the first one.
      documents: with the items that the files may name.

    Raises:
      InputError: a file is not TOML, or names a document or item that does not exist.
    """
    answers = _read(path, documents) if path.exists() else {}
    for name, texts in (_read(further, documents) if further else {}).items():
        answers[name] = answers.get(name, {}) | {item: text for item, text in texts.items() if text.strip()}
    return answers


def _read(path: Path, documents: Sequence[Document]) -> dict[str, dict[str, str]]:
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error}); correct it") from error
    known = {document.id: {item.id for item in document.items} for document in documents}
    for name, answers in content.items():
        if name not in known or not isinstance(answers, dict):
            raise InputError(f"{path}: {name!r} must be a part for one of the documents {', '.join(known)}")
        for item, text in answers.items():
            if item not in known[name]:
                raise InputError(f"{path}: {name} has no item {item!r}; its items are {', '.join(sorted(known[name]))}")
            if not isinstance(text, str):
                raise InputError(f"{path}: {name}, item {item!r} must be a text, got {text!r}; put it between quotes")
    return content


def answers_text(drafts: Sequence[Draft]) -> str:
    """The file with every item that has a gap or an answer."""
    parts = [_HEAD]
    for draft in drafts:
        parts.append(f"\n[{draft.document.id}]  # {draft.document.title}\n")
        for each in draft.items:
            if each.gaps or each.answer:
                parts += [f"# {each.item.topic}: {' '.join(gap.split())}\n" for gap in each.gaps]
                parts.append(f"{_quoted(each.item.id)} = {_quoted(each.answer)}\n")
    return "".join(parts)


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, except for the character of deletion, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
