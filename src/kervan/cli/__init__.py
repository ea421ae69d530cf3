"""The command line. Commands import what they need when they run, so that `kervan --help` stays light."""

import contextlib
import errno
import os
import sys
from typing import NoReturn

import click

from kervan import __version__
from kervan.cli import secret_words
from kervan.errors import ConfigError, KervanError

COMMANDS = {
    "plan": "Recommend a parallelism layout, with its predicted performance and cost.",
    "simulate": "Run a fleet and its policies on a virtual clock under a load.",
    "up": "Serve a model.",
    "down": "Stop a fleet.",
    "status": "Show the state of a fleet.",
    "top": "Watch a fleet live in the terminal.",
    "scale": "Change the number of replicas or gateways.",
    "autoscale": "Show how the number of replicas is decided, or what another policy would do.",
    "rotate-keys": "Give a fleet another secret and other keys; its streams go on.",
    "keys": "Add, list, limit and revoke API keys.",
    "usage": "Show what each API key has used.",
    "explain": "Show where the time of one request went.",
    "profile": "Show where the time of a replica and of the gateways goes, and what the GPU waits for.",
    "observe": "Metrics, alerts and dashboards of fleets; counters of GPUs.",
    "drain": "Take a replica or a node out of service; its streams move to other replicas.",
    "fault": "Inject a fault into a simulated replica.",
    "chaos": "Inject faults into a fleet under load and check every token.",
    "bench": "Load-test an OpenAI-compatible server.",
    "calibrate": "Measure this host's GPUs for the planner.",
    "memory": "Estimate and measure what training and serving take of a GPU's memory.",
    "pipeline": "Cut a decoder into pipeline stages, and measure schedules and their bubble.",
    "doctor": "Check that this machine can run a fleet, and say what to do where it cannot.",
    "cluster": "Write the files that start a fleet on a cluster, and say what its nodes cost.",
    "comm": "Measure how GPUs reach each other, and find what slows or breaks it.",
    "demo": "Run a small fleet on this machine, without a GPU, and kill a replica.",
}


class Commands(click.Group):
    """Loads `kervan.cli.NAME` when command NAME is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        import importlib

        module = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"kervan.cli.{module}"), module)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="kervan")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Of progress. [default: $KERVAN_LOG_FORMAT, or text]",
)
def cli(debug: bool, log_format: str | None) -> None:
    """Serve large language models on many GPUs; streams survive the loss of a GPU.

    Exit status of all commands: 0 done; 1 failed; 2 wrong usage, values included; 130 Ctrl-C.
    """
    if log_format is not None:
        os.environ["KERVAN_LOG_FORMAT"] = log_format


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 what was asked for is wrong, 130 Ctrl-C."""
    debug = "--debug" in sys.argv[1:]
    end: SystemExit | OSError | None = None
    try:
        _run(debug)
    except SystemExit as raised:
        end = raised
    except OSError as raised:
        if debug:
            raise
        end = raised
    problem = _stdout_problem(is_doubtful=isinstance(end, OSError))
    if problem is None:
        if end is not None:
            raise end
        return
    _silence_stdout()
    if isinstance(end, SystemExit) and end.code:
        raise end  # an error is told already
    print(f"error: stdout cannot be written ({problem.strerror or problem}); write it elsewhere", file=sys.stderr)
    sys.exit(1)


def _stdout_problem(*, is_doubtful: bool) -> OSError | None:
    """Why what was printed does not reach stdout; None if it does, or if who reads it has gone and wants no more.

    `is_doubtful`: something could not be written, maybe to stdout.
    """
    if sys.stdout is None or sys.stdout.closed:
        return None
    try:
        sys.stdout.flush()  # what could not be written is kept, and fails again
        if is_doubtful and getattr(sys.stdout, "write_through", False):  # nothing is kept
            sys.stdout.write("\n")
    except OSError as error:
        return None if error.errno == errno.EPIPE else error
    return None


def _silence_stdout() -> None:
    """Let what stdout keeps go nowhere, where Python would try once more at its end, and show a traceback."""
    with contextlib.suppress(OSError):  # one that is no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.flush()


def _run(debug: bool) -> None:
    """The command of the command line. Raises: SystemExit at all ends but that of one that is done; OSError."""
    secret_words.hide()
    try:
        cli.main(prog_name="kervan", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        from kervan.cli import misuse

        print(f"error: {misuse.described(error, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except KervanError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        _exit(2 if isinstance(error, ConfigError) else 1)
    except ModuleNotFoundError as error:
        from kervan.cli import missing_package

        if debug or not (told := missing_package.described(error)):
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug or not (told := _ray_failure(error)):
            raise
        print(f"error: {told}; kervan --debug shows where", file=sys.stderr)
        _exit(1)


def _ray_failure(error: Exception) -> str:
    """What Ray said, in one line; empty for an error that is not Ray's."""
    exceptions = sys.modules.get("ray.exceptions")  # not imported: most commands do without
    if exceptions is None or not isinstance(error, exceptions.RayError):
        return ""
    first_line = next(iter(str(error).strip().splitlines()), "")[:200]
    return f"Ray did not do what was asked of it ({type(error).__name__}: {first_line})"


def _exit(status: int) -> NoReturn:
    """End this process, also when something in it waits for a part of Ray that does not answer."""
    ray_errors = sys.modules.get("kervan.serve.ray_errors")
    if ray_errors is not None and ray_errors.is_any_abandoned():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
