"""What happens to the logs of a process that vLLM comes into."""

import io
import logging
import logging.config
import logging.handlers

from kervan.fleet.vllm.logs import kept_handlers

OTHERS_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"theirs": {"class": "logging.StreamHandler", "level": "INFO"}},
    "loggers": {"theirs": {"handlers": ["theirs"], "level": "INFO"}},
}


def test_handlers_outlive_anothers_dict_config() -> None:
    """Ray Serve's handler is one with a target, which closing takes away."""
    said = io.StringIO()
    target = logging.StreamHandler(said)
    kept = logging.handlers.MemoryHandler(capacity=1, target=target)
    with kept_handlers():
        made_inside = logging.handlers.MemoryHandler(capacity=1, target=target)
        logging.config.dictConfig(OTHERS_CONFIG)
    logging.getLogger("theirs").handlers.clear()
    assert (kept.target, made_inside.target) == (target, None)
    kept.handle(logging.makeLogRecord({"msg": "still here", "levelno": logging.INFO}))
    assert said.getvalue() == "still here\n"
    kept.close()


def test_handlers_known_before_are_known_after() -> None:
    before = logging._handlerList[:]  # type: ignore[attr-defined]
    with kept_handlers():
        made = logging.StreamHandler(io.StringIO())
    after = logging._handlerList  # type: ignore[attr-defined]
    assert [ref() for ref in after] == [*(ref() for ref in before), made]
