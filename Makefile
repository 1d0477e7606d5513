# `make demo` and `make test` install what is missing on a bare Debian 12; both need root for the lab's namespaces.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: ## install and build all that the lab and the tests need (idempotent)
	@lab/setup.sh

demo: setup ## bring a fleet up, move a busy guest there and back, print the timeline
	@$(PYTHON) -m handoff_lab.demo

test: setup lint types proto unit lab-test ## everything a fresh checkout needs to trust itself

lint: ## ruff, lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: ## mypy --strict
	.venv/bin/mypy

proto: ## buf lint
	.venv/bin/buf lint

unit: ## unit, property and model tests; no root needed but for etcd's and systemd's own binaries
	$(PYTHON) -m pytest -n 3 --dist worksteal --timeout 120 -o faulthandler_timeout=150 -m "not crash_points" \
		tests/unit tests/model

crash-points: ## an agent dies before and after every write of its records, in every way that a handoff can go
	$(PYTHON) -m pytest -n 2 --dist worksteal --timeout 120 tests/unit/agent/test_crash_points.py

lab-test: ## the fleet: real libvirt, QEMU, Open vSwitch and etcd
	$(PYTHON) -m pytest tests/lab --ignore=tests/lab/test_soak.py
	$(PYTHON) -m pytest tests/lab/test_soak.py

bench-handoff: setup ## our migration against `virsh migrate --live --p2p`, into out/bench/handoff.json
	@$(PYTHON) -m bench.handoff

bench-upgrade: setup ## a new QEMU under guests of 256 MiB, 2 GiB and 8 GiB, into out/bench/upgrade.json
	@$(PYTHON) -m bench.upgrade

bench-disks: setup ## local disks against `virsh migrate --copy-storage-all`, into out/bench/disks.json
	@$(PYTHON) -m bench.disks

bench-fast: setup ## when a guest with 1, 4, 8 GiB of data runs at the destination, into out/bench/fast.json
	@$(PYTHON) -m bench.fast

soak: setup ## every state of a migration with every fault; into out/soak/matrix.json and matrix.txt
	@$(PYTHON) -m soak.run $(SOAK)

bench-switch: setup ## guest's pause, network gap and lost frames, against three other ways, into out/bench/switch.json
	@$(PYTHON) -m bench.switch

clean: ## stop the lab, remove what was built here
	-.venv/bin/handoff-lab down
	rm -rf build out .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help setup demo test lint types proto unit crash-points lab-test soak \
	bench-handoff bench-upgrade bench-switch bench-disks bench-fast clean
