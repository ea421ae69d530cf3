"""Ray Serve LLM's OpenAI app for one model on one replica, on a Ray of its own: what `kervan up` is compared with.

    python benchmarks/ray_llm_service.py --model DIR --port 8000 --engine-arg max_model_len=2048

It prints `ready` when the app runs, and serves until it gets SIGTERM. Direct streaming is on when the environment has
`RAY_SERVE_ENABLE_HA_PROXY=1` and `RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1` (servers.py sets both). Settings are Ray's
defaults but for what both sides of a comparison share: engine arguments, one replica, the model's name.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import time

from servers import parse_engine_args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V")
    args = parser.parse_args()

    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short: Ray keeps sockets in it
        # Logical CPUs only say what may be placed; on a small machine the defaults leave no room for the ingress.
        ray.init(address="local", num_cpus=16, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # ray.init sets a handler of its own
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": args.port})
            config = LLMConfig(
                model_loading_config={"model_id": args.model, "model_source": args.model},
                deployment_config={"num_replicas": 1},
                engine_kwargs=parse_engine_args(args.engine_arg),
                accelerator_config={"kind": "gpu" if ray.cluster_resources().get("GPU") else "cpu"},
            )
            serve.run(build_openai_app({"llm_configs": [config]}), name="default", route_prefix="/")
            print("ready", flush=True)
            while True:
                time.sleep(3600)
        finally:
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
