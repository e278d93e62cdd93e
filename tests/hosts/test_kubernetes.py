"""The manifests: valid by Kubernetes' own schemas, as they are and as the GPU's patches leave them."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentrt.cli import app
from latentrt.serve.door.access import HEALTH_PATHS, allow
from tests.hosts.environment import PYTHON, missing
from tests.serve.live import live, open_demo

FOLDER = Path(__file__).resolve().parent.parent.parent / "deploy" / "kubernetes"
VERSION = "1.34"


def documents() -> dict[str, Any]:
    """By kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "base" / "latentrt.yaml").read_text())}


def test_no_kustomization_lies_above_what_it_is_made_of() -> None:
    """kustomize refuses a folder that has the other one in it."""
    for path in FOLDER.rglob("kustomization.yaml"):
        for resource in yaml.safe_load(path.read_text())["resources"]:
            found = (path.parent / resource).resolve()
            assert found.exists()
            assert found not in path.resolve().parents


def patched(objects: dict[str, Any]) -> dict[str, Any]:
    """What kustomize makes of them for GPUs: JSON patches (RFC 6902) that add and replace."""
    found = copy.deepcopy(objects)
    kustomization = yaml.safe_load((FOLDER / "gpu" / "kustomization.yaml").read_text())
    for patch in kustomization["patches"]:
        target = found[patch["target"]["kind"]]
        assert target["metadata"]["name"] == patch["target"]["name"]
        for change in yaml.safe_load(patch["patch"]):
            *way, last = (part.replace("~1", "/") for part in change["path"].split("/")[1:])
            place: Any = target
            for part in way:
                place = place[int(part)] if isinstance(place, list) else place[part]
            assert change["op"] in ("add", "replace")
            if isinstance(place, list) and last == "-":
                place.append(change["value"])
            elif isinstance(place, list):
                place[int(last)] = change["value"]
            else:
                assert change["op"] == "add" or last in place, change
                place[last] = change["value"]
    return found


@pytest.fixture(params=["cpu", "gpu"])
def objects(request: pytest.FixtureRequest) -> dict[str, Any]:
    return documents() if request.param == "cpu" else patched(documents())


def container(objects: dict[str, Any]) -> dict[str, Any]:
    (one,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return one


_VALIDATE = """
import json, sys
import kubernetes_validate
for one in json.load(sys.stdin):
    try:
        kubernetes_validate.validate(one, sys.argv[1], strict=True)
    except kubernetes_validate.ValidationError as error:
        print(one["kind"], error)
"""


def problems(*objects: dict[str, Any]) -> str:
    """What the schemas have against objects, in the environment that has the schemas (100 MB)."""
    if reason := missing():
        pytest.skip(reason)
    words = [str(PYTHON), "-c", _VALIDATE, VERSION]
    done = subprocess.run(words, input=json.dumps(objects), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_object_fits_its_schema(objects: dict[str, Any]) -> None:
    assert set(objects) == {
        *("Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy")
    }
    assert problems(*objects.values()) == ""


def test_a_wrong_field_is_found() -> None:
    one = documents()["Deployment"]
    one["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    assert "livenessProb" in problems(one)


def test_it_may_do_nothing_that_it_does_not_need(objects: dict[str, Any]) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    rights = container(objects)["securityContext"]
    assert rights["readOnlyRootFilesystem"]
    assert not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    dockerfile = (FOLDER.parent / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}" in dockerfile


def test_what_it_writes_has_a_volume(objects: dict[str, Any]) -> None:
    mounts = {one["name"]: one["mountPath"] for one in container(objects)["volumeMounts"]}
    volumes = {one["name"] for one in objects["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert set(mounts) == volumes == {"cache", "tmp", "keys"}
    home = {one["name"]: one.get("value") for one in container(objects)["env"]}["HOME"]
    assert home == mounts["cache"]


def test_its_arguments_are_options_of_the_server(objects: dict[str, Any]) -> None:
    import typer

    verb: Any = typer.main.get_command(app).commands["serve"]  # pyright: ignore
    options = {name for one in verb.params for name in one.opts}
    words = [word.partition("=") for word in container(objects)["args"] if word.startswith("--")]
    assert {name for name, _, _ in words} <= options
    assert {name: value for name, _, value in words}["--key-file"].startswith("/run/latentrt/")


def test_callers_and_prometheus_have_names_that_are_answered(objects: dict[str, Any]) -> None:
    given = [one.removeprefix("--allow-host=") for one in container(objects)["args"] if "--allow-host" in one]
    namespace = service = objects["Service"]["metadata"]["name"]
    domain = f"{service}.{namespace}.svc"
    assert {service, f"{service}.{namespace}", domain, f"{domain}.cluster.local", "$(POD_IP)"} <= set(given)
    access = allow(hosts=[name.replace("$(POD_IP)", "10.1.2.3") for name in given])
    with open_demo() as pipe, live(pipe, access=access, start=False) as at:
        for host in ("10.1.2.3:7860", domain, f"{domain}.cluster.local", "localhost"):
            assert at.client.get("/metrics", headers={"host": host}).status_code == 200
        assert at.client.get("/metrics", headers={"host": "10.9.9.9:7860"}).status_code == 421


def test_probes_ask_for_what_there_is_by_a_name_that_is_answered(objects: dict[str, Any]) -> None:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container(objects)[kind]["httpGet"]
        assert probe["path"] in HEALTH_PATHS
        assert probe["httpHeaders"] == [{"name": "Host", "value": "localhost"}]
        assert probe["port"] == container(objects)["ports"][0]["name"]


def test_there_is_time_to_end(objects: dict[str, Any]) -> None:
    grace = next(
        int(one.removeprefix("--grace=")) for one in container(objects)["args"] if one.startswith("--grace")
    )
    waits = int(container(objects)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert (
        objects["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        >= grace + 5 + waits
    )


def test_it_scales_on_a_metric_of_the_server(objects: dict[str, Any]) -> None:
    (metric,) = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    with open_demo() as pipe, live(pipe) as at:
        text = at.client.get("/metrics").text
    assert f"\n{metric['pods']['metric']['name']} " in text
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = objects[kind]["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        assert (selector.get("matchLabels") or selector).items() <= labels


# ── KServe ─────────────────────────────────────────────────────────────────────────────────────────

# Of `V1beta1PredictorSpec`, kserve 0.21: what it has besides the fields of a pod, and the types.
PREDICTOR: dict[str, type] = {
    "annotations": dict,
    "canaryTrafficPercent": int,
    "containerConcurrency": int,
    "labels": dict,
    "maxReplicas": int,
    "minReplicas": int,
    "scaleMetric": str,
    "scaleMetricType": str,
    "scaleTarget": int,
    "storageUris": list,
    "timeout": int,
}


def inference_service() -> dict[str, Any]:
    return yaml.safe_load((FOLDER.parent / "kserve" / "latentrt.yaml").read_text())


def as_pod(service: dict[str, Any]) -> dict[str, Any]:
    """What of a predictor is a pod's, as one."""
    spec = {name: value for name, value in service["spec"]["predictor"].items() if name not in PREDICTOR}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": spec}


def test_the_inference_service_fits_its_schema() -> None:
    service = inference_service()
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert set(service["spec"]) == {"predictor"}
    for name, value in service["spec"]["predictor"].items():
        assert isinstance(value, PREDICTOR.get(name, type(value))), name
    assert problems(as_pod(service)) == ""
    service["spec"]["predictor"]["maxReplica"] = 2
    assert "maxReplica" in problems(as_pod(service)), "it is no field of a pod either"


def test_the_inference_service_runs_triton_as_the_tests_do() -> None:
    (one,) = inference_service()["spec"]["predictor"]["containers"]
    assert one["name"] == "kserve-container", "what KServe looks for"
    assert one["args"][0] == "tritonserver"
    assert "--disable-auto-complete-config" in one["args"]
    probes = {one[kind]["httpGet"]["path"] for kind in ("readinessProbe", "livenessProbe")}
    assert probes == {"/v2/health/ready", "/v2/health/live"}
