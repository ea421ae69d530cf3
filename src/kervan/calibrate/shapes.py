"""Model directories without weights, for servers that run with random ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kervan import plain_tokenizer


def write_model(shape: Mapping[str, Any], out: Path) -> Path:
    """Write config.json, tokenizer.json and tokenizer_config.json under `out`, and return it. `shape`: a config.json.

    Raises: ConfigError for a shape without a vocabulary, or one that the tokenizer cannot cover.
    """
    plain_tokenizer.write(shape, out)
    (out / "config.json").write_text(json.dumps(dict(shape), indent=1) + "\n")
    return out
