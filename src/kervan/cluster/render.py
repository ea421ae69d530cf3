"""From a request to files, and what is to be done with them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kervan.cluster import compose, kuberay, kubernetes, ray_launcher, slurm, systemd
from kervan.cluster.request import LAUNCHERS, RenderRequest, Target

MAKERS: Mapping[Target, Callable[[RenderRequest], dict[str, str]]] = {
    "kuberay": kuberay.files,
    "ray-aws": ray_launcher.files,
    "ray-gcp": ray_launcher.files,
    "ray-azure": ray_launcher.files,
    "slurm": slurm.files,
    "compose": compose.files,
    "systemd": systemd.files,
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """`files`: text by name. `steps`: commands and deeds that bring the fleet up, in their order. `notes`: what a user
    should know first.
    """

    request: RenderRequest
    files: Mapping[str, str]
    steps: Sequence[str]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """What `kervan cluster render --json` prints, without the files' text."""
        return {
            "target": self.request.target,
            "files": list(self.files),
            "nodes": {group.market: {"least": group.least, "most": group.most} for group in self.request.groups},
            "grace": {
                group.market: dataclasses.asdict(self.request.grace(group.market)) for group in self.request.groups
            },
            "steps": list(self.steps),
            "notes": list(self.notes),
        }


def render(request: RenderRequest) -> Rendered:
    """The files of a fleet on the request's target.

    Raises: ConfigError for what the target cannot do.
    """
    if request.target in LAUNCHERS:
        request = dataclasses.replace(request, cloud_name=LAUNCHERS[request.target])
    files = MAKERS[request.target](request)
    return Rendered(request, files, _steps(request), _notes(request))


def _steps(request: RenderRequest) -> list[str]:
    name, has_tls = request.name, bool(request.fleet.tls_certificate)
    if request.target == "kuberay":
        space = f"-n {request.namespace} "
        return [
            f"kubectl {space}create secret generic {kubernetes.secret_name(request)} "
            "--from-literal=api-key=KEY --from-literal=hf-token=TOKEN",
            *([f"kubectl {space}create secret tls {name}-tls --cert=FULLCHAIN --key=KEY"] if has_tls else []),
            f"kubectl {space}apply -f DIR",
            f"kubectl {space}wait --for=condition=complete --timeout=1h "
            f"job -l app.kubernetes.io/instance={name},app.kubernetes.io/component=start",
        ]
    if request.target in LAUNCHERS:
        return [
            "cd DIR && ray up cluster.yaml",
            f"ray exec cluster.yaml 'KERVAN_API_KEY=KEY kervan up --config {ray_launcher.FLEET_FILE} --address auto "
            "--detach'",
        ]
    if request.target == "slurm":
        return [f"cd DIR && KERVAN_API_KEY=KEY sbatch {slurm.BATCH_FILE}"]
    if request.target == "compose":
        return ["cd DIR && KERVAN_API_KEY=KEY docker compose up --detach --wait"]
    services = [f"kervan-{name}.service"]
    steps = [
        f"make the user kervan, /opt/kervan with kervan installed, and /etc/kervan/{name}.env with KERVAN_API_KEY=KEY",
        f"copy {name}.yaml to /etc/kervan, units to /etc/systemd/system",
    ]
    if request.most_nodes > 1 and request.machine.gpus:
        variables = "RAY_AUTH_MODE=token, RAY_AUTH_TOKEN and KERVAN_RAY_HEAD=HOST:6379"
        steps.insert(1, f"on all machines: make /etc/kervan/ray.env with {variables}")
        workers = " or ".join(f"kervan-ray-{group.market}" for group in request.groups)
        steps.append(f"on machines with GPUs: systemctl enable --now {workers}")
        services.insert(0, systemd.HEAD_UNIT)
    return [*steps, f"on the head: systemctl enable --now {' '.join(services)}"]


def _notes(request: RenderRequest) -> list[str]:
    notes = []
    if request.fleet.api_keys:
        notes.append("api_keys of the file is left out of all files: give the key as KERVAN_API_KEY, as below")
    for group in request.groups:
        asked = round(request.fleet.drain_timeout_s)
        got = request.grace(group.market).drain_s
        if request.target == "kuberay" and got < asked:
            notes.append(
                f"{group.market} nodes get {got} s to drain in place of drain_timeout_s={asked}: {request.cloud_name} "
                f"gives {request.cloud.notice_s:g} s of notice"
            )
    return notes
