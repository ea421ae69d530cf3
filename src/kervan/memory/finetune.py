"""A small real training loop with any recipe: losses, checkpoints that survive the end of a node, resuming.

The data of a step depend on the seed and the step alone, and a step's sequences are shared by the ranks: so the losses
of all recipes and numbers of ranks are one curve, within rounding.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kervan.errors import ConfigError
from kervan.memory import text as texts
from kervan.memory.measure import join
from kervan.memory.shape import DecoderShape
from kervan.memory.techniques import Recipe
from kervan.ranks import told
from kervan.ranks.rank import Doing, Keep, Rank

WARM_UP_SHARE = 0.05
KEPT_CHECKPOINTS = 2
FACTS = "kervan.json"  # beside torch's files: what the run was, and the losses so far


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetunePlan:
    """`batch`: sequences of a step over all ranks. `checkpoint`: where to save and to resume from."""

    shape: DecoderShape
    recipe: Recipe
    steps: int
    batch: int
    seq: int
    lr: float
    device: Literal["cuda", "cpu"]
    files: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    save_every: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step and its loss, of all ranks."""

    step: int
    loss: float
    tokens_s: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is complete; the training stood still for `blocked_s` of the `took_s`."""

    step: int
    where: str
    blocked_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Steps done; `is_told`: ended early because it was told to."""

    steps: int
    resumed_from: int
    is_told: bool
    losses: tuple[float, ...]


def check(plan: FinetunePlan, ranks: int) -> None:
    """Raises: ConfigError."""
    if plan.batch % ranks:
        raise ConfigError(
            f"--batch {plan.batch} does not divide by {ranks} ranks (remainder {plan.batch % ranks}); give --batch "
            f"{plan.batch - plan.batch % ranks + ranks}"
        )
    if plan.shape.vocab < texts.VOCAB:
        raise ConfigError(f"the model has {plan.shape.vocab} words, and bytes need {texts.VOCAB}; take another model")
    if plan.checkpoint is not None and plan.recipe.sharding.startswith("zero"):
        raise ConfigError(
            f"--checkpoint with {plan.recipe.sharding}: DeepSpeed's checkpoints load on as many ranks as they "
            "were saved "
            "with; take fsdp, or leave --checkpoint out"
        )
    texts.check(texts.read(plan.files), plan.seq)


def newest(directory: Path) -> Path | None:
    """The last complete checkpoint: torch writes `.metadata` when all shards are there."""
    found = [path for path in directory.glob("step-*") if (path / ".metadata").exists() and (path / FACTS).exists()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def learning_rate(plan: FinetunePlan, step: int) -> float:
    """A linear rise, then a half cosine down to a tenth."""
    rise = max(1, int(plan.steps * WARM_UP_SHARE))
    if step < rise:
        return plan.lr * (step + 1) / rise
    share = (step - rise) / max(1, plan.steps - rise)
    return plan.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, share)))


def work(rank: Rank, plans: tuple[FinetunePlan, ...], keep: Keep) -> None:
    """Work of one rank, one plan after the other; rank 0 keeps StepDone, Saved, and an Ended for each plan."""
    import torch.distributed as dist

    from kervan.memory import setups

    device = join(rank, plans[0].device, keep)
    for plan in plans:
        setups.clear()
        keep(Doing(f"training with {plan.recipe.text}"))
        training = setups.make(plan.shape, plan.recipe, rank, device, lr=plan.lr, seed=plan.seed)
        is_told = _train(rank, plan, keep if rank.number == 0 else lambda _: None, device, training)
        training.close()
        del training  # or the next one is made beside it
        if is_told:
            break
    dist.destroy_process_group()  # not after an error: it may wait for ranks that go on


def _train(rank: Rank, plan: FinetunePlan, keep: Keep, device: Any, training: Any) -> bool:
    """One plan; whether it was told to end."""
    import torch
    import torch.distributed as dist

    data = torch.frombuffer(bytearray(texts.read(plan.files)), dtype=torch.uint8)
    losses: list[float] = []
    first = 0
    checkpoints = _Checkpoints(rank, plan, training) if plan.checkpoint is not None else None
    if checkpoints is not None and (there := newest(checkpoints.directory)) is not None:
        first, losses = checkpoints.load(there)
    rows = plan.batch // rank.of
    done = first
    is_told = False
    for step in range(first, plan.steps):
        begin_s = time.perf_counter()
        training.set_lr(learning_rate(plan, step))
        tokens, targets = _batch(data, plan, step, rank.number * rows, rows)
        loss = training.forward(tokens.to(device), targets.to(device))
        training.backward(loss)
        training.step()
        # the loss of all ranks, and whether any was told to end: every rank decides the same
        shared = torch.tensor([float(loss), float(told.is_told())], dtype=torch.float64)
        dist.all_reduce(shared)
        losses.append(round(float(shared[0]) / rank.of, 6))
        done = step + 1
        keep(StepDone(done, losses[-1], plan.batch * plan.seq / (time.perf_counter() - begin_s)))
        is_told = bool(shared[1] > 0)
        is_last = done == plan.steps or is_told
        if checkpoints is not None:
            checkpoints.tell(keep)
        if checkpoints is not None and (is_last or (plan.save_every and done % plan.save_every == 0)):
            checkpoints.save(done, losses, keep, must_wait=is_last)
        if is_told:
            break
    keep(Ended(done, first, is_told and done < plan.steps, tuple(losses)))
    return is_told


def _batch(data: Any, plan: FinetunePlan, step: int, first: int, rows: int) -> tuple[Any, Any]:
    """This rank's sequences of a step, and the next tokens: [rows, seq] each."""
    import torch

    generator = torch.Generator().manual_seed(1_000_003 * (plan.seed + 1) + step)
    starts = torch.randint(len(data) - plan.seq, (plan.batch,), generator=generator)[first : first + rows]
    ids = torch.stack([data[start : start + plan.seq + 1] for start in starts.tolist()]).long()
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class _Checkpoints:
    """torch.distributed.checkpoint: each rank writes its shards, beside the training; other numbers of ranks load them.

    A checkpoint has the weights, the optimizer's states, the step, and the losses.
    """

    def __init__(self, rank: Rank, plan: FinetunePlan, training: Any) -> None:
        import torch

        assert plan.checkpoint is not None
        self.directory = plan.checkpoint
        self._rank, self._plan, self._training = rank, plan, training
        # Saving talks in a thread of its own: in the training's group its messages would meet those of the next step.
        self._group = torch.distributed.new_group(backend="gloo")
        self._pending: tuple[Any, Saved] | None = None
        self._done_s = 0.0

    def save(self, step: int, losses: list[float], keep: Keep, *, must_wait: bool) -> None:
        """Begin to save, or save. An earlier one that still runs is waited for."""
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        begin_s = time.perf_counter()
        self.tell(keep, must_wait=True)
        where = self.directory / f"step-{step}"
        if self._rank.number == 0:
            where.mkdir(parents=True, exist_ok=True)
            facts = {"step": step, "losses": losses, "ranks": self._rank.of} | _identity(self._plan)
            (where / FACTS).write_text(json.dumps(facts))
            old = sorted(self.directory.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
            for path in old[: -KEPT_CHECKPOINTS - 1]:  # the newest may not be complete yet
                shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        future = dcp.async_save(self._state(), checkpoint_id=str(where), process_group=self._group)
        self._begin_s, self._done_s = begin_s, 0.0
        future.add_done_callback(self._note_end)
        self._pending = future, Saved(step, str(where), time.perf_counter() - begin_s, 0.0)
        if must_wait:
            self.tell(keep, must_wait=True)

    def _note_end(self, _: Any) -> None:
        self._done_s = time.perf_counter()

    def tell(self, keep: Keep, *, must_wait: bool = False) -> None:
        """Report a save that is complete. Raises: what the save raised."""
        if self._pending is None or not (must_wait or self._pending[0].done()):
            return
        (future, saved), self._pending = self._pending, None
        future.result()
        took_s = (self._done_s or time.perf_counter()) - self._begin_s
        keep(Saved(saved.step, saved.where, saved.blocked_s, took_s))

    def load(self, where: Path) -> tuple[int, list[float]]:
        """Put a checkpoint's state into the training; its step and losses. Raises: ConfigError for another run's."""
        import torch.distributed.checkpoint as dcp

        facts = json.loads((where / FACTS).read_text())
        wanted = _identity(self._plan)
        for key, value in wanted.items():
            if facts.get(key) != value:
                raise ConfigError(
                    f"checkpoint {where} is of {key} {facts.get(key)}, and this run has {value}; give the "
                    "same, or another "
                    "--checkpoint"
                )
        state = self._state()
        dcp.load(state, checkpoint_id=str(where), process_group=self._group)
        self._put(state)
        return int(facts["step"]), list(facts["losses"])

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = self._training.model, self._training.optimizer
        inner = getattr(optimizer, "inner", None)
        if inner is not None:
            weights, states = get_state_dict(model, inner)
            return {"model": weights, "optimizer": states}
        return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}

    def _put(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        model, optimizer = self._training.model, self._training.optimizer
        inner = getattr(optimizer, "inner", None)
        if inner is not None:
            set_state_dict(model, inner, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            return
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


def _identity(plan: FinetunePlan) -> dict[str, Any]:
    """What must be the same to go on with a run. Not the ranks."""
    return {"model": plan.shape.name, "technique": plan.recipe.text, "batch": plan.batch, "seq": plan.seq,
            "steps": plan.steps, "lr": plan.lr, "seed": plan.seed}  # fmt: skip


def smoothed(losses: tuple[float, ...] | list[float], share: float = 0.1) -> float:
    """Mean of the last tenth, at least one."""
    count = max(1, int(len(losses) * share))
    return sum(losses[-count:]) / count


def furthest(curve: list[float], other: list[float], window: int = 5) -> float:
    """The largest difference of two curves' running means over `window` steps, in nats."""

    def means(values: list[float]) -> list[float]:
        size = min(window, len(values))
        return [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]

    return max((abs(a - b) for a, b in zip(means(curve), means(other), strict=False)), default=0.0)
