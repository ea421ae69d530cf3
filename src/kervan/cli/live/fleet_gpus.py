"""GPUs of a fleet's nodes: those of this machine from NVML, others from what listens at ports there.

That is a dcgm-exporter (9400), or `kervan observe gpus --listen 9401`. Each node is asked by a thread of its own, so
that one that does not answer delays nobody.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from kervan.observe import dcgm, gpu_counters
from kervan.observe.dcgm import GpuCounters

PORTS = (9400, 9401)
MAX_THREADS = 16
Found = tuple[GpuCounters, ...] | str


class FleetGpus:
    """Asked again and again with `look`. `here`: address of this machine, as the fleet's nodes have theirs.

    `fetch`: of a page's URL, the GPUs, or None.
    """

    def __init__(
        self,
        here: str,
        *,
        fetch: Callable[[str], tuple[GpuCounters, ...] | None] = dcgm.fetch,
        ports: Sequence[int] = PORTS,
    ) -> None:
        self._here = here
        self._fetch = fetch
        self._ports = ports
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="gpus")
        self._asked: dict[str, Future[Found]] = {}
        self._found: dict[str, Found] = {}
        self._opened = ExitStack()
        self._reader: gpu_counters.GpuReader | None = None
        self._has_opened = False

    def look(self, nodes: Collection[str]) -> dict[str, Found]:
        """GPUs of each node, or why none are known; what a node answers is in the next look. Takes no time."""
        wanted = sorted({self._here, *nodes})
        for node in wanted:
            asked = self._asked.get(node)
            if asked is not None and not asked.done():
                continue
            if asked is not None:
                self._found[node] = asked.result()
            self._asked[node] = self._threads.submit(self._read, node)
        return {node: self._found.get(node, "no answer yet") for node in wanted}

    def _read(self, node: str) -> Found:
        if node == self._here:
            if not self._has_opened:
                self._has_opened = True
                self._reader = self._opened.enter_context(gpu_counters.opened())
            if self._reader is not None:
                return self._reader.read()
        host = f"[{node}]" if ":" in node else node
        for port in self._ports:
            found = self._fetch(f"http://{host}:{port}/metrics")
            if found is not None:
                return found
        nothing = f"nothing answers at port {' or '.join(map(str, self._ports))}"
        return f"NVML finds no GPU here, and {nothing}" if node == self._here else nothing

    def close(self) -> None:
        """Ask no more."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._opened.close()
