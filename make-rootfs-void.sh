#!/usr/bin/env bash
# Builds an experimental Void Linux root filesystem and its work seed (docs/void.md).
#
#   ./make-rootfs-void.sh [--mirror URL] [--size SIZE] [--output FILE] [--tools-sha256 SUM]
#
#   --mirror URL        where Void's packages and static XBPS tools are; https, unless --tools-sha256 is given
#   --size SIZE         how large the filesystem is: 2G, 1536M; by default as large as its content needs
#   --output FILE       the root filesystem, FILE.ext4; the work seed lies beside it as FILE.work-seed.ext4
#   --tools-sha256 SUM  what the archive of the static XBPS tools must hash to
#
# mise and opencode come from where RUNTIME_MANIFEST says, by default runtime-bundle.toml beside this script.
#
# Runs as root, or as an ordinary user with subordinate ids. What it mounts is mounted in a namespace of its own. Nothing
# is changed before all is built; an image that is there is replaced at once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
arch=x86_64

# shellcheck source=packages.sh
. "$here/packages.sh"

# ---- within the namespace: the tree and its tar

# xbps_install <tools>: the program of the static tools, by whichever name they have it.
xbps_install() {
    local file
    for file in "$1"/usr/bin/xbps-install.static "$1"/usr/bin/xbps-install "$1"/xbps-install.static; do
        if [ -x "$file" ]; then
            printf '%s\n' "$file"
            return
        fi
    done
    die "the static XBPS tools hold no xbps-install" "the archive at the mirror is another one than expected"
}

# enable <service>: as `ln -s /etc/sv/<service> /var/service` does on a running Void.
enable() {
    [ -e "$root/etc/sv/$1/run" ] || die "there is no service '$1' in the image" "the package that brings it is missing from packages.void"
    mkdir -p "$root/etc/runit/runsvdir/default"
    ln -sfn "/etc/sv/$1" "$root/etc/runit/runsvdir/default/$1"
}

populate() { # <mirror> <work directory> <package list>
    local mirror=$1 work=$2 list=$3 tools=$2/tools keys installer node
    root=$work/root
    mkdir -p "$root"/{dev,proc,root,var/db/xbps/keys}
    # Of the host's devices only those without effect.
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for node in null zero full random urandom; do
        : >"$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
    mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc" # a container may have masked parts of it

    # The keys by which packages are checked come with the tools.
    keys=$tools/var/db/xbps/keys
    if [ -d "$keys" ]; then
        cp "$keys"/* "$root/var/db/xbps/keys/"
    else
        say "the XBPS tools bring no keys: the mirror's are taken, which rests on https alone"
    fi
    installer=$(xbps_install "$tools")
    # shellcheck disable=SC2046 # names of packages, checked before
    XBPS_ARCH=$arch "$installer" -y -S -r "$root" -c "$work/cache" -R "$mirror/current" $(cat "$list") </dev/null >&2 ||
        die "Void's packages cannot be installed from $mirror/current" "look at what XBPS said above; packages.void says what it was asked for"

    # root has bash; /bin/sh stays the distribution's. No password opens the account, a key may.
    [ -x "$root/bin/bash" ] || die "the image has no /bin/bash" "add bash to packages.void"
    sed -i 's|^\(root:.*:\)[^:]*$|\1/bin/bash|' "$root/etc/passwd"
    [ ! -e "$root/etc/shadow" ] || sed -i 's|^root:[^:]*:|root:*:|' "$root/etc/shadow"
    cp -R --no-preserve=ownership "$here/tools/mkruntime/overlay/root/." "$root/root/"
    chmod 700 "$root/root"

    # The guest's configuration comes in files of its own (10-banger.conf), which sshd must read.
    [ -e "$root/etc/ssh/sshd_config" ] || die "the image has no SSH server" "add openssh to packages.void"
    mkdir -p "$root/etc/ssh/sshd_config.d"
    grep -q '^ *Include .*/etc/ssh/sshd_config\.d/\*\.conf' "$root/etc/ssh/sshd_config" ||
        sed -i '1i Include /etc/ssh/sshd_config.d/*.conf' "$root/etc/ssh/sshd_config"
    rm -f "$root"/etc/ssh/ssh_host_*
    enable sshd

    # The agent is no service: it is started before runit and outlives its restarts, in every image alike.
    if grep -qx docker "$list"; then
        enable docker
        mkdir -p "$root/etc/modules-load.d" "$root/etc/sysctl.d"
        printf '%s\n' overlay br_netfilter nf_nat xt_MASQUERADE xt_addrtype xt_conntrack >"$root/etc/modules-load.d/docker.conf"
        printf '%s\n' 'net.ipv4.ip_forward=1' 'net.bridge.bridge-nf-call-iptables=1' >"$root/etc/sysctl.d/90-docker.conf"
    fi
    # Nobody logs in on a console.
    rm -f "$root"/etc/runit/runsvdir/default/agetty-*

    rm -rf "$root"/var/cache/xbps/*
    umount -R "$root/dev" "$root/proc"
    tar --one-file-system --numeric-owner --sort=name --xattrs --xattrs-include='*' -C "$root" -cf "$work/root.tar" .
}

if [ "${1-}" = --populate ]; then
    shift
    populate "$@"
    exit
fi

# ---- outside: arguments, downloads, the images

mirror=https://repo-default.voidlinux.org
size=
output=$here/runtime/rootfs-void.ext4
tools_sha256=
while [ $# -gt 0 ]; do
    case $1 in
        --mirror | --size | --output | --tools-sha256)
            [ -n "${2-}" ] || die "$1 needs a value" "./make-rootfs-void.sh --help"
            case $1 in
                --mirror) mirror=${2%/} ;;
                --size) size=$2 ;;
                --output) output=$2 ;;
                --tools-sha256) tools_sha256=${2,,} ;;
            esac
            shift 2
            ;;
        -h | --help)
            usage "$here/make-rootfs-void.sh"
            exit 0
            ;;
        *) die "unknown argument '$1'" "./make-rootfs-void.sh --help" ;;
    esac
done
[ "$(uname -m)" = "$arch" ] || die "only $arch with glibc is supported, and this machine is $(uname -m)"
[[ $size =~ ^([0-9]+[KMGT]?)?$ ]] || die "--size $size is no size" "examples: 2G, 1536M"
case $output in
    *.ext4) ;;
    *) die "--output $output does not end in .ext4" ;;
esac
[ -d "$(dirname "$output")" ] || die "$(dirname "$output") does not exist" "make it first; for ./runtime: make runtime"
[[ -z $tools_sha256 || $tools_sha256 =~ ^[0-9a-f]{64}$ ]] || die "--tools-sha256 is no SHA256" "it has 64 hexadecimal digits"
case $mirror in
    https://?*) ;;
    http://?*) [ -n "$tools_sha256" ] || die "$mirror is not https, so that anybody on the way may change the tools that are run here" "use https, or say by --tools-sha256 what they must hash to" ;;
    *) die "--mirror $mirror is no http or https URL" ;;
esac
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
for program in curl xz tar unshare; do
    command -v "$program" >/dev/null || die "$program is not installed" "with apt: sudo apt install curl xz-utils tar util-linux"
done
into=(--mount --pid --fork)
if [ "$(id -u)" -ne 0 ]; then
    command -v newuidmap >/dev/null || die "uidmap is not installed; it lets an ordinary user build the image" "sudo apt install uidmap"
    into+=(--map-root-user --map-auto)
fi
[ -x "$here/dist/mkruntime" ] || make --no-print-directory -C "$here" dist/mkruntime >&2

work=$(mktemp -d "${TMPDIR:-/var/tmp}/banger-void-XXXXXX")
child=
finish() {
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -KILL "$child" 2>/dev/null || true # the namespace goes with it, and all that runs and is mounted there
        wait "$child" 2>/dev/null || true
    fi
    # An ordinary user can remove the tree's files only as their root.
    if [ "$(id -u)" -eq 0 ]; then rm -rf --one-file-system "$work"; else unshare "${into[@]}" rm -rf --one-file-system "$work"; fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir "$work/tools" "$work/cache"
packages "$here/packages.void" >"$work/packages"
[ -s "$work/packages" ] || die "packages.void lists no package"

archive=xbps-static-latest.$arch-musl.tar.xz
say "fetching the static XBPS tools from $mirror"
proto='=https'
[ "${mirror%%:*}" = https ] || proto='=http,https'
curl --fail --silent --show-error --location --proto "$proto" --proto-redir "$proto" --connect-timeout 10 --speed-time 20 --speed-limit 1 --max-filesize 256M \
    --output "$work/$archive" "$mirror/static/$archive" || die "$mirror/static/$archive cannot be fetched" "name another mirror: --mirror URL"
got=$(sha256sum <"$work/$archive")
got=${got%% *}
[ -z "$tools_sha256" ] || [ "$got" = "$tools_sha256" ] || die "$archive has SHA256 $got, and --tools-sha256 says $tools_sha256" "get it from another mirror, or correct the sum"
tar --no-same-owner -xJf "$work/$archive" -C "$work/tools" || die "$mirror/static/$archive is no archive"

say "installing $(wc -l <"$work/packages") packages and what they need"
# In the background, so that a signal reaches us at once and the child through us.
unshare "${into[@]}" --kill-child=KILL "$here/make-rootfs-void.sh" --populate "$mirror" "$work" "$work/packages" &
child=$!
status=0
wait "$child" || status=$?
child=
[ "$status" -eq 0 ] || exit "$status"

# With mise and opencode, as far as their sources are within reach: RUNTIME_MANIFEST says where those are, as for the default image.
"$here/dist/mkruntime" -to "$output" -size "${size:-0}" -tools -manifest "${RUNTIME_MANIFEST:-$here/runtime-bundle.toml}" image <"$work/root.tar"
say "$output is ready; next: make void-register"
