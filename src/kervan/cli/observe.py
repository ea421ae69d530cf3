"""`kervan observe`."""

import click

from kervan.cli.observe_gpus import gpus


@click.group()
def observe() -> None:
    """Metrics, alerts and dashboards of fleets, for Prometheus and Grafana; counters of GPUs."""


observe.add_command(gpus)
