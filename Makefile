# Everything runs in .venv, which the first target that needs it makes. Works with GNU make 3.81.

PYTHON ?= python3
BIN := .venv/bin

PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --cov
# Of all lines, by both kinds of tests together; alone the long ones cover less.
COVERAGE = $(if $(wildcard .coverage),95,0)

DEMO_OUTPUT := models/demo
# The data are the teacher's own answers, so alpha is 1; such small models learn most where their
# embedding is trained too, and want a higher learning rate than big ones.
DEMO_OPTIONS := \
	--domain stories \
	--teacher embedded:teacher \
	--student embedded:student \
	--prompts conch_dna/assets/story_openings.txt \
	--samples-per-prompt 4 \
	--max-tokens 192 \
	--temperature 1 \
	--alpha 1 \
	--lora-keys all,model.embed_tokens \
	--lora-rank 32 \
	--lora-scale 4 \
	--learning-rate 5e-3 \
	--batch-size 8 \
	--output-dir $(DEMO_OUTPUT) \
	--overwrite

# What these measure is a model of yours, which they have to be told.
OWN_MODEL := real_model prompt_distillation self_distillation fuse_bits student_sizes merge_neurons llama_cpp_files valid_answers

# pip compiles all 12,000 installed files, which takes longer than the rest of the set-up; without
# it Python compiles what is used, when it is first used, unless this variable forbids that.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-slow bench real house clean

help:
	@echo 'make demo    distil the embedded teacher into the embedded student and measure it'
	@echo 'make test    ruff, mypy and the tests that guard every behaviour'
	@echo 'make test-slow  the long tests: kills, whole runs, processes; with make test, coverage'
	@echo 'make bench   run the scripts in tests/benchmarks that need no model of yours'
	@echo 'make real    fetch SmolLM2-135M, leave out layers, distil it; an hour and more, goes on where'
	@echo '             it stopped; REAL_MODEL=FOLDER|FILE.gguf REAL_QUESTIONS=FILE REAL_OPTIONS="--minutes 90"'
	@echo 'make house   draw the house into CONTRIBUTING.md, and print its size'
	@echo 'make clean   remove .venv, caches and the output of the demo; other models stay'
	@echo 'PYTHON=...   the interpreter that makes .venv (3.11 or newer), now: $(PYTHON)'

demo: .venv/stamp
	$(BIN)/python -m conch_dna.training.true_kd $(DEMO_OPTIONS)

test: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@rm -f .coverage .coverage.*
	$(PYTEST) -m 'not slow' --cov-report=

# What `make test` covered counts too, where it ran before.
test-slow: .venv/stamp
	$(PYTEST) -m slow --cov-append --cov-report=term --cov-fail-under=$(COVERAGE)

bench: .venv/stamp
	@$(BIN)/python tests/benchmarks/_ratios.py forget
	@for script in $(filter-out $(OWN_MODEL:%=tests/benchmarks/%.py),$(wildcard tests/benchmarks/[a-z]*.py)); do \
		test -f "$$script" || { echo 'tests/benchmarks holds no script'; continue; }; \
		echo "== $$script"; \
		$(BIN)/python "$$script" || exit 1; \
	done
	$(BIN)/python tests/benchmarks/_ratios.py

real: .venv/stamp
	REAL_MODEL='$(REAL_MODEL)' REAL_QUESTIONS='$(REAL_QUESTIONS)' \
		$(BIN)/python tests/benchmarks/real_model.py $(REAL_OPTIONS)

house: .venv/stamp
	$(BIN)/python tests/house.py
	$(BIN)/python tests/house.py sizes

clean:
	rm -rf .venv build dist htmlcov .coverage .coverage.* $(DEMO_OUTPUT)
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find conch_dna examples tests -type d -name __pycache__ -prune -exec rm -rf {} +

.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'conch_dna needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=python3.11 ...' >&2; \
		exit 2; }
	@echo 'Setting up .venv (1 to 3 minutes, once)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --upgrade -c constraints.txt pip
	@$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev,offline]'
	@touch $@
