# Every target is one line that calls the real tool; `make` alone shows them.
PREFIX ?= /usr/local
DESTDIR ?=
RELEASE := target/x86_64-unknown-linux-gnu/release

.DEFAULT_GOAL := help
.PHONY: help run build test soak check filters fuzz bench install clean

help: ## show this text
	@awk -F ':[^#]*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

run: ## boot a guest: its shell on a terminal, a guided tour of the API without one
	@resources/run.sh

build: ## build the static binaries into target/x86_64-unknown-linux-gnu/release
	cargo build --release --locked

test: ## unit tests, life-cycle tests, and tests with real guests (in an emulated host where there is no KVM)
	@tests/run-tests.sh

check: ## formatting, lints, docs, unit tests, file lengths, short fuzz runs
	@resources/check/check.sh

soak: ## tests that take an hour: 1000 hotplugs, 1 GiB each way over vsock, a disk's writer killed 300 times
	@tests/run-tests.sh --soak

filters: build ## trace the system calls of all tests: none outside of the filters, no rule without use (takes hours)
	@tests/seccomp/coverage.sh

fuzz: ## fuzz every target for FUZZ_SECONDS (default 600)
	@tests/fuzz/run.sh $${FUZZ_SECONDS:-600}

bench: ## boot, block, net, memory and start-up figures, in a table
	@tests/benches/bench.sh

install: build ## install both binaries into DESTDIR/PREFIX/bin (PREFIX is /usr/local)
	install -D -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/mayfly $(RELEASE)/mayfly-jailer

clean: ## remove everything that was built, downloaded or found by fuzzing
	rm -rf target build tests/clients/target tests/fuzz/target tests/fuzz/corpus tests/fuzz/artifacts
