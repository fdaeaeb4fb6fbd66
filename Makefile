# make demo   a real tritonserver segments pictures with the small trained demo model
# make test   everything but the full-size model, against that same server
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

MINUTES ?= 30
WORKERS ?= 2

.PHONY: demo test test-full bench perf fuzz faults soak sbom lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 12) else "Python 3.10, 3.11 or 3.12 is needed, and $(PYTHON) is another version: choose one, for example with PYTHON=python3.12")'
	$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not full_size" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-full: $(STAMP)
	$(BIN)/python -m pytest -m full_size -s

bench: $(STAMP)
	$(BIN)/python -m benchmarks

perf: $(STAMP)
	$(BIN)/python -m benchmarks.perf

fuzz: $(STAMP)
	$(BIN)/python -m benchmarks.fuzz --requests 20000 --seed 0

faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults

soak: $(STAMP)
	$(BIN)/python -m benchmarks.faults soak --minutes $(MINUTES)

sbom: $(STAMP)
	mkdir -p build
	$(BIN)/cyclonedx-py requirements docker/requirements.txt --output-reproducible --output-file build/sbom.cdx.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy client/triton_sam3 export server demo benchmarks model_repository/sam3_prompt_decoder/1 tests examples/*.py
	$(BIN)/mypy model_repository/sam3_image_reader/1
	$(BIN)/mypy model_repository/sam3_mask_writer/1

clean:
	rm -rf build $(VENV)
