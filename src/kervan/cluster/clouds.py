"""What differs between clouds for a node that runs replicas: its notice, and how Kubernetes marks spot nodes."""

from dataclasses import dataclass
from typing import Literal

CloudName = Literal["aws", "gcp", "azure", "none"]
MARGIN_S = 5.0  # from a pod's last second to its node's


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """`notice_s`: from the notice of a spot node to its end, of which `usable_s` are left to a pod.

    `spot_label`: of a spot node in the cloud's Kubernetes, `(key, value)`; `spot_taint`: likewise what has to be
    tolerated there, None where the cloud taints none.
    """

    name: CloudName
    notice_s: float
    usable_s: float
    spot_label: tuple[str, str]
    spot_taint: tuple[str, str] | None = None
    instances: str = ""
    """Its name in the table of machines."""


CLOUDS: dict[CloudName, Cloud] = {
    cloud.name: cloud
    for cloud in (
        # Sources: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html and
        # https://docs.aws.amazon.com/eks/latest/userguide/managed-node-groups.html
        Cloud(
            name="aws", notice_s=120.0, usable_s=120.0, spot_label=("eks.amazonaws.com/capacityType", "SPOT"),
            instances="AWS",
        ),
        # Of 30 s the kubelet keeps 15 s for system pods; Google's example has a grace period of 25 s.
        # Source: https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
        Cloud(
            name="gcp", notice_s=30.0, usable_s=30.0, spot_label=("cloud.google.com/gke-spot", "true"),
            spot_taint=("cloud.google.com/gke-spot", "true"), instances="Google Cloud",
        ),
        # Source: https://learn.microsoft.com/en-us/azure/aks/spot-node-pool
        Cloud(
            name="azure", notice_s=30.0, usable_s=30.0, spot_label=("kubernetes.azure.com/scalesetpriority", "spot"),
            spot_taint=("kubernetes.azure.com/scalesetpriority", "spot"), instances="Azure",
        ),
        # A cluster of one's own: nodes are labelled as Ray's are.
        Cloud(name="none", notice_s=120.0, usable_s=120.0, spot_label=("ray.io/market-type", "spot")),
    )
}  # fmt: skip
