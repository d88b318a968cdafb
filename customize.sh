#!/usr/bin/env bash
# Makes a root filesystem of another one by hand: boots a VM on it, with a network, changes things in the VM, and
# writes what it then is into FILE.ext4, with its work seed beside it.
#
#   ./customize.sh [--packages FILE] [--script FILE] [--docker] [--interactive] [--size SIZE] BASE.ext4 FILE.ext4
#
#   --packages FILE  install these packages (apt), one a line
#   --script FILE    run this in the VM, as root
#   --docker         install Docker
#   --interactive    then open a shell in it; what is there when the shell ends is kept if you say so
#   --size SIZE      how large the new filesystem is; by default as large as its content needs
#
# Kernel and guest program are those of the bundle in BANGER_RUNTIME_DIR, else ./runtime. The VM, its daemon and their
# logs are in a directory of their own under BANGER_STATE_DIR, else ~/.local/state/banger, and gone afterwards; if something
# fails the log stays in image-build/ there. VMs and images that you have are not touched.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packages.sh
. "$here/packages.sh"

list='' script='' docker='' interactive='' size=0
while [ $# -gt 0 ]; do
    case $1 in
        --packages | --script | --size)
            [ -n "${2-}" ] || die "$1 needs a value" "./customize.sh --help"
            case $1 in
                --packages) list=$2 ;;
                --script) script=$2 ;;
                --size) size=$2 ;;
            esac
            shift 2
            ;;
        --docker) docker=yes && shift ;;
        --interactive) interactive=yes && shift ;;
        -h | --help)
            usage "$here/customize.sh"
            exit 0
            ;;
        -*) die "unknown argument '$1'" "./customize.sh --help" ;;
        *) break ;;
    esac
done
[ $# -eq 2 ] || die "a base and a result are to be named" "./customize.sh --help"
base=$(realpath -e -- "$1" 2>/dev/null) || die "$1 does not exist"
out=$2
case $out in
    *.ext4) ;;
    *) die "$out does not end in .ext4" ;;
esac
[ -d "$(dirname "$out")" ] || die "$(dirname "$out") does not exist" "make it first"
wanted=()
[ -z "$docker" ] || wanted+=(docker.io docker-cli iptables)
if [ -n "$list" ]; then
    names=$(packages "$list")
    mapfile -t -O "${#wanted[@]}" wanted <<<"$names"
fi
[ -z "$script" ] || [ -r "$script" ] || die "$script cannot be read"
[ -z "$interactive" ] || [ -t 0 ] || die "there is no terminal for a shell" "leave out --interactive, and name a script: --script FILE"

banger=$here/banger mkruntime=$here/dist/mkruntime
for program in "$banger" "$mkruntime"; do
    [ -x "$program" ] || die "$program is missing" "make build"
done
export BANGER_RUNTIME_DIR=${BANGER_RUNTIME_DIR:-$here/runtime}
state=${BANGER_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/banger}
(umask 077 && mkdir -p "$state/image-build")
work=$(mktemp -d "$state/customize-XXXXXX")
log=$state/image-build/customize-$(date +%Y%m%d-%H%M%S)-$$.log
export BANGER_STATE_DIR=$work/state BANGER_CONFIG=$work/config.toml
{
    printf 'default_rootfs = "%s"\n' "${base//\"/\\\"}"
    seed=${base%.ext4}.work-seed.ext4
    [ ! -e "$seed" ] || printf 'default_work_seed = "%s"\n' "${seed//\"/\\\"}"
    printf 'ssh_reminder = false\n'
} >"$BANGER_CONFIG"

finish() {
    local status=$?
    trap '' INT TERM HUP
    # Whatever was made so far goes with its directory.
    "$banger" vm delete customize >>"$log" 2>&1 || true
    "$banger" daemon stop >>"$log" 2>&1 || true
    rm -rf "$work"
    if [ "$status" -eq 0 ]; then rm -f "$log"; else say "its log: $log"; fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# inside <command...>: runs a command in the VM, its output on the screen and in the log.
inside() { "$banger" vm exec --no-tty --interactive=false customize -- "$@" 2>&1 | tee -a "$log" >&2; }

say "booting a VM on $base"
"$banger" vm create --name customize --nat --quiet >>"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    die "the VM does not start"
}
if [ ${#wanted[@]} -gt 0 ]; then
    say "installing ${#wanted[@]} packages"
    inside env DEBIAN_FRONTEND=noninteractive sh -c 'apt-get -q update && exec apt-get -qy install --no-install-recommends "$@"' sh "${wanted[@]}" ||
        die "the packages cannot be installed" "look at what apt says above; the network of VMs: ./banger doctor"
    inside apt-get clean
fi
if [ -n "$script" ]; then
    say "running $script"
    "$banger" vm cp "$script" customize:/tmp/customize >>"$log" 2>&1
    inside sh -c 'chmod 755 /tmp/customize && cd /root && exec /tmp/customize' || die "$script failed"
fi
if [ -n "$interactive" ]; then
    say "you are in the VM; leave the shell when it is as it should be"
    "$banger" vm exec --tty customize -- "${CUSTOMIZE_SHELL:-/bin/bash}" -l || true
    read -r -p "Keep it as $out? [y/N] " answer
    case $answer in
        y | Y | yes) ;;
        *)
            say "nothing is kept"
            exit 0
            ;;
    esac
fi

say "reading it back"
# Docker's directories and /root are filesystems of their own, and part of the image all the same.
# shellcheck disable=SC2016 # expanded in the VM
"$banger" vm exec --no-tty --interactive=false customize -- sh -c '
    cd /
    set -- .
    for d in root var/lib/docker var/lib/containerd; do [ ! -d "$d" ] || set -- "$@" "./$d"; done
    sync
    # 1: a file, a log mostly, changed while it was read.
    tar --one-file-system --numeric-owner --xattrs --xattrs-include="*" --warning=no-file-ignored -cf - "$@" || [ $? -eq 1 ]' >"$work/root.tar" 2>>"$log" ||
    die "the VM's files cannot be read"
"$mkruntime" -to "$out" -size "$size" image <"$work/root.tar"
say "$out is ready"
