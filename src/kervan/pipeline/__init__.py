"""A decoder in stages on several GPUs: cutting it, schedules of micro-batches, their bubble, and what was measured."""
