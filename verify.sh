#!/usr/bin/env bash
# Tries banger on this machine: makes a VM, uses it, and takes it away. ./verify.sh [--nat] [--void] [--image NAME]
#
#   --nat         the VM also reaches its package mirror with NAT, and nothing without
#   --void        of the image void-exp (make void-register), and what that image must have
#   --image NAME  of this image instead of the default one
# shellcheck disable=SC2016 # what runs in the VM is expanded there
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packages.sh
. "$here/packages.sh"
nat='' void='' image=()
while [ $# -gt 0 ]; do
    case $1 in
        --nat) nat=yes && shift ;;
        --void) void=yes image=(--image void-exp) && shift ;;
        --image)
            [ -n "${2-}" ] || die "$1 needs a value" "./verify.sh --help"
            image=(--image "$2")
            shift 2
            ;;
        -h | --help)
            usage "$here/verify.sh"
            exit 0
            ;;
        *) die "unknown argument '$1'" "./verify.sh --help" ;;
    esac
done
banger=$here/banger
[ -x "$banger" ] || die "$banger is missing" "make build"
vm=verify-$$

finish() {
    local status=$?
    trap '' INT TERM HUP
    "$banger" vm delete "$vm" >/dev/null 2>&1 || true
    [ "$status" -eq 0 ] || say "FAILED"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# check <what> <command...>: the command must succeed; what it says is shown if it does not.
check() {
    local what=$1 out
    shift
    if out=$("$@" 2>&1 </dev/null); then
        say "ok: $what"
    else
        printf '%s\n' "$out" >&2
        die "$what"
    fi
}
inside() { "$banger" vm exec --no-tty --interactive=false "$vm" -- sh -c "$1"; }
# reaches fetches one small file of the VM's own package mirror; whole indices take an emulated machine minutes.
reaches() {
    inside '
        if command -v apt-get >/dev/null; then
            url=$(apt-get update --print-uris | sed -n "s/^.\(http[^ ]*InRelease\). .*/\1/p" | head -n 1)
            [ -n "$url" ] && curl --fail --silent --show-error --location --max-time 60 --output /dev/null "$url"
        else
            timeout 180 xbps-install -S
        fi'
}
not() { if "$@"; then return 1; fi; }

check "the host is ready" "$banger" doctor
check "a VM is made" "$banger" vm create --name "$vm" "${image[@]}" --no-nat
check "it is listed" sh -c "'$banger' vm list | grep -q '$vm'"
check "a command runs in it, by SSH" "$banger" vm ssh "$vm" -- true
check "and by its agent" inside 'test "$(id -u)" = 0 && echo kept >/root/verify'
check "its ports are seen" sh -c "'$banger' vm ports '$vm' | grep -q '22/tcp'"
if [ -n "$void" ]; then
    check "its init is runit" inside 'test "$(cat /proc/1/comm)" = runit'
    check "sshd is a service" inside 'sv status sshd || sv status /etc/service/sshd'
    check "docker is a service" inside 'test -e /etc/runit/runsvdir/default/docker'
    check "root has bash" inside 'grep -q "^root:.*:/bin/bash$" /etc/passwd'
    check "mise is active in it" inside 'HOME=/root bash -lic "type -t mise" | grep -qx function'
    check "opencode is mise's" inside 'HOME=/root bash -lc "mise which opencode" | grep -q /opencode && test -x /usr/local/bin/opencode'
fi
if [ -n "$nat" ]; then
    check "without NAT it reaches nothing" not reaches
    check "NAT is turned on" "$banger" vm set "$vm" --nat
    check "with NAT it reaches its package mirror" reaches
    check "NAT is turned off" "$banger" vm set "$vm" --no-nat
    check "and it reaches nothing again" not reaches
fi
check "it stops" "$banger" vm stop "$vm"
check "it starts again" "$banger" vm start "$vm"
check "what was written is there" inside 'grep -q kept /root/verify'
check "it is deleted" "$banger" vm delete "$vm"
say "banger works here"
