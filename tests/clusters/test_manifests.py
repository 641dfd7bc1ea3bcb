"""The files in clusters/ against the schemas of those who will read them, against each other, and against `x2i`."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import tomllib
import yaml
from ray._private.accelerators import accelerator
from ray.autoscaler._private.util import prepare_config, validate_config

from fine_tune.parallel import check_sharing
from fine_tune.presets import preset
from tests.commands import parse

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
RAYJOBS = ("rayjob.yaml", "rayjob-train.yaml")
KUBERNETES = "1.32"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTERS / name).read_text())


def closed(schema: Any) -> Any:
    """A structural schema as the server reads it under strict validation: fields that it does not name are errors."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    names_fields = schema.get("type") == "object" and not is_open
    return {key: closed(part) for key, part in schema.items()} | (
        {"additionalProperties": False} if names_fields else {}
    )


def check_rayjob(manifest: dict[str, Any]) -> None:
    definition = yaml.safe_load((Path(__file__).parent / "rayjob_crd.yaml").read_text())["spec"]
    (version,) = definition["versions"]
    assert manifest["apiVersion"] == f"{definition['group']}/{version['name']}"
    assert manifest["kind"] == definition["names"]["kind"]
    jsonschema.validate(manifest, closed(version["schema"]["openAPIV3Schema"]), jsonschema.Draft7Validator)
    for name, group in groups(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def groups(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = manifest["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjob_is_what_kuberay_and_kubernetes_accept(name: str) -> None:
    check_rayjob(read(name))


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (("spec",), {"entryPoint": "x2i"}, "entryPoint"),
        (("spec", "rayClusterSpec"), {"authOptions": {"mode": "tokn"}}, "tokn"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), {"maxReplica": 8}, "maxReplica"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), {"num-cpus": 0}, "0 is not of type 'string'"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"), {"tolerations": [{"keys": "a"}]}, "keys"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template"), {"specs": {}}, "specs"),
    ],
)
def test_a_misspelt_field_of_a_rayjob_is_refused(place: tuple[Any, ...], wrong: dict[str, Any], said: str) -> None:
    manifest = copy.deepcopy(read("rayjob.yaml"))
    target = manifest
    for key in place:
        target = target[key]
    target.update(wrong)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=re.escape(said)):
        check_rayjob(manifest)


def test_the_launcher_accepts_its_configuration_and_no_misspelt_one() -> None:
    validate_config(prepare_config(read("cluster.yaml")))
    config = prepare_config(read("cluster.yaml"))
    config["idle_timeout_minute"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(config)


def entrypoint(name: str) -> dict[str, Any]:
    """The parameters of the command that a RayJob runs; the recipe is there, on the pod."""
    command = read(name)["spec"]["entrypoint"].replace("/recipe/recipe.yaml", str(ROOT / "recipes/demo/recipe.yaml"))
    return parse(shlex.split(command))


def size(quantity: str) -> int:
    """Bytes of a Kubernetes quantity such as 16Gi."""
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


def test_the_build_starts_as_many_units_as_there_are_cpus() -> None:
    job = entrypoint("rayjob.yaml")
    group = dict(groups(read("rayjob.yaml")))["cpu"]
    assert job["address"] == "auto" and job["corpus"] == "s3://bucket/corpus"
    assert job["workers"] == group["maxReplicas"] * int(container(group)["resources"]["limits"]["cpu"])


def test_the_run_has_a_rank_per_gpu_and_ranks_share_its_steps() -> None:
    job = entrypoint("rayjob-train.yaml")
    group = dict(groups(read("rayjob-train.yaml")))["gpu"]
    assert job["ray"] and job["address"] == "auto"
    assert int(job["workers"]) == group["replicas"] * int(container(group)["resources"]["limits"]["nvidia.com/gpu"])
    check_sharing(preset(job["preset"], job["overrides"] or []), [int(job["workers"])])


def test_units_without_a_gpu_do_not_see_the_one_of_their_machine() -> None:
    hides = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
    assert {"name": hides, "value": "1"} in container(dict(groups(read("rayjob.yaml")))["gpu"])["env"]
    assert f"-e {hides}=1" in read("cluster.yaml")["docker"]["run_options"]
    assert f'"{hides}"' in Path(accelerator.__file__).read_text(), "Ray calls it otherwise now"


def test_the_recipe_is_mounted_where_the_build_looks_for_it() -> None:
    head = dict(groups(read("rayjob.yaml")))["head"]
    made = re.search(r"create configmap (\S+) --from-file=(\S+)=", (CLUSTERS / "rayjob.yaml").read_text())
    assert made
    (volume,) = (v for v in head["template"]["spec"]["volumes"] if "configMap" in v)
    (mount,) = (m for m in container(head)["volumeMounts"] if m["name"] == volume["name"])
    assert volume["configMap"]["name"] == made[1]
    assert f" {mount['mountPath']}/{made[2]} " in read("rayjob.yaml")["spec"]["entrypoint"]


@pytest.mark.parametrize("name", RAYJOBS)
def test_pods_have_room_for_what_runs_in_them(name: str) -> None:
    for role, group in groups(read(name)):
        pod, spec = container(group), group["template"]["spec"]
        resources, volumes = pod["resources"], {v["name"]: v for v in spec["volumes"]}
        assert {m["name"] for m in pod["volumeMounts"]} == set(volumes)
        assert resources["requests"] == resources["limits"], "or Ray counts what the pod does not have"
        shm = size(volumes["shm"]["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) <= shm, "Ray would fall back to the disk"
        units = 0 if role == "head" else int(resources["limits"]["cpu"])
        assert (units == 0) == (group["rayStartParams"].get("num-cpus") == "0")
        assert size(resources["limits"]["memory"]) >= (2 << 30) * units + shm
        assert pod["envFrom"] == [{"secretRef": {"name": "x2i-credentials"}}]
        has_gpu = "nvidia.com/gpu" in resources["limits"]
        assert has_gpu == any(t["key"] == "nvidia.com/gpu" for t in spec.get("tolerations", []))


def test_one_image_and_one_version_of_ray_everywhere() -> None:
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    dockerfile = (CLUSTERS / "Dockerfile").read_text()
    jobs = [read(name) for name in RAYJOBS]
    assert f"\nFROM rayproject/ray:{ray}-py311\n" in dockerfile
    assert {job["spec"]["rayClusterSpec"]["rayVersion"] for job in jobs} == {ray}
    images = {container(group)["image"] for job in jobs for _, group in groups(job)}
    assert images == {read("cluster.yaml")["docker"]["image"]}
    assert f"-t {images.pop()} ." in dockerfile


def test_the_image_gets_what_pip_installs_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    allowed = [line[1:] for line in (CLUSTERS / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert set(allowed) > {place.rstrip("*") for place in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert all((ROOT / name).exists() for name in allowed)
    (extras,) = re.findall(r"'\.\[(.+)]'", (CLUSTERS / "Dockerfile").read_text())
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_the_job_that_the_launcher_names_fills_its_cluster() -> None:
    (line,) = re.findall(r"^#\s+(x2i submit .+)$", (CLUSTERS / "cluster.yaml").read_text(), re.M)
    cpu = read("cluster.yaml")["available_node_types"]["cpu"]
    assert int(parse(shlex.split(line))["workers"]) == cpu["max_workers"] * cpu["resources"]["CPU"]
