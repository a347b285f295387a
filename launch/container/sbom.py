"""Writes the bill of materials of an image (CycloneDX 1.6): every wheel that is installed, with version and SHA-256.

python sbom.py LOCK.txt WHEELS > sbom.json
"""

import hashlib
import json
import re
import sys
from pathlib import Path


def components(lock: Path, wheels: Path) -> list[dict]:
    """One component for each line of the lock file, with the hash of its wheel. Raises SystemExit: a wheel is missing."""
    by_name = {_normal(path.name.split("-")[0]): path for path in wheels.glob("*.whl")}
    listed = []
    for line in lock.read_text().splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if not version:
            continue
        wheel = by_name.get(_normal(name.partition("[")[0]))
        if wheel is None:
            sys.exit(f"sbom.py: {wheels} has no wheel of {line}; download it with the others")
        listed.append(_component(wheel, version))
    own = [path for name, path in by_name.items() if name.startswith("crcjax")]
    return [*(_component(path, path.name.split("-")[1]) for path in own), *listed]


def _component(wheel: Path, version: str) -> dict:
    name = _normal(wheel.name.split("-")[0])
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    print(json.dumps({**bill, "components": components(Path(sys.argv[1]), Path(sys.argv[2]))}, indent=1))
