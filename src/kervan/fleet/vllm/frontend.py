"""vLLM's OpenAI server over a fleet: one per gateway process."""

import asyncio
import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# ruff: noqa: E402 - vLLM's requests are defined by what follows
from kervan.fleet.vllm import first_error

first_error.install()

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from kervan import plain_tokenizer
from kervan.facts import model as models
from kervan.fleet.client import FleetClient
from kervan.fleet.vllm import failed_streams, limits, progress, versions
from kervan.fleet.vllm.codec import VllmCodec
from kervan.fleet.vllm.engine_client import injected
from kervan.fleet.vllm.logs import kept_handlers

__all__ = ["OpenAIFrontend", "VllmCodec", "bare_app"]


def bare_app(argv: Sequence[str], answering: Any) -> Any:
    """vLLM's app with the middlewares that `argv` asks for and nothing behind them but `answering`, an ASGI middleware.

    It can be there before any replica is. Raises: ConfigError when vLLM refuses `argv`.
    """
    args = versions.parse_args(argv)
    with kept_handlers():
        return versions.build_bare_app(args, answering)


class OpenAIFrontend:
    """`app` is vLLM's FastAPI app; `start` returns when a replica has linked and the app can answer."""

    def __init__(self, app: Any, engine: AsyncLLM, args: Namespace):
        self.app = app
        self.engine = engine
        self.args = args
        self._lifespan = contextlib.AsyncExitStack()

    @property
    def model_name(self) -> str:
        """The first name under which clients address the model."""
        names = self.args.served_model_name
        return str(names[0] if names else self.args.model)

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names by which clients may ask now: the model's own, and its adapters'; once it is closed, its own."""
        state = getattr(self.app, "state", None)  # vLLM takes it away at the end of the app, before the last beat
        if state is None:
            return (self.model_name,)
        models = state.openai_serving_models
        return tuple(dict.fromkeys([*(path.name for path in models.base_model_paths), *models.lora_requests]))

    @classmethod
    async def start(
        cls,
        fleet: FleetClient,
        argv: Sequence[str],
        *,
        is_twin: bool = False,
        is_followed: bool = False,
        answering: Any = None,
    ) -> "OpenAIFrontend":
        """`is_followed`: answers can be given again. `answering`: an ASGI middleware that may answer in place of vLLM.

        Raises: ConfigError when vLLM refuses `argv`.
        """
        with contextlib.ExitStack() as files:  # vLLM has read them when its app is there
            if is_twin:
                argv = [*argv, *await asyncio.to_thread(_tokenizer_argv, argv, files)]
            return await cls._start(fleet, argv, is_twin=is_twin, is_followed=is_followed, answering=answering)

    @classmethod
    async def _start(
        cls, fleet: FleetClient, argv: Sequence[str], *, is_twin: bool, is_followed: bool, answering: Any
    ) -> "OpenAIFrontend":
        args, engine_args, config = await asyncio.to_thread(_configure, argv)
        await asyncio.to_thread(_import_app)  # now, while the replicas start
        failed_streams.install()
        link = await fleet.wait_for_link()
        limits.install(config, entry_limits=link.facts.entry_limits, is_twin=is_twin)
        with injected(fleet, link.facts), kept_handlers():
            engine = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=engine_args.enable_log_requests,
                disable_log_stats=engine_args.disable_log_stats,
            )
        engine._profile_session_guard_enabled = False  # what this gateway begins, another one may end
        _check_first(engine)
        if is_followed:
            progress.follow(engine)
        app = await versions.build_openai_app(engine, args, answering)
        app.state.server = SimpleNamespace(should_exit=False)  # vLLM's, to be ended when its engine is dead
        frontend = cls(app, engine, args)
        await frontend._lifespan.enter_async_context(app.router.lifespan_context(app))
        return frontend

    async def close(self) -> None:
        """End vLLM's app and its engine client; the replicas stay."""
        await self._lifespan.aclose()
        self.engine.shutdown()


def settle_environment() -> None:
    """Tell vLLM that this process's environment does not change any more.

    Its server asks for a variable for each token (VLLM_COMPUTE_NANS_IN_LOGITS, in both versions), and each time looks
    into `os.environ`; its engines remember all of them once they have started, its server does not.
    """
    from vllm import envs

    envs.enable_envs_cache()


def _check_first(engine: AsyncLLM) -> None:
    """Check each request before vLLM counts it: AsyncLLM never forgets one that its engine-core client refuses."""
    codec, add = VllmCodec(), engine.output_processor.add_request

    def add_checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        codec.check(request)
        return add(request, *args, **kwargs)

    engine.output_processor.add_request = add_checked


def _import_app() -> None:
    with kept_handlers():
        versions.app_modules()


def _tokenizer_argv(argv: Sequence[str], files: contextlib.ExitStack) -> list[str]:
    """An argument that gives a twin a tokenizer where its model's directory has none. `files`: removes its files."""
    args = versions.parse_args(argv)
    directory = Path(args.model)
    if args.tokenizer or args.skip_tokenizer_init or not directory.is_dir() or plain_tokenizer.has_own(directory):
        return []
    made = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="kervan-tokenizer-")))
    plain_tokenizer.write(models.read_config(args.model) or {}, made, chat_template=plain_tokenizer.CHAT_TEMPLATE)
    return ["--tokenizer", str(made)]


def _configure(argv: Sequence[str]) -> tuple[Namespace, AsyncEngineArgs, Any]:
    args = versions.parse_args(argv)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    with kept_handlers():
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    return args, engine_args, config
