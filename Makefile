# The README's two commands are `make demo` and `make test`; both do all set-up on a fresh Debian or Ubuntu machine.
SHELL      := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON     ?= python3
VENV       ?= .venv
BIN        := $(VENV)/bin
COMPILE    := $(BIN)/python -m piptools compile -q --strip-extras --generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-options --allow-unsafe --no-header
BLOBS      := executor/pointcall_executor/blobs
STATE      ?= build/demo
APT        := python3-venv clang llvm libbpf-dev bpftool make
# What tests use where it is there: power cuts, system-call faults, PostgreSQL, PKCS#11, a registry, Wasm by C, shells.
APT_DEV    := $(APT) lld git iproute2 strace fuse3 e2fsprogs dmsetup postgresql softhsm2 docker-registry skopeo dbus systemd podman runc conmon busybox-static libseccomp2 zsh fish
JS         := build/js
JS_PACKAGES := assemblyscript @sigstore/bundle@4 @sigstore/protobuf-specs @sigstore/sign@4 @sigstore/verify@3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: setup ## run the whole loop for real (without root or BPF: on recorded events, and it says so)
	$(BIN)/pointcall demo --state-dir $(STATE) $(DEMO_ARGS)

test: setup-dev ## install what the tests need and run them
	POINTCALL_SIGSTORE_JS=$$(test -d $(JS)/node_modules && echo $(CURDIR)/$(JS) || true) \
	NODE_PATH=$(CURDIR)/$(JS)/node_modules $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup-dev ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## all that CI asks

# Peers that are there are measured, the others named: apt-get install bpftrace nftables fail2ban haproxy nginx-light.
bench: setup-dev ## measure: one JSON line a figure, each beside a baseline of the same run
	@for suite in kernel sandbox loop services log attest signing start idle; do $(BIN)/python -m tests.bench.$$suite; done

test-power: setup-dev ## power cuts, kill -9 and failed system calls against the journal, with a control that does lose (root, long)
	$(BIN)/python -m tests.fault.log.power kill --rounds 200
	$(BIN)/python -m tests.fault.log.power fuse shutdown --rounds 100
	$(BIN)/python -m tests.fault.log.syscalls

sim: setup-dev ## the whole executor simulated: a thousand seeds, ten million events, on all cores (long)
	nice -n 10 $(BIN)/python -m tests.sim --seeds 1000 --events 10500

test-crash: setup-dev ## kill -9 of the real executor at every label of a whole life, then its restart (long)
	$(BIN)/python -m tests.fault.executor.sweep

soak: setup-dev ## one hour of the real executor: kills, full disk, clock jumps, a dead central store (root)
	$(BIN)/python -m tests.fault.executor.soak

fuzz: setup-dev ## fuzz the parsers for long
	$(BIN)/python -m tests.fuzz.attest.bits
	$(BIN)/python -m tests.fuzz.attest.mutants --inputs 1000000
	$(BIN)/pip install -q 'atheris>=3,<4'
	$(BIN)/python -m tests.fuzz.attest.coverage_guided --inputs 50000
	$(BIN)/python -m tests.fuzz.runbook.mutants --mutants 1000000
	$(BIN)/python -m tests.fuzz.runbook.test_source_fuzz --sources 20000 --seed 7
	$(BIN)/python -m tests.unit.runbook.test_differential --pairs 100000

coverage: setup-dev ## branch coverage of the evidence verifier
	$(BIN)/python -m pytest tests/unit/attest_tee tests/vectors/tee tests/fuzz/attest -q --cov --cov-config=tests/fuzz/attest/coverage.ini \
		--cov-report=term-missing --cov-fail-under=100

# MUTATION_ARGS="--minutes 30 --jobs 2" takes as many by chance as the time allows, and says how sure the score is.
mutation: setup-dev ## mutate the evidence verifier and see whether its tests notice (long)
	$(BIN)/pip install -q 'cosmic-ray>=8.3'
	$(BIN)/python -m tests.fuzz.attest.mutation $(MUTATION_ARGS)

test-storm: setup-dev ## ten minutes of events at the highest rate: generated == received + counted lost, memory flat (root)
	$(BIN)/python -m tests.kernel.storm --seconds $(or $(SECONDS_OF_STORM),600)

# KERNELS: folders of unpacked linux-image packages, and of linux-headers ones for bcc (apt-get download, dpkg -x).
test-kernels: setup-dev apt-kernels ## the kernel tests on Debian's kernels 6.1 and 6.12 under QEMU (root, long); KERNELS="folder ...": on others
	tests/kernel/vm/suite.sh $(CURDIR)/$(BIN)/python $(or $(KERNELS),$$(tests/kernel/vm/kernels.sh build/kernels))

# The release of one commit in dist/, built twice and compared. SIGN: words for `pointcall sign-bundle`; empty: as this CI job.
release: setup-dev ## sdist, wheel, SBOM and digests, reproducibly; SIGN="--identity-token T" signs them
	$(BIN)/python -m deploy.release.release --out dist $(if $(filter undefined,$(origin SIGN)),,--sign $(SIGN))

format: setup-dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: apt $(VENV)/.installed bpf generated
setup-dev: apt-dev $(VENV)/.installed-dev bpf-dev generated js

# Debian packages: only what is missing is installed, and only root can.
apt: PACKAGES := $(APT)
apt-dev: PACKAGES := $(APT_DEV)
apt-kernels: PACKAGES := qemu-system-x86 busybox-static kmod cpio python3-bpfcc
apt apt-dev apt-kernels:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "pointcall: not root, cannot install:" $$missing; exit 0; fi; \
	echo "installing:" $$missing; apt-get update -qq; \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --require-hashes -r requirements.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --require-hashes -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@ $(VENV)/.installed

# The BPF loader blobs. Without clang or bpftool the executor runs on recorded events only, and says so.
bpf:
	@if command -v clang >/dev/null && command -v bpftool >/dev/null; then $(MAKE) -s -C bpf OUT=$(CURDIR)/$(BLOBS) PYTHON=$(CURDIR)/$(BIN)/python; \
	else echo "pointcall: no clang or bpftool: no BPF objects"; fi

bpf-dev:
	@if command -v clang >/dev/null && command -v bpftool >/dev/null; then $(MAKE) -s -C bpf all bench OUT=$(CURDIR)/$(BLOBS) PYTHON=$(CURDIR)/$(BIN)/python; \
	else echo "pointcall: no clang or bpftool: no BPF objects"; fi

# The other stock Sigstore client, for interoperability tests; without node or the registry they skip.
js:
	@if [ ! -d $(JS)/node_modules ] && command -v npm >/dev/null; then mkdir -p $(JS); \
	npm install --prefix $(JS) --no-audit --no-fund --no-package-lock --loglevel=error $(JS_PACKAGES) >/dev/null || rm -rf $(JS); fi

generated: executor/pointcall_executor/api/generated/.made
executor/pointcall_executor/api/generated/.made: executor/pointcall_executor/api/pointcall.proto
	$(BIN)/python -m pointcall_executor.api.generate
	touch $@

lock: setup-dev ## pin all dependencies with hashes (no addresses)
	$(COMPILE) --upgrade --extra executor --extra build -o requirements.txt pyproject.toml
	$(COMPILE) --upgrade $(addprefix --extra ,agents build dev executor fleet measure pkcs11 release telemetry) -c requirements.txt -o requirements-dev.txt pyproject.toml

clean: ## remove everything made
	rm -rf build dist $(BLOBS) executor/pointcall_executor/api/generated
	$(MAKE) -s -C bpf clean

.PHONY: help demo test test-power sim test-crash soak fuzz coverage mutation test-storm test-kernels release lint check bench format setup setup-dev apt apt-dev apt-kernels bpf bpf-dev js generated lock clean
