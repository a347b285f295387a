import json
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.parallel.cluster_env import ClusterEnvironment, detect_cluster

BATCH = {"AWS_BATCH_JOB_NUM_NODES": "4", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0"}
AZURE = {"AZUREML_RUN_ID": "r", "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105", "RANK": "2", "WORLD_SIZE": "4"}
VERTEX = {
    "cluster": {"workerpool0": ["first:2222"], "workerpool1": ["a:2222", "b:2222"]},
    "task": {"type": "workerpool1", "index": 1},
}


def test_aws_batch_says_all_to_its_main_node_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    other = BATCH | {"AWS_BATCH_JOB_NODE_INDEX": "3", "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.7"}
    assert detect_cluster(other) == ClusterEnvironment("10.0.0.7:61440", 4, 3)
    monkeypatch.setattr("socket.gethostname", lambda: "ip-10-0-0-7")
    assert detect_cluster(BATCH | {"AWS_BATCH_JOB_NODE_INDEX": "0"}) == ClusterEnvironment("ip-10-0-0-7:61440", 4, 0)
    # Process 0 is the main node, whichever it is.
    moved = {**other, "AWS_BATCH_JOB_MAIN_NODE_INDEX": "2"}
    assert detect_cluster(moved) == ClusterEnvironment("10.0.0.7:61440", 4, 1)


def test_sagemaker_describes_the_machines_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "resourceconfig.json"
    hosts = [f"algo-{number}" for number in range(1, 12)]
    path.write_text(json.dumps({"current_host": "algo-10", "hosts": sorted(hosts)}))
    environment = {"CRCJAX_HOSTS_FILE": str(path)}
    assert detect_cluster(environment) == ClusterEnvironment("algo-1:61440", 11, 9)
    path.write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}))
    assert detect_cluster(environment) is None
    path.write_text("{}")
    with pytest.raises(InputError, match=r"resourceconfig\.json with hosts and current_host"):
        detect_cluster(environment)


def test_azure_ml_says_all_and_the_same_variables_elsewhere_say_nothing() -> None:
    assert detect_cluster(AZURE) == ClusterEnvironment("10.0.0.4:6105", 4, 2)
    assert detect_cluster({name: value for name, value in AZURE.items() if name != "AZUREML_RUN_ID"}) is None


def test_vertex_counts_the_processes_of_all_pools() -> None:
    assert detect_cluster({"CLUSTER_SPEC": json.dumps(VERTEX)}) == ClusterEnvironment("first:2222", 3, 2)
    first = VERTEX | {"task": {"type": "workerpool0", "index": 0}}
    assert detect_cluster({"CLUSTER_SPEC": json.dumps(first)}) == ClusterEnvironment("first:2222", 3, 0)
    with pytest.raises(InputError, match="CLUSTER_SPEC must be Vertex AI's JSON"):
        detect_cluster({"CLUSTER_SPEC": "[]"})
