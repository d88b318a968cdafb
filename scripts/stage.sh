# shellcheck shell=bash
# Sourced by the other scripts: how a script shows what it is doing and for how long.
#
# On a terminal the running stage is redrawn in place; elsewhere it gets a line when it begins, one
# every ten seconds, and one when it ends. Everything goes to stderr.

if [ -t 2 ] && [ "${TERM:-dumb}" != dumb ]; then stage_tty=yes; else stage_tty=''; fi
stage_ticker=''
stage_group='' # process group of the running stage

# stage_watch <title> <log> <parent>: says until it is ended that the stage still runs. It ends by
# itself when the script is gone, however that came about.
stage_watch() {
    local began=$SECONDS said=0 took line
    while kill -0 "$3" 2>/dev/null; do
        took=$((SECONDS - began))
        if [ -n "$stage_tty" ]; then
            line=$(tail -n 1 "$2" 2>/dev/null | tr -cd '[:print:]') || line=''
            printf '\r\033[K  … %s  %ds  %s' "$1" "$took" "${line:0:60}" >&2
        elif [ $((took - said)) -ge 10 ]; then
            printf '  %s, %ds so far\n' "$1" "$took" >&2
            said=$took
        fi
        sleep 1
    done
}

# stage_run <log> <command...>: runs the command with its output in the log, or where the script's goes if that is ''. It has a
# process group of its own and is waited for in the background: bash runs no trap while a program is in the
# foreground, and a script that is told to end must end, with all that it started. A function runs in a subshell.
stage_run() {
    local log=$1 status=0
    shift
    set -m
    {
        [ -z "$log" ] || exec >"$log" 2>&1
        "$@" || exit $?
    } </dev/null &
    stage_group=$!
    set +m
    wait "$stage_group" || status=$?
    stage_group=''
    return "$status"
}

# stage_end ends what runs of a stage, by force if it does not by itself within two seconds.
stage_end() {
    local tries
    if [ -n "$stage_group" ]; then
        kill -TERM -- "-$stage_group" 2>/dev/null || true
        for tries in {1..20}; do
            kill -0 -- "-$stage_group" 2>/dev/null || break
            [ "$tries" -lt 20 ] || kill -KILL -- "-$stage_group" 2>/dev/null || true
            sleep 0.1
        done
        stage_group=''
    fi
    [ -n "$stage_ticker" ] || return 0
    kill "$stage_ticker" 2>/dev/null || true
    wait "$stage_ticker" 2>/dev/null || true
    stage_ticker=''
    [ -z "$stage_tty" ] || printf '\r\033[K' >&2
}

# stage <title> <log> <command...>: runs the command with its output in the log, which is shown if it fails. Its exit
# status is the stage's. The script has `trap stage_end EXIT`, and ends on INT and TERM.
stage() {
    local title=$1 log=$2 began=$SECONDS status=0
    shift 2
    [ -n "$stage_tty" ] || printf '  %s\n' "$title" >&2
    : >"$log"
    stage_watch "$title" "$log" $$ &
    stage_ticker=$!
    stage_run "$log" "$@" || status=$?
    stage_end
    if [ "$status" -ne 0 ]; then
        cat "$log" >&2
        printf '  %s: failed after %ds\n' "$title" $((SECONDS - began)) >&2
        return "$status"
    fi
    if [ -n "$stage_tty" ] || [ $((SECONDS - began)) -ge 2 ]; then
        printf '  %s: done in %ds\n' "$title" $((SECONDS - began)) >&2
    fi
}
