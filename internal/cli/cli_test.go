package cli

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Every code of package fault has an exit code: read from its source, so that a new one is noticed.
func TestEveryFaultCodeHasAnExitCode(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "../fault/fault.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if ok && len(v.Values) == 1 {
			if id, ok := v.Type.(*ast.Ident); ok && id.Name == "Code" {
				code, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				found++
				if got, ok := exitCodes[fault.Code(code)]; !ok || got == 0 {
					t.Errorf("%s has no exit code", code)
				}
			}
		}
		return true
	})
	if found != len(exitCodes) || found < 10 {
		t.Errorf("%d codes found, %d mapped", found, len(exitCodes))
	}
}

func TestExitCode(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{passed(42), 42},
		{reported{4}, 4},
		{fmt.Errorf("outer: %w", fault.New(fault.NotFound, "x", "y")), 3},
		{errInterrupted, 130},
		{fault.New(fault.Cancelled, "x", "by an operator"), 1},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("%v: %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestPrintError(t *testing.T) {
	err := fmt.Errorf("outer: %w", fault.Wrap(errors.New("EIO"), fault.Corrupt, "otter", "its disk cannot be read").WithHint("banger doctor"))
	for _, tt := range []struct {
		json, color bool
		want        string
	}{
		{false, false, "banger: otter: its disk cannot be read\n  cause: EIO\n  hint: banger doctor\n"},
		{false, true, "\x1b[31mbanger:\x1b[0m otter: its disk cannot be read\n  cause: EIO\n  hint: banger doctor\n"},
		{true, true, `{"error":{"code":"corrupt","subject":"otter","message":"its disk cannot be read","hint":"banger doctor","cause":"EIO"}}` + "\n"},
	} {
		var b bytes.Buffer
		a := &app{stderr: &b, json: tt.json, errColor: tt.color}
		a.printError(err)
		if diff := cmp.Diff(tt.want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestTable(t *testing.T) {
	rows := [][]cell{{{text: "otter"}, {text: "running", color: green}, {text: "2"}}, {{text: "é"}, {text: "stopped", color: dim}, {text: "16"}}}
	for color, want := range map[bool]string{
		false: "NAME   STATE    N\notter  running  2\né      stopped  16\n",
		true:  "\x1b[2mNAME\x1b[0m   \x1b[2mSTATE\x1b[0m    \x1b[2mN\x1b[0m\notter  \x1b[32mrunning\x1b[0m  2\né      \x1b[2mstopped\x1b[0m  16\n",
	} {
		var b bytes.Buffer
		if err := table(&b, color, []string{"NAME", "STATE", "N"}, rows); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestFormats(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for got, want := range map[string]string{
		formatBytes(0):                           "0 B",
		formatBytes(512 << 20):                   "512 MiB",
		formatBytes(3 << 29):                     "1.5 GiB",
		formatBytes(1<<63 - 1):                   "8 EiB",
		formatAge(now, nil):                      "-",
		formatAge(now, ago(0)):                   "0s ago",
		formatAge(now, ago(59)):                  "59s ago",
		formatAge(now, ago(60)):                  "1m ago",
		formatAge(now, ago(47*3600)):             "47h ago",
		formatAge(now, ago(48*3600)):             "2d ago",
		formatAge(now, ago(-5)) + " of a skewed": "0s ago of a skewed",
		formatTook(1300 * time.Microsecond):      "1.3 ms",
		formatTook(250 * time.Millisecond):       "250 ms",
		formatTook(3 * time.Second):              "3.0 s",
		formatTook(125 * time.Second):            "2m05s",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func ago(seconds int64) *timestamppb.Timestamp {
	return timestamppb.New(time.Unix(1_000_000-seconds, 0))
}

func TestFlagValues(t *testing.T) {
	for _, tt := range []struct {
		flag    pflag.Value
		in      string
		refused bool
	}{
		{&count{what: "x"}, "4", false},
		{&count{what: "x"}, "0", true},
		{&count{what: "x"}, "-3", true},
		{&count{what: "x"}, "99999999999", true},
		{&count{what: "x"}, "two", true},
		{&signalFlag{}, "TERM", false},
		{&signalFlag{}, "sigkill", false},
		{&signalFlag{}, "15", false},
		{&signalFlag{}, "0", true},
		{&signalFlag{}, "-9", true},
		{&signalFlag{}, "999", true},
		{labels{}, "a=b", false},
		{labels{}, "a=", false},
		{labels{}, "=b", true},
		{labels{"a": "c"}, "a=b", true},
		{newChoice("table", "table", "json"), "json", false},
		{newChoice("table", "table", "json"), "JSON", true},
	} {
		if err := tt.flag.Set(tt.in); (err != nil) != tt.refused {
			t.Errorf("%T %q: %v", tt.flag, tt.in, err)
		}
	}
}

// Every command that does something has an example, a short line, and takes --output.
func TestEveryCommandIsDocumented(t *testing.T) {
	a := &app{}
	var walk func(*cobra.Command)
	seen := 0
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		seen++
		if c.Example == "" || c.Short == "" {
			t.Errorf("%s has no example or no short line", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(a.root())
	if seen < 20 {
		t.Errorf("only %d commands", seen)
	}
}

// syncBuffer may be read while progress writes.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func stage(name string, start, end time.Time) *bangerv1.OperationStage {
	s := &bangerv1.OperationStage{Name: name, StartedAt: timestamppb.New(start)}
	if !end.IsZero() {
		s.FinishedAt = timestamppb.New(end)
	}
	return s
}

// Without a terminal each finished stage that took a while is a line, and one of over two seconds is
// not silent.
func TestProgressLines(t *testing.T) {
	clock := time.Unix(1000, 0)
	out := &syncBuffer{}
	p := &progress{a: &app{stderr: out, now: func() time.Time { return clock }}, title: "otter", start: clock, since: clock, said: clock}
	first := stage("image", clock, clock.Add(120*time.Millisecond))
	clock = clock.Add(120 * time.Millisecond)
	booting := clock
	p.update(&bangerv1.Operation{VmName: "otter", Stages: []*bangerv1.OperationStage{first, stage("agent", booting, time.Time{})}})
	for range 140 { // 14 s
		clock = clock.Add(100 * time.Millisecond)
		p.beat()
	}
	booted := clock
	clock = clock.Add(99 * time.Millisecond)
	p.update(&bangerv1.Operation{VmName: "otter", Stages: []*bangerv1.OperationStage{
		first, stage("agent", booting, booted), stage("quick", booted, clock), stage("unheard of", clock, clock.Add(time.Second))}})
	want := "otter: preparing the image 120 ms\notter: booting ... 2.0 s\notter: booting ... 12.0 s\n" +
		"otter: booting 14.0 s\notter: unheard of 1.0 s\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}

// On a terminal the running stage is redrawn in its line, which is empty again at the end.
func TestProgressOnATerminal(t *testing.T) {
	clock := time.Unix(1000, 0)
	out := &syncBuffer{}
	a := &app{stderr: out, errTTY: true, now: func() time.Time { return clock }}
	p := &progress{a: a, title: "otter", start: clock, since: clock, said: clock, stop: make(chan struct{}), done: make(chan struct{})}
	close(p.done)
	p.update(&bangerv1.Operation{VmName: "otter", Stages: []*bangerv1.OperationStage{stage("agent", clock, time.Time{})}})
	clock = clock.Add(time.Second)
	p.beat()
	p.line("otter: lost the connection")
	p.beat()
	p.update(&bangerv1.Operation{VmName: "otter", Stages: []*bangerv1.OperationStage{stage("agent", clock.Add(-time.Second), clock)}})
	p.end()
	const empty = "\r\x1b[K"
	want := empty + "⠋ otter: booting 1.0 s" + empty + "otter: lost the connection\n" + empty + "⠙ otter: booting 1.0 s" + empty + "✓ otter: booting 1.0 s\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}

func TestNearestFlag(t *testing.T) {
	cmd := (&app{}).createCommand()
	for in, want := range map[string]string{"nam": "name", "disk": "disk-size", "memroy": "memory", "xyzzy": ""} {
		if got := nearestFlag(cmd, in); got != want {
			t.Errorf("--%s: %q, want %q", in, got, want)
		}
	}
}

func TestWantsJSON(t *testing.T) {
	for in, want := range map[string]bool{
		"vm list": false, "-o json vm list": true, "vm list --output=json": true, "vm list -ojson": true,
		"vm list --output table": false, "vm ssh x -- -o json": false, "vm list -o": false,
	} {
		if got := wantsJSON(strings.Fields(in)); got != want {
			t.Errorf("%q: %v", in, got)
		}
	}
}

// TestCopyProgress: a long copy says how far it has come, without a terminal in lines of their own, and a short one nothing.
func TestCopyProgress(t *testing.T) {
	for _, after := range []time.Duration{time.Second, 4 * time.Second} {
		var err bytes.Buffer
		now := time.Unix(1_000_000_000, 0)
		a := &app{stderr: &err, now: func() time.Time { return now }}
		so := &client.CopyProgress{}
		p := a.copyProgress("otter", so)
		so.Files.Store(12)
		so.Bytes.Store(8 << 20)
		p.mu.Lock()
		now = now.Add(after)
		p.beat()
		p.mu.Unlock()
		p.end()
		want := ""
		if after > firstLine {
			want = "otter: copying: 12 files, 8 MiB, 2 MiB/s ... 4.0 s\n"
		}
		if err.String() != want {
			t.Errorf("after %v: %q, want %q", after, err.String(), want)
		}
	}
}
