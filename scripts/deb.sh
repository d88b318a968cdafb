#!/usr/bin/env bash
# `make deb`: Debian packages of banger, in dist.
#
#   scripts/deb.sh <version>
#
# banger holds the programs, completions and manuals; banger-runtime the bundle in ./runtime,
# for all users of a machine and without a key. The same content makes the same packages, bit by bit: times are those of
# SOURCE_DATE_EPOCH, else of the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022

die() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '       %s\n' "$2" >&2
    exit 1
}
[ -n "${1-}" ] || die "the version is missing" "make deb"
command -v dpkg-deb >/dev/null || die "dpkg-deb is not installed" "it is part of Debian's dpkg"
for program in banger bangerd banger-helper dist/mkruntime; do [ -x "$program" ] || die "$program is missing" "make build"; done

# deb-version(7): a digit first, no hyphen but the last, which a revision would follow. v1.2-3-gabc is after 1.2.
version=${1#v}
case $version in
    [0-9]*) version=${version//-/+} ;;
    *) version=0~${version//-/+} ;; # a commit without a tag, or no git at all: before any release
esac
[[ $version =~ ^[0-9][A-Za-z0-9.+~]*$ ]] || die "'$1' makes no version of a package"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH

# On the filesystem of dist, so that the bundle's blocks can be shared.
mkdir -p dist
stage=$(mktemp -d dist/.deb-XXXXXX)
trap 'rm -rf "$stage"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# control <package> <depends> <recommends> <description, continuation lines>
control() {
    local root=$stage/$1 size
    # As policy wants it: KiB, a KiB for each file or directory at least.
    size=$(du -k --apparent-size -s "$root" | cut -f 1)
    mkdir -p "$root/DEBIAN"
    {
        printf 'Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: The banger developers <root@localhost>\n' "$1" "$version"
        printf 'Installed-Size: %s\nSection: admin\nPriority: optional\nHomepage: https://git.thaloco.com/thaloco/banger\n' "$size"
        [ -z "$2" ] || printf 'Depends: %s\n' "$2"
        [ -z "$3" ] || printf 'Recommends: %s\n' "$3"
        printf 'Description: %s\n' "$4"
    } >"$root/DEBIAN/control"
    (cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
    chmod 644 "$root/DEBIAN/control" "$root/DEBIAN/md5sums"
}

# docs <package>: what policy wants of every package.
docs() {
    local dir=$stage/$1/usr/share/doc/$1
    mkdir -p "$dir"
    {
        printf 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: banger\n'
        printf 'Source: https://git.thaloco.com/thaloco/banger\n\nFiles: *\n%s\nLicense: Expat\n' "$(sed -n 's/^Copyright (c)/Copyright:/p' LICENSE)"
        sed '1,/^Copyright/d; s/^$/./; s/^/ /' LICENSE | sed '1{/^ \.$/d}'
        if [ "$1" = banger-runtime ]; then # what others have made of it
            printf '\nFiles: usr/lib/banger/*.ext4 usr/lib/banger/vmlinux usr/lib/banger/initrd.img\nCopyright: the authors of the Debian packages in them\nLicense: various\n'
            printf ' Each package in the image has its own in /usr/share/doc/PACKAGE/copyright there.\n'
            printf '\nFiles: usr/lib/banger/firecracker usr/lib/banger/jailer\nCopyright: Amazon.com, Inc. or its affiliates\nLicense: Apache-2.0\n'
            printf ' The text is in /usr/share/common-licenses/Apache-2.0.\n'
        fi
    } >"$dir/copyright"
    gzip -9n <CHANGELOG.md >"$dir/changelog.gz"
    chmod 644 "$dir"/*
}

build() {
    local root=$stage/$1 file=dist/$1_${version}_amd64.deb
    find "$root" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
    # The images inside are sparse and compress fast enough at the lowest level.
    dpkg-deb --root-owner-group -Zgzip -z"$2" --build "$root" "$stage/new.deb" >/dev/null
    mv "$stage/new.deb" "$file"
    printf '%s  %s\n' "$(sha256sum <"$file" | cut -d ' ' -f 1)" "$file"
}

# ---- banger

root=$stage/banger
# The root helper is beside them: `banger system install` takes it from there, and makes its units.
install -D -m 755 -t "$root/usr/bin" banger bangerd banger-helper
make --no-print-directory shell-files SHARE="$stage/share"
mkdir -p "$root/usr/share/zsh"
mv "$stage/share/zsh/site-functions" "$root/usr/share/zsh/vendor-completions" # where Debian's zsh looks
mv "$stage/share/bash-completion" "$stage/share/fish" "$stage/share/man" "$root/usr/share"
gzip -9n "$root/usr/share/man/man1"/*
# Nothing enables them: a user does, by `systemctl --user enable`, or `banger daemon install` writes that user's own.
./banger internal units "$root/usr/lib/systemd/user" /usr/bin
rm -r "$stage/share"
docs banger
control banger "e2fsprogs, openssh-client" "banger-runtime, qemu-system-x86" \
    "development sandboxes, each a virtual machine
 banger gives a person Linux machines of their own in one command: root,
 systemd, Docker, an SSH session, files that stay. Each is a microVM, under
 Firecracker where there is KVM, else under QEMU.
 .
 The daemon runs as the user and is started when it is needed."
build banger 9

# ---- banger-runtime

if [ -e runtime/bundle.json ]; then
    dist/mkruntime -to "$stage/banger-runtime/usr/lib/banger" -shared install >&2
    docs banger-runtime
    control banger-runtime "" "banger" \
        "kernel, images and guest program of banger
 What banger makes virtual machines from: a kernel, an initrd, the default
 image with its work seed, the program that runs in guests, and Firecracker if
 the bundle that this was built from has it.
 .
 It holds no SSH key: every user has one of their own."
    build banger-runtime 1
else
    echo "  no banger-runtime: there is no bundle in ./runtime (make runtime)" >&2
fi
