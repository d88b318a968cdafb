package helper

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/hostnet"
	"git.thaloco.com/thaloco/banger/internal/jail"
	"git.thaloco.com/thaloco/banger/internal/network"
	"git.thaloco.com/thaloco/banger/internal/process"
)

// fakeJails keeps what it was asked, and complains of what no user may have asked.
type fakeJails struct {
	t    testing.TB
	fail error
	exit chan syscall.WaitStatus

	mu    sync.Mutex
	calls []string
	last  jail.Request
	said  []string // what the files of the last start hold
}

func (f *fakeJails) act(verb string, n jail.Name) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, verb)
	if err := n.Validate(); err != nil {
		f.t.Errorf("%s: %v", verb, err)
	}
	if n.Installation == foreign {
		f.t.Errorf("%s of another user's", verb)
	}
}

func (f *fakeJails) Check(_ context.Context, dir *os.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "check "+filepath.Base(dir.Name()))
	if st, err := dir.Stat(); err != nil || !st.IsDir() {
		return fault.New(fault.Permission, "it", "it is no directory")
	}
	return f.fail
}

func (f *fakeJails) Start(_ context.Context, r jail.Request, files jail.Files) (process.Started, error) {
	f.act("start", r.Name)
	if err := r.Validate(); err != nil {
		f.t.Error(err)
	}
	for _, tap := range r.TAPs {
		if r.Installation != installation || !strings.HasPrefix(tap, (network.Plan{Installation: installation}).TAPPrefix()) {
			f.t.Errorf("%s gets %s", r.Installation, tap)
		}
	}
	if len(files.Drives) != len(r.Drives) {
		f.t.Errorf("%d drives with %d files", len(r.Drives), len(files.Drives))
	}
	if f.fail != nil {
		return process.Started{}, f.fail
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last, f.said = r, nil
	for _, file := range files.All() {
		b, err := io.ReadAll(file)
		if err != nil {
			b = []byte("?")
		}
		f.said = append(f.said, string(b))
	}
	p, err := os.Open(os.DevNull) // in place of a pidfd
	return process.Started{PID: 4711, PIDFD: p, Exit: f.exit}, err
}

func (f *fakeJails) Find(_ context.Context, n jail.Name) (int, *os.File, error) {
	if n.Validate() != nil {
		return 0, nil, n.Validate()
	}
	f.act("find", n)
	if f.fail != nil {
		return 0, nil, f.fail
	}
	p, err := os.Open(os.DevNull)
	return 4712, p, err
}

func (f *fakeJails) Signal(_ context.Context, n jail.Name, sig int) error {
	if n.Validate() != nil || !slices.Contains(jail.Signals, sig) {
		return fault.New(fault.Invalid, "jail", "no")
	}
	f.act("signal", n)
	return f.fail
}

func (f *fakeJails) List(_ context.Context, installation, place string) ([]string, error) {
	f.act("list", jail.Name{Installation: installation, VM: "any", Place: place})
	return []string{"abc", "def"}, f.fail
}

// jailService is a helper that makes jails, of this test's user. That user has a network on record, and so has another.
func jailService(t testing.TB) (*fakeJails, Options) {
	t.Helper()
	f := &fakeJails{t: t, exit: make(chan syscall.WaitStatus, 1)}
	o := Options{UID: os.Getuid(), Records: t.TempDir(), Jails: f, Bound: func(_ context.Context, r jail.Request, pid int) {
		if pid != 4711 || r.Validate() != nil {
			t.Errorf("process %d of %+v is bounded", pid, r)
		}
	}, Log: slog.New(slog.DiscardHandler), Open: func(hostnet.Settings) (Host, error) {
		t.Error("what makes jails looks at networks")
		return nil, errors.New("no")
	}}
	for _, r := range []record.Record{
		{UID: o.UID + 1, Installation: foreign, Bridge: "banger7", Addresses: addresses(sample(foreign))},
		{UID: o.UID, Installation: installation, Bridge: "banger0", Addresses: addresses(sample(installation))},
	} {
		if err := record.Dir(o.Records).Put(r); err != nil {
			t.Fatal(err)
		}
	}
	return f, o
}

func jailFiles(t testing.TB, texts ...string) (out []*os.File) {
	t.Helper()
	for _, text := range texts {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		out = append(out, f)
	}
	return out
}

func TestJailVerbs(t *testing.T) {
	f, o := jailService(t)
	j, ctx := NewJailer(serveFor(t, o)), t.Context()
	plan := network.Plan{Installation: installation}
	want := jail.Request{Name: jail.Name{Installation: installation, VM: "0123", Place: "ab"}, VCPU: 2, MemoryMiB: 512, TAPs: []string{plan.TAP(0), plan.TAP(17)},
		Drives: []jail.Drive{{Role: "base", ReadOnly: true}, {Role: "system"}}}
	all := jailFiles(t, "log", "run", "kernel", "initrd", "base", "system", "net")
	given, err := jail.Restore(want, all)
	if err != nil {
		t.Fatal(err)
	}
	started, err := j.Start(ctx, want, given)
	if err != nil || started.PID != 4711 {
		t.Fatal(started, err)
	}
	defer started.PIDFD.Close()
	if !reflect.DeepEqual(f.last, want) || strings.Join(f.said, " ") != "log run kernel initrd base system net" {
		t.Errorf("what arrived is %+v with %q", f.last, f.said)
	}
	f.exit <- 0x0900
	select {
	case ws := <-started.Exit:
		if ws != 0x0900 {
			t.Errorf("its end is told as %#x", ws)
		}
	case <-time.After(20 * time.Second):
		t.Error("nobody tells how it ended")
	}

	here, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if err := j.Check(ctx, here); err != nil {
		t.Error(err)
	}
	pid, pidfd, err := j.Find(ctx, want.Name)
	if err != nil || pid != 4712 || pidfd.Close() != nil {
		t.Errorf("%d, %v", pid, err)
	}
	if err := j.Signal(ctx, want.Name, 9); err != nil {
		t.Error(err)
	}
	if vms, err := j.List(ctx, installation, "ab"); err != nil || !slices.Equal(vms, []string{"abc", "def"}) {
		t.Errorf("%q, %v", vms, err)
	}
	f.calls = nil

	// Faults arrive as they are, and nothing else.
	f.fail = fault.New(fault.Unsupported, "/vm", "its filesystem cannot").WithHint("move it")
	for what, err := range map[string]error{"check": j.Check(ctx, here), "signal": j.Signal(ctx, want.Name, 9), "start": func() error { _, err := j.Start(ctx, want, given); return err }(),
		"find": func() error { _, _, err := j.Find(ctx, want.Name); return err }()} {
		if !fault.Is(err, fault.Unsupported) || fault.HintOf(err) != "move it" {
			t.Errorf("%s: %v", what, err)
		}
	}
	f.fail, f.calls = nil, nil

	// What a user may not ask for.
	for what, change := range map[string]func(r *jail.Request){
		"another user's installation": func(r *jail.Request) { r.Installation, r.TAPs = foreign, nil },
		"no network of its own": func(r *jail.Request) {
			r.Installation, r.TAPs = "c1b2c3d4e5f6", []string{(network.Plan{Installation: "c1b2c3d4e5f6"}).TAP(0)}
		},
		"no CPUs":                 func(r *jail.Request) { r.VCPU = 0 },
		"another number of files": func(r *jail.Request) { r.Drives = nil },
	} {
		r := want
		change(&r)
		if _, err := j.Start(ctx, r, given); err == nil {
			t.Errorf("%s is started", what)
		}
	}
	other := want
	other.TAPs = []string{"eth0"} // which has no slot to name
	if _, err := j.Start(ctx, other, given); !fault.Is(err, fault.Internal) {
		t.Errorf("a device of another's: %v", err)
	}
	if len(f.calls) != 0 {
		t.Errorf("the host was asked for %v", f.calls)
	}
}

// TestTwoHelpers: what makes networks makes no jails and takes no descriptors, and the other way round.
func TestTwoHelpers(t *testing.T) {
	hosts, _, socket := fakeService(t)
	here := jailFiles(t, "x")
	if err := NewJailer(socket).Check(t.Context(), here[0]); !fault.Is(err, fault.Invalid) {
		t.Errorf("a jail of what makes networks: %v", err)
	}
	if _, err := NewJailer(socket).List(t.Context(), installation, "ab"); !fault.Is(err, fault.Invalid) {
		t.Errorf("jails of what makes networks: %v", err)
	}
	f, o := jailService(t)
	c := NewClient(serveFor(t, o), sample(installation), "banger0")
	if _, err := c.Setup(t.Context(), addresses(sample(installation))); !fault.Is(err, fault.Invalid) {
		t.Errorf("a network of what makes jails: %v", err)
	}
	if err := c.Watch(t.Context(), func() {}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a watch of what makes jails: %v", err)
	}
	if len(hosts.calls)+len(f.calls) != 0 {
		t.Errorf("asked for %v, %v", hosts.calls, f.calls)
	}
}

// FuzzJailRequest asks what makes jails for anything, with some number of files: nothing of another user's and nothing malformed gets
// through, which fakeJails sees to.
func FuzzJailRequest(f *testing.F) {
	seed := func(files int, change func(*wire.Request)) {
		r := request(wire.JailStart, jail.Name{Installation: installation, VM: "0123", Place: "ab"})
		r.Revision, r.Jail.VCPU, r.Jail.MemoryMiB = wire.Revision, 1, 64
		r.Jail.Drives = []wire.JailDrive{{Role: "base", ReadOnly: true}, {Role: "system"}}
		change(&r)
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, files)
	}
	for _, verb := range append(slices.Clone(jailVerbs), wire.Setup, wire.Watch, "jail-path") {
		for _, files := range []int{0, 1, 6, 7, 30} {
			seed(files, func(r *wire.Request) { r.Verb = verb })
			seed(files, func(r *wire.Request) { r.Verb, r.Network.Installation, r.Slots = verb, foreign, []int{0} })
			seed(files, func(r *wire.Request) { r.Verb, r.Slots = verb, []int{0, 1, 4095} })
		}
		seed(6, func(r *wire.Request) { r.Verb, r.Slots = verb, []int{-1, 1 << 40} })
		seed(1, func(r *wire.Request) { r.Verb, r.Jail = verb, nil })
		seed(6, func(r *wire.Request) { r.Verb, r.Network.Installation = verb, "../jails" })
		seed(6, func(r *wire.Request) { r.Verb, r.Jail.VM = verb, "../../../etc/passwd" })
		seed(6, func(r *wire.Request) { r.Verb, r.Jail.Place = verb, "" })
		seed(6, func(r *wire.Request) {
			r.Verb, r.Jail.Drives = verb, []wire.JailDrive{{Role: "../kernel"}, {Role: "base"}}
		})
		seed(6, func(r *wire.Request) { r.Verb, r.Jail.Signal, r.Jail.MemoryMiB = verb, 1<<31, -1 })
	}
	f.Fuzz(func(t *testing.T, body []byte, files int) {
		jails, o := jailService(t)
		close(jails.exit)
		r, err := wire.ReadRequest(bytes.NewReader(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)))
		if err != nil {
			return // FuzzRequest's
		}
		var given []*os.File
		for range min(max(files, 0), 32) {
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			given = append(given, null)
		}
		_, out, err := NewServer(o).doJail(t.Context(), r, given)
		closeAll(out)
		if fault.Is(err, fault.Internal) {
			t.Errorf("%s: %v", body, err)
		}
		if err != nil && len(out) > 0 {
			t.Errorf("%d descriptors go with %v", len(out), err)
		}
	})
}
