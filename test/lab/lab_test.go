//go:build e2e

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// place is what all tests share: the built host, the checkout, a directory that goes away, and one for
// results that stay.
var place struct {
	host, checkout, scratch, results string
}

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) (code int) {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	checkout, err := filepath.Abs("../..")
	if err != nil {
		return fail(err)
	}
	place.checkout = checkout
	if place.host, err = filepath.EvalSymlinks(filepath.Join(checkout, HostDir)); err != nil {
		return fail(fmt.Errorf("no lab (make lab): %w", err))
	}
	dist := filepath.Join(checkout, "dist/lab")
	if place.scratch, err = Scratch(dist); err != nil {
		return fail(err)
	}
	defer func() {
		if err := os.RemoveAll(place.scratch); err != nil {
			code = fail(err)
		}
	}()
	place.results = filepath.Join(dist, "results")
	if err := errors.Join(os.RemoveAll(place.results), os.MkdirAll(place.results, 0o755)); err != nil {
		return fail(err)
	}
	// A machine dies with this process; the directory does not.
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-interrupted
		_ = os.RemoveAll(place.scratch)
		os.Exit(130)
	}()
	code = m.Run()
	if err := mergeCoverage(); err != nil {
		return fail(err)
	}
	return code
}

// slow leaves a test to `make test-full`.
func slow(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: make test-full runs it")
	}
}

// packed is a payload with some content, which is made once.
func packed(t *testing.T, c Content) string {
	t.Helper()
	payloads.Lock()
	defer payloads.Unlock()
	if image, ok := payloads.of[c]; ok {
		return image
	}
	began := time.Now()
	image, err := MakePayload(context.Background(), place.checkout, place.scratch, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%5.1fs  packing programs, tests and bundle", time.Since(began).Seconds())
	payloads.of[c] = image
	return image
}

var payloads = struct {
	sync.Mutex
	of map[Content]string
}{of: map[Content]string{}}

// alongside has a test run beside another one where all are run: a host has one CPU, and most machines have two.
func alongside(t *testing.T) {
	if !testing.Short() {
		t.Parallel()
	}
}

// boot starts a host that ends with the test. Its console is kept under the test's name.
func boot(t *testing.T, o Options) *Machine {
	t.Helper()
	o.Host = place.host
	if o.Memory == 0 {
		o.Memory = 6144
	}
	if o.Payload == "" {
		// The programs, their tests, the bundle and Go.
		o.Payload = packed(t, Content{Cover: true, Suites: true, Go: true})
	}
	log, err := os.OpenFile(filepath.Join(place.results, strings.ReplaceAll(t.Name(), "/", "_")+".console.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	o.Console = log
	began := time.Now()
	m, err := Boot(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Kill()
		_ = log.Close()
	})
	t.Logf("%5.1fs  the lab boots", time.Since(began).Seconds())
	return m
}

// suite is a test program as it is run in the lab.
type suite struct {
	Suite
	user      string
	tests     []string // each in a process of its own; the rest of the package runs on the machine itself
	lingering []string // more of them, run when the user lingers (loginctl(1)): VMs are then bounded by the user's own systemd
	quick     []string // those of a landing, which has no others
	least     int      // tests that must pass, subtests included; in a landing and without
	most      int
}

// Of the e2e suite, what is run as an ordinary user; as root, what is otherwise there: the network, jails, control groups, a full disk; and
// as root, what makes an ordinary user of its own.
var (
	ofVMMs = []string{"TestAgentVerbs", "TestBrokenFirecracker", "TestCopyAgainstScp", "TestUnbootable", "TestBrokenBundle", "TestConfiguredArtifacts", "TestConfinement",
		"TestDiskSizes", "TestForeignInitrd", "TestGuestInTrouble", "TestImageBuildOfFiles", "TestLifeOfAVM", "TestManyAtOnce", "TestPull", "TestReadOnlyRootFilesystems",
		"TestTwoInstallations", "TestUpgrade", "TestVerbs"}
	ofRoot = []string{"TestHostFull", "TestBridgeNetwork", "TestUserNetwork", "TestUserNetworkInAJail", "TestConfinement", "TestLifeOfAVM", "TestManyAtOnce",
		"TestPull", "TestReadOnlyRootFilesystems", "TestRootHelper", "TestVerbs"}
	ofKVM = []string{"TestLinuxConformance"}
)

// leftOut is the rest of the e2e suite, each with the reason: TestLeftOut skips them by name.
var leftOut = map[string]string{
	"TestBenchCreate":                 "make builds everything before, which takes the lab more than nine minutes; make bench-floor measures Firecracker's creates",
	"TestBootsUnderLoad":              "it is about QEMU's emulation: make test-boots",
	"TestDebianPackages":              "what is packed does not depend on the VMM",
	"TestDefaultImage":                "it is about what is in the image; TestSandbox boots it",
	"TestHelpers":                     "it fetches packages of Debian's, and nothing is fetched in the lab",
	"TestHelpersRefuse":               "it boots nothing",
	"TestImageBuild":                  "it fetches packages of Debian's and of the npm registry, and nothing is fetched in the lab; TestImageBuildOfFiles runs",
	"TestImageBuildOfSteps":           "it is about what the build's own steps do; TestImageBuildOfFiles runs",
	"TestImageBuildWithoutItsSources": "it boots nothing",
	"TestImagesByHand":                "it fetches packages of Debian's, and nothing is fetched in the lab",
	"TestInstall":                     "what is installed does not depend on the VMM; TestUpgrade runs",
	"TestKernelOfAnotherRelease":      "its kernel is the lab's, which is not among what the lab is given",
	"TestMake":                        "what is built does not depend on the VMM",
	"TestOrdinaryUser":                "all of them run as an ordinary user as well",
	"TestReadme":                      "TestSandbox types the same, as two users",
	"TestRunitGuest":                  "it fetches packages of Debian's, and nothing is fetched in the lab",
	"TestVoidScript":                  "it boots nothing",
	"TestVoidScriptAsAnOrdinaryUser":  "it boots nothing",
}

// inTheLab are the runs of TestFirecracker and TestFirecrackerForRoot. The numbers are what ran when they were written down: fewer
// means that something is not run any more.
var inTheLab = []suite{
	{Suite: Suites[0], user: "user", tests: ofKVM, quick: ofKVM, least: 36, most: 36},
	{Suite: Suites[0], user: "root", tests: append([]string{"TestJailedLinuxConformance"}, ofKVM...), most: 72},
	{Suite: Suites[1], user: "user", tests: ofVMMs, lingering: []string{"TestConfinement"}, quick: []string{"TestPull"}, least: 1, most: 72},
	{Suite: Suites[1], user: "root", tests: ofRoot, most: 30},
}

// TestLeftOut tells each test of the e2e suite that does not run in the lab, and fails for one that nobody has decided about.
func TestLeftOut(t *testing.T) {
	files, err := filepath.Glob("../e2e/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	in := map[string]bool{}
	for _, s := range inTheLab {
		for _, name := range slices.Concat(s.tests, s.lingering) {
			in[name] = true
		}
		for _, name := range s.quick {
			if !slices.Contains(s.tests, name) {
				t.Errorf("a landing runs %s, and a full run does not", name)
			}
		}
	}
	found := map[string]bool{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range declared.FindAllStringSubmatch(string(text), -1) {
			name := m[1]
			found[name] = true
			reason, left := leftOut[name]
			if left == in[name] {
				t.Errorf("%s: it is run in the lab: %v, left out: %v", name, in[name], left)
			}
			if left {
				t.Run(name, func(t *testing.T) { t.Skip(reason) })
			}
		}
	}
	for name := range leftOut {
		if !found[name] {
			t.Errorf("%s is left out, and the e2e suite has no such test", name)
		}
	}
	for _, name := range slices.Concat(ofVMMs, ofRoot) {
		if !found[name] {
			t.Errorf("%s is to be run, and the e2e suite has no such test", name)
		}
	}
}

// TestFirecracker runs the project's own tests with real Firecracker in the lab, as an ordinary user in group kvm.
func TestFirecracker(t *testing.T) {
	alongside(t)
	firecracker(t, "user")
}

// TestFirecrackerForRoot does so as root, on another host: each takes half an hour.
func TestFirecrackerForRoot(t *testing.T) {
	slow(t)
	alongside(t)
	firecracker(t, "root")
}

func firecracker(t *testing.T, user string) {
	m := boot(t, Options{})
	for _, s := range inTheLab {
		if s.user != user {
			continue
		}
		t.Run(s.Package, func(t *testing.T) {
			if len(s.quick) == 0 {
				slow(t)
			}
			runSuite(t, m, s)
		})
	}
}

// attemptTime bounds one test there. A landing's takes a minute, the longest of the others eight on a quiet machine.
func attemptTime() time.Duration {
	if testing.Short() {
		return 8 * time.Minute
	}
	return 20 * time.Minute
}

// lockup is what a guest's kernel says on its console of a CPU of its own that stands still.
var lockup = regexp.MustCompile(`BUG: soft lockup|rcu: INFO: rcu_\w+ (self-)?detected|clocksource: timekeeping watchdog`)

// runSuite runs tests of a test program in the lab, mirrors them here, and brings back logs and coverage. One that fails with
// a guest whose CPU stood still is run once more: that is the emulation of a guest within an emulated host (docs/lab.md), and
// happens to guests in which nothing is of banger.
func runSuite(t *testing.T, m *Machine, s suite) {
	began := time.Now()
	out := "/tmp/lab-" + strings.TrimSuffix(s.Binary, ".test")
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	if _, err := m.Output(ctx, s.user, fmt.Sprintf("rm -rf %[1]s %[1]s.captured && mkdir -p %[1]s/cover %[1]s/logs %[1]s.captured", out)); err != nil {
		t.Fatal(err)
	}
	names, least := slices.Concat(s.tests, s.lingering), s.most
	if testing.Short() {
		names, least = s.quick, s.least
	}
	var tests mirror
	for i, name := range names {
		if i == len(s.tests) {
			defer linger(t, m, s.user)()
		}
		events, err := s.attempt(t, m, name, out)
		if err != nil {
			if stood := lockup.FindString(said(events)); stood != "" {
				t.Logf("%s failed, and the CPU of a guest stood still meanwhile (%q): once more", name, stood)
				events, err = s.attempt(t, m, name, out)
			}
		}
		tests.events = events
		tests.run(t, "")
		if err != nil && !t.Failed() {
			t.Errorf("%s ended with %v, and no test failed", s.Binary, err)
		}
	}
	t.Logf("%5.1fs  %d tests passed as %s", time.Since(began).Seconds(), len(tests.passed), s.user)
	s.judge(t, tests, least)
	fetch(t, m, s.user, out, filepath.Join(place.results, s.user+"-"+strings.TrimSuffix(s.Binary, ".test")))
	nothingLeft(t, m, s.user)
}

// judge fails if fewer tests passed than are known to, or others were skipped.
func (s suite) judge(t *testing.T, tests mirror, least int) {
	t.Helper()
	if len(tests.passed) < least {
		t.Errorf("only %d tests passed, %d did when this was written", len(tests.passed), least)
	}
	wantSkips(t, s, tests.skipped)
}

// linger lets a user's own systemd outlive the user's sessions, as far as the function that it returns is not called.
func linger(t *testing.T, m *Machine, user string) (end func()) {
	t.Helper()
	ask := func(verb string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), callTime)
		defer cancel()
		if out, err := m.Output(ctx, "root", "loginctl "+verb+" "+user); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	ask("enable-linger")
	return func() { ask("disable-linger") }
}

// attempt runs one test in the lab, shows what it prints while it does, and returns all that it said. The error is how its
// program ended.
func (s suite) attempt(t *testing.T, m *Machine, name, out string) ([]event, error) {
	t.Helper()
	args := "-test.v=test2json -test.paniconexit0 -test.timeout=" + (attemptTime() - time.Minute).String() + " -test.gocoverdir=" + out + "/cover -test.run='^" + name + "$'"
	if testing.Short() {
		args += " -test.short"
	}
	command := fmt.Sprintf("cd ~/banger/%[2]s && GOCOVERDIR=%[1]s/cover BANGER_TEST_LOGS=%[1]s/logs BANGER_E2E_CAPTURED=%[1]s.captured BANGER_RUNTIME_DIR=$HOME/banger/runtime BANGER_E2E_VMM=firecracker "+
		"exec /payload/bin/%[3]s %[4]s", out, s.Package, s.Binary, args)

	ctx, cancel := context.WithTimeoutCause(t.Context(), attemptTime(), fmt.Errorf("%s did not end within %v", name, attemptTime()))
	defer cancel()
	convert := exec.CommandContext(ctx, "go", "tool", "test2json", "-p", s.Package)
	convert.Dir, convert.Stderr = place.checkout, os.Stderr
	raw, err := convert.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	lines, err := convert.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := convert.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := m.Run(ctx, s.user, command, nil, raw, raw)
		ended <- errors.Join(err, raw.Close())
	}()
	var events []event
	for d := json.NewDecoder(lines); ; {
		var e event
		if err := d.Decode(&e); err != nil {
			if !errors.Is(err, io.EOF) {
				t.Errorf("test2json: %v", err)
			}
			break
		}
		if e.Action == "run" || e.Action == "output" && !frame.MatchString(e.Output) {
			fmt.Fprint(t.Output(), e.shown())
		}
		events = append(events, e)
	}
	_, _ = io.Copy(io.Discard, lines) // after a line that is no event
	err = <-ended
	if werr := convert.Wait(); werr != nil {
		t.Errorf("test2json: %v", werr)
	}
	return events, err
}

// wantSkips compares what was skipped, with its reasons, with what is known to be: a new skip fails.
func wantSkips(t *testing.T, s suite, skipped []string) {
	t.Helper()
	mode := "full"
	if testing.Short() {
		mode = "short"
	}
	golden := filepath.Join("testdata", strings.Join([]string{"skips", mode, s.user, strings.TrimSuffix(s.Binary, ".test")}, "-"))
	want, err := os.ReadFile(golden)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // none is like an empty one
		t.Fatal(err)
	}
	got := ""
	for _, line := range skipped {
		got += line + "\n"
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("other tests are skipped than those in test/lab/%s (-want +got):\n%s", golden, diff)
	}
}

// fetch brings a directory of the lab back.
func fetch(t *testing.T, m *Machine, user, from, to string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	unpack := exec.CommandContext(ctx, "tar", "-x", "-C", to)
	in, err := unpack.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := unpack.Start(); err != nil {
		t.Fatal(err)
	}
	err = m.Run(ctx, user, "tar -C "+from+" -c .", nil, in, os.Stderr)
	if err := errors.Join(err, in.Close(), unpack.Wait()); err != nil {
		t.Errorf("bringing back %s: %v", from, err)
	}
}

// leftovers prints what banger may leave behind on a machine. It is read from the standard input, so that
// its own process has none of these names.
const leftovers = `
ps -u "$USER" -o pid=,args= | grep -E '[f]irecracker|[q]emu-system|[b]angerd' | sed 's/^/process /'
find /tmp /var/tmp "${XDG_RUNTIME_DIR:-/nonexistent}" -user "$USER" \( -path '*banger*' -o -path '*firecracker*' \) ! -type d 2>/dev/null | grep -v '^/tmp/lab-' | sed 's/^/file /'
find "$HOME/.local/state/banger/run" "$HOME/.local/state/banger/vms" -mindepth 1 2>/dev/null | sed 's/^/file /'
/usr/sbin/losetup -a | sed 's/^/loop device /'
findmnt -rno TARGET | grep banger | grep -v '^/root/banger$\|^/home/user/banger$' | sed 's/^/mount /'
ip -br link | grep -v '^lo \|^eth0 ' | sed 's/^/link /'
true
`

// nothingLeft looks for what banger may leave behind on a machine when the last VM is deleted and the
// daemon stopped.
func nothingLeft(t *testing.T, m *Machine, user string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	var out lockedBuffer
	if err := m.Run(ctx, user, "sh -s", strings.NewReader(leftovers), &out, &out); err != nil {
		t.Errorf("looking for what is left: %v\n%s", err, out.String())
	} else if left := strings.TrimSpace(out.String()); left != "" {
		t.Errorf("left behind in the lab by %s:\n%s", user, left)
	}
}

// mergeCoverage makes one profile of what all programs ran of the source in the lab.
func mergeCoverage() error {
	dirs, err := filepath.Glob(filepath.Join(place.results, "*/cover"))
	if err != nil {
		return err
	}
	var with []string
	for _, dir := range dirs {
		if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
			with = append(with, dir)
		}
	}
	if len(with) == 0 {
		return nil
	}
	profile := filepath.Join(place.results, "coverage.out")
	for _, args := range [][]string{
		{"tool", "covdata", "textfmt", "-i=" + strings.Join(with, ","), "-o=" + profile},
		{"tool", "cover", "-func=" + profile},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = place.checkout
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		if lines := strings.Fields(string(out)); args[1] == "cover" && len(lines) > 0 {
			fmt.Printf("coverage in the lab: %s of all statements (%s)\n", lines[len(lines)-1], profile)
		}
	}
	return nil
}
