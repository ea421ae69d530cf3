"""An agent that calls a tool, then says what it found as JSON: python examples/agent.py [URL] [MODEL]. Needs openai.

The fleet needs `enable_auto_tool_choice` and the parser of its model (agents.yaml).
"""

import json
import sys
from typing import Any

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MAX_TURNS = 4

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
REPORT = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "sky": {"type": "string", "enum": ["sunny", "cloudy", "rainy"]},
        "celsius": {"type": "integer", "minimum": -60, "maximum": 60},
    },
    "required": ["city", "sky", "celsius"],
    "additionalProperties": False,
}


def get_weather(city: str) -> str:
    return {"Ankara": "sunny, 24 degrees"}.get(city, "unknown")


def ask(client: OpenAI, model: str, question: str) -> tuple[str, list[Any]]:
    """The answer, and the conversation that led to it, calls of tools included."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        # The session's turns go to one replica, which has all that was said before in its prefix cache.
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, temperature=0, extra_body={"session_id": "weather"}
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        if not message.tool_calls:
            return message.content or "", messages
        for call in message.tool_calls:
            found = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": found})
    raise RuntimeError(f"no answer after {MAX_TURNS} turns")


def report(client: OpenAI, model: str, text: str, **more: Any) -> dict[str, Any]:
    """What `text` says, by the schema: vLLM allows no token that would break it."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"As JSON: {text}"}],
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": REPORT}},
        max_tokens=200,
        **more,
    )
    if answer.choices[0].finish_reason == "length":
        raise RuntimeError("the answer did not end within 200 tokens")
    found: dict[str, Any] = json.loads(answer.choices[0].message.content or "")
    return found


def main() -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
        model = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id
        text, messages = ask(client, model, "What is the weather in Ankara?")
        print(f"{text} ({len(messages)} messages)")
        print(json.dumps(report(client, model, text)))


if __name__ == "__main__":
    main()
