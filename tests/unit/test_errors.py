import inspect
import re
from typing import get_args, get_type_hints

import pytest

from kervan import errors
from kervan.errors import KervanError
from kervan.fleet.control import EngineFailed

TREE = {name: thing for name, thing in vars(errors).items() if inspect.isclass(thing) and thing is not KervanError}


def test_the_drawn_tree_is_the_tree() -> None:
    assert re.findall(r"[├└]── (\w+)", errors.__doc__ or "") == list(TREE)


@pytest.mark.parametrize("kind", TREE.values(), ids=TREE)
def test_each_error_is_a_kervan_error_of_its_own_with_a_sentence(kind: type[KervanError]) -> None:
    assert kind.__bases__ == (KervanError,)
    assert kind.__doc__


def test_what_an_engine_process_reports_names_an_error_class() -> None:
    assert set(get_args(get_type_hints(EngineFailed)["kind"])) <= set(TREE)
