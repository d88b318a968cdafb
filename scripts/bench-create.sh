#!/usr/bin/env bash
# `make bench-create`: how long `banger vm create` takes on this machine, and until `banger vm ssh` gets in, as JSON.
#
#   scripts/bench-create.sh [--runs N] [--image NAME]
#
#   --runs N      so many VMs, one after the other (5)
#   --image NAME  of this image instead of the default one
#
# create_ms and ssh_ready_ms count from the same moment, the start of the create. What a create costs its host beside the guest's boot
# is what `make bench` measures.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=packages.sh
. ./packages.sh

runs=5 image=()
while [ $# -gt 0 ]; do
    case $1 in
        --runs | --image)
            [ -n "${2-}" ] || die "$1 needs a value" "scripts/bench-create.sh --help"
            if [ "$1" = --runs ]; then runs=$2; else image=(--image "$2"); fi
            shift 2
            ;;
        -h | --help)
            usage scripts/bench-create.sh
            exit 0
            ;;
        *) die "unknown argument '$1'" "scripts/bench-create.sh --help" ;;
    esac
done
[[ $runs =~ ^[1-9][0-9]{0,3}$ ]] || die "--runs $runs is no number of runs" "1 to 9999"
[ -x ./banger ] || die "./banger is missing" "make build"

vm=bench-create-$$
finish() {
    trap '' INT TERM HUP
    ./banger vm delete "$vm" >/dev/null 2>&1 || true
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
now() { # ms
    local t=${EPOCHREALTIME/[.,]/}
    echo $((t / 1000))
}

create='' ready=''
for ((run = 1; run <= runs; run++)); do
    began=$(now)
    ./banger vm create --quiet --name "$vm" ${image[@]+"${image[@]}"} >/dev/null
    made=$(($(now) - began))
    ./banger vm ssh "$vm" -- true >/dev/null
    in=$(($(now) - began))
    ./banger vm delete "$vm" >/dev/null
    say "run $run of $runs: $made ms, SSH after $in ms"
    create="$create${create:+, }$made" ready="$ready${ready:+, }$in"
done
# median <numbers, comma separated>: the lower of the two in the middle if there are two.
median() { tr -d ' ' <<<"$1" | tr , '\n' | sort -n | sed -n "$(((runs + 1) / 2))p"; }
printf '{"runs": %d, "create_ms": [%s], "ssh_ready_ms": [%s], "create_ms_p50": %d, "ssh_ready_ms_p50": %d}\n' \
    "$runs" "$create" "$ready" "$(median "$create")" "$(median "$ready")"
