"""The HTTP front: a thin ASGI shell around vLLM's OpenAI app."""

from kervan.gateway.merged_page import FLEET_GAUGES, merge_pages
from kervan.gateway.shell import GatewayShell, GatewayView, Shed

__all__ = ["FLEET_GAUGES", "GatewayShell", "GatewayView", "Shed", "merge_pages"]
