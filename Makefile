# Two commands do everything: `make demo` and `make test`. Each installs what it needs first.
PYTEST = .venv/bin/pytest -q -n 2 -p no:cacheprovider
TARGETS = qemu-arm64 qemu-arm64-sd qemu-x86_64

.PHONY: setup setup-tests demo test lint images unit scenarios night explore campaign server device server-night lock bench fuzz mutants clean

setup:
	@.ci/bootstrap

# Also what only the tests use.
setup-tests:
	@.ci/bootstrap tests

demo: setup
	@.venv/bin/brownout demo

# Lint, types, all tests, the planted bugs, and the `smoke` scenarios on all three targets. The
# whole scenario matrix takes longer than a person waits: `make night`.
test: lint images unit scenarios

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

images: setup
	@for target in $(TARGETS); do \
		.venv/bin/python -m images build $$target --relock-if-gone || exit 1; \
	done

unit: images setup-tests
	$(PYTEST) tests --ignore tests/planted -m "not night" --durations=20

scenarios: images
	$(PYTEST) tests/planted --lg-env rigs/qemu-arm64.yaml
	$(PYTEST) scenarios --lg-env rigs/simulated.yaml
	@for target in $(TARGETS); do \
		$(PYTEST) scenarios -m smoke --lg-env rigs/$$target.yaml || exit 1; \
	done

# The whole matrix, everything on an SD card too, and the long tests: for the night.
night: images setup-tests
	$(PYTEST) tests --ignore tests/planted -m night
	.venv/bin/brownout simulate --lifetimes 100000 --single --double kept --double torn
	$(MAKE) explore DEEP=all
	@for rig in rigs/qemu-*.yaml; do \
		$(PYTEST) scenarios tests/planted --lg-env $$rig --alluredir build/night || exit 1; \
	done

# Record install + commit + rollback on all three targets and cut the recordings everywhere. DEEP:
# how many distinct recoveries a target are cut again, or `all` (some hours).
DEEP ?= 4
explore: images
	@for target in $(TARGETS); do \
		.venv/bin/brownout record --rig rigs/$$target.yaml \
			--output build/explore/$$target.recording || exit 1; \
	done
	.venv/bin/brownout explore $(TARGETS:%=build/explore/%.recording) \
		--exhaustive-up-to 10 --samples 300 \
		--judge static --judge data --judge mount --judge uboot --judge coldboot \
		--data-checks all --mounts 24 --decisions 60 --cold-boots 12 --deep $(DEEP) \
		--report build/explore/report.html

# Random compositions of faults on two rigs for a night (MINUTES=480); the same command goes on.
MINUTES ?= 480
campaign: images
	.venv/bin/brownout campaign --rig rigs/qemu-arm64.yaml --rig rigs/qemu-x86_64.yaml \
		--minutes $(MINUTES) --seed $(shell date +%Y%m%d) -j 2
	.venv/bin/brownout campaign --history build/campaign/campaign.db

# An update server with its web page on https://localhost:8443, for trying things out; the first
# start prints the password and how to connect a device.
server: setup
	@[ -e build/server/server.toml ] || .venv/bin/updater server init build/server \
		--name localhost --name 127.0.0.1 --name 10.0.2.2
	@.venv/bin/updater server run build/server

# A QEMU device to try things out with, its console on this terminal. It keeps its disk.
device: setup
	@.venv/bin/python -m images boot qemu-arm64

# The management server's long tests (kills, fuzzing, slow connections) and its benchmark.
server-night: setup-tests
	$(PYTEST) tests/updater_server tests/peers -m server_night
	.venv/bin/python tests/benchmarks/server.py

bench: images
	.venv/bin/python tests/benchmarks/recorder.py
	.venv/bin/python tests/benchmarks/cut_to_verdict.py
	.venv/bin/python tests/benchmarks/explore.py
	.venv/bin/python tests/benchmarks/simulate.py
	.venv/bin/python tests/benchmarks/farm.py
	.venv/bin/python tests/benchmarks/client.py --rounds 3
	.venv/bin/python tests/benchmarks/client_guest.py

# Coverage-guided fuzzing of the artifact reader. What it finds is kept in build/fuzz; SECONDS=3600.
SECONDS ?= 600
fuzz: setup
	mkdir -p build/fuzz/corpus build/fuzz/found
	.venv/bin/python tests/fuzz/fuzz_artifact.py -max_total_time=$(SECONDS) \
		-artifact_prefix=build/fuzz/found/ -print_final_stats=1 build/fuzz/corpus tests/fuzz/corpus

# The mutation score of the client's state machine, simulated lifetimes as the killer (20 CPU
# minutes; one that is ended goes on where it was).
mutants: setup
	.venv/bin/python -m pip install --quiet -e '.[mutation]'
	.venv/bin/python tests/mutation/state_machine.py

lock: setup
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--extra dev --no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf build
