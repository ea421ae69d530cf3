"""What differs between the vLLM releases that kervan supports, in one place.

Tested: 0.24.0 (GPU, model runner V2) and 0.32.0 (the CPU lock, model runner V1). 0.33.0 is published for GPUs only: its
source keeps the contract, and on a CPU it ran over the kernels of 0.32.

    what                      0.24                               0.32
    OpenAI app                entrypoints.openai.api_server      entrypoints.launchers.app / .api_server.app_state
    argument parser           entrypoints.openai.cli_args        entrypoints.launchers.cli_args; 0.33: .common.cli_args
    make_async_mp_client      -                                  + renderer=
    token limits of a runner  V2: module constants               V2: 0.24's, lifted (VLLM_MAX_NUM_BAD_WORDS)
    errors of a generation    openai.engine.{serving,protocol}   generate.base.serving, exceptions; one is retryable
    a grammar's advance       should_advance, accept_tokens      StructuredOutputManager.accept_tokens
"""

import contextlib
import importlib
import importlib.util
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from kervan.errors import ConfigError

MIN_VERSION = (0, 24)
MAX_VERSION = (0, 34)  # exclusive
TESTED = ("0.24.0", "0.32.0")


def engine_version() -> str:
    """The installed vLLM's version; gateways and replicas compare it in their handshake."""
    from vllm.version import __version__

    return str(__version__)


def supported() -> str:
    """The range of versions, as for pip."""
    return f">={'.'.join(map(str, MIN_VERSION))},<{'.'.join(map(str, MAX_VERSION))}"


def untested(version: str) -> str | None:
    """What a user is told of a version that kervan is not tested with; None for a tested one."""
    release = version.partition("+")[0]
    if release in TESTED:
        return None
    told = f"vLLM {version} is not a version that kervan is tested with ({' and '.join(TESTED)})"
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and MIN_VERSION <= (int(numbers[1]), int(numbers[2])) < MAX_VERSION:
        return f"{told}; it is in the supported range {supported()}"
    return f"{told}, and outside the supported range {supported()}"


def _first(*names: str) -> ModuleType:
    for name in names:
        try:
            if importlib.util.find_spec(name) is not None:
                return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or name):  # it is there, and needs a package that is not
                raise ConfigError(
                    f"vLLM {engine_version()} needs a package that is not installed ({error}); install vLLM again with "
                    "its packages"
                ) from error
    raise ConfigError(f"vLLM {engine_version()} has none of {', '.join(names)}; kervan supports vLLM {supported()}")


def cli_args() -> ModuleType:
    """vLLM's module with `make_arg_parser` and `validate_parsed_serve_args`."""
    return _first(
        "vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"
    )


def parse_args(argv: Sequence[str]) -> Namespace:
    """vLLM's own reading of its server arguments.

    Raises: ConfigError with vLLM's message, where vLLM would print its usage and exit, or stop with a traceback; also
    for a word that belongs to no option, which vLLM takes for the model's name.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"vLLM refuses its arguments: {message}")

    module = cli_args()
    parser: ArgumentParser = module.make_arg_parser(Parser())
    try:
        args = parser.parse_args(list(argv))
        module.validate_parsed_serve_args(args)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses its arguments: {' '.join(str(error).split())}") from error
    if args.model_tag is not None:
        raise ConfigError(f"vLLM's arguments have {args.model_tag!r}, which no option takes; leave it out")
    return args


def app_modules() -> tuple[ModuleType, ModuleType]:
    """vLLM's modules that build its app and the app's state; seconds to import."""
    return (
        _first("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server"),
        _first("vllm.entrypoints.launchers.api_server.app_state", "vllm.entrypoints.openai.api_server"),
    )


async def build_openai_app(engine: Any, args: Namespace, answering: Any = None) -> Any:
    """vLLM's OpenAI FastAPI app over `engine`, with its state filled in.

    `answering`: an ASGI middleware that may answer in the place of vLLM's routes.
    """
    app_module, state_module = app_modules()
    tasks = await engine.get_supported_tasks()
    with _answering(answering):
        app = app_module.build_app(args, tasks, engine.model_config)
    await state_module.init_app_state(engine, app.state, args, tasks)
    return app


def build_bare_app(args: Namespace, answering: Any) -> Any:
    """vLLM's FastAPI app without a task: its middlewares down to `answering`, and no state."""
    with _answering(answering, is_last=True):
        return app_modules()[0].build_app(args, ())


@contextlib.contextmanager
def _answering(answering: Any, *, is_last: bool = False) -> Iterator[None]:
    """Within, FastAPI apps get `answering` just inside of CORS, with `is_last` in the place of what is further inside.

    That is what counts requests: the second of a process counts nothing. vLLM adds CORS and builds the stack of
    middlewares in one function.
    """
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware

    original = FastAPI.build_middleware_stack

    def build(self: FastAPI) -> Any:
        classes: list[Any] = [middleware.cls for middleware in self.user_middleware]
        if answering not in classes:
            place = classes.index(CORSMiddleware) + 1
            self.user_middleware[place : None if is_last else place] = [Middleware(answering)]
        return original(self)

    if answering is not None:
        FastAPI.build_middleware_stack = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        FastAPI.build_middleware_stack = original  # type: ignore[method-assign]


def advance_grammar(manager: Any, request: Any, token: int) -> bool:
    """Feed a generated token to a request's grammar as vLLM's scheduler does after a step; False if it is refused.

    `request`: its tokens already include `token`, and all but `token` are computed.
    """
    if hasattr(manager, "accept_tokens"):
        return bool(manager.accept_tokens(request, [token]))
    manager.should_fill_bitmask(request)  # finds out whether the prompt has ended the reasoning
    tokens = [token]
    if hasattr(manager, "trim_reasoning_for_advance"):  # 0.29
        if not manager.should_advance(request, new_token_ids=tokens):
            return True
        tokens = manager.trim_reasoning_for_advance(request, tokens)
    elif not manager.should_advance(request):
        return True
    return not tokens or bool(request.structured_output_request.grammar.accept_tokens(request.request_id, tokens))


def serving_class() -> Any:
    """The base class of vLLM's generating endpoints, whose `_raise_if_error` ends a failed request."""
    module = _first("vllm.entrypoints.generate.base.serving", "vllm.entrypoints.openai.engine.serving")
    return next(
        value for value in vars(module).values() if isinstance(value, type) and "_raise_if_error" in vars(value)
    )


def generation_error(message: str, *, is_transient: bool) -> Exception:
    """What vLLM answers with 500, or 503 if it is transient; 0.24 knows no type of error for the latter."""
    from http import HTTPStatus

    exceptions = importlib.import_module("vllm.exceptions")
    if is_transient and hasattr(exceptions, "RetryableRequestError"):
        error: Exception = exceptions.RetryableRequestError(message)
        return error
    module = exceptions if hasattr(exceptions, "GenerationError") else _first("vllm.entrypoints.openai.engine.protocol")
    failed: Exception = module.GenerationError(message)
    if is_transient:
        failed.status_code = HTTPStatus.SERVICE_UNAVAILABLE  # type: ignore[attr-defined]
    return failed


def runner_limits() -> dict[str, int]:
    """How many entries a request may carry, by sampling parameter, before model runner V2 raises and dies.

    It raises inside the worker, which kills the engine; a gateway answers 400 instead. `bad_words_tokens`: of all
    words. Source: vllm/v1/worker/gpu/sample/{logit_bias,bad_words}.py. Runner V1 has no such limits.
    """
    from vllm import envs

    limits = {}
    for parameter, module_name, constant in (
        ("logit_bias", "logit_bias", "MAX_NUM_LOGIT_BIAS_TOKENS"),
        ("allowed_token_ids", "logit_bias", "MAX_NUM_ALLOWED_TOKEN_IDS"),
        ("stop_token_ids", "logit_bias", "MAX_NUM_STOP_TOKEN_IDS"),
        ("bad_words", "bad_words", "MAX_NUM_BAD_WORDS"),
        ("bad_words_tokens", "bad_words", "MAX_BAD_WORDS_TOTAL_TOKENS"),
    ):
        source = importlib.util.find_spec(f"vllm.v1.worker.gpu.sample.{module_name}")
        value = _module_constant(source.origin, constant) if source is not None and source.origin else None
        value = getattr(envs, f"VLLM_{constant}", None) if value is None else value
        if value is not None:
            limits[parameter] = value
    return limits


def _module_constant(path: str, name: str) -> int | None:
    """An integer constant of a module that must not be imported here (it needs Triton)."""
    import ast
    from pathlib import Path

    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            value = ast.literal_eval(node.value)
            return int(value)
    return None
