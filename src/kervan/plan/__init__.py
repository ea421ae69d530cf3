"""Which layout, what it will deliver, what it costs, and why. Pure: no GPU, no ray, vllm or torch."""
