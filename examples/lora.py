"""The same question to a base model and to its adapters: python examples/lora.py [URL]. Needs the package openai."""

import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def main() -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        for model in client.models.list().data:  # the base, then each adapter
            answer = client.chat.completions.create(
                model=model.id,
                messages=[{"role": "user", "content": "What is a caravan?"}],
                temperature=0,
                max_tokens=64,
            )
            print(f"{model.id}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
