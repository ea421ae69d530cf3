"""`GET /health/ready`, then a streamed `POST /chat`, with nothing but the standard library: python chat.py [URL]."""

import json
import sys
import time
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
QUESTION = "What is a caravan?"


def main() -> None:
    with urllib.request.urlopen(f"{URL}/health/ready", timeout=10) as answer:
        print(f"health: {answer.status}")
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "temperature": 0, "stream": True}
    request = urllib.request.Request(f"{URL}/chat", json.dumps(body).encode(), {"Content-Type": "application/json"})
    begin_s, first_s, usage = time.monotonic(), 0.0, {}
    with urllib.request.urlopen(request, timeout=300) as events:
        for line in events:
            if not line.startswith(b"data: {"):
                continue  # an empty line between events, or [DONE]
            event = json.loads(line[len(b"data: ") :])
            first_s = first_s or time.monotonic() - begin_s
            usage = event.get("usage") or usage
            print(event.get("content") or "", end="", flush=True)
    print(f"\n{usage['completion_tokens']} tokens, the first after {1e3 * first_s:.0f} ms")


if __name__ == "__main__":
    main()
