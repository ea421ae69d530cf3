"""Traces of requests by OTLP/HTTP: a span for each request, and below it one for each part of its time.

The request's span begins with it, so that vLLM's own spans have it as their parent; all others are made of the record
when it ends (`kervan.gateway.explain`), as spans that have ended: to start and end each would cost four times as much.
Nothing happens for a token. Needs `pip install 'kervan[otel]'`.
"""

import logging
import time
from typing import Any

from kervan.errors import ConfigError
from kervan.fleet.timeline import RequestRecord
from kervan.gateway.asgi import Scope

logger = logging.getLogger(__name__)

NS = 1e9
TRACE_HEADERS = (b"traceparent", b"tracestate")
INSTALL = "pip install 'kervan[otel]', on all nodes"


class Tracing:
    """Sends the spans of one gateway. `endpoint`: URL of OTLP/HTTP's traces. Raises: ConfigError without packages."""

    def __init__(self, endpoint: str, *, fleet: str, gateway_id: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"otlp={endpoint} needs OpenTelemetry ({error}); {INSTALL}") from error
        self._gateway_id = gateway_id

        class OwnResource(Resource):
            """Equal to itself alone: OTLP's encoder hashes it for each span, and the SDK's hash writes JSON."""

            __hash__ = object.__hash__

            def __eq__(self, other: object) -> bool:
                return self is other

        about = {"service.name": "kervan", "service.instance.id": gateway_id, "kervan.fleet": fleet}
        resource = OwnResource(Resource.create(about).attributes)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
        self._provider.add_span_processor(self._processor)
        self._resource = self._provider.resource
        self._scope = InstrumentationScope("kervan")
        self._tracer = self._provider.get_tracer("kervan")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, scope: Scope, caller: str = "") -> Scope:
        """Start the request's span, below the client's if it sent one; the scope for vLLM, whose spans are below it.

        `caller`: traceparent of another trace that it is linked to.
        """
        from opentelemetry.trace import Link, SpanKind, get_current_span, set_span_in_context

        headers = [(name, value) for name, value in scope["headers"] if name in TRACE_HEADERS]
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        called = get_current_span(self._propagator.extract({"traceparent": caller}))
        record.span = self._tracer.start_span(
            f"{record.method} {record.path}",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            links=[Link(called.get_span_context())] if called.get_span_context().is_valid else None,
            start_time=int(record.received_unix_s * NS),
        )
        onward: dict[str, str] = {}
        self._propagator.inject(onward, set_span_in_context(record.span))
        record.traceparent = onward.get("traceparent", record.traceparent)
        kept = [pair for pair in scope["headers"] if pair[0] not in TRACE_HEADERS]
        return {**scope, "headers": kept + [(name.encode(), value.encode("latin-1")) for name, value in onward.items()]}

    def end(self, record: RequestRecord) -> None:
        """Make the spans of its parts, and end the request's."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

        from kervan.gateway import explain

        span = record.span
        record.span = None
        if span is None:
            return
        if not span.is_recording():  # not sampled
            span.end()
            return
        told = explain.explained(record, gateway=self._gateway_id, now_s=time.monotonic())
        zero_s = record.received_unix_s

        context: SpanContext = span.get_span_context()

        def child(name: str, parent: SpanContext, start_s: float, seconds: float, about: dict[str, Any]) -> SpanContext:
            new_id = self._provider.id_generator.generate_span_id()
            own = SpanContext(context.trace_id, new_id, False, context.trace_flags, context.trace_state)
            made = ReadableSpan(
                name=name, context=own, parent=parent, resource=self._resource, instrumentation_scope=self._scope,
                attributes={key: value for key, value in about.items() if value not in ("", 0)},
                kind=SpanKind.INTERNAL, status=unset,
                start_time=int((zero_s + start_s) * NS), end_time=int((zero_s + start_s + seconds) * NS),
            )  # fmt: skip
            self._processor.on_end(made)
            return own

        unset = Status()
        for part in told.before:
            child(part.part, context, part.start_s, part.seconds, {})
        failures = []
        for stream in told.streams:
            begin_s = stream.parts[0].start_s if stream.parts else 0.0
            took_s = sum(part.seconds for part in stream.parts)
            about = {
                "kervan.stream": stream.request_id,
                "kervan.ended": stream.ended,
                "kervan.moves": len(stream.moves),
                "gen_ai.usage.input_tokens": stream.prompt_tokens,
                "gen_ai.usage.output_tokens": stream.output_tokens,
            }
            above = child("stream", context, begin_s, took_s, about)
            moves = iter(stream.moves)
            for part in stream.parts:
                attributes: dict[str, Any] = {
                    "kervan.replica": part.replica,
                    "kervan.why": part.why,
                    "kervan.tokens": part.tokens,
                    "kervan.cached_tokens": part.cached_tokens,
                }
                if part.part in ("move", "lost prefill") and (move := next(moves, None)) is not None:
                    attributes |= {
                        "kervan.move.reason": move.reason,
                        "kervan.move.from": move.source,
                        "kervan.move.to": move.target,
                        "kervan.move.after_tokens": move.after_tokens,
                        "kervan.move.prefilled_tokens": move.prefilled_tokens,
                    }
                child(part.part, above, part.start_s, part.seconds, attributes)
            if stream.ended not in ("stop", "length", "tool_calls", "abort", ""):
                failures.append(stream.ended)
        if told.delivery_s:
            child("delivery", context, told.seconds - told.delivery_s, told.delivery_s, {})
        span.set_attribute("http.response.status_code", record.status)
        span.set_attribute("kervan.gateway", self._gateway_id)
        span.set_attribute("kervan.stream_id", record.stream_id)
        if failures or record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, failures[0] if failures else f"status {record.status}"))
        span.end(int((zero_s + told.seconds) * NS))

    def close(self) -> None:
        """Send what has not been sent, vLLM's spans in this process too. Blocks for seconds if nobody takes it."""
        from opentelemetry import trace

        self._provider.shutdown()
        vllms: Any = trace.get_tracer_provider()
        if hasattr(vllms, "shutdown"):
            vllms.shutdown()
