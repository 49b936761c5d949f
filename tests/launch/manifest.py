"""The fields of a JobSet (v1alpha2) and of its Job and pods that we use, with their types: all are needed, no other is allowed.

Names and types as in the custom resource definition of JobSet 0.6 to 0.12, which embeds those of batch/v1 and core/v1.
"""

import re

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
POD_CONDITION = {"type": {"DisruptionTarget"}, "status": {"True"}}
EXIT_CODES = {"containerName": LABEL, "operator": {"In", "NotIn"}, "values": [int]}
CONTAINER = {
    "name": LABEL,
    "image": str,
    "command": [str],
    "args": [str],
    "resources": {"limits": {"google.com/tpu": int}},
    "volumeMounts": [{"name": LABEL, "mountPath": str}],
}
POD = {
    "metadata": {"annotations": {"gke-gcsfuse/volumes": {"true", "false"}}},
    "spec": {
        "restartPolicy": {"Never"},  # what a podFailurePolicy asks for
        "terminationGracePeriodSeconds": int,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": {"tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice"},
            "cloud.google.com/gke-tpu-topology": re.compile(r"\d+x\d+(x\d+)?"),
        },
        "containers": [CONTAINER],
        "volumes": [{"name": LABEL, "persistentVolumeClaim": {"claimName": str}}],
    },
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed"},
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": (
            {"action": {"Count"}, "onPodConditions": [POD_CONDITION]},
            {"action": {"FailJob"}, "onExitCodes": EXIT_CODES},
        )
    },
    "template": POD,
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {
        "name": LABEL,
        "namespace": LABEL,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": {"cloud.google.com/gke-nodepool"}},
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": LABEL, "action": {"FailJobSet"}, "onJobFailureReasons": [{"PodFailurePolicy"}]}],
        },
        "replicatedJobs": [{"name": LABEL, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check(value, schema, path="manifest"):
    """Raises AssertionError for the first field that does not fit."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{path} is no mapping"
        assert set(value) == set(schema), f"{path} has {sorted(value)}, expected {sorted(schema)}"
        for key, item in schema.items():
            check(value[key], item, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, f"{path} is no list, or empty"
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    elif isinstance(schema, tuple):
        assert isinstance(value, list) and len(value) == len(schema), f"{path} is no list of {len(schema)}"
        for index, (item, kind) in enumerate(zip(value, schema, strict=True)):
            check(item, kind, f"{path}[{index}]")
    elif isinstance(schema, set):
        assert value in schema, f"{path} is {value!r}, expected one of {sorted(schema)}"
    elif isinstance(schema, re.Pattern):
        assert isinstance(value, str) and schema.fullmatch(value), f"{path} is {value!r}, expected {schema.pattern}"
    else:
        assert type(value) is schema, f"{path} is {value!r}, expected {schema.__name__}"


def outcome(jobset, code, disrupted=False):
    """What the controllers do when a pod ends: "done", "restart" (counted against maxRestarts) or "fail"."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    if code == 0:
        return "done"
    for rule in job["podFailurePolicy"]["rules"]:  # the first that fits counts
        if "onPodConditions" in rule:
            fits = disrupted
        else:
            fits = (code in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In")
        if fits:
            reason = {"FailJob": "PodFailurePolicy", "Count": "BackoffLimitExceeded"}[rule["action"]]
            break
    else:
        reason = "BackoffLimitExceeded"
    assert job["backoffLimit"] == 0, "one counted pod would not end the Job"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return {"FailJobSet": "fail"}[rule["action"]]
    return "restart"
