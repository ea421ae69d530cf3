"""LangChain: python examples/clients/langchain_chat.py [URL] [MODEL]. Needs langchain-openai."""

import sys

from langchain_openai import ChatOpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MODEL = sys.argv[2] if len(sys.argv) > 2 else "chat"

model = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=256)
for chunk in model.stream("What is a caravan?"):
    print(chunk.content, end="", flush=True)
print()
