#!/usr/bin/env bash
# `make sandbox`: from a fresh checkout to a command that runs in a virtual machine of one's own.
#
# Run again, it goes straight to the machine: what was built is recognised by its content. Ended half-way
# it leaves nothing that the next run would trip over.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/stage.sh
. scripts/stage.sh

vm=sandbox
trap stage_end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

scripts/deps.sh sandbox

mkdir -p dist
# The program's key is all of its source and the version that is stamped into it; the bundle's is
# what `make runtime` makes it from, less the guest program, which every build renews.
source_key() {
    {
        git describe --tags --always --dirty 2>/dev/null || true
        find Makefile go.mod go.sum api client cmd internal tools -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum
}
bundle_key() {
    find packages.apt runtime-bundle.toml go.mod tools/mkruntime \
        internal/bundle internal/cachedir internal/ext4 internal/fault internal/filelock internal/imagebuild internal/kernel internal/vm \
        -type f ! -name '*_test.go' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}
# fresh <stamp> <key>
fresh() { [ "$(cat "dist/$1" 2>/dev/null)" = "$2" ]; }
stamp() {
    echo "$2" >"dist/$1.new"
    mv "dist/$1.new" "dist/$1"
}

sources=$(source_key)
if ! fresh built "$sources" || [ ! -x banger ] || [ ! -x bangerd ] || [ ! -x banger-helper ]; then
    rm -f dist/built
    stage "building banger" dist/build.log make --no-print-directory build
    stamp built "$sources"
fi
bundle=$(bundle_key)
if ! fresh bundled "$bundle" || [ ! -e runtime/bundle.json ]; then
    rm -f dist/bundled
    make --no-print-directory runtime
    stamp bundled "$bundle"
fi

shown=0
./banger vm show "$vm" >/dev/null 2>dist/show.log || shown=$?
case $shown in
    0) ./banger vm start "$vm" ;;
    3) ./banger vm create --name "$vm" >/dev/null ;; # not found: see docs/cli.md
    *)
        cat dist/show.log >&2
        exit "$shown"
        ;;
esac

# shellcheck disable=SC2016 # expanded in the machine
command='. /etc/os-release; echo "$PRETTY_NAME, kernel $(uname -r), $(nproc) CPUs"; df -h / /root'
printf '\n$ ./banger vm ssh %s -- '\''%s'\''\n' "$vm" "$command"
# In a stage, since an emulated machine takes seconds to log somebody in.
enter() { ./banger vm ssh "$vm" -- "$command" >dist/ssh.out; }
stage "entering it" dist/ssh.log enter
cat dist/ssh.out

printf '\nThat was your own machine. Next:\n'
next() { printf '  %-30s %s\n' "$1" "$2"; }
next "./banger vm ssh $vm" "enter it, as root; files stay when it is stopped"
next "./banger vm list" "what there is"
next "./banger vm stop $vm" "shut it down"
next "./banger vm start $vm" "boot it again"
next "./banger vm delete $vm" "take it away, with its disks"
next "./banger vm create" "make another one"
next "./banger --help" "everything else"
