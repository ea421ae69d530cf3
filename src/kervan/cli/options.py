"""Options that several commands share."""

from collections.abc import Mapping

import click

name = click.option("--name", default="default", show_default=True, help="The fleet's name.")
address = click.option("--address", help="Ray cluster to join (HOST:PORT); without it, Ray on this machine.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def sectioned(sections: Mapping[str, str]) -> type[click.Command]:
    """A command whose help has its options in sections: title -> options, with spaces between."""

    class Sectioned(click.Command):
        def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            by_name = {parameter.opts[-1]: parameter for parameter in self.get_params(ctx)}
            for title, names in sections.items():
                rows = [by_name[name].get_help_record(ctx) for name in names.split()]
                with formatter.section(title):
                    formatter.write_dl([row for row in rows if row is not None])

    return Sectioned
