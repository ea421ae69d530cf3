"""`kervan doctor`."""

import sys
from dataclasses import asdict

import click

from kervan.cli import options
from kervan.errors import ConfigError

MAX_PORT = 65535


@click.command()
@options.name
@options.address
@options.setting("--port", help="That the fleet would listen on. [default: its own, or 8000]")
@options.as_json
def doctor(name: str, address: str | None, port: int | None, as_json: bool) -> None:
    """Check that this machine can run a fleet, and say what to do where it cannot.

    Looks at versions, GPUs and driver, Ray, ports, limits, disks, the clock, the Hugging Face cache, proxies and NCCL's
    settings; starts nothing. kervan comm doctor measures too. Exit status 1 if a check fails; a warning does not.
    """
    if port is not None and not 1 <= port <= MAX_PORT:
        raise ConfigError(f"--port {port} is outside 1..{MAX_PORT}; write for example --port 8000")
    from kervan.cli import check_view, render
    from kervan.comm import settings_checks
    from kervan.doctor import checks, gather
    from kervan.doctor.machine import to_json

    machine = gather.machine(name, port=port, address=address, say=render.progress_lines(is_quiet=as_json))
    found = checks.examine(machine)
    advice = settings_checks.advice(machine.host, nodes=1) if machine.host.gpus else []
    has_failed = any(check.verdict == "fail" for check in found)
    if as_json:
        render.print_json(
            {
                "ok": not has_failed,
                "counts": check_view.counts(found),
                "checks": [asdict(check) for check in found],
                "environment": [asdict(line) for line in advice],
                "machine": to_json(machine),
            }
        )
    else:
        check_view.print_checks(found, advice=advice)
    if has_failed:
        sys.exit(1)
