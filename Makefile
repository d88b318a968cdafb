# banger's build. `make help` lists what there is to type.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

PREFIX ?= $(HOME)/.local
RUNTIME_MANIFEST ?= runtime-bundle.toml
ARGS ?=
# Programs to take into the runtime bundle, instead of what is in PATH or fetched.
FIRECRACKER ?=
JAILER ?=

# Outside of git (a release archive) the version is "devel".
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X git.thaloco.com/thaloco/banger/internal/version.release=$(VERSION)'
MKRUNTIME := ./dist/mkruntime -version '$(VERSION)'
MAKE_BUNDLE = $(MKRUNTIME) -manifest '$(RUNTIME_MANIFEST)' -firecracker '$(FIRECRACKER)' -jailer '$(JAILER)'

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- build

.PHONY: build
build: dist/mkruntime ## ./banger, ./bangerd and ./banger-helper, and the guest program in ./runtime if it exists
	$(GO_BUILD) -o banger ./cmd/banger
	$(GO_BUILD) -o bangerd ./cmd/bangerd
	$(GO_BUILD) -o banger-helper ./cmd/banger-helper
	if [ -e runtime/bundle.json ]; then $(MKRUNTIME) agent; fi

# Go's own build cache decides whether there is anything to do.
.PHONY: dist/mkruntime
dist/mkruntime:
	@mkdir -p dist
	@$(GO_BUILD) -o $@ ./tools/mkruntime

# ---- runtime bundle (docs/runtime-bundle.md)

.PHONY: runtime
runtime: dist/mkruntime ## build or repair the runtime bundle in ./runtime; FIRECRACKER=path JAILER=path: with these
	@exec $(MAKE_BUNDLE) all

.PHONY: rootfs
rootfs: dist/mkruntime ## build the default image and its work seed afresh, if packages.apt has changed or the image is missing
	@exec $(MAKE_BUNDLE) rootfs

.PHONY: runtime-package
runtime-package: dist/mkruntime ## pack ./runtime into dist/banger-runtime.tar.gz and print its SHA256; WITH_KEY=1: the private key as well
	@exec $(MKRUNTIME) $(if $(WITH_KEY),-with-key) pack

.PHONY: runtime-bundle
runtime-bundle: dist/mkruntime ## unpack the archive that RUNTIME_MANIFEST names into ./runtime
	@exec $(MKRUNTIME) -manifest '$(RUNTIME_MANIFEST)' fetch

# ---- the experimental Void image (docs/void.md)

VOID_VM_NAME ?= void-dev

.PHONY: rootfs-void void-register void-vm verify-void
rootfs-void: dist/mkruntime ## build the experimental Void image in ./runtime; ARGS='--mirror URL --size 2G'
	@exec ./make-rootfs-void.sh $(ARGS)
void-register: ## make it, or what it is now, the image void-exp
	@exec ./banger image register --name void-exp --rootfs ./runtime/rootfs-void.ext4 \
	  --work-seed ./runtime/rootfs-void.work-seed.ext4 --packages ./packages.void
void-vm: void-register ## create a VM of it; VOID_VM_NAME=name
	@exec ./banger vm create --image void-exp --name '$(VOID_VM_NAME)'
verify-void: void-register ## make a VM of it, look at what must be there, delete it
	@exec ./verify.sh --void

# ---- install

.PHONY: sandbox-deps test-deps
sandbox-deps: ## install what building and running sandboxes takes
	@scripts/deps.sh sandbox
test-deps: ## install that, and what the tests take
	@scripts/deps.sh test

.PHONY: install uninstall
install: build ## into $(PREFIX)/bin, the runtime bundle into $(PREFIX)/lib/banger
	@$(MKRUNTIME) -to '$(PREFIX)/lib/banger' install
	@mkdir -p '$(PREFIX)/bin'
	@for p in banger bangerd banger-helper; do install -m 755 $$p '$(PREFIX)/bin/.new.'$$p; mv '$(PREFIX)/bin/.new.'$$p '$(PREFIX)/bin/'$$p; done
	@$(MAKE) --no-print-directory shell-files SHARE='$(PREFIX)/share'
	@echo "installed in $(PREFIX)/bin"

uninstall: dist/mkruntime ## remove what install put there; settings, VMs and the key to them stay
	@if [ -x '$(PREFIX)/bin/banger' ]; then '$(PREFIX)/bin/banger' daemon stop || true; fi
	@rm -f '$(PREFIX)/bin/banger' '$(PREFIX)/bin/bangerd' '$(PREFIX)/bin/banger-helper'
	@$(MKRUNTIME) -to '$(PREFIX)/lib/banger' uninstall
	@rm -f '$(PREFIX)/share/bash-completion/completions/banger' '$(PREFIX)/share/zsh/site-functions/_banger' '$(PREFIX)/share/fish/vendor_completions.d/banger.fish' '$(PREFIX)'/share/man/man1/banger*.1
	@echo "removed from $(PREFIX)"

.PHONY: deb
deb: build ## Debian packages of the programs and of ./runtime, in dist
	@scripts/deb.sh '$(VERSION)'

# Of the program that was built: packages run it, too, with SHARE below their own root.
SHARE ?= dist/share
.PHONY: shell-files dist/man
dist/man:
	@mkdir -p dist
	@$(GO_BUILD) -o $@ ./tools/man
shell-files: dist/man ## manual pages and what shells complete with, into SHARE (dist/share)
	@mkdir -p '$(SHARE)/bash-completion/completions' '$(SHARE)/zsh/site-functions' '$(SHARE)/fish/vendor_completions.d'
	@./banger completion bash >'$(SHARE)/bash-completion/completions/banger'
	@./banger completion zsh >'$(SHARE)/zsh/site-functions/_banger'
	@./banger completion fish >'$(SHARE)/fish/vendor_completions.d/banger.fish'
	@dist/man '$(SHARE)/man/man1'

# ---- sandbox, tests, benchmarks

.PHONY: sandbox
sandbox: ## a machine of your own: installs what is missing, builds, makes it, runs a command in it
	@exec scripts/sandbox.sh

# N boots for test-boots.
N ?= 20

.PHONY: test test-full test-boots
test: ## every check and test, and the quick ones of those that boot real machines
	@exec scripts/test.sh
test-full: ## that, and the slow ones
	@exec scripts/test.sh full
test-boots: ## N=20 boots in a row while all CPUs are busy; none may fail
	@exec scripts/test.sh boots $(N)

# ---- the lab: an emulated host with KVM (docs/lab.md)

.PHONY: lab lab-shell
lab: dist/mkruntime ## build the emulated host that Firecracker is tested on
	@exec $(MKRUNTIME) -to dist/lab/host lab
lab-shell: lab runtime ## enter it, with this checkout in it; ARGS='-user root make test' runs a command
	@go build -o dist/lab/shell ./test/lab/shell
	@exec dist/lab/shell $(ARGS)

.PHONY: bench
bench: build runtime ## measure what a VM costs its host (docs/benchmarks.md); BENCH_QUICK=1: in a minute
	$(GO_BUILD) -o dist/bangerd-fake ./test/bangerd-fake
	$(GO_BUILD) -o dist/bench ./tools/bench
	@dist/bench $(ARGS)

.PHONY: bench-create
bench-create: ## time a create and the first SSH on this host, as JSON; ARGS="--runs 3 --image docker-dev"
	@$(MAKE) --no-print-directory build runtime >&2
	@exec ./banger bench create $(ARGS)

.PHONY: bench-floor
bench-floor: build runtime lab ## hold a create on Firecracker against Firecracker alone, in the lab; BENCH_QUICK=1: fewer samples
	@$(MKRUNTIME) -to dist/lab/stock stock
	$(GO_BUILD) -o dist/bench ./tools/bench
	@dist/bench -floor -json dist/bench-floor.json $(ARGS)

.PHONY: bench-boot
bench-boot: build runtime lab ## what command line, initrd and units cost a guest's boot, in the lab; BENCH_QUICK=1: fewer samples
	@$(MKRUNTIME) -to dist/lab/stock stock
	$(GO_BUILD) -o dist/bench ./tools/bench
	@dist/bench -boot -json dist/bench-boot.json $(ARGS)

# ---- housekeeping

.PHONY: clean
clean: ## remove what was built here; ./runtime and its key stay
	rm -rf banger bangerd banger-helper dist coverage.out
