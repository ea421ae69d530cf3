"""Options that several commands share."""

from collections.abc import Mapping

import click

name = click.option("--name", default="default", show_default=True, help="The fleet's name.")
address = click.option("--address", help="Ray cluster to join (HOST:PORT); without it, Ray on this machine.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Count(click.ParamType):  # type: ignore[type-arg]
    """A number, or two with `..` between: as (number, 0) or (least, most)."""

    name = "N or MIN..MAX"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        least, dots, most = str(value).partition("..")
        try:
            counts = int(least), int(most) if dots else 0
        except ValueError:
            self.fail(f"{value!r} is no number and no range; write for example 2 or 1..4", param, ctx)
        if dots and counts[1] < max(1, counts[0]):
            self.fail(f"{value!r} goes from {counts[0]} down to {counts[1]}; write for example 1..4", param, ctx)
        return counts


def gateway_words(count: tuple[int, int] | None) -> dict[str, int]:
    """The settings that `--gateways` stands for."""
    return {} if count is None else {"gateways": count[0], "max_gateways": count[1]}


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
