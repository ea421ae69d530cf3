"""A fleet on virtual machines: the file of Ray's cluster launcher (`ray up`), for AWS, Google Cloud and Azure.

A node type has one market and, on AWS and Azure, one zone: Ray tries zones within a type in order and does not come
back to the first, and kervan's label of the market has to be true of each node.
"""

import re
from typing import Any

from kervan.cluster.fleet_file import for_cluster, settings
from kervan.cluster.nodes import NodeGroup
from kervan.cluster.request import RenderRequest, Zone
from kervan.cluster.text import as_yaml
from kervan.errors import ConfigError
from kervan.facts.markets import SPOT

IDLE_TIMEOUT_S = 300
SPOT_PRIORITY = 10  # before on-demand's 0, among types that fit
HEAD = {"aws": ("m7i.2xlarge", 8), "gcp": ("n2-standard-8", 8), "azure": ("Standard_D8s_v5", 8)}
EXAMPLES = {
    "aws": ("us-west-2", "p5.48xlarge"),
    "gcp": ("us-central1", "a3-highgpu-8g"),
    "azure": ("westus2", "Standard_ND96isr_H100_v5"),
}
DISK_GB = 500
# What Ray's autoscaler on the head calls the clouds with; Azure's are the versions that Ray 2.60 asks for.
AUTOSCALER_NEEDS = {
    "aws": ("boto3==1.44.8",),
    "gcp": ("google-api-python-client==2.202.0", "google-auth-httplib2==0.4.4"),
    "azure": (
        "azure-common==1.1.28",
        "azure-core==1.35.0",
        "azure-identity==1.23.1",
        "azure-mgmt-compute==35.0.0",
        "azure-mgmt-network==29.0.0",
        "azure-mgmt-resource==24.0.0",
        "msrest==0.7.1",
        "msrestazure==0.6.4.post1",
    ),
}
CLOUD_LIBRARIES = "/home/kervan/.cloud"
FLEET_FILE = "/home/kervan/fleet.yaml"  # in the container
NO_ZONE = Zone("")


def files(request: RenderRequest) -> dict[str, str]:
    """The launcher's file, and the fleet's, which the launcher puts on the head.

    Raises: ConfigError for a region or zones that the cloud's part of Ray cannot take.
    """
    _check(request)
    fleet = for_cluster(
        request.fleet, gpus_per_node=request.machine.gpus, nodes=request.most_nodes, adds_nodes=request.is_scaled
    )
    return {
        "cluster.yaml": as_yaml(request.target, cluster(request)),
        "fleet.yaml": as_yaml(request.target, settings(fleet)),
    }


def _check(request: RenderRequest) -> None:
    region, instance = EXAMPLES[request.cloud_name]
    if not request.region:
        raise ConfigError(f"--target {request.target} needs a region; write for example --region {region}")
    if not request.machine.instance:
        raise ConfigError(
            f"--target {request.target} needs the kind of machine; write for example --instance {instance}"
        )
    for zone in request.zones:
        if request.cloud_name == "aws" and not zone.subnet:
            raise ConfigError(
                f"--zone {zone.name} names no subnet, by which Ray chooses the zone on AWS; write "
                f"--zone {zone.name}=subnet-0123456789abcdef0"
            )
        if request.cloud_name != "aws" and zone.subnet:
            raise ConfigError(f"--zone {zone.name}={zone.subnet}: a subnet is of AWS; write --zone {zone.name}")
    if request.cloud_name == "gcp":
        if len(request.zones) != 1:
            raise ConfigError(
                f"--target ray-gcp with {len(request.zones)} zones: on Google Cloud Ray starts all nodes "
                f"of a cluster in one zone; give one, like --zone {request.region}-a"
            )
        if not request.project:
            raise ConfigError("--target ray-gcp needs the project; write for example --project my-project-123")
    for zone in request.zones:
        _check_in_region(request, zone.name)


def _check_in_region(request: RenderRequest, name: str) -> None:
    """AWS and Google Cloud begin a zone's name with its region's; on Azure it is a number."""
    region = re.escape(request.region)
    pattern, nearest = {
        "aws": (f"{region}([a-z]|-[a-z0-9-]+)", f"{request.region}a"),
        "gcp": (f"{region}-[a-z]", f"{request.region}-a"),
    }.get(request.cloud_name, ("[1-9]", "1"))
    if re.fullmatch(pattern, name) is None:
        raise ConfigError(
            f"--zone {name} is no zone of --region {request.region}; write one like {nearest}, or another --region"
        )


def cluster(request: RenderRequest) -> dict[str, Any]:
    """The launcher's file as a mapping, in the words of Ray's `ray-schema.json`."""
    types = {"head": _head(request)}
    for group in request.groups:
        types |= _worker_types(request, group)
    return {
        "cluster_name": request.name,
        "max_workers": request.most_nodes,
        "idle_timeout_minutes": IDLE_TIMEOUT_S / 60,
        "provider": _provider(request),
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": request.image,
            "container_name": "kervan",
            "pull_before_run": True,
        },
        "file_mounts": {FLEET_FILE: "fleet.yaml"},
        "head_node_type": "head",
        "available_node_types": types,
        "head_setup_commands": [
            # In versions that do not change what the image has.
            "python -m pip list --format=freeze >/tmp/image.txt && python -m pip install --quiet "
            f"--target={CLOUD_LIBRARIES} --constraint=/tmp/image.txt {' '.join(AUTOSCALER_NEEDS[request.cloud_name])}"
        ],
        "head_start_ray_commands": [
            "ray stop",
            f"PYTHONPATH={CLOUD_LIBRARIES} ray start --head --port=6379 --num-cpus=0 --num-gpus=0 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            "KERVAN_NOTICES_WATCH=auto,signal "
            f"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={request.grace('on-demand').drain_s} "
            "ray start --address=$RAY_HEAD_IP:6379",
        ],
    }


def _provider(request: RenderRequest) -> dict[str, Any]:
    if request.cloud_name == "aws":
        return {"type": "aws", "region": request.region, "cache_stopped_nodes": False}
    if request.cloud_name == "gcp":
        return {
            "type": "gcp",
            "region": request.region,
            "availability_zone": request.zones[0].name,
            "project_id": request.project,
        }
    return {"type": "azure", "location": request.region, "resource_group": request.name, "cache_stopped_nodes": False}


def _head(request: RenderRequest) -> dict[str, Any]:
    instance, cpus = HEAD[request.cloud_name]
    zone = request.zones[0] if request.zones else NO_ZONE
    return {
        "resources": {"CPU": cpus},
        "node_config": _node_config(request, instance, zone, is_spot=False, has_gpus=False),
    }


def _worker_types(request: RenderRequest, group: NodeGroup) -> dict[str, dict[str, Any]]:
    """A type for each zone. Those that must be there are divided over the zones, the first ones getting one more."""
    zones = request.zones or (NO_ZONE,)
    is_spot = group.market == SPOT
    types = {}
    for place, zone in enumerate(zones):
        least = group.least // len(zones) + (place < group.least % len(zones))
        labels = {"ray.io/market-type": group.market}
        if zone.name:
            labels["ray.io/availability-zone"] = zone.name
        resources = {"CPU": request.machine.cpus}
        if request.machine.gpus:
            resources["GPU"] = request.machine.gpus
        types["-".join(filter(None, (group.market, zone.name)))] = {
            "min_workers": least,
            "max_workers": group.most,
            "priority": SPOT_PRIORITY if is_spot else 0,
            "idle_timeout_s": IDLE_TIMEOUT_S,
            "resources": resources,
            "labels": labels,
            "node_config": _node_config(
                request, request.machine.instance, zone, is_spot=is_spot, has_gpus=bool(request.machine.gpus)
            ),
        }
    return types


def _node_config(request: RenderRequest, instance: str, zone: Zone, *, is_spot: bool, has_gpus: bool) -> dict[str, Any]:
    """What the cloud's API takes for a machine; the images are those with NVIDIA's driver and Docker."""
    if request.cloud_name == "aws":
        return _aws(instance, zone, is_spot=is_spot)
    if request.cloud_name == "gcp":
        return _gcp(instance, is_spot=is_spot, has_gpus=has_gpus)
    return _azure(instance, zone, is_spot=is_spot)


def _aws(instance: str, zone: Zone, *, is_spot: bool) -> dict[str, Any]:
    """boto3's `create_instances`. A spot instance is asked for once, at up to the on-demand price, as AWS advises."""
    config: dict[str, Any] = {
        "InstanceType": instance,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": DISK_GB, "VolumeType": "gp3"}}],
        # Without a token nothing is answered, and containers are one hop further away.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
    if zone.subnet:
        config["SubnetIds"] = [zone.subnet]
    if is_spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
    return config


def _gcp(instance: str, *, is_spot: bool, has_gpus: bool) -> dict[str, Any]:
    """Compute Engine's `instances.insert`. Machines with GPUs cannot migrate: they end for maintenance."""
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"} if has_gpus else {}
    if is_spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    config: dict[str, Any] = {
        "machineType": instance,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "diskSizeGb": DISK_GB,
                    "sourceImage": "projects/deeplearning-platform-release/global/images/family/"
                    "common-cu128-ubuntu-2204-nvidia-570",
                },
            }
        ],
    }
    if scheduling:
        config["scheduling"] = scheduling
    return config


def _azure(instance: str, zone: Zone, *, is_spot: bool) -> dict[str, Any]:
    """Parameters of Ray's template of a virtual machine."""
    parameters: dict[str, Any] = {
        "vmSize": instance,
        "imagePublisher": "microsoft-dsvm",
        "imageOffer": "ubuntu-2204",
        "imageSku": "2204-gen2",
        "imageVersion": "latest",
        "osDiskSize": DISK_GB,
    }
    if zone.name:
        parameters["availability_zone"] = zone.name
    if is_spot:
        parameters |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    return {"azure_arm_parameters": parameters}
