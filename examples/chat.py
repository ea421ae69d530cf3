"""A streamed chat with any OpenAI client: python examples/chat.py [URL] [MODEL]. Needs the package openai."""

import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def main() -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        model = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is a caravan?"}],
            temperature=0,
            max_tokens=256,
            stream=True,
        )
        for chunk in stream:  # a replica that is lost meanwhile shows as a pause
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
