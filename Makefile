# FedRad. `make demo` and `make test` set up all they need in .venv; nothing else on the machine changes but
# the Debian packages that the data import's tests read images with.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
WORKERS ?= 2

.PHONY: demo test test-all lint bench figures system clean

$(STAMP): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/cpu.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fedrad-local demo --out runs/demo

test: $(STAMP) system
	$(BIN)/python -m pytest -m "not slow and not realdata and not gpu" -n $(WORKERS) --dist loadfile

test-all: $(STAMP) system lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks > benchmarks.json.partial && mv benchmarks.json.partial benchmarks.json

figures: $(STAMP)
	$(BIN)/python -m deploy.local.figures --out docs/figures

# From Debian: tesseract reads burned-in text in X-rays, nginx and Caddy stand before the server,
# systemd judges units, Chromium shows pages, nftables holds the relay. Tests whose program cannot be had are skipped.
DEBIAN := tesseract-ocr nginx-light caddy systemd chromium iproute2 nftables
system:
	@present=$$(dpkg-query -W -f='$${Package} $${Status}\n' $(DEBIAN) 2>/dev/null | grep -c "ok installed" || true); \
	[ "$$present" = $(words $(DEBIAN)) ] || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends $(DEBIAN) >/dev/null; } || \
	  echo "not all of $(DEBIAN) are installed: their tests are skipped" >&2

clean:
	rm -rf $(VENV) runs benchmarks.json
