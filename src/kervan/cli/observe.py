"""`kervan observe`."""

import click

from kervan.cli.observe_gpus import gpus
from kervan.cli.observe_plot import plot
from kervan.cli.observe_render import render


@click.group()
def observe() -> None:
    """Metrics, alerts and dashboards of fleets, for Prometheus and Grafana; counters of GPUs."""


observe.add_command(gpus)
observe.add_command(render)
observe.add_command(plot)
