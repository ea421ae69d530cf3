"""LlamaIndex: python examples/clients/llamaindex_chat.py [URL] [MODEL]. Needs llama-index-llms-openai-like."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MODEL = sys.argv[2] if len(sys.argv) > 2 else "chat"

model = OpenAILike(
    model=MODEL, api_base=f"{URL}/v1", api_key="none", is_chat_model=True, temperature=0.0, max_tokens=256
)
for chunk in model.stream_chat([ChatMessage(role="user", content="What is a caravan?")]):
    print(chunk.delta or "", end="", flush=True)
print()
