"""The third-party packages that an installed crcjax needs: as a CycloneDX SBOM and as a table.

The list follows the requirements of the installed crcjax, so that a developer's further packages are not in it.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "crcjax"
# A longer text under "License" is the licence itself, not its name.
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
      name, version: as installed.
      licence: as its metadata states it; empty if they do not.
      is_expression: whether `licence` is an SPDX expression.
      requires: names of the packages that it needs here.
    """

    name: str
    version: str
    licence: str
    is_expression: bool
    requires: tuple[str, ...]

    @property
    def purl(self) -> str:
        """The package's URL, which names it in an SBOM."""
        return f"pkg:pypi/{self.name}@{self.version}"


def installed_packages(root: str = ROOT) -> tuple[Package, ...]:
    """A package and all that it needs without extras, the package first and then by name; none if it is not installed.

    Requirements whose markers do not hold on this machine, and those that are not installed, are left out.
    """
    packages: dict[str, Package] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(canonicalize_name(root), frozenset())]
    visited: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        needed = list(_needed(distribution, extras))
        before = packages[name].requires if name in packages else ()
        requires = tuple(sorted({*before, *(required for required, _ in needed)}))
        packages[name] = Package(name, distribution.version, *_licence(distribution), requires)
        waiting += needed
    by_name = [packages[name] for name in sorted(packages)]
    first = [package for package in by_name if package.name == canonicalize_name(root)]
    return (*first, *(package for package in by_name if package not in first))


def _needed(distribution: metadata.Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for text in distribution.requires or ():
        requirement = Requirement(text)
        # A marker without an extra is evaluated with the empty one.
        environments = [{"extra": extra} for extra in (*extras, "")]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def _licence(distribution: metadata.Distribution) -> tuple[str, bool]:
    facts = distribution.metadata
    if "License-Expression" in facts:
        return facts["License-Expression"], True
    name = facts["License"].strip() if "License" in facts else ""
    if name and "\n" not in name and len(name) <= _LONGEST_NAME:
        return name, False
    classifiers = [text for text in facts.get_all("Classifier") or () if text.startswith("License :: ")]
    return "; ".join(text.rpartition(" :: ")[2] for text in classifiers), False


def sbom(packages: Sequence[Package], date: str) -> str:
    """The packages as a CycloneDX 1.6 document in JSON; the same packages and date give the same text."""
    first, *others = packages
    present = {package.name: package.purl for package in packages}
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": f"{date}T00:00:00Z", "component": {"type": "application", **_component(first)}},
        "components": [{"type": "library", **_component(package)} for package in others],
        "dependencies": [
            {"ref": package.purl, "dependsOn": [present[name] for name in package.requires if name in present]}
            for package in packages
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))
    return json.dumps({"bomFormat": "CycloneDX", "serialNumber": serial.urn} | document, indent=1) + "\n"


def _component(package: Package) -> dict[str, Any]:
    facts = {"name": package.name, "version": package.version, "bom-ref": package.purl, "purl": package.purl}
    if not package.licence:
        return facts
    stated = {"expression": package.licence} if package.is_expression else {"license": {"name": package.licence}}
    return facts | {"licenses": [stated]}


def soup_rows(packages: Sequence[Package]) -> list[dict[str, str]]:
    """The packages as rows of a table. Their purpose and known anomalies are an open item of software_lifecycle."""
    required_by: dict[str, list[str]] = {}
    for package in packages:
        for name in package.requires:
            required_by.setdefault(name, []).append(package.name)
    return [
        {
            "package": package.name,
            "version": package.version,
            "licence": package.licence or "not stated",
            "required_by": " ".join(required_by.get(package.name, ())),
        }
        for package in packages[1:]
    ]
