"""vLLM's engine on paper: step times, memory and limits, for the planner, the twin and simulations."""
