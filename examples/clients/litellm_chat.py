"""LiteLLM: python examples/clients/litellm_chat.py [URL] [MODEL]. Needs litellm."""

import sys

import litellm

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MODEL = sys.argv[2] if len(sys.argv) > 2 else "chat"

stream = litellm.completion(
    model=f"openai/{MODEL}",  # the provider's name, then the fleet's
    api_base=f"{URL}/v1",
    api_key="none",
    messages=[{"role": "user", "content": "What is a caravan?"}],
    temperature=0,
    max_tokens=256,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
