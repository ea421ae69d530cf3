"""On the PYTHONPATH of an interpreted engine's workers, which are Python processes of their own."""

from harness import triton_on_cpu

triton_on_cpu.interpret()
