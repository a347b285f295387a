"""Checks rendered files by the clouds' own descriptions; run by the Python of make cloud-packages.

    python check_clouds.py FOLDER

FOLDER holds a folder for each cloud. Prints one line for each fault, and ends with 1 if there is one.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import yaml


def aws_faults(service: str, operation: str, path: Path) -> list[str]:
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model(service).operation_model(operation).input_shape
    request = json.loads(path.read_text())
    report = ParamValidator().validate(request, shape).generate_report()
    return [f"{path}: {line}" for line in [*report.splitlines(), *_enum_faults(request, shape)] if line]


def _enum_faults(value: object, shape, where: str = "") -> list[str]:
    """botocore leaves the values of enumerations, and patterns, to the service."""
    import re

    faults = []
    if shape.type_name == "structure" and isinstance(value, dict):
        for name, inner in value.items():
            if name in shape.members:
                faults += _enum_faults(inner, shape.members[name], f"{where}.{name}")
    elif shape.type_name == "list" and isinstance(value, list):
        for inner in value:
            faults += _enum_faults(inner, shape.member, f"{where}[]")
    elif shape.type_name == "string" and isinstance(value, str):
        if shape.enum and value not in shape.enum:
            faults.append(f"{where} must be one of {len(shape.enum)} values, got {value!r}")
        pattern = shape.metadata.get("pattern")
        if pattern and not re.fullmatch(pattern, value):
            faults.append(f"{where} must match {pattern}, got {value!r}")
    return faults


def azure_faults(path: Path) -> list[str]:
    from azure.ai.ml import load_job

    try:
        job = load_job(path)
        result = job._validate()
    # The loader raises many kinds, all of which name the field.
    except Exception as error:
        return [f"{path}: {error}"]
    return [] if result.passed else [f"{path}: {result.error_messages}"]


def vertex_faults(path: Path) -> list[str]:
    from google.cloud.aiplatform_v1.types import CustomJobSpec
    from google.protobuf.json_format import ParseDict, ParseError

    try:
        ParseDict(yaml.safe_load(path.read_text()), CustomJobSpec.pb(CustomJobSpec()))
    except ParseError as error:
        return [f"{path}: {error}"]
    return []


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder = Path(sys.argv[1])
    faults = [
        *aws_faults("batch", "RegisterJobDefinition", folder / "aws-batch" / "job-definition.json"),
        *aws_faults("batch", "SubmitJob", folder / "aws-batch" / "submit-job.json"),
        *aws_faults("sagemaker", "CreateTrainingJob", folder / "sagemaker" / "training-job.json"),
        *azure_faults(folder / "azure-ml" / "job.yml"),
        *vertex_faults(folder / "vertex" / "custom-job.yaml"),
    ]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
