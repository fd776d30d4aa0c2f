# docker quay: build, check, install. `make help` lists the targets.
#
# Needs Go 1.26 and, for the tests, Debian 12 (or what it provides) with access to Debian's packages and a Go module proxy.
# Nothing outside build/ is written but by apt (as root) and by the install targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

export GOTOOLCHAIN := local
# One dependency of the torrent library has a database in C that is never used: without cgo it is not compiled either.
export CGO_ENABLED := 0

MODULE  := github.com/docker-quay/docker-quay
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X $(MODULE)/fetcher.Version=$(VERSION)

DESTDIR ?=
PREFIX  ?= /usr/local
BINDIR   = $(DESTDIR)$(PREFIX)/bin
UNITDIR  = $(DESTDIR)$(PREFIX)/lib/systemd/system
# The CLI's plugin folder is fixed by docker: PREFIX moves it only together with docker itself.
HOST_PLUGINS = $(DESTDIR)/usr/local/lib/docker/cli-plugins
USER_PLUGINS = $(DESTDIR)$(if $(DOCKER_CONFIG),$(DOCKER_CONFIG),$(HOME)/.docker)/cli-plugins

BIN   := build/bin
TOOLS := ./test/tools/tools.sh
UNITS := $(wildcard install/systemd/*.service)

# Two packages at a time: the end-to-end ones run whole nodes. The limit is per package.
TEST_P       ?= 2
TEST_TIMEOUT ?= 30m
TEST_FLAGS   ?=
PACKAGES     ?= ./...

.PHONY: build
build: ## static binaries in build/bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/docker-quay ./plugin/docker-quay
	go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/containerd-quay-grpc ./snapshotter/containerd-quay-grpc

.PHONY: deps
deps: ## tools and servers for the tests: pinned versions in build/, a few packages by apt
	$(TOOLS) apt
	$(TOOLS) servers

.PHONY: demo
demo: ## three nodes, one registry, one real image; as root (IMAGE=… for an image of yours)
	@[ "$$(id -u)" = 0 ] || { echo 'make demo: needs root, for network namespaces and containers' >&2; exit 1; }
	$(MAKE) --no-print-directory deps build
	QUAY_TEST_BIN='$(CURDIR)/$(BIN)' go run ./test/demo $(if $(IMAGE),-image '$(IMAGE)') $(DEMO_FLAGS)

.PHONY: test
test: deps build ## every test; those that need root are skipped without it
	QUAY_TEST_BIN='$(CURDIR)/$(BIN)' go test -p $(TEST_P) -timeout $(TEST_TIMEOUT) $(TEST_FLAGS) $(PACKAGES)

.PHONY: lint
lint: ## gofmt, vet, staticcheck, govulncheck where its database can be reached
	@files=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go' | while read -r f; do [ ! -e "$$f" ] || echo "$$f"; done)); \
	  [ -z "$$files" ] || { printf 'gofmt: these files need it:\n%s\n' "$$files" >&2; exit 1; }
	go vet ./...
	$(TOOLS) lint
	$(BIN)/staticcheck ./...
	@status=0; $(TOOLS) vuln || status=$$?; \
	  case $$status in 0) $(BIN)/govulncheck ./... ;; 3) ;; *) exit $$status ;; esac

.PHONY: bench-fetch
bench-fetch: deps build ## 1 GiB from a loopback registry against plain HTTP range + sha256
	QUAY_TEST_BIN='$(CURDIR)/$(BIN)' go run ./test/bench/fetch $(BENCH_FLAGS)

.PHONY: bench-swarm bench-demand bench-node bench-lazy bench-read bench-unpack
bench-swarm: ## cold nodes at once on shaped links, with every mishap, against plain pulls; as root
bench-demand: ## reads that somebody waits for, from a peer, idle and beside a full download; as root
bench-node: ## what 1,000 blobs, and 300 mounted layers, cost a node that has nothing to do; its restart; as root
bench-lazy: ## how soon real programs run whose images are not there yet, against overlayfs and stargz; as root
bench-read: ## files of lazy and of complete layers against ext4, hot, and whole images cold; as root
bench-unpack: ## eager pulls without a link against containerd alone: time and memory; as root
bench-swarm bench-demand bench-node bench-lazy bench-read bench-unpack: deps build
	@[ "$$(id -u)" = 0 ] || { echo 'make $@: needs root, for network namespaces and node daemons' >&2; exit 1; }
	QUAY_TEST_BIN='$(CURDIR)/$(BIN)' go run ./test/bench/$(@:bench-%=%) $(BENCH_FLAGS)

.PHONY: bench-simulate
bench-simulate: ## up to ten thousand nodes by a virtual clock: table, JSON and build/bench/simulate.svg (QUICK=1: up to a thousand)
	go run ./test/bench/simulate $(BENCH_FLAGS)

# How long each fuzz target runs. One worker: two at a time leave a shared machine nothing.
FUZZTIME ?= 10m

.PHONY: fuzz
fuzz: ## every fuzz target, one after the other, for FUZZTIME each; stops at the first crash
	@go list -f '{{.Dir}}|{{.ImportPath}}|{{range .TestGoFiles}}{{.}} {{end}}{{range .XTestGoFiles}}{{.}} {{end}}' $(PACKAGES) | \
	  while IFS='|' read -r dir package files; do \
	    for target in $$(cd "$$dir" && { [ -z "$$files" ] || sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*/\1/p' $$files; }); do \
	      echo "$$package $$target"; \
	      go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -parallel 1 "$$package" </dev/null || exit 1; \
	    done; \
	  done

# With Go at hand the install targets bring the binaries up to date first; without (sudo often has no Go on its PATH) they take
# those that `make` left in build/bin.
BINARIES := $(BIN)/docker-quay $(BIN)/containerd-quay-grpc
BUILT    := $(if $(shell command -v go),build,$(BINARIES))
$(BINARIES):
	@echo '$@ is missing and there is no go command on PATH to build it: run make first' >&2; exit 1

.PHONY: install
install: $(BUILT) plugin-host ## binaries, systemd unit, CLI plugin for all users (PREFIX, DESTDIR)
	install -D -m 0755 $(BIN)/docker-quay $(BINDIR)/docker-quay
	install -D -m 0755 $(BIN)/containerd-quay-grpc $(BINDIR)/containerd-quay-grpc
	for unit in $(UNITS); do install -D -m 0644 $$unit $(UNITDIR)/$${unit##*/}; \
	  sed -i 's,/usr/local/bin/,$(PREFIX)/bin/,g' $(UNITDIR)/$${unit##*/}; done

.PHONY: plugin-user
plugin-user: $(BUILT) ## the CLI plugin for this user: ~/.docker/cli-plugins
	install -D -m 0755 $(BIN)/docker-quay $(USER_PLUGINS)/docker-quay
	ln -sf docker-quay $(USER_PLUGINS)/docker-torrent

.PHONY: plugin-host
plugin-host: $(BUILT) ## the CLI plugin for all users: /usr/local/lib/docker/cli-plugins
	install -D -m 0755 $(BIN)/docker-quay $(HOST_PLUGINS)/docker-quay
	ln -sf docker-quay $(HOST_PLUGINS)/docker-torrent

# While the daemon runs release refuses, and so nothing is removed. What is staged below DESTDIR runs nowhere, and who is not root has no
# daemon.
.PHONY: uninstall
uninstall: ## unmounts what the stopped daemon left, then removes what the install targets put there, and nothing else
	@if [ -z '$(DESTDIR)' ] && [ "$$(id -u)" = 0 ] && [ -x $(BINDIR)/containerd-quay-grpc ]; then \
	  echo '$(BINDIR)/containerd-quay-grpc release'; $(BINDIR)/containerd-quay-grpc release || { \
	  echo 'make uninstall: nothing was removed, as layers may still be mounted. If the daemon runs, stop it first: systemctl disable --now containerd-quay-grpc' >&2; exit 1; }; fi
	rm -f $(BINDIR)/docker-quay $(BINDIR)/containerd-quay-grpc $(foreach dir,$(HOST_PLUGINS) $(USER_PLUGINS),$(dir)/docker-quay $(dir)/docker-torrent)
	rm -f $(foreach unit,$(UNITS),$(UNITDIR)/$(notdir $(unit)))

.PHONY: clean
clean: ## everything that was built, downloaded or cached here
	rm -rf build

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
