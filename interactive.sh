#!/usr/bin/env bash
# Changes a root filesystem by hand, in a shell of a VM that runs on it: ./interactive.sh [BASE.ext4 [FILE.ext4]]
#
# By default of the default image, into runtime/rootfs.ext4, which image builds begin with. See ./customize.sh --help.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packages.sh
. "$here/packages.sh"
case ${1-} in
    -h | --help)
        usage "$here/interactive.sh"
        exit 0
        ;;
    -*) die "unknown argument '$1'" "./interactive.sh --help" ;;
esac
[ $# -le 2 ] || die "too many arguments" "./interactive.sh --help"
runtime=${BANGER_RUNTIME_DIR:-$here/runtime}
exec "$here/customize.sh" --interactive "${1:-$runtime/rootfs-docker.ext4}" "${2:-$runtime/rootfs.ext4}"
