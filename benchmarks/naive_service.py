"""A baseline, not an example: the service as people first write it.

The handler is `async` and calls the synchronous `LLM.generate` in it. The event loop stands still until the answer is
whole, so requests run one after another, at the speed of one stream, whatever the GPU could do. Nothing is streamed:
the answer is one event of OpenAI's format, so that the same client measures it.

    python benchmarks/naive_service.py --model DIR --port 8000 --engine-arg max_model_len=2048
"""

import argparse
import json

from servers import parse_engine_args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V")
    args = parser.parse_args()

    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import Response
    from pydantic import BaseModel
    from vllm import LLM, SamplingParams

    class CompletionRequest(BaseModel):
        prompt: str | list[int]
        max_tokens: int = 16
        temperature: float = 1.0
        ignore_eos: bool = False

    llm = LLM(model=args.model, **parse_engine_args(args.engine_arg))
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [{"id": args.model, "object": "model"}]}

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest) -> Response:
        prompt = request.prompt if isinstance(request.prompt, str) else {"prompt_token_ids": request.prompt}
        sampling = SamplingParams(
            max_tokens=request.max_tokens, temperature=request.temperature, ignore_eos=request.ignore_eos
        )
        [output] = llm.generate([prompt], sampling, use_tqdm=False)  # blocks the event loop: the point of this file
        [answer] = output.outputs
        usage = {"prompt_tokens": len(output.prompt_token_ids or ()), "completion_tokens": len(answer.token_ids)}
        choice = {"index": 0, "text": answer.text, "finish_reason": answer.finish_reason}
        events = [json.dumps({"choices": [choice]}), json.dumps({"choices": [], "usage": usage}), "[DONE]"]
        return Response("".join(f"data: {event}\n\n" for event in events), media_type="text/event-stream")

    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
