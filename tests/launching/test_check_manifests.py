import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from crcjax.launching.check_manifests import manifest_faults
from crcjax.launching.read_manifests import longest_save_s, read_manifests, schema_faults

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "launch" / "kubernetes" / "service"
FOLDERS = (ROOT / "launch" / "kubernetes", ROOT / "launch" / "kuberay", SERVICE / "base", SERVICE / "overlays" / "gpu")


@pytest.fixture(scope="module")
def service() -> list[dict]:
    return read_manifests(SERVICE / "overlays" / "monitored")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_manifests_in_launch_have_no_fault(folder: Path) -> None:
    objects = read_manifests(folder)
    assert schema_faults(objects) == []
    assert manifest_faults(objects, 60) == []


def test_the_monitored_overlay_has_the_service_with_a_gpu_and_no_fault(service: list[dict]) -> None:
    assert schema_faults(service) == manifest_faults(service, 60) == []
    kinds = sorted(manifest["kind"] for manifest in service)
    assert kinds == [
        *("Deployment", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "Service", "ServiceMonitor")
    ]
    (deployment,) = (manifest for manifest in service if manifest["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_arguments_of_the_service_are_options_that_it_has(service: list[dict]) -> None:
    from crcjax.serve.config import ServeConfig

    (deployment,) = (manifest for manifest in service if manifest["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    options = [argument.removeprefix("--").partition("=")[0].replace("-", "_") for argument in container["args"]]
    assert set(options) <= ServeConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("terminationGracePeriodSeconds", 120, "must be at least --drain-s and 15 s more, 135, got 120"),
        ("hostNetwork", True, "hostNetwork must not be set"),
        ("automountServiceAccountToken", True, "automountServiceAccountToken must be false"),
    ],
)
def test_a_fault_names_the_object_the_field_and_what_it_must_be(
    field: str, value: object, message: str, service: list[dict]
) -> None:
    damaged = copy.deepcopy(service)
    (deployment,) = (manifest for manifest in damaged if manifest["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"][field] = value
    (fault,) = manifest_faults(damaged, 60)
    assert fault.startswith("Deployment crcjax-service: ")
    assert message in fault


def test_the_least_grace_period_follows_from_the_longest_save_of_a_run(crcjax, tmp_path: Path) -> None:
    saves = [
        {"kind": "checkpoint_saved", "facts": {"step": step, "seconds": seconds}}
        for step, seconds in ((1, 2), (2, 170))
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, [*saves, {"kind": "restarted", "facts": {}}])))
    assert longest_save_s(tmp_path) == 170
    done = crcjax("launch", "check", ROOT / "launch" / "kubernetes", "--run", tmp_path)
    assert done.returncode == 1
    assert "terminationGracePeriodSeconds must be at least 340" in done.stdout
    absent = crcjax("launch", "check", ROOT / "launch" / "kubernetes", "--run", tmp_path / "absent")
    assert absent.returncode == 2
    assert "give the --workdir of a run" in absent.stderr
    assert crcjax("launch", "check", tmp_path / "absent.yaml").returncode == 2
    all_manifests = crcjax("launch", "check", ROOT / "launch" / "kubernetes")
    assert (all_manifests.returncode, all_manifests.stdout) == (0, "no fault in 2 objects\n")


def test_at_least_95_per_cent_of_mutated_manifests_are_caught_and_the_others_are_listed() -> None:
    recorded = json.loads((ROOT / "tools" / "results" / "mutate_manifests.json").read_text())
    (total,) = (row for row in recorded["rows"] if row["fault"] == "all")
    assert total["mutants"] >= 200
    assert total["valid by the schemas"] >= total["mutants"] / 2
    assert total["caught"] >= 0.95 * total["mutants"]
    listed = {(row["fault"], place) for row in recorded["rows"] for place in filter(None, row["missed"].split(", "))}
    assert len(listed) == total["mutants"] - total["caught"]
    spec = importlib.util.spec_from_file_location("mutate_manifests", ROOT / "tools" / "mutate_manifests.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules["mutate_manifests"] = tool
    spec.loader.exec_module(tool)
    sample = list(tool.outcomes(every=9))
    assert len(sample) > 20
    missed = {(one["operator"], f"{one['source']} {one['number']}") for one in sample if not one["caught"]}
    assert missed <= listed
