"""`python -m kervan.serve.local_ray TEMP_DIR`: a Ray of this machine alone, until told to end.

Ray guards it with the token in its environment. Writes its address as the first line of its output. Ends on SIGTERM,
and when its input closes before it has read "stay": so a `kervan up` that dies on the way leaves nothing.
"""

import json
import os
import signal
import sys
import threading

OBJECT_STORE_BYTES = 256 * 2**20  # tokens do not pass through Ray's object store


def main() -> None:
    """Blocks until it is told to end."""
    temp_dir = sys.argv[1]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    import ray

    from kervan.serve.cluster import sigterm_kept
    from kervan.serve.ray_internals import TEMP_DIR_OPTION, leave_out_parts

    leave_out_parts()
    with sigterm_kept():
        context = ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            namespace="kervan",
            **{TEMP_DIR_OPTION: temp_dir},
        )
    sys.stdout.write(json.dumps({"address": context.address_info["gcs_address"], "pid": os.getpid()}) + "\n")
    sys.stdout.flush()

    def watch_starter() -> None:
        if sys.stdin.readline().strip() != "stay":
            ended.set()

    threading.Thread(target=watch_starter, daemon=True).start()
    ended.wait()
    ray.shutdown()


if __name__ == "__main__":
    main()
