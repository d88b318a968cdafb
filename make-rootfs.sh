#!/usr/bin/env bash
# Builds the default image, ./runtime/rootfs-docker.ext4, and its work seed: ./make-rootfs.sh [--base-rootfs FILE.ext4]
#
# Without --base-rootfs it is made of Debian's packages, as `make rootfs` does. With it, the packages of packages.apt
# are installed into a copy of that filesystem, which must be a Debian, in a VM.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packages.sh
. "$here/packages.sh"
base=''
while [ $# -gt 0 ]; do
    case $1 in
        --base-rootfs)
            [ -n "${2-}" ] || die "$1 needs a value" "./make-rootfs.sh --help"
            base=$2
            shift 2
            ;;
        -h | --help)
            usage "$here/make-rootfs.sh"
            exit 0
            ;;
        *) die "unknown argument '$1'" "./make-rootfs.sh --help" ;;
    esac
done
if [ -z "$base" ]; then
    exec make --no-print-directory -C "$here" rootfs
fi
runtime=${BANGER_RUNTIME_DIR:-$here/runtime}
[ -e "$runtime/bundle.json" ] || die "$runtime holds no runtime bundle" "make runtime"
new=$(mktemp -d "${TMPDIR:-/var/tmp}/banger-rootfs-XXXXXX")
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
"$here/customize.sh" --packages "$here/packages.apt" "$base" "$new/rootfs.ext4"
"$here/dist/mkruntime" -runtime "$runtime" -packages "$here/packages.apt" -to "$new/rootfs.ext4" adopt
say "new VMs are made of it; those that exist keep what they have"
