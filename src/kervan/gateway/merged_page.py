"""One Prometheus page out of the pages of several gateways.

Works on lines of the text format 0.0.4: values and timestamps pass unread, so nothing is rounded or renamed
(prometheus_client's parser takes `_total` off counters and is seven times slower, on the loop that serves tokens; the
tests use it as the judge).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kervan import metrics
from kervan.vendor import vllm_names

# Families that describe the fleet and not one gateway: every gateway tells the same.
FLEET_GAUGES = frozenset(
    {
        vllm_names.REQUESTS_RUNNING,
        vllm_names.REQUESTS_WAITING,
        vllm_names.REQUESTS_WAITING_BY_REASON,
        vllm_names.KV_CACHE_USAGE,
        vllm_names.CACHE_CONFIG,
        vllm_names.ENGINE_SLEEP_STATE,
        *(name for name, metric in metrics.ALL.items() if metric.scope == "fleet"),
    }
)

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*\s*=\s*"[^"\\]*(?:\\.[^"\\]*)*"'
_SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    rf"(?:\s*\{{\s*(?P<labels>{_LABEL}(?:\s*,\s*{_LABEL})*)?\s*,?\s*\}}\s*|\s+)"
    r"(?P<value>[+-]?(?:[0-9.][0-9.eE+-]*|Inf|NaN)(?:\s+-?[0-9]+)?)"
)
_EACH_LABEL = re.compile(_LABEL)
_OWN_GATEWAY = re.compile(r"gateway\s*=")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}


@dataclass(slots=True)
class _Family:
    help: str | None = None
    type: str | None = None
    lines: list[str] = field(default_factory=list)
    owner: str | None = None  # the gateway whose page a fleet family is taken from


def merge_pages(pages: Mapping[str, str], *, fleet_gauges: frozenset[str] = FLEET_GAUGES) -> str:
    """One valid page: each family once, each sample with a label gateway="id" (keys of `pages`).

    Families in `fleet_gauges` come without that label, from the first page that has them. A label `gateway` that a
    sample already has becomes `exported_gateway`, as in Prometheus. `_created` series are left out.

    Raises:
        ValueError: a line is no sample, or two pages give one family different types.
    """
    families: dict[str, _Family] = {}
    for gateway, page in pages.items():
        label = f'gateway="{_escape(gateway)}"'
        # "\n" alone ends a line: str.splitlines would also cut at characters that a label value may hold.
        for line in map(str.strip, page.split("\n")):
            if line.startswith("#"):
                _note(families, line, gateway)
            elif line:
                match = _SAMPLE.fullmatch(line)
                if match is None:
                    raise ValueError(f"gateway {gateway}: {line!r} is not a sample of the Prometheus text format 0.0.4")
                name = _family_name(families, match["name"])
                family = families.setdefault(name, _Family())
                if name not in fleet_gauges:
                    labels = _labelled(label, match["labels"])
                    family.lines.append(f"{match['name']}{{{labels}}} {match['value']}")
                    continue
                if family.owner is None:
                    family.owner = gateway
                if family.owner == gateway:
                    family.lines.append(line)
    out: list[str] = []
    for name, family in families.items():
        if not family.lines or _is_created(families, name):
            continue
        if family.help is not None:
            out.append(f"# HELP {name} {family.help}")
        if family.type is not None:
            out.append(f"# TYPE {name} {family.type}")
        out += family.lines
    return "\n".join([*out, ""])


def _note(families: dict[str, _Family], line: str, gateway: str) -> None:
    """Take a HELP or TYPE line; other comments are dropped."""
    _, kind, name, text = [*line.split(None, 3), "", "", ""][:4]
    if kind == "HELP":
        family = families.setdefault(name, _Family())
        if family.help is None:
            family.help = text
    elif kind == "TYPE":
        family = families.setdefault(name, _Family())
        if family.type is None:
            family.type = text
        elif family.type != text:
            raise ValueError(f"gateway {gateway}: {name} is a {text}, and a {family.type} on the pages before it")


def _family_name(families: dict[str, _Family], sample: str) -> str:
    """The family of a sample: itself, or the histogram or summary whose part it is."""
    if sample in families:
        return sample
    base, part, suffix = sample.rpartition("_")
    family = families.get(base)
    if family is not None and part + suffix in _SUFFIXES.get(family.type or "", ()):
        return base
    return sample


def _is_created(families: dict[str, _Family], name: str) -> bool:
    base = name.removesuffix("_created")
    return base != name and (base in families or base + "_total" in families)


def _labelled(label: str, labels: str | None) -> str:
    if not labels:
        return label
    if "gateway" in labels:
        labels = _EACH_LABEL.sub(lambda m: ("exported_" if _OWN_GATEWAY.match(m[0]) else "") + m[0], labels)
    return f"{label},{labels}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
