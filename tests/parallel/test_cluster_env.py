from pathlib import Path

import pytest

from crcjax.config import get_config
from crcjax.errors import InputError
from crcjax.parallel.cluster_env import ClusterEnvironment, detect_cluster
from crcjax.runs.run_directory import common_facts

SRUN = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08,11],login1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JOBSET = {"JOB_COMPLETION_INDEX": "3", "JOBSET_NAME": "epoc", "REPLICATED_JOB_NAME": "workers"}


def test_a_bare_environment_is_a_single_process() -> None:
    assert detect_cluster({}) is None


def test_srun_says_all() -> None:
    assert detect_cluster(SRUN) == ClusterEnvironment("gpu07:61443", 8, 5, (1,))
    for nodes, first in (("a,b", "a"), ("gpu[07-08]-ib,a", "gpu07-ib"), ("rack[1-2]n[3,5],b", "rack1n3")):
        assert detect_cluster(SRUN | {"SLURM_STEP_NODELIST": nodes}) == ClusterEnvironment(f"{first}:61443", 8, 5, (1,))


def test_a_batch_script_without_srun_and_a_step_of_one_task_run_alone() -> None:
    assert detect_cluster({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) is None
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert detect_cluster(SRUN | alone) is None


def test_mpirun_says_all() -> None:
    assert detect_cluster(MPIRUN) == ClusterEnvironment(f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 2)


def test_a_jobset_says_all_but_how_many() -> None:
    assert detect_cluster(JOBSET, process_count=4) == ClusterEnvironment("epoc-workers-0-0.epoc:61440", 4, 3)
    with pytest.raises(InputError, match=r"Kubernetes does not say --processes N.*--processes 1 to run alone"):
        detect_cluster(JOBSET)
    assert detect_cluster(JOBSET, process_count=1) is None


def test_flags_go_before_the_environment() -> None:
    assert detect_cluster(SRUN, "h:1", 2, 1) == ClusterEnvironment("h:1", 2, 1, (1,))
    assert detect_cluster({}, "h:1", 2, 1) == ClusterEnvironment("h:1", 2, 1)


@pytest.mark.parametrize(
    ("visible", "gpus"), [("0,1,2,3", (2, 3)), ("GPU-1", None), ("0,1", (1,)), ("0,1,2", "got 3 GPUs for 2 processes")]
)
def test_processes_of_one_machine_divide_its_visible_gpus(visible: str, gpus) -> None:
    environment = SRUN | {"CUDA_VISIBLE_DEVICES": visible}
    if isinstance(gpus, str):
        with pytest.raises(InputError, match=gpus):
            detect_cluster(environment)
    else:
        assert detect_cluster(environment).gpu_indices == gpus


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, 0), "does not say --processes N"),
        ((None, 2, None), "does not say --coordinator HOST:PORT or --process I"),
        (("h:1", 2, 2), "--process must be from 0 to 1 .*, got 2"),
        (("h", 2, 1), "must be HOST:PORT, the address of process 0, got 'h'"),
    ],
)
def test_what_is_missing_or_impossible_is_named(given: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        detect_cluster({}, *given)


def test_processes_with_other_weights_or_labels_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    config = get_config()
    config.model.weights, config.tasks.labels = str(tmp_path / "a.safetensors"), str(tmp_path / "labels")
    (tmp_path / "labels").mkdir()
    found = []
    for content in (b"1", b"2"):
        for file in (tmp_path / "a.safetensors", tmp_path / "labels" / "slide.csv"):
            file.write_bytes(content)
        found.append(common_facts(config, tmp_path))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"the weights", "the labels"}
