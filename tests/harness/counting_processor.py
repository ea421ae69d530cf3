"""A logits processor as a user may bring one; only for processes that have loaded vLLM."""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates


class CountingProcessor(LogitsProcessor):
    """Requests that say `counts` get token 100 first, then 101, and so on."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        self.outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(
            self.outputs,
            batch_update,
            lambda params, prompt, output: output if (params.extra_args or {}).get("counts") else None,
        )

    def apply(self, logits: Any) -> Any:
        for row, output in self.outputs.items():
            logits[row, 100 + len(output)] = 1e4
        return logits
