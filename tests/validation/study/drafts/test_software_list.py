"""The list of software is that of the installed package and nothing more."""

import csv
import importlib.metadata
import io
import json

import pytest

from crcjax.validation.predictions_table import table_text
from crcjax.validation.study.drafts.software_list import Package, installed_packages, sbom, soup_rows

# Of the extras `dev` and `torch` and their requirements, which a user's installation lacks.
OF_DEVELOPERS = {
    "pytest",
    "mypy",
    "ruff",
    "hypothesis",
    "beartype",
    "playwright",
    "pypdf",
    "torch",
    "statsmodels",
    "weasyprint",
}


@pytest.fixture(scope="module")
def packages() -> tuple[Package, ...]:
    return installed_packages()


def test_all_requirements_are_listed_with_their_installed_versions_and_no_package_of_developers(packages) -> None:
    names = [package.name for package in packages]
    assert names[0] == "crcjax"
    assert len(names) == len(set(names)) > 30
    # Needed directly, and by what is needed.
    assert {"jax", "jaxlib", "numpy", "scipy", "pydantic", "pydantic-core", "jinja2", "markupsafe"} <= set(names)
    assert not OF_DEVELOPERS & set(names)
    for package in packages:
        assert package.version == importlib.metadata.version(package.name)
    assert sum(bool(package.licence) for package in packages) > 0.9 * len(packages)


def test_the_sbom_names_every_package_once_and_how_they_depend(packages) -> None:
    text = sbom(packages, "2026-01-31")
    assert text == sbom(packages, "2026-01-31")
    document = json.loads(text)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["serialNumber"].startswith("urn:uuid:")
    assert document["metadata"]["component"]["name"] == "crcjax"
    references = [document["metadata"]["component"]["bom-ref"], *(c["bom-ref"] for c in document["components"])]
    assert references == [package.purl for package in packages]
    assert [each["ref"] for each in document["dependencies"]] == references
    depends = {each["ref"]: each["dependsOn"] for each in document["dependencies"]}
    assert {reference for needed in depends.values() for reference in needed} == set(references[1:])
    pydantic = next(reference for reference in references if reference.startswith("pkg:pypi/pydantic@"))
    assert any(reference.startswith("pkg:pypi/pydantic-core@") for reference in depends[pydantic])
    assert json.loads(sbom(packages[:-1], "2026-01-31"))["serialNumber"] != document["serialNumber"]


def test_the_table_says_who_needs_a_package(packages) -> None:
    rows = {row["package"]: row for row in csv.DictReader(io.StringIO(table_text(soup_rows(packages))))}
    assert set(rows) == {package.name for package in packages[1:]}
    assert "pydantic" in rows["pydantic-core"]["required_by"].split()
    assert all(row["required_by"] and row["licence"] for row in rows.values())


def test_a_package_that_is_not_installed_has_no_list() -> None:
    assert installed_packages("no-such-package-of-this-test") == ()
