"""A baseline, not an example: the service as people first write it.

The handler is `async` and calls the synchronous `LLM.generate` in it. The event loop stands still until the answer is
whole, so requests run one after another, at the speed of one stream, whatever the GPU could do. Nothing is streamed.

    python benchmarks/naive_service.py --model DIR --port 8000 --engine-arg max_model_len=2048
"""

import argparse

from servers import parse_engine_args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V")
    args = parser.parse_args()

    import uvicorn
    from fastapi import FastAPI, HTTPException
    from pydantic import BaseModel
    from vllm import LLM, SamplingParams

    class GenerateRequest(BaseModel):
        prompt: str | None = None
        prompt_token_ids: list[int] | None = None
        max_tokens: int = 16
        temperature: float = 1.0
        ignore_eos: bool = False

    llm = LLM(model=args.model, **parse_engine_args(args.engine_arg))
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    async def generate(request: GenerateRequest) -> dict[str, str | int]:
        if request.prompt_token_ids is not None:
            prompt: object = {"prompt_token_ids": request.prompt_token_ids}
        elif request.prompt is not None:
            prompt = request.prompt
        else:
            raise HTTPException(422, "give prompt or prompt_token_ids")
        sampling = SamplingParams(
            max_tokens=request.max_tokens, temperature=request.temperature, ignore_eos=request.ignore_eos
        )
        [output] = llm.generate([prompt], sampling, use_tqdm=False)  # blocks the event loop: the point of this file
        return {"text": output.outputs[0].text, "tokens": len(output.outputs[0].token_ids)}

    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
