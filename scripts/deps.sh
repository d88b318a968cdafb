#!/bin/sh
# Installs what banger needs on this machine and is missing, by apt; elsewhere it says what to install.
#
#   scripts/deps.sh sandbox          what building and running sandboxes takes
#   scripts/deps.sh test             that, and what the tests take
#   scripts/deps.sh --dry-run test   only say what is missing: exit status 1 if anything is
#
# Nothing is asked, printed or started when nothing is missing.
set -eu

# need <package> <probe> <why>: the probe is a program on the PATH, or a file if it begins with a slash.
need() {
    case $2 in
        /*) [ -e "$2" ] && return ;;
        *) command -v "$2" >/dev/null 2>&1 && return ;;
    esac
    missing="$missing $1"
    reasons="$reasons
  $1: $3"
}

sandbox() {
    need qemu-system-x86 qemu-system-x86_64 "runs the virtual machines"
    need e2fsprogs mke2fs "makes and checks their disks"
    need openssh-client ssh "enters them (banger vm ssh)"
    need mmdebstrap mmdebstrap "builds the default image from Debian packages"
    need debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg "holds the keys that Debian's packages are signed with"
    need uidmap newuidmap "lets an ordinary user build the image"
    need zstd zstd "unpacks Debian packages"
    need xz-utils xz "unpacks Debian packages"
    need ca-certificates /etc/ssl/certs/ca-certificates.crt "lets Go fetch the source's dependencies"
    need git git "stamps the version"
}

tests() {
    need gcc gcc "compiles the race detector's runtime into the tests"
    need libc6-dev /usr/include/stdlib.h "compiles the race detector's runtime into the tests"
    need iproute2 ip "looks at the host's network in tests"
    need jq jq "reads JSON output in tests"
    need python3-pip pip3 "fetches Firecracker where its release page is out of reach"
    need npm npm "knows where npm packages come from: mise and opencode, which image builds install"
    need procps ps "looks at processes in tests"
    need strace strace "counts the programs that a create executes (make bench)"
    need busybox-static busybox "is in the container images that VMs are made of in tests"
    need erofs-utils mkfs.erofs "makes a root filesystem that nobody can write to, which VMs are booted of in tests"
    need squashfs-tools mksquashfs "makes another one"
    need xfsprogs mkfs.xfs "makes a filesystem that jails are tried on in tests"
    need btrfs-progs mkfs.btrfs "makes another one"
    need umoci umoci "unpacks images, as the reference that banger's own unpacking is compared with"
    need shellcheck shellcheck "checks the shell scripts"
    need bash-completion /usr/share/bash-completion/bash_completion "lets bash complete, in the tests of completion"
    need zsh zsh "completes, in the tests of completion"
    need fish fish "completes, in the tests of completion"
}

# Programs of administration may be missing from an ordinary user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing='' reasons='' dry=''
if [ "${1-}" = --dry-run ]; then
    dry=yes
    shift
fi
case ${1-} in
    sandbox) sandbox ;;
    test) sandbox; tests ;;
    *)
        echo "usage: scripts/deps.sh [--dry-run] sandbox|test" >&2
        exit 2
        ;;
esac

# Go 1.21 and later fetch the toolchain that go.mod names; older ones cannot. Asked outside of the
# checkout, so that nothing is fetched now.
go_version=$(
    cd /
    GOTOOLCHAIN=local go version 2>/dev/null || true
)
go_version=${go_version#go version }
go_version=${go_version%% *}
case $go_version in
    go1.[0-9] | go1.[0-9].* | go1.1[0-9] | go1.1[0-9].* | go1.20 | go1.20.*)
        echo "Go ${go_version#go} is too old: banger is built with Go 1.21 or later (which fetches the exact version itself)." >&2
        echo "Get a current Go from https://go.dev/dl/, unpack it, and put its bin directory first in PATH." >&2
        exit 1
        ;;
    '')
        echo "Go is not installed: banger is built with Go 1.21 or later." >&2
        echo "Get a current Go from https://go.dev/dl/, unpack it, and put its bin directory first in PATH." >&2
        exit 1
        ;;
esac

[ -n "$missing" ] || exit 0

echo "Missing on this machine:$reasons"
if [ -n "$dry" ]; then
    exit 1
fi
as_root=''
if [ "$(id -u)" -ne 0 ]; then
    as_root=sudo
fi
if ! command -v apt-get >/dev/null 2>&1 || { [ -n "$as_root" ] && ! command -v sudo >/dev/null 2>&1; }; then
    echo "Install them as root (the names are Debian's), then run this again. With apt:" >&2
    echo "  apt-get install$missing" >&2
    exit 1
fi
echo "Installing with: ${as_root:+$as_root }apt-get install$missing"
if [ -n "$as_root" ]; then
    echo "sudo may ask for your password; nothing else of banger needs it."
fi
# The lists are fetched only if they are missing or do not know the packages any more.
# shellcheck disable=SC2086 # $missing is a list of words, $as_root is empty or one
install() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; }
# shellcheck disable=SC2086
if ! apt-cache show $missing >/dev/null 2>&1 || ! install; then
    echo "Fetching the lists of packages first."
    $as_root apt-get update
    install
fi
