"""Records JSON schemas of Kubernetes' Job and Service, for the manifests that dtrun prints.

    pip install kubernetes; python -m tests.record_schemas

Source: the models of the Python client `kubernetes` (Apache-2.0), which are made from the OpenAPI
description of Kubernetes; for a JobSet, by hand, the types of kubernetes-sigs/jobset, v1alpha2
(Apache-2.0). Kept: names, types and what is required; unknown names are errors. What
no manifest of ours comes near is an object of any kind.
"""

from __future__ import annotations

import importlib
import json
from importlib import metadata
from typing import Any

from tests.tree import ROOT

TARGET = ROOT / "tests" / "recorded" / "kubernetes" / "schemas.json"
KEPT = {
    "Capabilities",
    "Container",
    "ContainerPort",
    "EmptyDirVolumeSource",
    "EnvVar",
    "EnvVarSource",
    "JobSpec",
    "KeyToPath",
    "LabelSelector",
    "LocalObjectReference",
    "ObjectMeta",
    "PersistentVolumeClaimVolumeSource",
    "PodFailurePolicy",
    "PodFailurePolicyOnExitCodesRequirement",
    "PodFailurePolicyOnPodConditionsPattern",
    "PodFailurePolicyRule",
    "PodSecurityContext",
    "PodSpec",
    "PodTemplateSpec",
    "ResourceRequirements",
    "SeccompProfile",
    "SecretVolumeSource",
    "SecurityContext",
    "ServicePort",
    "ServiceSpec",
    "SuccessPolicy",
    "SuccessPolicyRule",
    "Toleration",
    "TopologySpreadConstraint",
    "Volume",
    "VolumeMount",
}


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    found = {"type": "object", "additionalProperties": False, "properties": properties}
    return found | {"required": required.split()} if required else found


TEXT, NUMBER, SWITCH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
META = {"$ref": "#/$defs/ObjectMeta"}
REPLICATED = _object(
    "name template",
    name=TEXT,
    replicas=NUMBER,
    groupName=TEXT,
    template=_object("spec", metadata=META, spec={"$ref": "#/$defs/JobSpec"}),
)
JOB_SET = _object(
    "apiVersion kind metadata spec",
    apiVersion=TEXT,
    kind=TEXT,
    metadata=META,
    spec=_object(
        "replicatedJobs",
        replicatedJobs={"type": "array", "items": REPLICATED},
        network=_object(enableDNSHostnames=SWITCH, subdomain=TEXT, publishNotReadyAddresses=SWITCH),
        failurePolicy=_object(maxRestarts=NUMBER),
        successPolicy=_object(operator=TEXT, targetReplicatedJobs={"type": "array", "items": TEXT}),
        suspend=SWITCH,
        ttlSecondsAfterFinished=NUMBER,
    ),
)


def plain(schema: Any) -> Any:
    """A schema without words, and without "or null", which YAML has no need of."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2].removeprefix("V1")
        return {"$ref": f"#/$defs/{name}"} if name in KEPT else {"type": "object"}
    kinds = [one for one in schema.get("anyOf", []) if one != {"type": "null"}]
    if len(kinds) == 1:
        return plain(kinds[0])
    words = {"description", "title", "default", "$defs", "properties"}
    kept = {key: plain(value) for key, value in schema.items() if key not in words}
    if "properties" in schema:
        kept["properties"] = {name: plain(one) for name, one in schema["properties"].items()}
    return kept


def main() -> None:
    """Write the recording."""
    found: dict[str, Any] = {"JobSet": JOB_SET}
    for kind, module in (("Job", "v1_job"), ("Service", "v1_service")):
        model = getattr(importlib.import_module(f"kubernetes.client.models.{module}"), f"V1{kind}")
        schema = model.model_json_schema(by_alias=True)
        found[kind] = plain(schema)
        for name, one in schema["$defs"].items():
            if (short := name.removeprefix("V1")) in KEPT:
                found[short] = plain(one)
    source = f"kubernetes {metadata.version('kubernetes')} (Python client, Apache-2.0)"
    TARGET.parent.mkdir(exist_ok=True)
    text = json.dumps({"source": source, "$defs": dict(sorted(found.items()))}, indent=1)
    TARGET.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
