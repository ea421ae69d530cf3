"""How often bf16 rounding changes an answer: by a move, and by nothing but another batch.

The model is a llama of 80M parameters, trained here on Python sources for about a minute: as in real models, most of
its tokens are sure and some are not. Random weights would not do: their tokens are near ties, or always the same.
"""

import argparse
import json
import multiprocessing
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exact_moves import first_difference, last_line, margin, took
from harness.resume_oracle import Answer, Ask, Oracle

Row = dict[str, Any]
Keep = Callable[[Row], None]
VOCAB_SIZE = 8192
MAX_TOKENS = 256
PROMPT_TOKENS = (64, 512)
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
SMALL_SHAPE = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_SHAPE["num_key_value_heads"] = 2
CONTEXT = 1024
TRAIN_BYTES = 32 * 2**20
TOKENIZER_BYTES = 4 * 2**20
NUM_MOVES = 4  # of each answer, each at another place
NUM_ALONE = 8
SAMPLINGS: Mapping[str, Row] = {
    "greedy": {"temperature": 0.0},
    "seed, temperature 0.8": {"temperature": 0.8, "top_p": 0.95},
}
ENGINES = {"bf16": {}, "bf16, batch invariant": {"VLLM_BATCH_INVARIANT": "1"}}


def run(args: argparse.Namespace, keep: Keep, device: Mapping[str, Any]) -> str:
    """Train, then ask; rows go to `keep`. Returns the table."""
    with tempfile.TemporaryDirectory() as place:
        return _run(args, keep, device, Path(place))


def _run(args: argparse.Namespace, keep: Keep, device: Mapping[str, Any], place: Path) -> str:
    is_small = not device
    begin_s = time.monotonic()
    context = multiprocessing.get_context("spawn")
    training = context.Process(target=train, args=(place, args.train_s, is_small))  # frees the GPU when it ends
    training.start()
    training.join()
    if training.exitcode:
        raise RuntimeError(f"the training ended with {training.exitcode}")
    keep({"what": "training", **json.loads((place / "training.json").read_text()), "took_s": took(begin_s)})
    rows: list[Row] = []
    asks = questions(place, args.answers)
    with ThreadPoolExecutor() as starters:  # engines start side by side, and are asked one after the other
        starting = {name: starters.submit(_start, name, args, place, device) for name in ENGINES}
        for name, oracle in starting.items():
            try:
                for row in _asked(oracle.result(), asks, args.deadline_s):
                    rows.append({"engine": name, **row})
                    keep(rows[-1])
            except Exception as error:  # noqa: BLE001 - a row says it; the next engine may do
                keep({"engine": name, "what": "engine", "failed": last_line(error)})
    return table(rows)


def _start(name: str, args: argparse.Namespace, place: Path, device: Mapping[str, Any]) -> Oracle:
    sizes = {"max_model_len": CONTEXT, "max_num_seqs": 128, "enable_prefix_caching": False, "dtype": "bfloat16"}
    if device:
        sizes |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 8 * 2**30}
    log = args.out / f"flips-{name.replace(', ', '-').replace(' ', '-')}.log"
    return Oracle(str(place), env={**ENGINES[name], "VLLM_LOGGING_LEVEL": "INFO"}, log=log, **{**device, **sizes})


def _asked(oracle: Oracle, asks: Sequence[Sequence[int]], deadline_s: float) -> Iterator[Row]:
    with closing(oracle):
        yield {"what": "engine", "facts": oracle.call("facts")}
        for kind, sampling in SAMPLINGS.items():
            for row in measured(oracle, asks, sampling):
                yield {"sampling": kind, **row}
                if time.monotonic() > deadline_s - 20:
                    raise TimeoutError("no time left")


def measured(oracle: Oracle, asks: Sequence[Sequence[int]], sampling: Row) -> Iterator[Row]:
    """The answers all at once, then asked again in other batches, then moved."""
    full = [
        Ask(prompt, {**sampling, "max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 2, **seed})
        for number, prompt in enumerate(asks)
        for seed in [{"seed": number} if sampling["temperature"] else {}]
    ]
    whole: list[Answer] = oracle.call("answers", full)
    leads = sorted(
        lead for answer in whole for position in range(MAX_TOKENS) if (lead := margin(answer, position)) is not None
    )
    yield {
        "what": "answers",
        "answers": len(whole),
        "lead_quantiles": {str(q): round(leads[int(q * (len(leads) - 1))], 4) for q in (0.001, 0.01, 0.1, 0.5)},
        "distinct_tokens": round(sum(len(set(answer.tokens)) for answer in whole) / len(whole), 1),
    }
    starts = [0] * len(whole)
    again: list[Answer] = oracle.call("answers", full)
    yield differing("the same batch again", whole, again, starts)
    tens = [answer for i in range(0, len(full), 10) for answer in oracle.call("answers", full[i : i + 10])]
    yield differing("in batches of 10", whole, tens, starts)
    alone = [answer for ask in full[:NUM_ALONE] for answer in oracle.call("answers", [ask])]
    yield differing("one by one", whole[:NUM_ALONE], alone, starts[:NUM_ALONE])
    rng = random.Random(0)
    originals, moved, cuts = [], [], []
    for _ in range(NUM_MOVES):
        chosen = [rng.randrange(1, MAX_TOKENS) for _ in full]
        moved += oracle.call("answers", full, [answer.tokens[:n] for answer, n in zip(whole, chosen, strict=True)])
        originals += whole
        cuts += chosen
    yield differing("moved at a random token", originals, moved, cuts)


def differing(what: str, whole: Sequence[Answer], others: Sequence[Answer], starts: Sequence[int]) -> Row:
    """How many of `others` part from `whole`. `starts`: tokens of each that were given, so could not differ."""
    exposed, parted, at_once, margins = 0, 0, 0, []
    for ours, theirs, start in zip(whole, others, starts, strict=True):
        position = first_difference(ours.tokens, theirs.tokens)
        exposed += (len(ours.tokens) if position is None else position + 1) - start
        if position is None:
            continue
        parted += 1
        at_once += position == start
        lead = margin(ours, position)
        margins.append(round(lead if lead is not None else -1.0, 4))
    return {
        "what": what,
        "asked": len(others),
        "differ": parted,
        "tokens_until_then": exposed,
        "per_1000_tokens": round(1000 * parted / exposed, 3),
        "differ_at_their_first_token": at_once,
        "leads": sorted(margins),
    }


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'engine':<23} {'sampling':<22} {'what':<24} {'differ':>9} {'of':>5} {'per 1000 tokens':>16}  largest lead"
    ]
    for row in rows:
        if "differ" in row:
            largest = f"{row['leads'][-1]:.4f}" if row["leads"] else "-"
            lines.append(
                f"{row['engine']:<23} {row['sampling']:<22} {row['what']:<24} {row['differ']:>9} {row['asked']:>5} "
                f"{row['per_1000_tokens']:>16.3f}  {largest}"
            )
    return "\n".join(lines)


# ---- the model


def sources() -> list[Path]:
    """Python files of the standard library and of packages that are here anyway."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in ("torch", "transformers", "vllm", "ray", "numpy"):
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots += [Path(place) for place in spec.submodule_search_locations]
    files = [
        path
        for root in roots
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.relative_to(root).parts
    ]
    random.Random(0).shuffle(files)
    return files


def texts(max_bytes: int) -> tuple[list[str], list[str]]:
    """Sources to learn, and others to ask about."""
    held: list[str] = []
    learnt: list[str] = []
    size = 0
    for path in sources():
        text = path.read_text(errors="ignore")
        if len(text) < 4000:
            continue
        if len(held) < 200:
            held.append(text)
        elif size < max_bytes:
            learnt.append(text[:100_000])
            size += len(learnt[-1])
        else:
            break
    return learnt, held


def questions(place: Path, count: int) -> list[list[int]]:
    """Beginnings of files that were not learnt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    _, held = texts(0)
    rng = random.Random(1)
    found = []
    for number in range(count):
        ids = tokenizer.encode(held[number % len(held)][: 8 * PROMPT_TOKENS[1]]).ids
        begin = 0 if number < len(held) else rng.randrange(len(ids) // 2)
        found.append(ids[begin : begin + rng.randrange(*PROMPT_TOKENS)])
    return found


def train(place: Path, budget_s: float, is_small: bool) -> None:
    """Make the model in `place`, with `training.json` about it. In a process of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    begin_s = time.monotonic()
    learnt, _ = texts(TRAIN_BYTES // (16 if is_small else 1))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:20_000] for text in learnt[: TOKENIZER_BYTES // 20_000]), trainer)
    encoded = tokenizer.encode_batch(learnt)
    tokens = torch.tensor([id_ for one in encoded for id_ in (*one.ids, 0)], dtype=torch.long)
    prepared_s = time.monotonic() - begin_s

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = SMALL_SHAPE if is_small else SHAPE
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="float32", **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    size, length = (2, 128) if is_small else (32, CONTEXT)
    generator = torch.Generator().manual_seed(0)
    start_s = time.monotonic()
    steps, losses = 0, []
    while (share := (time.monotonic() - start_s) / budget_s) < 1:
        rate = 1e-3 * min(1.0, (steps + 1) / 50) * (1.0 - 0.95 * share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        begins = torch.randint(0, len(tokens) - length, (size,), generator=generator)
        ids = torch.stack([tokens[i : i + length] for i in begins.tolist()]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        losses.append(loss.detach())
        if steps % 20 == 0:
            losses[-1].item()  # waits for the GPU, so that the clock means something
    place.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(place)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.save_pretrained(place)
    about = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_of_text": len(tokens),
        "tokens_seen": steps * size * length,
        "steps": steps,
        "loss": round(float(torch.stack(losses[-20:]).mean()), 3),
        "prepared_s": round(prepared_s, 1),
    }
    (place / "training.json").write_text(json.dumps(about))
