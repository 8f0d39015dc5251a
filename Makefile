# Two commands need nothing but Python 3.11+ and a C++ compiler: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard kernels/loraplex_kernels/cpu/*.cpp kernels/loraplex_kernels/cpu/*.h)
PACKAGES := service/loraplex_service,engine/loraplex_engine,engine/loraplex_quantize,adapters/loraplex_adapters,kernels/loraplex_kernels,client/loraplex,demo/loraplex_demo
LEAST_COVERED := 93
# A process for each core, of four at most. In order, so that what many tests share is made once; who has ended takes of
# what is left.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal
# Hundreds of processes import the same files: what Python compiled is kept, wherever that is switched off.
test test-long explore soak: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-long explore sanitize soak check gpu-check gpu-packages stubs constraints docs format clean

demo: $(VENV)/.installed  ## stream several adapters and two models side by side, then end
	$(BIN)/loraplex demo

test: $(VENV)/.installed-dev  ## the CPU tests; with PYTHONOPTIMIZE=1 as an optimised build runs
	@mkdir -p build && rm -f build/coverage.*
	$(BIN)/python -m slipcover --branch --source $(PACKAGES) --omit 'client/loraplex/v1/*,service/loraplex_service/dialect_stubs/*' --json --out build/coverage.json \
		-m pytest $(SIDE_BY_SIDE) -m "not gpu and not long" --hypothesis-profile=ci; tests=$$?; \
	$(BIN)/python -m slipcover --branch --merge build/coverage.json --out build/coverage.merged.json --skip-covered \
		--missing-width 60 --fail-under $(LEAST_COVERED) > build/coverage.txt; covered=$$?; \
	$(BIN)/python -c 'import json; \
	found = json.load(open("build/coverage.merged.json"))["summary"]["percent_covered"]; \
	print(f"Coverage: {found:.2f} % of lines and branches, of $(LEAST_COVERED) % asked for; build/coverage.txt has each file")'; \
	[ $$tests != 0 ] || tests=$$covered; exit $$tests

test-long: $(VENV)/.installed-dev  ## those that take minutes each: every kernel for every GPU, gpu-check on a bare machine
	$(BIN)/python -m pytest -m "long and not gpu" --hypothesis-profile=ci

explore: $(VENV)/.installed-dev  ## the tests of properties with new draws: `make test` repeats its own
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "hypothesis and not gpu"

sanitize: $(VENV)/.installed-dev  ## the tests of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python kernels/sanitize.py

soak: $(VENV)/.installed-dev  ## two minutes of everything at once: no process may grow; SECONDS=1800 for half an hour
	LORAPLEX_SOAK_SECONDS=$(or $(SECONDS),120) $(BIN)/python -m pytest -s tests/faults/test_soak.py

check: $(VENV)/.installed-dev  ## lint, format, types, layers, contract, generated stubs and clients
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks
	$(BIN)/mypy kernels/*.py client/*.py docs/*.py examples/python/*.py
	$(BIN)/lint-imports
	$(BIN)/python client/generate.py check
	proto/stubs.sh check
	proto/stubs.sh lint
	proto/stubs.sh breaking

gpu-check:  ## on a machine with a GPU, with its own Python: tests, kernels and throughput in under nine minutes
	$(PYTHON) -m benchmarks.gpu_check --out gpu-check

gpu-packages:  ## wheels of what gpu-check needs and such a machine may lack, for its Python; bring the folder there
	for version in 3.11 3.12 3.13; do $(PYTHON) -m pip download --quiet --no-deps --only-binary :all: \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --python-version $$version \
		--dest gpu-packages msgspec llguidance pyzmq || exit 1; done

docs: $(VENV)/.installed  ## the documentation as a site, into build/site
	$(INSTALL) --editable ".[docs]"
	$(BIN)/python docs/build_site.py

stubs: $(VENV)/.installed-dev  ## generate client/loraplex/v1 from proto/, and the client's methods with all options
	proto/stubs.sh generate
	$(BIN)/python client/generate.py

constraints: $(VENV)/.installed-dev  ## pin what is installed here, once all tests have passed with it
	(grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ \|^triton==' | sed 's/+cpu$$//') > constraints.new
	mv constraints.new constraints.txt

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

# The stamps depend on what decides the environment: a changed dependency or kernel source installs again.
INSTALL_INPUTS := pyproject.toml client/pyproject.toml constraints.txt kernels/build.py $(KERNELS)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable client

$(VENV)/bin/python:
	@echo "== an environment of our own: $(VENV)"
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { echo "$(PYTHON) cannot make environments: \
	install its venv module (Debian, Ubuntu: apt install python3-venv), or give another: make PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INSTALL_INPUTS) | $(VENV)/bin/python
	@echo "== Loraplex, with what it needs: some 200 MB to fetch, and minutes to compile the kernels"
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | $(VENV)/bin/python
	@echo "== Loraplex, with what it and its tests need: some 500 MB to fetch, and minutes to compile the kernels"
	$(INSTALL) --editable ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) .venv-stubs build dist client/dist *.egg-info kernels/loraplex_kernels/cpu/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
