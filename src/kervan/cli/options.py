"""Options that several commands share."""

import click

name = click.option("--name", default="default", show_default=True, help="The fleet's name.")
address = click.option("--address", help="Ray cluster to join (HOST:PORT); without it, Ray on this machine.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
