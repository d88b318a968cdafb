#!/usr/bin/env bash
# `make test`, `make test-full`, `make test-boots`: every check and test of this checkout.
#
#   scripts/test.sh          all checks, unit tests, the crash test's mutations, the quick tests with real VMs
#   scripts/test.sh full     the slow ones as well
#   scripts/test.sh boots N  N boots of a real VM in a row while all CPUs are busy
#
# A stage that fails does not keep the others from running, unless they need it. Nothing is skipped
# silently: what did not run is named with its reason. Everything runs in a directory of its own with a
# mark in the environment, so that what is left behind is found, reported as a failure, and removed.
# shellcheck disable=SC2317 # most functions are run by way of check
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/stage.sh
. scripts/stage.sh

mode=${1:-quick} boots=${2:-20}
case $mode in
    quick | full) ;;
    boots) [[ $boots =~ ^[1-9][0-9]*$ ]] || mode='' ;;
    *) mode='' ;;
esac
if [ -z "$mode" ]; then
    echo "usage: scripts/test.sh [full | boots N]" >&2
    exit 2
fi

# ---- a place of its own

# A caller's settings must not decide what is tested.
for name in $(compgen -e | grep '^BANGER_' || true); do unset "$name"; done
unset XDG_CONFIG_HOME XDG_DATA_HOME
cache=${XDG_CACHE_HOME:-$HOME/.cache}
run=$(mktemp -d /tmp/bt-XXXXXX) # short: sockets' paths hold 108 bytes
chmod 755 "$run"                # tests of an ordinary user pass through it
mkdir -p "$run/tmp" "$run/state" "$run/log"
mkdir -m 700 "$run/run"
chmod 1777 "$run/tmp"
export BANGER_TEST_RUN=$run TMPDIR=$run/tmp XDG_STATE_HOME=$run/state XDG_RUNTIME_DIR=$run/run
export GOFLAGS="${GOFLAGS-}" GOTOOLCHAIN="${GOTOOLCHAIN-auto}"
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# processes lists what was started by this run and still runs. The script itself and its subshells
# have begun before the mark was set. A VMM has none of its daemon's environment; its files are the run's.
processes() {
    local dir
    for dir in /proc/[0-9]*; do
        if grep -qsz "^BANGER_TEST_RUN=$run\$" "$dir/environ" || grep -qsF "$run/" "$dir/cmdline"; then
            printf '%s %s\n' "${dir#/proc/}" "$(tr '\0' ' ' 2>/dev/null <"$dir/cmdline" | cut -c 1-200)"
        fi
    done
}
# around lists what a run of ours could leave outside of its directory.
around() {
    find /tmp /var/tmp -maxdepth 1 -user "$(id -u)" \( -name 'banger*' -o -name 'mmdebstrap*' \) 2>/dev/null | sed 's/^/file /'
    grep -F "$run" /proc/self/mountinfo | cut -d ' ' -f 5 | sed 's/^/mount /' || true
    grep -sF "$run" /sys/block/loop*/loop/backing_file | sed 's/^/loop device /' || true
    grep '^banger' /etc/passwd | cut -d : -f 1 | sed 's/^/user /' || true
    git status --porcelain 2>/dev/null | sed 's/^/change of the checkout: /' || true
}

clean() {
    local pid rest
    trap '' INT TERM HUP # make passes a signal on that we had already
    stage_end
    # Whatever still runs by now is ours by its mark; the ends are waited for, for the directory's sake.
    while read -r pid rest; do kill -KILL "$pid" 2>/dev/null || true; done < <(processes)
    for rest in 1 2 3 4 5; do [ -n "$(processes)" ] || break; sleep "0.$rest"; done
    chmod -R u+w "$run" 2>/dev/null || true
    rm -rf "$run"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ---- stages

failed=''       # names of stages that failed
report=()       # a line a stage
not_run=()      # what was skipped, with the reason
began_all=$SECONDS
# Stages run in processes of their own: what they count, and say of what was not run, is in files.
: >"$run/log/counts"
: >"$run/log/not_run"
: >"$run/log/failures"
counted() { echo "$*" >>"$run/log/counts"; } # <tests> <skipped> <failures>

# check <name> <command...>: a stage. Its output is shown as it comes if the command is a `live`
# one; else only if it fails, with a sign of life meanwhile.
check() {
    local name=$1 began=$SECONDS status=0
    shift
    if [ "$1" = live ]; then
        shift
        printf '\n== %s\n' "$name"
        stage_run '' "$@" || status=$?
    else
        stage "$name" "$run/log/stage" "$@" || status=$?
    fi
    took=$((SECONDS - began))
    if [ "$status" -eq 0 ]; then
        report+=("$(printf '%5ds  pass  %s' "$took" "$name")")
    else
        report+=("$(printf '%5ds  FAIL  %s' "$took" "$name")")
        failed="$failed${failed:+, }$name"
    fi
    return "$status"
}
# needed is a check without which nothing else makes sense.
needed() { check "$@" || finish; }

finish() {
    local left tests skipped failures
    read -r tests skipped failures < <(awk '{ t += $1; s += $2; f += $3 } END { print t + 0, s + 0, f + 0 }' "$run/log/counts")
    printf '\n== summary (%s)\n' "$mode"
    printf '%s\n' "${report[@]}"
    printf '%5ds        all\n' $((SECONDS - began_all))
    if [ -s "$run/log/skips" ]; then
        echo "skipped tests, with their reasons:"
        sed 's/^/  /' "$run/log/skips"
    fi
    for left in ${not_run[@]+"${not_run[@]}"}; do printf 'not run: %s\n' "$left"; done
    sed 's/^/not run: /' "$run/log/not_run"
    if [ -n "$failed" ]; then
        cat "$run/log/failures"
        printf 'FAILED: %s\n' "$failed"
    fi
    printf '%d tests passed, %d failed, %d skipped; %d stages passed, %d failed\n' \
        $((tests - skipped - failures)) "$failures" "$skipped" \
        "$(printf '%s\n' "${report[@]}" | grep -c '  pass  ' || true)" "$(printf '%s\n' "${report[@]}" | grep -c '  FAIL  ' || true)"
    [ -z "$failed" ] || exit 1
    exit 0
}

# ---- tools, pinned; built once each and kept by version

tools=$cache/banger/tools
tool() { # <module path of the program> <version>
    local dir
    dir=$tools/${1##*/}-$2
    [ ! -x "$dir/${1##*/}" ] || return 0
    rm -rf "$dir" "$dir.new"
    # Outside of the checkout: its go.mod has no say in a tool's dependencies.
    (cd / && GOBIN=$dir.new go install "$1@$2") && mv "$dir.new" "$dir"
}
install_runner() { tool gotest.tools/gotestsum v1.13.0; }
install_tools() {
    install_runner &&
        tool github.com/golangci/golangci-lint/v2/cmd/golangci-lint v2.15.0 &&
        tool github.com/bufbuild/buf/cmd/buf v1.75.0 &&
        tool google.golang.org/protobuf/cmd/protoc-gen-go v1.36.12 &&
        tool connectrpc.com/connect/cmd/protoc-gen-connect-go v1.21.1
}
PATH=$tools/gotestsum-v1.13.0:$tools/golangci-lint-v2.15.0:$tools/buf-v1.75.0:$tools/protoc-gen-go-v1.36.12:$tools/protoc-gen-connect-go-v1.21.1:$PATH

# failures tells the last lines of each test that failed, and of a package that failed with none: what is far up in a long log is
# told again at its end.
failures() {
    jq -rs '[.[] | select(.Package != null)] | (map(select(.Action == "fail" and .Test != null)) | map({(.Package): true}) | add // {}) as $told |
        group_by([.Package, .Test])[] | select(any(.[]; .Action == "fail")) | select(.[0].Test != null or ($told[.[0].Package] | not)) |
        "failed: " + (.[0].Package | sub("^git.thaloco.com/thaloco/banger/"; "")) + " " + (.[0].Test // "") + "\n" +
        ([.[] | select(.Action == "output") | .Output | select(test("^\\s*===") | not)] | .[-12:] | map("    " + .) | add // "")' "$run/log/json" | cut -c 1-300 | sed -n 1,200p
}

# gotests <format> <go test arguments...>: runs go tests, counts them, and keeps the reasons of skips.
gotests() {
    local format=$1 status=0 out=$run/log/gotests counts
    shift
    gotestsum --format "$format" --hide-summary=skipped --jsonfile "$run/log/json" -- "$@" 2>&1 | tee "$out" || status=$?
    counts=$(grep '^DONE ' "$out" | tail -n 1)
    number() { echo "$counts" | sed -n "s/.*[^0-9]\([0-9][0-9]*\) $1.*/\1/p"; }
    counted "$(number tests | grep . || echo 0)" "$(number skipped | grep . || echo 0)" "$(number failure | grep . || echo 0)"
    # A skip's reason is the test's last line before its verdict.
    jq -rs '[.[] | select(.Test != null)] | group_by([.Package, .Test])[] | select(any(.[]; .Action == "skip")) |
        (.[0].Package | sub("^git.thaloco.com/thaloco/banger/"; "")) + " " + .[0].Test + ": " +
        ([.[] | select(.Action == "output") | .Output | select(test("^\\s*(===|---)") | not)] | join(" ") | gsub("\\s+"; " ") | sub("^ ?[^ ]+\\.go:[0-9]+: "; ""))' \
        "$run/log/json" >>"$run/log/skips"
    [ "$status" -eq 0 ] || failures >>"$run/log/failures"
    return "$status"
}

# ---- checks

go_files() { git ls-files -co --exclude-standard '*.go' 2>/dev/null || find . -name '*.go'; }
formatted() {
    local bad
    bad=$(go_files | xargs gofmt -l)
    [ -z "$bad" ] || { printf 'not as gofmt writes it:\n%s\n' "$bad"; return 1; }
}
vetted() { go vet ./... && go vet -tags e2e ./... && go vet -tags mutants ./...; }
generated() {
    local fresh=$TMPDIR/generated status=0
    mkdir -p "$fresh"
    buf lint || status=1
    buf generate --output "$fresh" || status=1
    for file in $(cd "$fresh" && find . -type f); do
        diff -u "$file" "$fresh/$file" || status=1
    done
    rm -rf "$fresh"
    return "$status"
}
shell_checked() { shellcheck -x ./*.sh scripts/*.sh test/lab/*.sh .ci/run; }

# The crash test, and no other, must fail when the engine is wrong: each mutation is one way to be wrong.
mutations() {
    local binary=$TMPDIR/crash.test m all bad status=0
    all=$(sed -n 's,^//\t\([a-z]*-[a-z]*\) .*,\1,p' internal/lifecycle/mutants.go)
    [ -n "$all" ] || { echo "internal/lifecycle/mutants.go names no mutations"; return 1; }
    go test -c -tags mutants -o "$binary" ./internal/sandbox || return
    for m in $all; do
        local began=$SECONDS log=$run/log/mutant
        bad=1
        if (cd internal/sandbox && BANGER_MUTATION=$m "$binary" -test.run "^$crash\$" -test.short) >"$log" 2>&1; then
            echo "the crash test does not notice the mutation $m"
        elif ! grep -q "^--- FAIL: $crash " "$log"; then
            echo "with the mutation $m the crash test ended without a verdict:"
            tail -n 20 "$log"
        else
            bad=0
            printf 'caught %s after %ds: %s\n' "$m" $((SECONDS - began)) "$(grep -m 1 'crash_test.go' "$log" | cut -c 1-150)"
        fi
        counted 1 0 "$bad"
        status=$((status | bad))
    done
    rm -f "$binary"
    return "$status"
}

vulnerabilities() {
    tool golang.org/x/vuln/cmd/govulncheck v1.8.0 && "$tools/govulncheck-v1.8.0/govulncheck" ./...
}
vulnerability_database() {
    timeout 10 bash -c 'exec 3<>/dev/tcp/vuln.go.dev/443' 2>/dev/null
}

left_behind() {
    local left status=0 i
    for i in 1 2 3 4 5 6; do # the go command leaves a short-lived child
        left=$(processes)
        [ -n "$left" ] || break
        sleep "0.$i"
    done
    [ -z "$left" ] || { printf 'still running:\n%s\n' "$left"; status=1; }
    # A daemon leaves its socket's directory, empty, as it would in a login session.
    left=$(
        find "$run/tmp" "$run/state" -mindepth 1 | head -n 20
        find "$run/run" ! -type d
    )
    [ -z "$left" ] || { printf 'left in the directory for temporary files:\n%s\n' "$left"; status=1; }
    around >"$run/log/after"
    left=$(sort "$run/log/after" | comm -13 "$run/log/before" -)
    [ -z "$left" ] || { printf 'left on the machine:\n%s\n' "$left"; status=1; }
    return "$status"
}

# ---- the run

scripts/deps.sh test
around | sort >"$run/log/before"
: >"$run/log/skips"

export BANGER_RUNTIME_DIR=$PWD/runtime
if [ "$mode" = boots ]; then
    needed "tools" install_runner
    needed "build" make --no-print-directory build
    needed "runtime bundle" live make --no-print-directory runtime
    export BANGER_E2E_BOOTS=$boots
    check "boots" live gotests standard-verbose -tags e2e -count 1 -timeout 3h -run '^TestBootsUnderLoad$' ./test/e2e || true
    check "nothing is left behind" live left_behind || true
    finish
fi

crash=TestCrashAtEveryBoundary
short=-short
if [ "$mode" = full ]; then short=; fi

needed "tools" install_tools
needed "runtime bundle" live make --no-print-directory runtime
needed "build" make --no-print-directory build
check "gofmt" formatted || true
check "go vet" vetted || true
check "golangci-lint" golangci-lint run ./... || true
check "generated code" generated || true
check "shellcheck" shell_checked || true
if vulnerability_database; then
    check "govulncheck" vulnerabilities || true
else
    not_run+=("govulncheck: its database cannot be reached from here")
fi
# Before the unit tests: the tests of what runs beside banger take their Docker and firewalld from its host's disk.
check "the lab" live make --no-print-directory lab || true
# shellcheck disable=SC2086 # $short is empty or one word
check "unit tests" live gotests pkgname -race -skip "^$crash\$" $short ./... || true
# Without the race detector: it is about processes, thousands of them, that end in the middle.
# shellcheck disable=SC2086
check "crash test" live gotests pkgname -run "^$crash\$" $short ./internal/sandbox || true
check "mutations of the crash test" live mutations || true

e2e() { # tests with real VMs, one package after the other
    local short=$1
    shift
    # shellcheck disable=SC2086
    gotests standard-verbose -tags e2e -count 1 -p 1 -timeout 90m $short "$@"
}
e2e_tests() { sed -n 's/^func \(Test[A-Za-z0-9_]*\)(.*/\1/p' "$1"/*_e2e_test.go | sort | paste -sd '|'; }
check "e2e: the command line" live e2e "$short" ./test/e2e || true
check "e2e: the documentation" live e2e "$short" -run '^TestReal$' ./test/docs || true
for package in internal/guest internal/vmm/qemu tools/mkruntime; do
    names=$(e2e_tests "$package")
    if [ "$mode" = quick ]; then
        case $package in
            internal/guest) names=TestUnbootable ;;
            internal/vmm/qemu) names=TestHostFull ;;
            tools/mkruntime) names='' ;;
        esac
        not_run+=("$package: $(comm -23 <(e2e_tests "$package" | tr '|' '\n') <(tr '|' '\n' <<<"$names") | paste -sd ' ') (make test-full)")
    fi
    [ -z "$names" ] || check "e2e: $package" live e2e "$short" -run "^($names)\$" "./$package" || true
done
# Firecracker, on the emulated host; it goes away with the test's process. No lab is a failure. A host that is
# emulated was seen to hang or panic by itself (docs/lab.md): the tests notice and say so, and only then do those that it
# happened to have another try in a fresh lab, which the summary tells.
lab() {
    local try tests=. again
    cp "$run/log/failures" "$run/log/failures.before"
    for try in 1 2 3; do
        # shellcheck disable=SC2086
        if gotests standard-verbose -tags e2e -count 1 -timeout 150m $short -run "$tests" ./test/lab; then
            [ "$try" -eq 1 ] || echo "the lab's host failed $((try - 1)) times before the tests passed: its output is above" >>"$run/log/not_run"
            return 0
        fi
        again=$(jq -rs -f scripts/hung.jq "$run/log/json") || return 1
        [ "$try" -lt 3 ] || return 1
        tests="^($(paste -sd '|' <<<"$again"))\$"
        printf '\n== the lab failed under %s: once more, in a fresh one\n' "$(paste -sd ' ' <<<"$again")"
        # What is tried again counts once.
        # shellcheck disable=SC2046
        counted $(jq -rs --arg tests "$tests" '[.[] | select(.Test != null) | select(.Test | split("/")[0] | test($tests))] | group_by(.Test) |
            def those(action): map(select(any(.[]; .Action == action))) | length;
            "-\(length) -\(those("skip")) -\(those("fail"))"' "$run/log/json")
        cp "$run/log/failures.before" "$run/log/failures"
        sed -i -E "\\,^test/lab ($(paste -sd '|' <<<"$again"))[/:],d" "$run/log/skips"
    done
}
check "e2e: Firecracker in the lab" live lab || true
check "nothing is left behind" live left_behind || true
finish
