# shellcheck shell=bash
# Sourced by the other helpers: lists of packages (packages.apt, packages.void), and how the helpers speak.

say() { printf '  %s\n' "$*" >&2; }
die() { # <message> [hint]
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '       %s\n' "$2" >&2
    exit 1
}

# usage <script>: the comment on top of a script, as its help.
usage() { sed -n '2,/^[^#]/{/^#/!d; /^# shellcheck/d; s/^# \{0,1\}//; p}' "$1"; }

# packages <file>: the names in a list, one a line; # begins a comment, two names for the same are one.
packages() {
    local line
    local -A seen=()
    [ -r "$1" ] || die "$1 cannot be read" "it lists packages, one a line"
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        read -r line <<<"$line"
        if [ -z "$line" ] || [ -n "${seen[$line]-}" ]; then continue; fi
        [[ $line =~ ^[A-Za-z0-9][A-Za-z0-9+._:-]*$ ]] || die "$1: '$line' is no package name" "one package a line, # begins a comment"
        seen[$line]=1
        printf '%s\n' "$line"
    done <"$1"
}
