"""The few numbers that the step-time model does not know from data sheets: what hardware and vLLM reach of them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Shares are of the data sheet's figure; times are seconds.

    `bandwidth_share`: of memory bandwidth, reading weights. `kv_bandwidth_share`: reading the KV cache.
    `flops_share`: of dense arithmetic in large matrix products; half of it at `flops_half_tokens` rows.
    `fp8_flops_factor`: what products in FP8 reach of `flops_share`; `fp8_bandwidth_factor`: of `bandwidth_share` in
    batches of more than 16 rows (another kernel); `fp8_layer_s`: more for a layer, whose inputs are to be quantised.
    `attention_share`: of arithmetic in prefill attention of long prompts, half at `attention_half_tokens`.
    `expert_flops_share`: of arithmetic in fused expert kernels with full tiles of `expert_tile_tokens` rows, half of it
    where a product sums over `expert_half_depth` values: short sums leave the pipeline of a tile half filled.
    `layer_s`: launches and small kernels of a layer. `expert_layer_s`: more for routing and sorting tokens.
    `all_reduce_s`: of a small message. `step_s`: between two steps. `sequence_s`: per sequence in a step.
    `eager_layer_s`: least time of a layer in a step that no CUDA graph covers (the host launches each kernel); more of
    it with each doubling of `tp` (`eager_group_layer_s`), for experts (`eager_expert_layer_s`) and for sharing them out
    (`eager_ep_layer_s`). `stage_s`: handing a batch to the next stage.
    `prompt_s`, `prompt_token_s`: the frontend's work on a request. `output_s`: on a streamed token.
    `delivery_s`: from a step's end to the client.
    """

    bandwidth_share: float = 0.846
    kv_bandwidth_share: float = 0.92
    flops_share: float = 0.70
    flops_half_tokens: float = 42.0
    fp8_flops_factor: float = 0.88
    fp8_bandwidth_factor: float = 0.86
    fp8_layer_s: float = 9e-6
    attention_share: float = 0.63
    attention_half_tokens: float = 1000.0
    expert_flops_share: float = 0.455
    expert_half_depth: float = 620.0
    expert_tile_tokens: float = 64.0
    layer_s: float = 28.5e-6
    expert_layer_s: float = 25e-6
    all_reduce_s: float = 6.4e-6
    step_s: float = 256e-6
    sequence_s: float = 4e-6
    eager_layer_s: float = 620e-6
    eager_group_layer_s: float = 450e-6
    eager_expert_layer_s: float = 900e-6
    eager_ep_layer_s: float = 520e-6
    stage_s: float = 50e-6
    prompt_s: float = 2.2e-3
    prompt_token_s: float = 1e-6
    output_s: float = 60e-6
    delivery_s: float = 1.5e-3
