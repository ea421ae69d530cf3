"""Texts are vLLM's own (0.24.0 and 0.32.0), with numbers filled in."""

import pytest

from kervan.errors import CapacityError, ConfigError, EngineError, KervanError
from kervan.fleet.control import EngineFailed
from kervan.fleet.vllm.failures import diagnosed, explain, of_end, with_cause

SEE_DOCS = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."


class ValidationError(ValueError):
    """As pydantic's: vLLM's configs raise it around their own ValueErrors."""


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "kind", "fix"),
    [
        pytest.param(
            ValueError(
                "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the "
                "engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). "
                + SEE_DOCS
            ),
            CapacityError,
            "VLLM_CPU_KVCACHE_SPACE=GiB",
            id="no KV cache",
        ),
        pytest.param(
            ValueError(
                "To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, which "
                "is larger than the available KV cache memory (11.34 GiB). Based on the available memory, the estimated "
                "maximum model length is 92896. Try increasing `gpu_memory_utilization` (which also controls CPU memory on "
                "the CPU backend) or decreasing `max_model_len` when initializing the engine. " + SEE_DOCS
            ),
            CapacityError,
            "--engine-arg max_model_len=4096",
            id="KV cache too small",
        ),
        pytest.param(
            ValueError(
                "Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try "
                "increasing `gpu_memory_utilization`."
            ),
            CapacityError,
            "more GPUs per replica (--tp)",
            id="auto-fit finds no room",
        ),
        pytest.param(
            ValueError(
                "Free memory on device cuda:0 (61.28/139.81 GiB) on startup is less than desired GPU memory utilization "
                "(0.92, 128.62 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
            ),
            CapacityError,
            "stop what else uses the GPU",
            id="GPU in use",
        ),
        pytest.param(
            ValueError(
                "Externally held weights on device cuda:0 (130.1/139.81 GiB) exceed the desired GPU memory utilization "
                "(0.92, 128.62 GiB). Increase GPU memory utilization or reduce GPU memory used by other processes."
            ),
            CapacityError,
            "stop what else uses the GPU",
            id="weights held elsewhere",
        ),
        pytest.param(
            ValueError(
                "Available memory on node 0 (3.62/15.61 GiB) on startup is less than desired CPU memory utilization (0.92, "
                "14.37 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory "
                "reserved (despite its name). To resolve: decrease `--gpu-memory-utilization` (e.g. "
                "`--gpu-memory-utilization 0.5`) or reduce CPU memory used by other processes."
            ),
            CapacityError,
            "--engine-arg gpu_memory_utilization=0.5",
            id="CPU memory in use",
        ),
        pytest.param(
            ValueError(
                "Available memory on node 0 (3.62/15.61 GiB) on kv cache allocation is less than requested memory for kv "
                "(400.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other "
                "processes."
            ),
            CapacityError,
            "smaller --env VLLM_CPU_KVCACHE_SPACE=GiB",
            id="CPU KV cache too large",
        ),
        pytest.param(
            OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.21 GiB "
                "is free. Including non-PyTorch memory, this process has 77.89 GiB memory in use."
            ),
            CapacityError,
            "a quantised model",
            id="CUDA OOM",
        ),
        pytest.param(
            RuntimeError(
                "CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering "
                "`max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
            ),
            CapacityError,
            "gpu_memory_utilization=0.8",
            id="OOM in warm-up",
        ),
        pytest.param(
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 429496729600 bytes. Error code 12 (Cannot allocate memory)"
            ),
            CapacityError,
            "a quantised model",
            id="CPU OOM",
        ),
        pytest.param(
            ValidationError(
                "1 validation error for ModelConfig\n  Value error, User-specified max_model_len (99999) is greater than the "
                "derived max_model_len (max_position_embeddings=4096 or model_max_length=None in model's config.json). To "
                "allow overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
            ),
            ConfigError,
            "within the model's own context length",
            id="max_model_len too long",
        ),
        pytest.param(
            ValidationError(
                "1 validation error for VllmConfig\n  Value error, Total number of attention heads (14) must be divisible by "
                "tensor parallel size (4)."
            ),
            ConfigError,
            "a --tp that divides",
            id="tp does not divide",
        ),
        pytest.param(
            ValidationError(
                "1 validation error for ModelConfig\n  Value error, Model architectures ['NopeForCausalLM'] are not supported "
                "for now. Supported architectures: dict_keys(['AfmoeForCausalLM', 'ApertusForCausalLM'])"
            ),
            ConfigError,
            "a model that this vLLM supports",
            id="unknown architecture",
        ),
        pytest.param(
            ValueError(
                "Model architectures ['LlamaForCausalLM'] failed to be inspected. Please check the logs for more details."
            ),
            ConfigError,
            "a model that this vLLM supports",
            id="architecture fails to import",
        ),
        pytest.param(
            ValueError(
                "Model architecture MotifForCausalLM was supported in vLLM until v0.10.2, and is not supported anymore. "
                "Please use an older version of vLLM if you want to use this model architecture."
            ),
            ConfigError,
            "a model that this vLLM supports",
            id="architecture dropped",
        ),
        pytest.param(
            OSError(
                "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/meta/x.\n"
                "401 Client Error. Cannot access gated repo for url https://huggingface.co/meta/x/resolve/main/config.json."
            ),
            ConfigError,
            "--env HF_TOKEN=TOKEN",
            id="gated model",
        ),
        pytest.param(
            OSError(
                "a/b is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'"
            ),
            ConfigError,
            "check the model's name",
            id="no such model",
        ),
        pytest.param(
            OSError(
                "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached "
                "files."
            ),
            ConfigError,
            "a directory with the model",
            id="no hub",
        ),
        pytest.param(
            OSError(28, "No space left on device", "/root/.cache/huggingface/hub/tmp"),
            CapacityError,
            "--env HF_HOME=DIRECTORY",
            id="disk full",
        ),
        pytest.param(
            RuntimeError("Error while deserializing header: incomplete metadata, file not fully covered"),
            ConfigError,
            "fetch the model's weights again",
            id="truncated safetensors",
        ),
        pytest.param(
            RuntimeError("Cannot find any model weights with `/models/x`"),
            ConfigError,
            "load_format=dummy",
            id="no weights",
        ),
        pytest.param(
            ValueError(
                "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library file, (2) ..."
            ),
            ConfigError,
            "--engine-arg tokenizer=DIRECTORY",
            id="no tokenizer",
        ),
        pytest.param(
            ValidationError(
                "1 validation error for ModelConfig\n  Value error, The repository /m contains custom code which must be "
                "executed to correctly load the model. Please pass the argument `trust_remote_code=True`"
            ),
            ConfigError,
            "--engine-arg trust_remote_code=true",
            id="custom code",
        ),
        pytest.param(
            ImportError("libcudart.so.13: cannot open shared object file: No such file or directory"),
            EngineError,
            "--env LD_LIBRARY_PATH=DIRECTORY",
            id="missing library",
        ),
        pytest.param(
            RuntimeError("The NVIDIA driver on your system is too old (found version 12040)."),
            EngineError,
            "a newer NVIDIA driver",
            id="old driver",
        ),
        pytest.param(
            RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
            CapacityError,
            "stop what else uses the GPU",
            id="exclusive GPU",
        ),
        pytest.param(
            RuntimeError("CUDA error: invalid device ordinal"),
            ConfigError,
            "this node's GPUs are enough for",
            id="too few GPUs",
        ),
        pytest.param(
            RuntimeError(
                "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: "
                "-98, name: EADDRINUSE, message: address already in use"
            ),
            EngineError,
            "start again",
            id="port taken",
        ),
        pytest.param(
            AssertionError("Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers."),
            ConfigError,
            "VLLM_CPU_OMP_THREADS_BIND=nobind",
            id="NUMA",
        ),
    ],
)
def test_known_failures_name_their_fix(error: Exception, kind: type[KervanError], fix: str) -> None:
    explained = explain(error)
    assert type(explained) is kind
    head, _, told = str(explained).partition(" Fix: ")
    assert fix in told
    assert head.startswith(str(error).split("\n")[0].split(".")[0])  # vLLM's own words, with their numbers, stay
    assert "\n" not in str(explained)


WRAPPER = (
    "vLLM did not start: Exception: WorkerProc initialization failed due to an exception in a background process. See "
    "stack trace for root cause."
)


def log_of(*errors: str) -> str:
    return "".join(f"Traceback (most recent call last):\n  File\n{error}\n\n" for error in errors)


@pytest.mark.parametrize(
    ("log", "kind", "message"),
    [
        pytest.param("", "EngineError", WRAPPER, id="nothing in the log"),
        pytest.param(
            log_of("ValueError: odd", "RuntimeError: Worker died unexpectedly"),
            "ConfigError",
            "vLLM did not start: ValueError: odd.",
            id="unknown",
        ),
        pytest.param(
            log_of("torch.OutOfMemoryError: CUDA out of memory.", "AttributeError: 'X' has no attribute 'close'"),
            "CapacityError",
            "OutOfMemoryError: CUDA out of memory. Fix: more GPUs per replica",
            id="a known one before an unknown one",
        ),
    ],
)
def test_a_failure_that_names_another_one_is_told_as_that(log: str, kind: str, message: str) -> None:
    found = with_cause(EngineFailed("EngineError", WRAPPER), log)
    assert found.kind == kind
    assert found.message.startswith(message)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (
            -4,
            "a worker of the engine ended with signal SIGILL. vLLM uses an instruction that this CPU lacks. Fix: --eng",
        ),
        (-9, "a worker of the engine ended with signal SIGKILL. If the machine was out of memory"),
        (-7, "signal SIGBUS. Fix: more shared memory"),
        (-11, "a worker of the engine ended with signal SIGSEGV."),
        (3, "a worker of the engine ended with exit status 3."),
    ],
)
def test_a_worker_that_died_without_a_word_is_told(status: int, told: str) -> None:
    log = (
        f"(MainProcess pid=1) ERROR 11-29 20:01:35 [multiproc_executor.py:380] Worker proc VllmWorker-0 died unexpectedly "
        f"(exit code: {status}), shutting down executor.\n"
    ) + log_of("RuntimeError: cancelled")
    found = with_cause(EngineFailed("EngineError", "vLLM did not start: RuntimeError: cancelled."), log)
    assert found.message.startswith("vLLM did not start: ")
    assert told in found.message


def test_a_failure_that_says_what_it_is_stays() -> None:
    own = EngineFailed("ConfigError", "tp=3 does not divide 8 heads")
    assert with_cause(own, log_of("ValueError: other")) is own


def test_an_end_without_a_word_gets_the_fix_of_the_last_known_error() -> None:
    missing = "ImportError: libcudart.so.13: cannot open shared object file"
    ended = of_end(f"exit status 1; its last error: {missing}", log_of(missing))
    assert ended.message.startswith("the engine process ended during start-up with exit status 1; its last error: Imp")
    assert " Fix: install the vLLM" in ended.message
    killed = of_end("signal SIGKILL (killed; when the machine was out of memory, by its kernel); its last line: x", "x")
    assert "Fix" not in killed.message


def test_the_root_cause_is_found_below_a_wrapper() -> None:
    try:
        try:
            raise ValueError("No available memory for the cache blocks.")
        except ValueError as cause:
            raise RuntimeError("Engine core initialization failed. See root cause above.") from cause
    except RuntimeError as error:
        assert isinstance(explain(error), CapacityError)


def test_a_cause_that_was_not_chained_on_purpose_is_found_too() -> None:
    try:
        try:
            raise ValueError("Free memory on device cuda:0 (1.0/2.0 GiB) on startup is less than desired")
        finally:
            raise RuntimeError("while cleaning up")
    except RuntimeError as error:
        assert isinstance(explain(error), CapacityError)


def test_kervans_own_errors_pass_unchanged() -> None:
    own = ConfigError("vLLM refuses its arguments: argument --dtype: invalid choice: 'int3'")
    wrapper = RuntimeError("start failed")
    wrapper.__cause__ = own
    assert explain(own) is own
    assert explain(wrapper) is own


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError("[Errno 5] Input/output error: '/models/x/config.json'"),
            ConfigError,
            "OSError: [Errno 5] Input/output error",
        ),
        (ValueError("bad value\nin two lines"), ConfigError, "ValueError: bad value in two lines."),
        (KeyError("rope_theta"), EngineError, "KeyError: 'rope_theta'."),
        (RuntimeError("NCCL error: unhandled cuda error"), EngineError, "RuntimeError: NCCL error"),
    ],
)
def test_other_failures_are_told_in_one_line(error: Exception, kind: type[KervanError], words: str) -> None:
    explained = explain(error)
    assert type(explained) is kind
    assert str(explained).startswith("vLLM did not start: ")
    assert words in str(explained)
    assert "\n" not in str(explained)


def test_a_gateways_failure_that_is_not_vllms_keeps_its_words() -> None:
    assert diagnosed(OSError(98, "Address already in use")) is None
    too_long = ValueError("User-specified max_model_len (4096) is greater than the derived max_model_len (2048)")
    assert str(diagnosed(too_long)).endswith("Fix: a max_model_len within the model's own context length")


def test_long_texts_are_cut() -> None:
    assert len(str(explain(RuntimeError("x" * 10_000)))) < 800


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert "RuntimeError: a" in str(explain(first))
