"""Make a model directory from a config.json alone: the config, and a tokenizer whose ids cover its vocabulary.

For runs with random weights (`--engine-arg load_format=dummy`) of a real architecture.

    python benchmarks/shape_model.py models/llama3-8b/config.json /tmp/llama3-8b
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))  # of this checkout, also where kervan is not installed

from kervan.calibrate.shapes import write_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a Hugging Face config.json")
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    print(write_model(json.loads(args.config.read_text()), args.out_dir))


if __name__ == "__main__":
    main()
