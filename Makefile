# Two commands do everything: `make demo` and `make test`. Each installs what it needs first.
.PHONY: setup demo test lint lock images bench clean

setup:
	@.ci/bootstrap

demo: setup
	@.venv/bin/brownout demo

test: setup
	@.venv/bin/brownout selftest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lock: setup
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--extra dev --no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock

clean:
	rm -rf build
