"""What keys have used: counted once for each stream, and added up over gateways."""

from typing import Any

from kervan.fleet.stream import Stream
from kervan.fleet.usage import KEEP_GATEWAY_S, Charge, FleetUsage, KeyUsage, Ledger


def stream(request_id: str, *, generated: int, replayed: int = 0, model: str = "") -> Stream:
    request: Any = None
    return Stream(
        request_id, request, prompt_tokens=10, max_output_tokens=99, generated=[1] * generated, cached_tokens=4,
        num_replayed=replayed, model=model,
    )  # fmt: skip


def test_choices_of_a_prompt_share_it_and_prompts_do_not() -> None:
    spent: list[tuple[str, KeyUsage]] = []
    charge = Charge(lambda model, usage: spent.append((model, usage)))
    for name in ("0_cmpl-a-0", "1_cmpl-a-0", "0_cmpl-a-1", "cmpl-a-2"):
        one = stream(name, generated=3, model="sql")
        charge.opened(one)
        assert one.charge is charge
        charge.ended(one)
        assert one.charge is None
    assert [usage.prompt_tokens for _, usage in spent] == [10, 0, 10, 10]
    assert [usage.cached_tokens for _, usage in spent] == [4, 0, 4, 4]
    assert {(model, usage.generated_tokens) for model, usage in spent} == {("sql", 3)}


def test_a_client_that_comes_back_pays_for_what_comes_after() -> None:
    spent: list[KeyUsage] = []
    charge = Charge(lambda _, usage: spent.append(usage))
    charge.ended(stream("a", generated=30, replayed=20))
    assert spent == [KeyUsage(generated_tokens=10)]


def counted(requests: int, streams: int = 0) -> dict[str, dict[str, KeyUsage]]:
    return {"web": {"m": KeyUsage(requests=requests, streams=streams)}}


def test_gateways_tell_from_their_start_and_what_they_told_stays_when_they_are_gone() -> None:
    ledger = Ledger(FleetUsage(0.0))
    ledger.tell("a", counted(3, streams=1), 0.0)
    ledger.tell("a", counted(5, streams=2), 1.0)
    ledger.tell("b", counted(10), 1.0)
    assert ledger.usage.total() == counted(15, streams=2)
    ledger.look(2.0, {"b"})
    assert ledger.usage.total() == counted(15)  # what is gone has no streams
    ledger.tell("a", counted(6), 3.0)  # its last word
    ledger.look(3.0 + KEEP_GATEWAY_S + 1, {"b"})
    assert list(ledger.usage.gateways) == ["b"]
    assert ledger.usage.total() == counted(16)


def test_a_new_ledger_goes_on_with_what_was_stored() -> None:
    before = Ledger(FleetUsage(0.0))
    before.tell("a", counted(3), 0.0)
    assert before.is_changed
    after = Ledger(before.usage)
    after.tell("a", counted(4), 100.0)
    after.tell("c", counted(1), 100.0)
    assert after.usage.total() == counted(5)
