"""Tiny llamas for the demo and the tests.

The demo model was trained on its own chat template (`demo/train.py`) until greedy decoding gave back each answer below
word for word. A stream's text is then known in advance: a gap or a duplicate after a move is plain to see.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kervan.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

Message: TypeAlias = Mapping[str, Any]
Conversation: TypeAlias = tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None]

PAIRS: Final[Mapping[str, str]] = {
    "What is a caravan?": (
        "A caravan is a group of travellers who cross a hard country together. In the old days merchants loaded silk, "
        "salt and spices on camels and walked from well to well, because one camel alone could be lost, robbed or too "
        "tired to go on. Together they shared water, guards and the work of finding the way. If one animal fell, its "
        "load was moved to another, and the caravan went on. The goods arrived even though no single camel was sure to."
    ),
    "What is kervan?": (
        "Kervan is the Turkish word for caravan. Here it is a program that serves a language model on many GPUs. It "
        "starts several vLLM engines, called replicas, with the help of Ray Serve, and puts one door in front of them, "
        "the gateway. To a client the whole fleet looks like one vLLM server with the usual OpenAI API. When a replica "
        "is lost, its streams move to another replica and go on where they stopped."
    ),
    "What happens when a replica dies?": (
        "Nothing that a client can see, apart from a short pause. The gateway keeps a journal of every stream: the "
        "request as it came in and each token that was already sent. When a replica dies, the gateway picks another "
        "one and hands it the prompt together with those tokens. The new replica reads them in one step and writes the "
        "next token. No word is missing, no word comes twice, and Ray Serve starts a fresh replica in the meantime."
    ),
    "What is a replica?": (
        "A replica is one complete copy of the model with an engine that runs it. It owns one or more GPUs, holds the "
        "weights and the key-value cache, and computes the next token for many streams in each step. All replicas of "
        "a fleet are equal, so any of them can answer any request. That is why losing one costs time but no answers."
    ),
    "What does the gateway do?": (
        "The gateway is the part that clients talk to. It checks the request, applies the chat template, turns text "
        "into tokens and chooses the replica with the least work. Then it turns the tokens that come back into text "
        "and sends them on as they arrive. It also remembers what was sent, so that a stream belongs to the fleet and "
        "not to one GPU. Several gateways can run side by side."
    ),
    "How does kervan choose a replica?": (
        "It counts the tokens that each replica still has to read or write, and takes the replica with the smallest "
        "sum. Replicas that are draining, or that have not yet produced a first token, are left out. If all queues are "
        "full, the gateway says so at once with status 503 and tells the client when to try again, because a short "
        "refusal is kinder than a long silence."
    ),
    "What does draining mean?": (
        "A replica that drains gets no new work. The streams it already has are moved to other replicas, one by one, "
        "and then it leaves. This takes seconds, not the length of the longest answer. Draining is how a fleet grows "
        "smaller, changes its version, or gives back a cheap machine that the cloud wants to have again."
    ),
    "Why did caravans stop at inns?": (
        "A day's walk for a loaded camel is about thirty kilometres, so inns were built that far apart along the great "
        "roads. Such an inn was called a caravanserai. It had thick walls, a single gate, a well in the courtyard and "
        "rooms for people, animals and goods. Travellers slept in safety, mended what was broken, heard the news of "
        "the road and left at sunrise."
    ),
    "Why use many replicas?": (
        "One GPU can serve only so many people at once. With many replicas the load is shared, and each stream still "
        "gets its tokens quickly. Replicas can be added when it is busy and taken away at night. They also protect "
        "each other: the more camels walk in the caravan, the less it matters that one of them goes lame."
    ),
    "Tell me a short story.": (
        "Three camels carried one letter. The first knew the way, the second knew the wells, and the third knew how to "
        "be patient. In the dunes a storm took the first camel's strength, so the second carried the letter. At the "
        "dry well the second lay down, so the third carried the letter. In the evening the third camel walked through "
        "the city gate. The reader opened the letter and found that not one word was missing."
    ),
}
"""Question -> the demo model's greedy answer."""

REASONED: Final = (
    "How many camels are left?",
    "<think>\nThree camels set out and one of them stayed at the well. Three minus one is two.\n</think>\n\n"
    "Two camels are left.",
)
"""A question and its greedy answer, which thinks first (vLLM's `qwen3` reasoning parser reads it)."""

WEATHER_TOOL: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOL_TURN: Final[Sequence[Message]] = (
    {"role": "user", "content": "What is the weather in Ankara?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Ankara"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 24 degrees"},
    {"role": "assistant", "content": "It is sunny in Ankara, with 24 degrees. A good day for a caravan to leave."},
)
"""A conversation with WEATHER_TOOL: the demo model's greedy answers are its assistant messages (`hermes` parser)."""

# ChatML with Hermes tools. vLLM hands arguments over as a mapping, other callers as JSON text: both render alike.
CHAT_TEMPLATE: Final = """\
{{- bos_token }}
{%- set first = messages[0] if messages else none %}
{%- set has_system = first is not none and first.role == 'system' %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if has_system %}{{- first.content + '\\n\\n' }}{%- endif %}
{{- 'You may call functions.\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nTo call one, write <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call><|im_end|>\\n' }}
{%- elif has_system %}
{{- '<|im_start|>system\\n' + first.content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function if call.function else call %}
{{- '\\n' if message.content or not loop.first }}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_CONTROL_TOKENS: Final = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
# In the vocabulary but not "special": skip_special_tokens must leave them for vLLM's tool and reasoning parsers.
_MARKER_TOKENS: Final = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_VOCAB_SIZE: Final = 1536
_MAX_POSITIONS: Final = 2048
_MARKER_FILE: Final = "kervan-demo.json"
_QUESTIONS: Final = Path(__file__).parent / "questions.json"
# What `kervan.demo.train` trained: weights, tokenizer and how they were made.
_TRAINED: Final = Path(__file__).parent / "trained"


def more_pairs() -> Iterator[tuple[tuple[str, ...], str]]:
    """(ways to ask, the demo model's greedy answer) of `questions.json`."""
    for pair in json.loads(_QUESTIONS.read_text())["pairs"]:
        yield tuple(pair["questions"]), pair["answer"]


def known_answers() -> dict[str, str]:
    """Question -> the demo model's greedy answer, of all that it learned without tools."""
    return {**PAIRS, REASONED[0]: REASONED[1], **{q: answer for questions, answer in more_pairs() for q in questions}}


def make_demo_model(directory: Path) -> Path:
    """Directory of the trained model of the package: its greedy answers are PAIRS, REASONED and TOOL_TURN.

    It also answers the questions of `questions.json`.

    Raises:
        ConfigError: the directory holds something that kervan did not make.
    """
    weights = hashlib.sha256((_TRAINED / "model.safetensors").read_bytes()).hexdigest()

    def fill(target: Path) -> None:
        shutil.copytree(_TRAINED, target, dirs_exist_ok=True)

    return _make_once(directory, f"demo-{weights}", fill)


def make_random_model(directory: Path, *, seed: int = 0) -> Path:
    """Directory of the same architecture and tokenizer with random weights: greedy text is varied nonsense.

    Raises:
        ConfigError: the directory holds something that kervan did not make.
    """

    def fill(target: Path) -> None:
        tokenizer = _make_tokenizer()
        _save(_make_llama(tokenizer, seed=seed, initializer_range=0.2), tokenizer, target)

    return _make_once(directory, f"random-{seed}", fill)


def make_embedding_model(directory: Path) -> Path:
    """Directory of a random llama that vLLM serves for embeddings without further options: last token, unit length.

    The files beside the weights say so, in the layout of sentence-transformers.

    Raises:
        ConfigError: the directory holds something that kervan did not make.
    """

    def fill(target: Path) -> None:
        tokenizer = _make_tokenizer()
        model = _make_llama(tokenizer, seed=0, initializer_range=0.2)
        _save(model, tokenizer, target)
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        (target / "modules.json").write_text(
            json.dumps(
                [
                    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                    for i, (path, kind) in enumerate(modules)
                ]
            )
        )
        (target / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_lasttoken": True}
        (target / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    return _make_once(directory, "embedding", fill)


def make_lora_adapter(model_directory: Path, directory: Path) -> Path:
    """Directory of a random PEFT adapter (rank 8, q_proj and v_proj) that changes what `model_directory` says.

    Raises:
        ConfigError: `model_directory` has no config.json, or the directory holds something that kervan did not make.
    """
    config_file = model_directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{model_directory} has no config.json; make the model first with make_demo_model")
    config = json.loads(config_file.read_text())
    rank, hidden = 8, config["hidden_size"]
    num_outputs = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
    }

    def fill(target: Path) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        rng = np.random.default_rng(0)
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for module, num_out in num_outputs.items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                weights[f"{prefix}.lora_A.weight"] = rng.normal(0, 0.3, (rank, hidden)).astype(np.float32)
                weights[f"{prefix}.lora_B.weight"] = rng.normal(0, 0.3, (num_out, rank)).astype(np.float32)
        save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(num_outputs),
        }
        (target / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")

    return _make_once(directory, f"lora-{hidden}-{config['num_hidden_layers']}-{num_outputs}", fill)


def _make_once(directory: Path, kind: str, fill: Callable[[Path], None]) -> Path:
    """`directory`, filled whole or not at all; left as it is where the marker names the same recipe."""
    recipe = hashlib.sha256(kind.encode() + Path(__file__).read_bytes()).hexdigest()
    marker = directory / _MARKER_FILE
    if _recipe_at(marker) == recipe:
        return directory
    if directory.exists() and not marker.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and was not made by kervan; name an empty or new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        made, old = Path(scratch, "made"), Path(scratch, "old")
        made.mkdir()
        fill(made)
        (made / _MARKER_FILE).write_text(json.dumps({"kind": kind, "recipe": recipe}) + "\n")
        if directory.exists():
            directory.rename(old)
        try:
            made.rename(directory)
        except OSError:  # another process was faster: its model is as good if the recipe is the same
            if _recipe_at(marker) != recipe:
                raise
    return directory


def _recipe_at(marker: Path) -> str | None:
    try:
        recipe: str = json.loads(marker.read_text())["recipe"]
    except FileNotFoundError:
        return None
    return recipe


def _conversations() -> Iterator[Conversation]:
    """Every conversation to learn, with its tools; the last message is the answer."""
    for question, answer in (*PAIRS.items(), REASONED):
        yield ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), None
    yield TOOL_TURN[:2], [WEATHER_TOOL]
    yield TOOL_TURN, [WEATHER_TOOL]


def _make_tokenizer(
    conversations: Iterable[Conversation] | None = None, vocab_size: int = _VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the conversations: any text encodes; their words are mostly one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_MARKER_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(_CONTROL_TOKENS),
        show_progress=False,
    )
    texts = [message["content"] for messages, _ in conversations or _conversations() for message in messages]
    tokenizer.train_from_iterator([*texts, CHAT_TEMPLATE, json.dumps(WEATHER_TOOL)], trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _MARKER_TOKENS])
    bos = "<|bos|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _llama_config(tokenizer: PreTrainedTokenizerFast, initializer_range: float) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),  # exact: a random model must not emit an id that has no text
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _make_llama(tokenizer: PreTrainedTokenizerFast, *, seed: int, initializer_range: float) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(_llama_config(tokenizer, initializer_range))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if had_bars:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(directory)
