"""The HTTP front: a thin ASGI shell around vLLM's OpenAI app."""
