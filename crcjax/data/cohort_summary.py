"""A summary of a cohort: cases per split, class and site, and warnings about missing, duplicated or unusual data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crcjax.data.cohort import CALIBRATION, SPLITS, Cohort, SlideRow
from crcjax.errors import InputError
from crcjax.slides.store.tile_store import open_store, tiled_slides

NO_SPLIT = "no split"
UNLABELLED = "unlabelled"
# A class is small below this fraction of the largest class's training cases.
_SMALL_CLASS = 0.2
# A site with this many training cases, all of one class, is worth a warning.
_SITE_CASES = 5
_SHOWN_SITES = 20
_SHOWN_IDS = 5


@dataclass(frozen=True)
class SummaryRow:
    """Cases and slides of one class, of one site or of the whole cohort, by split in the summary's order of splits."""

    group: str
    name: str
    cases: tuple[int, ...]
    slides: tuple[int, ...]


@dataclass(frozen=True)
class CohortSummary:
    """A cohort in numbers.

    `warnings` are sentences about data to check before training, `problems` are sentences about data that training cannot
    use. `str(summary)` is the table.
    """

    splits: tuple[str, ...]
    rows: tuple[SummaryRow, ...]
    warnings: list[str]
    problems: list[str]

    @property
    def table(self) -> str:
        """Lines of text with aligned columns: the number of cases, and in brackets of slides."""
        header = ["cases (slides)", *self.splits]
        lines, group = [header], ""
        for row in self.rows:
            if row.group != group and row.group != "all":
                lines.append([row.group] + [""] * len(self.splits))
            group = row.group
            counts = zip(row.cases, row.slides, strict=True)
            indent = "" if row.group == "all" else "  "
            lines.append([indent + row.name, *(f"{cases} ({slides})" for cases, slides in counts)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
        return "\n".join("  ".join(cells).rstrip() for cells in padded)

    def __str__(self) -> str:
        return self.table


def summarise_cohort(
    cohort: Cohort, content_hash: Mapping[str, str] | None = None, *, needs_validation: bool = True
) -> CohortSummary:
    """Counts the cases and slides of a cohort per split, class and site.

    Args:
      cohort: all slides of the table, after splits were assigned, with every class that the model will have.
      content_hash: the content hash of each slide in the store, by slide id (`content_hashes`). With None, duplicated
        files are detected by their paths alone.
      needs_validation: whether a cohort without validation cases is a problem. If the user asked for none, it is a warning.

    Returns:
      The summary. Its problems: no labelled slide, no training case, training cases of fewer than two classes, no
      validation case. Its warnings: classes without training, validation or test cases, unusually small classes, sites
      with one class, unlabelled slides, slides without a split, cases in two splits, and files that occur more than once
      in the cohort.
    """
    rows = cohort.rows
    used = [split for split in SPLITS if split != CALIBRATION or any(row.split == split for row in rows)]
    splits = (*used, *((NO_SPLIT,) if any(row.split is None for row in rows) else ()))
    classes = (*cohort.classes, *((UNLABELLED,) if any(row.label is None for row in rows) else ()))
    table = [_counts("class", name, _of_class(rows, name), splits) for name in classes]
    sites = _sites(rows)
    if len(sites) > 1:
        table += [_counts("site", name, _of_site(rows, name), splits) for name in sites[:_SHOWN_SITES]]
        if rest := sites[_SHOWN_SITES:]:
            table.append(_counts("site", f"{len(rest)} others", [row for row in rows if row.site in rest], splits))
    table.append(_counts("all", "all", rows, splits))
    problems, unvalidated = _problems(cohort), _without_validation(cohort)
    warnings = [
        *(() if needs_validation else unvalidated),
        *_class_warnings(cohort),
        *_site_warnings(cohort, sites),
        *_unused_slides(cohort),
        *_cases_in_two_splits(rows),
        *duplicated_slides(rows, content_hash),
    ]
    return CohortSummary(splits, tuple(table), warnings, problems + (unvalidated if needs_validation else []))


def duplicated_slides(rows: Iterable[SlideRow], content_hash: Mapping[str, str] | None = None) -> list[str]:
    """One sentence for each slide file that has several slide ids in the cohort.

    Two slides are the same file if they have the same content hash in the store, or else the same path.
    """
    rows_by_file: dict[str, list[SlideRow]] = {}
    for row in rows:
        file_key = (content_hash or {}).get(row.slide_id) or (str(row.path.resolve()) if row.path else "")
        if file_key:
            rows_by_file.setdefault(file_key, []).append(row)
    sentences = []
    for file_key, duplicates in rows_by_file.items():
        if len(duplicates) == 1:
            continue
        reason = "the same content_hash" if file_key in (content_hash or {}).values() else "the same path"
        names = " and ".join(f"{row.slide_id} (case {row.case_id}, {row.split or NO_SPLIT})" for row in duplicates)
        leaks = len({row.split for row in duplicates if row.split}) > 1
        effect = "; the model would be tested on slides that it was trained on" if leaks else ""
        sentences.append(f"slides {names} have {reason}{effect}; keep one, or correct the path of the others")
    return sentences


def content_hashes(store: str | Path, rows: Iterable[SlideRow]) -> dict[str, str]:
    """The content hash of each slide in the store, by slide id. Slides that are missing or damaged are left out."""
    tiled, hashes = set(tiled_slides(store)), {}
    for row in rows:
        if row.slide_id in tiled:
            try:
                content_hash = open_store(store, row.slide_id).info.content_hash
            except InputError:
                continue
            if content_hash:
                hashes[row.slide_id] = content_hash
    return hashes


def _of_class(rows: Sequence[SlideRow], name: str) -> list[SlideRow]:
    return [row for row in rows if (row.label or UNLABELLED) == name]


def _of_site(rows: Sequence[SlideRow], name: str) -> list[SlideRow]:
    return [row for row in rows if row.site == name]


def _sites(rows: Sequence[SlideRow]) -> list[str]:
    """The sites of the cohort, sorted by falling number of cases."""
    cases = {row.site: len({other.case_id for other in _of_site(rows, row.site)}) for row in rows if row.site}
    return sorted(cases, key=lambda site: (-cases[site], site))


def _counts(group: str, name: str, rows: Sequence[SlideRow], splits: Sequence[str]) -> SummaryRow:
    rows_by_split = [[row for row in rows if (row.split or NO_SPLIT) == split] for split in splits]
    cases = tuple(len({row.case_id for row in split_rows}) for split_rows in rows_by_split)
    return SummaryRow(group, name, cases, tuple(map(len, rows_by_split)))


def _cases(rows: Sequence[SlideRow], split: str, name: str | None = None) -> set[str]:
    """The labelled cases of a split, of one class or of all."""
    return {row.case_id for row in rows if row.split == split and row.label and name in (None, row.label)}


def _problems(cohort: Cohort) -> list[str]:
    rows = cohort.rows
    if not any(row.label for row in rows):
        return [f"the cohort has no labelled slide; fill in the column {cohort.label}"]
    train = _cases(rows, "train")
    splits = sorted({row.split for row in rows if row.split})
    if not train and not _cases(rows, "val"):
        reason = f"all labelled cases have split {' or '.join(splits)}" if splits else "no case has a split"
        return [f"no labelled case has split train or val ({reason}); correct the column split, or leave it empty"]
    problems = []
    trained_classes = [name for name in cohort.classes if _cases(rows, "train", name)]
    if not train:
        problems.append("no labelled case has split train; correct the column split, or leave it empty")
    elif len(trained_classes) < 2:
        problems.append(
            f"all {len(train)} training cases are {trained_classes[0]}; training needs cases of two classes or more"
        )
    return problems


def _without_validation(cohort: Cohort) -> list[str]:
    if not _cases(cohort.rows, "train") or _cases(cohort.rows, "val"):
        return []
    return [
        "no labelled case has split val, so no checkpoint can be chosen; give some cases split val, or leave the column "
        "split empty and set config.data.val_fraction"
    ]


def _class_warnings(cohort: Cohort) -> list[str]:
    rows, sentences = cohort.rows, []
    for split, kind, effect in (
        ("train", "training", "the model cannot learn it"),
        ("val", "validation", "validation metrics leave it out"),
        ("test", "test", "test metrics leave it out"),
    ):
        if _cases(rows, split):
            lacking = [name for name in cohort.classes if not _cases(rows, split, name)]
            sentences += [f"class {name} has no {kind} case; {effect}" for name in lacking]
    counts = {name: len(_cases(rows, "train", name)) for name in cohort.classes}
    largest = max(counts, key=lambda name: counts[name], default="")
    for name, count in counts.items():
        if 0 < count < _SMALL_CLASS * counts[largest]:
            sentences.append(
                f"class {name} has {count} training cases, {largest} has {counts[largest]}; expect a low sensitivity for it"
            )
    return sentences


def _site_warnings(cohort: Cohort, sites: Sequence[str]) -> list[str]:
    """Sites whose training cases are all of one class: the model could learn the site in place of the class."""
    sentences = []
    for site in sites if len(sites) > 1 else ():
        rows = _of_site(cohort.rows, site)
        classes = [name for name in cohort.classes if _cases(rows, "train", name)]
        count = len(_cases(rows, "train"))
        if len(classes) == 1 and count >= _SITE_CASES:
            sentences.append(
                f"all {count} training cases of site {site} are {classes[0]}; the model could learn the site instead"
            )
    return sentences


def _unused_slides(cohort: Cohort) -> list[str]:
    unlabelled = [row.slide_id for row in cohort.rows if row.label is None]
    unsplit = [row.slide_id for row in cohort.rows if row.label and row.split is None]
    return [
        f"training and validation leave out {_id_list(slide_ids)} without a {column}"
        for column, slide_ids in ((cohort.label, unlabelled), ("split", unsplit))
        if slide_ids
    ]


def _id_list(slide_ids: Sequence[str]) -> str:
    first_ids = ", ".join(slide_ids[:_SHOWN_IDS]) + (", …" if len(slide_ids) > _SHOWN_IDS else "")
    return f"{len(slide_ids)} slide{'s' * (len(slide_ids) > 1)} ({first_ids})"


def _cases_in_two_splits(rows: Sequence[SlideRow]) -> list[str]:
    splits_of: dict[str, set[str]] = {}
    for row in rows:
        if row.split:
            splits_of.setdefault(row.case_id, set()).add(row.split)
    return [
        f"case {case} has slides in {' and '.join(sorted(splits, key=SPLITS.index))}; give all of its slides one split"
        for case, splits in splits_of.items()
        if len(splits) > 1
    ]
