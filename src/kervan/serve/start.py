"""Bringing a fleet up: what `kervan up` calls."""

import contextlib
import dataclasses
import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError, FleetError
from kervan.facts import model as models
from kervan.facts import weight_files
from kervan.facts.markets import ON_DEMAND
from kervan.fleet.vllm import arguments, versions
from kervan.gateway.tls import TlsFiles, context_of, files_of
from kervan.notices import settings as notices
from kervan.serve import cluster, placement, pools
from kervan.serve.directory.client import DirectoryClient, find_directory, fleet_names
from kervan.serve.directory.keys import read_file
from kervan.serve.down import end_fleet
from kervan.serve.ray_internals import HAPROXY_VARIABLE
from kervan.serve.readiness import slowest_start, wait_until_ready
from kervan.serve.status import FleetStatus
from kervan.units import plural


def validate(config: FleetConfig, *, is_here: bool = True) -> FleetConfig:
    """The config with its model resolved, after every check that needs no cluster.

    `is_here`: the model is served on this machine. Where it is not, its nodes look for the weights: this one need not
    have them.

    Raises: ConfigError.
    """
    config = dataclasses.replace(config, model=models.resolve(config.model, is_here=is_here))
    if config.api_keys_file:  # the directory follows it, and works elsewhere
        config = dataclasses.replace(config, api_keys_file=str(Path(config.api_keys_file).expanduser().absolute()))
    arguments.check(config.engine_args)
    models.check_layout(models.read_config(config.model), tp=config.tp, pp=config.pp, ep=config.ep)
    if config.engine == "twin":
        from kervan.twin import settings as twins

        twins.settings(config)
    elif is_here:
        _check_files(config)
    config = _check_tls(config, is_here=is_here)
    notices.from_environment(config.env)
    if not config.pools and not (
        config.replicas or config.max_replicas
    ):  # Serve would refuse it; a part of a fleet with pools may have none
        raise ConfigError("replicas=0 would leave nothing to serve requests; give at least 1, or kervan down")
    return config


def _check_tls(config: FleetConfig, *, is_here: bool) -> FleetConfig:
    """The config with absolute paths of its TLS files. Raises: ConfigError for files here that cannot be used."""
    if (files := files_of(config)) is None:
        return config
    if not is_here:
        for path in files.paths:
            if not Path(path).is_absolute():
                raise ConfigError(f"{path}: gateways on other nodes read it there; give an absolute path")
        return config
    certificate, key, client_ca = (path and str(Path(path).absolute()) for path in dataclasses.astuple(files))
    context_of(TlsFiles(certificate, key, client_ca))
    return dataclasses.replace(config, tls_certificate=certificate, tls_key=key, tls_client_ca=client_ca)


def _check_files(config: FleetConfig) -> None:
    """Raises: ConfigError for a local model whose files vLLM could not load, which a replica would find out late."""
    own_tokenizer = not (config.engine_args.get("tokenizer") or config.engine_args.get("skip_tokenizer_init"))
    problem = weight_files.problem(config.model, config.weights_format)
    if problem is None and own_tokenizer:
        problem = weight_files.missing_tokenizer(config.model)
    if problem is not None:
        raise ConfigError(problem)


def on_cpu(config: FleetConfig, cores: int) -> FleetConfig:
    """The config for a machine without GPUs: its replicas share the cores, unless the user says how.

    Left alone, each vLLM engine binds its threads to the same first cores.
    """
    replicas = sum(pool.maximum for pool in config.bounds.values())
    if config.engine == "twin" or replicas < 2 or "VLLM_CPU_OMP_THREADS_BIND" in {**os.environ, **config.env}:
        return config
    share = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max(1, cores // replicas))}
    return dataclasses.replace(config, env={**share, **config.env})


def check_port(host: str, port: int) -> None:
    """Raises: ConfigError when something listens on the port already, or the host is not this machine.

    Gateways share their port (SO_REUSEPORT), so two fleets of one user could share it without an error.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError(
                    f"host {host!r} is not an address of this machine ({error.strerror}); "
                    "use 127.0.0.1, or 0.0.0.0 for all (--host)"
                ) from error
            other = port + 1 if 1024 <= port < 65535 else 8000
            raise ConfigError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another, for example --port {other}"
            ) from error


def num_gateways(config: FleetConfig) -> int:
    """The configured number, or one per 8 cores of this machine, 1 to 4 and within `max_gateways`."""
    return config.gateways or min(4, config.max_gateways or 4, max(1, (os.cpu_count() or 1) // 8))


class Startup:
    """A fleet on its way up; `cancel` undoes whatever has been started."""

    def __init__(self, config: FleetConfig, address: str | None, progress: Callable[[str], None]):
        self.config = config
        self.progress = progress
        self._address = address
        self._started_ray: cluster.StartingRay | None = None
        self._directory: DirectoryClient | None = None

    def run(self) -> FleetStatus:
        """Start the fleet and wait until every replica has given a token.

        Raises: ConfigError, CapacityError, EngineError, FleetError. Undone on every exception, Ctrl-C too.
        """
        try:
            return self._run()
        except BaseException:
            with _uninterrupted():
                self.cancel()
            raise

    def _run(self) -> FleetStatus:
        is_here = self._address is None
        cluster.check_home()
        self.config = validate(self.config, is_here=is_here)
        file_keys = read_file(self.config)
        if self.config.engine == "vllm" and (warning := versions.untested(arguments.installed_version())):
            self.progress(warning)
        if is_here and cluster.find_local_ray() is None:
            check_port(self.config.host, self.config.port)
        address = self._reach_ray()
        if not is_here and cluster.is_one_machine():
            self.config = validate(self.config)
        from kervan.serve import app, shared_port
        from kervan.serve.directory.actor import create_directory

        nodes = cluster.devices_by_node()
        if not placement.has_gpus(nodes):
            self.config = on_cpu(self.config, os.cpu_count() or 1)
        config = self.config = placement.spread(self.config, nodes)
        if config.name in fleet_names():
            raise FleetError(
                f"fleet {config.name!r} is already up; use another --name, kervan scale, or kervan down first"
            )
        if not shared_port.check(config, [other for other, _ in shared_port.fleets()]) and is_here:
            check_port(config.host, config.port)
        pool_nodes = cluster.nodes_for(config)
        pools.check(config, pool_nodes, {})
        if warning := pools.warning(config, pool_nodes):
            self.progress(warning)
        awaited = pools.awaited(config, pools.placeable(config, pool_nodes, {}))
        if config.max_replicas and not config.replicas:  # gateways learn from the first one what the engines can do
            awaited[ON_DEMAND] = 1
        if config.ingress == "serve":
            _check_entry_is_free()
        config = self.config = dataclasses.replace(config, gateways=num_gateways(config))
        self._directory = create_directory(config, secrets.token_hex(32), file_keys)
        app.start_serve(config)
        self.progress(f"starting {plural(sum(awaited.values()), 'replica')} and {plural(config.gateways, 'gateway')}")
        app.deploy(app.build(config, nodes), config)
        status = wait_until_ready(config, self._directory, self.progress, awaited=awaited)
        shared_port.wait_until_known(config, self.progress)
        if parts := slowest_start(status.snapshot):
            self.progress(f"the slowest engine took {parts}")
        cluster.remember(cluster.Remembered(config.name, address, status.url, is_joined=not is_here))
        return status

    def _reach_ray(self) -> str:
        needs_haproxy = self.config.ingress == "serve"
        if self._address is not None:
            if needs_haproxy and os.environ.get(HAPROXY_VARIABLE) != "1":
                raise FleetError(
                    f"--ingress serve needs HAProxy on the cluster: {HAPROXY_VARIABLE}=1 in the environment of "
                    "Ray on all nodes and of kervan up; or use --ingress direct"
                )
            cluster.connect(self._address, or_start=True)
            return self._address
        local = cluster.find_local_ray()
        if local is None:
            self.progress("starting Ray on this machine")
            self._started_ray = cluster.start_local_ray(has_haproxy=needs_haproxy)
            local = self._started_ray.local
        elif needs_haproxy and not local.has_haproxy:
            raise FleetError(
                "the Ray that runs on this machine was started without HAProxy; "
                "end its fleets first (kervan down), or use --ingress direct"
            )
        cluster.connect(local.address)
        return local.address

    def keep(self) -> None:
        """Let the fleet outlive this process."""
        if self._started_ray is not None:
            self._started_ray.keep()

    def cancel(self) -> None:
        """End what has been started."""
        if self._started_ray is not None:
            cluster.stop_local_ray(self._started_ray.local)
            cluster.forget(self.config.name)
        elif self._directory is not None:
            try:
                end_fleet(self.config.name)
            except Exception as error:  # noqa: BLE001 - what ended the start is raised next, and says more
                name = self.config.name
                self.progress(f"fleet {name!r} may not have ended ({error}); kervan down --name {name} ends it")


def _check_entry_is_free() -> None:
    """Serve has one entry for a whole cluster, and a fleet needs all of its paths."""
    for name in fleet_names():
        other = find_directory(name).fleet().result().config
        if other.ingress == "serve":
            raise FleetError(
                f"fleet {name!r} has the one entry of Serve on this cluster (port {other.port}); use --ingress direct"
            )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore further Ctrl-C while cleaning up."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
