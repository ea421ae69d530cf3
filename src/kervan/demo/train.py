"""Trains the demo's model once, for the package: python -m kervan.demo.train --output src/kervan/demo/trained

A llama of a few million parameters learns all answers of `questions.json` and of `model.py` word for word, from several
ways to ask for each, with several system prompts. It is rounded to BF16, and saved only if greedy decoding then gives
every answer back. `trained/training.json` says how it went: 80 s on one H200.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kervan.demo import model as demo

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_MB = 15.0
MIN_MARGIN = 2.0  # logits, after rounding to BF16; the demo computes in FP32
ASKED = ("{q}", "{q}", "{lower}", "Please tell me: {q}", "I would like to know: {q}", "{q} Answer in a few sentences.")
SYSTEM_PROMPTS = (None, None, "You are a helpful assistant.", "You are kervan. Answer in plain English.")
HELD_OUT = ("Tell me, {lower}", "One more thing: {q}")
_IGNORE = -100  # cross_entropy's ignore_index
LICENCE = """The weights in this directory were trained by kervan.demo.train on the texts in kervan/demo/model.py and
kervan/demo/questions.json, which were written for kervan. Weights and texts: Apache-2.0, as kervan itself.
"""


def lower(question: str) -> str:
    """Without capital letter and punctuation."""
    return question[0].lower() + question[1:].rstrip("?.")


def all_conversations() -> Iterator[tuple[Sequence[demo.Message], Any]]:
    """What the tokenizer is learned from, in the form of `demo.model`: each question and answer, and their tools."""
    yield from demo._conversations()
    for questions, answer in demo.more_pairs():
        for question in questions:
            yield ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), None


def examples(tokenizer: Any, rng: random.Random) -> list[tuple[list[int], int]]:
    """One epoch: token ids and how many of them are the prompt."""
    found = list(built_in(tokenizer, rng.choice(SYSTEM_PROMPTS), rng))
    for questions, answer in demo.more_pairs():
        for question in questions:
            found.append(encoded(tokenizer, ask(rng.choice(ASKED), question), answer, rng.choice(SYSTEM_PROMPTS)))
    return found


def ask(form: str, question: str) -> str:
    """A question in one of the forms."""
    return form.format(q=question, lower=lower(question))


def encoded(tokenizer: Any, question: str, answer: str, system: str | None) -> tuple[list[int], int]:
    """Token ids of a chat of one turn, and how many of them are the prompt."""
    turns: list[demo.Message] = [] if system is None else [{"role": "system", "content": system}]
    turns = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids, len(tokenizer.encode(prompt, add_special_tokens=False))


def margins(model: Any, tokenizer: Any, device: Any, batch_size: int) -> tuple[float, float]:
    """The least lead of a right token in what must be known; the share of answers right for forms never trained on."""
    known = [e for system in dict.fromkeys(SYSTEM_PROMPTS) for e in built_in(tokenizer, system, None)]
    known += [encoded(tokenizer, q, answer, None) for questions, answer in demo.more_pairs() for q in questions]
    held_out = [
        encoded(tokenizer, ask(form, questions[0]), answer, None)
        for questions, answer in demo.more_pairs()
        for form in HELD_OUT
    ]
    each = [_margin(model, *_on(_batch(part), device)) for part in _parts(known, batch_size)]
    right = [_margin(model, *_on(_batch([one]), device)) > 0 for one in held_out]
    return min(each), sum(right) / len(right)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _on(tensors: tuple[Any, Any], device: Any) -> tuple[Any, Any]:
    return tensors[0].to(device), tensors[1].to(device)


def built_in(
    tokenizer: PreTrainedTokenizerFast, system: str | None, rng: random.Random | None
) -> Iterator[tuple[list[int], int]]:
    """Of each conversation of `demo.model`: token ids, how many of them are the prompt. `rng` varies the question."""
    head = [] if system is None else [{"role": "system", "content": system}]
    for messages, tools in demo._conversations():
        turns: list[demo.Message] = [*head, *messages]
        if rng is not None and rng.random() < 0.2:  # also without capital letter and punctuation
            turns[len(head)] = {**messages[0], "content": messages[0]["content"].lower().rstrip("?.")}
        prompt = tokenizer.apply_chat_template(turns[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        ids = tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)
        yield ids, len(prompt_ids)
    if system is None:  # as plain text, for completions: what follows the first words of an answer
        for answer in demo.PAIRS.values():
            yield [*tokenizer.encode(answer), tokenizer.eos_token_id], 6


def _batch(examples: Sequence[tuple[list[int], int]]) -> tuple[Any, Any]:
    """Ids and next-token targets, both [num_examples, longest - 1], right-padded."""
    import torch

    longest = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full((len(examples), longest), _IGNORE)
    for row, (tokens, num_prompt) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, num_prompt : len(tokens)] = ids[row, num_prompt : len(tokens)]
    return ids[:, :-1], targets[:, 1:]


def _margin(model: LlamaForCausalLM, ids: Any, targets: Any) -> float:
    """Smallest lead of a right answer token over every other token, in logits; negative where one is wrong."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=ids).logits[targets != _IGNORE]
    wanted = targets[targets != _IGNORE].unsqueeze(1)
    right = logits.gather(1, wanted)
    others = logits.scatter(1, wanted, float("-inf")).amax(1, keepdim=True)
    return float((right - others).min())


def train(arguments: argparse.Namespace) -> int:
    """Train, round, check and save. Exit status: 1 when the answers are not all known."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    device = torch.device(arguments.device)
    tokenizer = demo._make_tokenizer(all_conversations(), arguments.vocab)
    config: LlamaConfig = demo._llama_config(tokenizer, 0.02)
    config.update(
        {
            "hidden_size": arguments.hidden, "intermediate_size": 3 * arguments.hidden, "head_dim": 64,
            "num_hidden_layers": arguments.layers, "num_attention_heads": max(2, arguments.hidden // 64),
            "num_key_value_heads": max(1, arguments.hidden // 128),
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.2f}M parameters, {2 * count / 1e6:.1f} MB in BF16, {len(tokenizer)} tokens", flush=True)
    if 2 * count / 1e6 > MAX_MB:
        print(f"that is above {MAX_MB:g} MB; give a smaller --hidden or --layers", file=sys.stderr)
        return 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=arguments.steps, pct_start=0.05, final_div_factor=100
    )
    rng, begin_s, step = random.Random(0), time.monotonic(), 0
    while step < arguments.steps:
        epoch = examples(tokenizer, rng)
        epoch.sort(key=lambda example: len(example[0]) + 30 * rng.random())
        batches = list(_parts(epoch, arguments.batch))
        rng.shuffle(batches)
        for part in batches[: arguments.steps - step]:
            ids, targets = _on(_batch(part), device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=ids).logits
            loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORE)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % max(1, arguments.steps // 20) == 0:
                print(f"[{time.monotonic() - begin_s:5.1f} s] step {step}: loss {loss.item():.4f}", flush=True)
    model = model.to(torch.bfloat16).float().eval()  # as it will be served: rounded weights, FP32 arithmetic
    margin, held_out = margins(model, tokenizer, device, arguments.batch)
    print(f"least lead of a right token {margin:.2f}; {100 * held_out:.0f}% right for forms that were not trained on")
    if margin < arguments.min_margin:
        print(f"that is below {arguments.min_margin:g}, so some answers may differ; give more --steps", file=sys.stderr)
        return 1
    model.to(torch.bfloat16).cpu()
    model.config.dtype = "bfloat16"
    arguments.output.mkdir(parents=True, exist_ok=True)
    demo._save(model, tokenizer, arguments.output)
    (arguments.output / "LICENCE").write_text(LICENCE)
    facts = {
        "parameters": count, "steps": step, "seconds": round(time.monotonic() - begin_s, 1),
        "least_margin": round(margin, 3),
        "held_out_right": held_out, "torch": torch.__version__, "device": str(device),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "",
    }  # fmt: skip
    (arguments.output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")
    return 0


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--min-margin", type=float, default=MIN_MARGIN)
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(train(parsed()))
