"""vLLM's prefix cache on paper: which blocks of a prompt are found, and which are given up for others.

What is followed, from the source of vLLM 0.24 to 0.32 (`KVCacheManager`, `BlockPool`; models whose layers all have full
attention):

- Full blocks only, each known by a hash of its tokens, of the block before it, and of what else its content depends
  on (LoRA adapter, `cache_salt`, media). A hit ends before the last token of the prompt, which has to be computed.
- A block is in the cache from the moment its last token is scheduled, that of a prompt or of an answer, so equal
  prompts of one step share it. The same content may be there more than once.
- Blocks that nobody uses wait in a queue: those without a hash are taken first, then those unused for longest; of a
  request, its last ones before its first ones. A block keeps its content until it is taken, also after a preemption.

`tests/contract/test_scheduler.py` runs vLLM's own beside it. `Scheduler` itself counts blocks and knows no tokens,
which is faster; the planner uses that.
"""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.scheduler import DecodeGroup, ScheduledRequest, Scheduler


@dataclass(frozen=True, slots=True)
class Media:
    """Tokens of a prompt that stand for an image or the like; `identifier` tells equal ones."""

    identifier: str
    first_token: int
    num_tokens: int


class BlockHashes:
    """The hashes of a context's full blocks, in `values`; tokens may be appended.

    `scope`: what must be equal besides the tokens. The hashes are those of this process: another one has others.
    """

    __slots__ = ("_block_tokens", "_media", "_rest", "values")

    def __init__(
        self, tokens: Sequence[int], block_tokens: int, *, scope: Hashable = None, media: Sequence[Media] = ()
    ) -> None:
        self._block_tokens = block_tokens
        self._media = media
        ids = array("I", tokens).tobytes()
        size = array("I").itemsize * block_tokens
        full = len(tokens) // block_tokens
        self.values: list[int] = []
        last = hash(("prefix", scope))
        for number in range(full):
            piece = ids[number * size : (number + 1) * size]
            last = hash((last, piece, self._media_in(number)) if media else (last, piece))
            self.values.append(last)
        self._rest = [
            last,
            *tokens[full * block_tokens :],
        ]  # the last full block's hash, then tokens

    def append(self, token: int) -> None:
        """One more token of the context, which is none of media."""
        rest = self._rest
        rest.append(token)
        if len(rest) > self._block_tokens:
            piece = array("I", rest[1:]).tobytes()
            number = len(self.values)
            media = self._media_in(number) if self._media else ()
            last = hash((rest[0], piece, media) if media else (rest[0], piece))
            self.values.append(last)
            self._rest = [last]

    def _media_in(self, block: int) -> tuple[tuple[str, int], ...]:
        first, end = block * self._block_tokens, (block + 1) * self._block_tokens
        return tuple(
            (one.identifier, one.first_token - first)
            for one in self._media
            if one.first_token < end and one.first_token + one.num_tokens > first
        )


@dataclass(slots=True, eq=False)
class Block:
    """A full block with its content's hash, and how many requests use it."""

    hash: int
    users: int = 1


class BlockPool:
    """A pool of KV blocks of which those with a hash keep their content until they are taken for something else.

    Blocks without a hash are all alike, so they are counted and not kept.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blank = num_blocks  # free, without content
        self._idle: OrderedDict[Block, None] = OrderedDict()  # free, with content; the first to be taken comes first
        self._first: dict[int, Block] = {}
        self._copies: dict[int, dict[Block, None]] = {}  # blocks with the content of one in `_first`

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, those with content included."""
        return self._num_blank + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks with content, used or not, copies included."""
        return len(self._first) + sum(map(len, self._copies.values()))

    def find(self, hashes: Sequence[int], most: int) -> list[Block]:
        """The blocks of the longest beginning that is here, `most` of them at most."""
        found: list[Block] = []
        for number in range(min(most, len(hashes))):
            block = self._first.get(hashes[number])
            if block is None:
                break
            found.append(block)
        return found

    def use(self, blocks: Iterable[Block]) -> None:
        """One more user of each."""
        for block in blocks:
            if not block.users:
                del self._idle[block]
            block.users += 1

    def take(self, count: int) -> None:
        """So many blocks to write into; at most `num_free`. What the ones unused for longest held is gone."""
        blank = min(count, self._num_blank)
        self._num_blank -= blank
        for _ in range(count - blank):
            block, _ = self._idle.popitem(last=False)
            self._forget(block)

    def fill(self, content: int) -> Block:
        """A block that was taken is full from now on, with this hash."""
        block = Block(content)
        if content in self._first:
            self._copies.setdefault(content, {})[block] = None
        else:
            self._first[content] = block
        return block

    def give_back(self, blocks: Sequence[Block], num_partial: int) -> None:
        """The blocks of one request, in the order of its tokens, and those that it had not filled."""
        self._num_blank += num_partial
        for block in reversed(blocks):
            block.users -= 1
            if not block.users:
                self._idle[block] = None

    def add(self, count: int) -> None:
        """So many blocks more."""
        self._num_blank += count

    def reset(self) -> None:
        """Forget the content of all free blocks. Of blocks in use there may be none."""
        self._num_blank += len(self._idle)
        self._idle.clear()
        self._first.clear()
        self._copies.clear()

    def _forget(self, block: Block) -> None:
        copies = self._copies.get(block.hash)
        if self._first[block.hash] is not block:
            assert copies is not None
            del copies[block]
        elif copies:
            self._first[block.hash] = next(iter(copies))
            del copies[self._first[block.hash]]
        else:
            del self._first[block.hash]
        if copies is not None and not copies:
            del self._copies[block.hash]


@dataclass(slots=True, kw_only=True, eq=False)
class CachedRequest(ScheduledRequest):
    """A request whose blocks are kept for others.

    `hashes`: whoever adds the request appends the tokens that it generates. `cached_tokens` is what was found when it
    began, after a preemption when it began again; `first_cached_tokens` what was found at first, None before that.
    """

    hashes: BlockHashes
    first_cached_tokens: int | None = None
    reads_cache: bool = True
    blocks: list[Block] = field(default_factory=list)  # that are full
    num_partial: int = 0  # blocks that are not full yet


C = TypeVar("C", bound=CachedRequest)


@dataclass(slots=True)
class PrefixCacheCounts:
    """Of requests that began, without those that began again after a preemption: as vLLM counts them.

    `queries`: tokens that were looked for, `hits`: tokens that were found.
    """

    requests: int = 0
    queries: int = 0
    hits: int = 0


@dataclass(slots=True)
class _PhasedGroup(DecodeGroup[C]):
    """Also knows which members stand where in their last block."""

    members: list[dict[int, C]] = field(init=False)  # by phase, then by number

    def __post_init__(self) -> None:
        DecodeGroup.__post_init__(self)
        self.members = [{} for _ in range(self.block_tokens)]

    def at(self, tokens: int) -> dict[int, C]:
        """Those that have so many tokens in their last block, by number."""
        return self.members[(tokens - self.steps) % self.block_tokens]

    def add(self, request: C) -> None:
        DecodeGroup.add(self, request)
        self.at(request.computed_tokens)[request.number] = request

    def _leave(self, request: C) -> None:
        DecodeGroup._leave(self, request)
        del self.at(request.computed_tokens)[request.number]


class CachingScheduler(Scheduler[C]):
    """Composes steps as `Scheduler` does, and finds what prompts have in common with those before them.

    One step is under way at a time, and pipeline stages are not followed.
    """

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, num_blocks: int, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.counts = PrefixCacheCounts()
        self._candidates: list[Block] = []  # what was found for the prompt at the head of the queue
        super().__init__(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
        )

    def reset_prefix_cache(self, *, preempts: bool = False) -> tuple[bool, list[C]]:
        """Forget all content, if no block is in use: (whether it was so, those that were preempted for it).

        `preempts`: make it so. What the step under way computes of them is thrown away (`resize`).
        """
        preempted = []
        while preempts and self.num_running:
            preempted.append(self._preempt_youngest())
        is_unused = not self.num_running
        if is_unused:
            self.pool.reset()
        return is_unused, preempted

    def add_running(self, requests: Iterable[C]) -> None:
        raise NotImplementedError("requests that were computed before have no blocks here")

    def check_integrity(self) -> None:
        """Raises: AssertionError when blocks were lost or given twice."""
        running = [*(request for group in self._groups for request in group)]
        running += [self._partial] if self._partial is not None else []
        users: dict[Block, int] = {}
        for request in running:
            group = next((g for g in self._groups if any(member is request for member in g)), None)
            computed = request.computed_tokens if group is None else group.computed_tokens(request)
            assert len(request.blocks) == computed // self.block_tokens
            assert len(request.blocks) + request.num_partial == self._blocks(computed)
            for block in request.blocks:
                users[block] = users.get(block, 0) + 1
        assert all(block.users == count for block, count in users.items())
        held = len(users) + sum(request.num_partial for request in running)
        assert self.free_blocks == self.pool.num_free
        assert held + self.free_blocks == self.num_blocks, (
            f"{held} blocks held and {self.free_blocks} free are not the pool's {self.num_blocks}"
        )

    # ---- the pool

    def _new_group(self) -> DecodeGroup[C]:
        return _PhasedGroup(self.block_tokens)

    def _set_size(self, num_blocks: int) -> None:
        if num_blocks < self.num_blocks:
            self.pool.take(self.num_blocks - num_blocks)
        else:
            self.pool.add(num_blocks - self.num_blocks)
        self.num_blocks, self.free_blocks = num_blocks, self.pool.num_free

    def _take_for_decode(self, group: DecodeGroup[C]) -> int:
        assert isinstance(group, _PhasedGroup)
        needing = group.at(0)
        taken = 0
        for number in sorted(needing):
            while number in needing and not self.pool.num_free:
                self._preempt_youngest()
            if number in needing:  # else it was the youngest itself, or younger than one that was preempted for it
                self.pool.take(1)
                needing[number].num_partial += 1
                taken += 1
        filling = group.at(self.block_tokens - 1)
        for number in sorted(filling):
            self._fill_blocks(filling[number], len(filling[number].blocks) + 1)
        self.free_blocks = self.pool.num_free
        return taken

    def _find_cached(self, request: C) -> int:
        most = (request.context_tokens - 1) // self.block_tokens if request.reads_cache else 0
        self._candidates = self.pool.find(request.hashes.values, most)
        request.cached_tokens = len(self._candidates) * self.block_tokens
        return request.cached_tokens

    def _has_room_for(self, request: C) -> bool:
        idle = sum(not block.users for block in self._candidates)
        return self._blocks(request.context_tokens) - len(self._candidates) + idle <= self.pool.num_free

    def _take_for_prompt(self, request: C, computed_tokens: int, *, is_new: bool) -> None:
        if is_new:
            request.blocks = self._candidates
            self.pool.use(request.blocks)
            if request.first_cached_tokens is None:
                request.first_cached_tokens = request.cached_tokens
                if request.reads_cache:
                    self.counts.requests += 1
                    self.counts.queries += request.context_tokens
                    self.counts.hits += request.cached_tokens
        more = self._blocks(computed_tokens) - len(request.blocks) - request.num_partial
        self.pool.take(more)
        request.num_partial += more
        self._fill_blocks(request, computed_tokens // self.block_tokens)
        self.free_blocks = self.pool.num_free

    def _fill_blocks(self, request: C, full: int) -> None:
        """The first `full` blocks of a request are full."""
        for content in request.hashes.values[len(request.blocks) : full]:
            request.blocks.append(self.pool.fill(content))
            request.num_partial -= 1

    def _release(self, request: C) -> None:
        self.pool.give_back(request.blocks, request.num_partial)
        request.blocks, request.num_partial = [], 0
        self.free_blocks = self.pool.num_free
