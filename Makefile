# make demo, make test, make test-system, make lint, make bench, make docs: each sets up what it needs; a second call sets up nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Several CPU devices in one process starve jax 0.10's thread pool on few cores and hang; 16 threads do not.
export PJRT_NPROC ?= 16

# Worker processes of the tests; each takes up to 4 GiB. A module's tests share one worker, and with it their fixtures.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --durations 25 -rs

.PHONY: demo test test-system lint bench docs clean

demo: $(READY)
	$(BIN)/crcjax demo --out runs/demo

test: $(READY)
	$(PYTEST) -m "not system"

# What starts servers, compares with PyTorch, or takes minutes by nature; parts that are absent are skipped by name.
test-system: $(READY)
	$(PYTEST) -m system

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/record.py

# The documentation as a site: build/docs/index.html
docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "crcjax needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory system-packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# Its requirement of an older orbax-checkpoint is not needed for what crcjax uses.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps jax2onnx==0.17.1
	@touch $@

# Debian and Ubuntu leave venv out of their python3; everything else comes from Python packages.
.PHONY: system-packages
system-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq --yes python3-venv; \
	else echo "the system's package python3-venv is missing: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; fi

# A SLURM cluster on this machine, for tests/slurm; Debian and Ubuntu.
.PHONY: slurm-packages
slurm-packages:
	@{ [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/munged ]; } \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes slurm-wlm munge; }

# A Redis server for tests/serve; Debian and Ubuntu.
.PHONY: redis-packages
redis-packages:
	@command -v redis-server >/dev/null \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends redis-server; }

# The clouds' own descriptions of their jobs, for tests/launching/test_clouds.py, in an environment of their own.
.PHONY: cloud-packages
cloud-packages: .venv-clouds/.ready
.venv-clouds/.ready: tests/launching/clouds.txt | $(READY)
	$(PYTHON) -m venv .venv-clouds
	$(BIN)/uv pip install --quiet --python .venv-clouds/bin/python --requirement tests/launching/clouds.txt
	@touch $@

# Prometheus, promtool and Alertmanager, for tests/monitor; Debian and Ubuntu.
.PHONY: prometheus-packages
prometheus-packages:
	@{ command -v prometheus && command -v promtool && command -v prometheus-alertmanager; } >/dev/null \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends prometheus prometheus-alertmanager; }

# The images of launch/container, in .images, for tests/launching/test_containers.py; as root.
.PHONY: images
images: $(READY)
	@command -v buildah >/dev/null && command -v debootstrap >/dev/null \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends buildah debootstrap; }
	mkdir -p .images
	for image in edge service; do STORAGE=$(CURDIR)/.images PYTHON=$(CURDIR)/$(BIN)/python launch/container/build.sh $$image; done

# A browser for the tests that look at pages, and what PDF reports need; Debian and Ubuntu.
BROWSER_PACKAGES := chromium fonts-dejavu fonts-liberation libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0
.PHONY: browser-packages
browser-packages:
	@dpkg --status $(BROWSER_PACKAGES) >/dev/null 2>&1 \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $(BROWSER_PACKAGES); }

# The zooming viewer of the service's page, by npm; Debian and Ubuntu.
.PHONY: viewer
viewer: $(READY)
	@command -v npm >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends npm; }
	@$(BIN)/crcjax install-viewer

clean:
	rm -rf $(VENV) .venv-clouds .images runs build *.egg-info
