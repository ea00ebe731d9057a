# Two commands do everything: `make demo` and `make test`. Each installs what it needs first.
PYTEST = .venv/bin/pytest -q -n 2 -p no:cacheprovider
TARGETS = qemu-arm64 qemu-arm64-sd qemu-x86_64

.PHONY: setup demo test lint images unit scenarios night lock bench clean

setup:
	@.ci/bootstrap

demo: setup
	@.venv/bin/brownout demo

# Every check, on all three targets; at most 25 minutes on two cores.
test: lint images unit scenarios

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

images: setup
	@for target in $(TARGETS); do \
		.venv/bin/python -m images build $$target --relock-if-gone || exit 1; \
	done

unit: images
	$(PYTEST) tests --ignore tests/planted

scenarios: images
	$(PYTEST) scenarios tests/planted --lg-env rigs/qemu-arm64.yaml
	$(PYTEST) scenarios -m smoke --lg-env rigs/qemu-x86_64.yaml
	$(PYTEST) scenarios -m smoke --lg-env rigs/qemu-arm64-sd.yaml

# The whole matrix, and everything on an SD card too: for the night.
night: images
	@for rig in rigs/*.yaml; do \
		$(PYTEST) scenarios tests/planted --lg-env $$rig --alluredir build/night || exit 1; \
	done

bench: images
	.venv/bin/python tests/benchmarks/recorder.py
	.venv/bin/python tests/benchmarks/cut_to_verdict.py

lock: setup
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--extra dev --no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf build
