"""What a cloud says before it takes a node away, as one typed event. No Ray, no vLLM: an asyncio program per node."""
