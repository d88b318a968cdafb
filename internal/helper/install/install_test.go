package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
)

// host is a host with a systemd that keeps notes, and does of its work what others see: enabled sockets are links.
type host struct {
	Host
	calls  []string
	fail   string // the command that fails
	jailer string // its version
	jails  string // how many VMs run in some
}

func newHost(t *testing.T, systemd bool) *host {
	t.Helper()
	h := &host{Host: Host{Root: t.TempDir()}, jailer: "v1.12.1", jails: "0"}
	h.Run = func(_ context.Context, program string, args ...string) (string, error) {
		h.calls = append(h.calls, strings.TrimPrefix(program, h.Root)+" "+strings.Join(args, " "))
		switch strings.TrimPrefix(program, h.Root) {
		case Firecracker:
			return "Firecracker v1.12.1\n\nSupported snapshot data format versions: 1.0.0\n", nil
		case Jailer:
			return "Jailer " + h.jailer + "\n", nil
		}
		if slices.Contains(args, "-list-jails") {
			return h.jails + "\n", nil
		}
		return "banger-helper 1.2.3, revision 1\n", nil
	}
	if systemd {
		h.Systemctl = func(_ context.Context, args ...string) error {
			line := strings.Join(args, " ")
			h.calls = append(h.calls, line)
			if line == h.fail {
				return fault.New(fault.Unavailable, "systemctl", "it failed")
			}
			link := filepath.Join(h.Root, wants, args[len(args)-1])
			switch args[0] {
			case "enable":
				return errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), ignore(os.Symlink("x", link), fs.ErrExist))
			case "disable":
				return os.Remove(link)
			}
			return nil
		}
	}
	return h
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

func (h *host) files(t *testing.T) string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(h.Root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		out = append(out, strings.TrimPrefix(p, h.Root)+" "+fi.Mode().String())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

func source(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "banger-helper")
	if err := os.WriteFile(path, []byte("program"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstallAndUninstall(t *testing.T) {
	h, ctx := newHost(t, true), t.Context()
	for range 2 {
		h.calls = nil
		if byHand, err := h.Install(ctx, Request{Source: source(t), Users: []int{1000}}); err != nil || byHand != nil {
			t.Fatal(byHand, err)
		}
		want := []string{Program + " -version", "daemon-reload", "stop banger-helper@*.service", "enable banger-helper@1000.socket", "restart banger-helper@1000.socket"}
		if !slices.Equal(h.calls, want) {
			t.Errorf("%q, want %q", h.calls, want)
		}
		if got, want := h.files(t), `/etc/systemd/system/banger-helper@.service -rw-r--r--
/etc/systemd/system/banger-helper@.socket -rw-r--r--
/etc/systemd/system/sockets.target.wants/banger-helper@1000.socket Lrwxrwxrwx
/usr/local/libexec/banger/banger-helper -rwxr-xr-x`; got != want {
			t.Errorf("there is\n%s\nwant\n%s", got, want)
		}
	}
	// Another user, and another range; then as it was, without saying so again.
	ranges := []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16"), netip.MustParsePrefix("172.16.0.0/16")}
	if _, err := h.Install(ctx, Request{Source: source(t), Users: []int{1001}, Ranges: ranges}); err != nil {
		t.Fatal(err)
	}
	h.calls = nil
	if _, err := h.Install(ctx, Request{Source: source(t)}); err != nil || !slices.Contains(h.calls, "restart banger-helper@1000.socket") || !slices.Contains(h.calls, "restart banger-helper@1001.socket") {
		t.Errorf("%v: %q", err, h.calls)
	}
	unit, err := os.ReadFile(h.path(filepath.Join(units, service)))
	if err != nil || !strings.Contains(string(unit), "ExecStart=/usr/local/libexec/banger/banger-helper -uid %i -range 10.64.0.0/16 -range 172.16.0.0/16\n") {
		t.Errorf("%s, %v", unit, err)
	}
	s, err := h.Status(ctx, 1000)
	if err != nil || !s.Installed || s.Version != "1.2.3, revision 1" || !slices.Equal(s.Users, []int{1000, 1001}) || !fault.Is(s.Err, fault.Unavailable) {
		t.Errorf("%+v, %v", s, err)
	}

	// Somebody's network is there.
	records := record.Dir(h.path(filepath.Join(wire.RunDir, "records")))
	if err := errors.Join(os.MkdirAll(string(records), 0o700), records.Put(record.Record{UID: 1000, Installation: "a1b2c3d4e5f6", Bridge: "banger0"})); err != nil {
		t.Fatal(err)
	}
	h.calls = nil
	if err := h.Uninstall(ctx, 0, false); !fault.Is(err, fault.Precondition) || !strings.Contains(fault.HintOf(err), "--force") || len(h.calls) != 0 {
		t.Errorf("%v: %q", err, h.calls)
	}
	if err := h.Uninstall(ctx, 0, true); err != nil {
		t.Fatal(err)
	}
	if i := slices.Index(h.calls, Program+" -remove"); i < slices.Index(h.calls, "disable --now banger-helper@1001.socket") || i < 0 {
		t.Errorf("%q", h.calls)
	}
	if left := h.files(t); left != "" {
		t.Errorf("left is\n%s", left)
	}
	// Of nothing, nothing is left.
	if err := h.Uninstall(ctx, 0, false); err != nil {
		t.Error(err)
	}
	if s, err := h.Status(ctx, 1000); err != nil || s.Installed {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestJails: with a Firecracker there is what makes jails as well, and it stays when the helper is replaced from where none is.
func TestJails(t *testing.T) {
	h, ctx := newHost(t, true), t.Context()
	with := Request{Source: source(t), Users: []int{1000}, Firecracker: source(t), Jailer: source(t)}
	for _, r := range []Request{with, {Source: with.Source}} {
		h.calls = nil
		if _, err := h.Install(ctx, r); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"stop banger-jailer@*.service", "enable banger-jailer@1000.socket", "restart banger-jailer@1000.socket", "enable banger-helper@1000.socket"} {
			if !slices.Contains(h.calls, want) {
				t.Errorf("no %q in %q", want, h.calls)
			}
		}
		if got, want := h.files(t), `/etc/systemd/system/banger-helper@.service -rw-r--r--
/etc/systemd/system/banger-helper@.socket -rw-r--r--
/etc/systemd/system/banger-jailer@.service -rw-r--r--
/etc/systemd/system/banger-jailer@.socket -rw-r--r--
/etc/systemd/system/sockets.target.wants/banger-helper@1000.socket Lrwxrwxrwx
/etc/systemd/system/sockets.target.wants/banger-jailer@1000.socket Lrwxrwxrwx
/usr/local/libexec/banger/banger-helper -rwxr-xr-x
/usr/local/libexec/banger/firecracker -rwxr-xr-x
/usr/local/libexec/banger/jailer -rwxr-xr-x`; got != want {
			t.Errorf("there is\n%s\nwant\n%s", got, want)
		}
	}
	if s, err := h.Status(ctx, 1000); err != nil || s.Jailer != "v1.12.1" || !slices.Equal(s.Users, []int{1000}) || !fault.Is(s.JailErr, fault.Unavailable) {
		t.Errorf("%+v, %v", s, err)
	}
	// Somebody's VM runs in one: only the helper can end it. Root's own do not count, and keep their records.
	jails := h.path(wire.Jails)
	if err := errors.Join(os.MkdirAll(jails, 0o700), os.WriteFile(filepath.Join(jails, "vm-0-x"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	h.jails, h.calls = "2", nil
	if err := h.Uninstall(ctx, 0, false); !fault.Is(err, fault.Precondition) || !strings.Contains(fault.HintOf(err), "--force") || len(h.calls) != 1 {
		t.Errorf("%v: %q", err, h.calls)
	}
	if err := h.Uninstall(ctx, 0, true); err != nil {
		t.Fatal(err)
	}
	if i := slices.Index(h.calls, Program+" -remove"); i < slices.Index(h.calls, "disable --now banger-jailer@1000.socket") || i < 0 {
		t.Errorf("%q", h.calls)
	}
	if left := h.files(t); left != wire.Jails+"/vm-0-x -rw-------" {
		t.Errorf("left is\n%s", left)
	}
	// Two that do not fit are no jailer.
	h.jailer = "v1.13.0"
	if _, err := h.Install(ctx, with); !fault.Is(err, fault.Invalid) || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}

func TestWithoutSystemd(t *testing.T) {
	h := newHost(t, false)
	byHand, err := h.Install(t.Context(), Request{Source: source(t), Users: []int{1000}})
	if err != nil || !slices.Equal(byHand, []string{Program + " -uid 1000 -range 172.16.0.0/16"}) {
		t.Errorf("%q, %v", byHand, err)
	}
	if got := h.files(t); got != Program+" -rwxr-xr-x" {
		t.Errorf("there is\n%s", got)
	}
	// One that was started by hand is for who did that to end.
	path := h.path(wire.Socket(1000))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Uninstall(t.Context(), 0, true); !fault.Is(err, fault.Precondition) || fault.HintOf(err) != fmt.Sprint("end it: sudo kill ", os.Getpid()) {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	_ = l.Close()
	if err := h.Uninstall(t.Context(), 0, false); err != nil || h.files(t) != "" {
		t.Errorf("%v, left is\n%s", err, h.files(t))
	}
}

func TestRefusals(t *testing.T) {
	h, ctx := newHost(t, true), t.Context()
	for what, c := range map[string]struct {
		r    Request
		code fault.Code
		hint string
	}{
		"not root":   {Request{UID: 1000, Source: source(t), Users: []int{1000}}, fault.Permission, "sudo "},
		"for root":   {Request{Source: source(t), Users: []int{0}}, fault.Invalid, "--user"},
		"for nobody": {Request{Source: source(t)}, fault.Invalid, "--user"},
		"no program": {Request{Source: filepath.Join(t.TempDir(), "x"), Users: []int{1000}}, fault.NotFound, "make"},
		"a pipe":     {Request{Source: t.TempDir(), Users: []int{1000}}, fault.Invalid, ""},
	} {
		if _, err := h.Install(ctx, c.r); !fault.Is(err, c.code) || !strings.Contains(fault.HintOf(err), c.hint) {
			t.Errorf("%s: %v, hint %q", what, err, fault.HintOf(err))
		}
	}
	if err := h.Uninstall(ctx, 1000, false); !fault.Is(err, fault.Permission) || !strings.HasSuffix(fault.HintOf(err), "banger system uninstall") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if h.files(t) != "" {
		t.Errorf("there is\n%s", h.files(t))
	}
	h.fail = "daemon-reload"
	if _, err := h.Install(ctx, Request{Source: source(t), Users: []int{1000}}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("%v", err)
	}
}

// TestUnits has systemd itself read them, where its tool is there.
func TestUnits(t *testing.T) {
	dir := t.TempDir()
	text := strings.ReplaceAll(serviceUnit(DefaultRanges()), Program, "/bin/true")
	jails := strings.ReplaceAll(jailServiceUnit, Program, "/bin/true")
	for name, text := range map[string]string{service: text, socket: helperSocketUnit, jailService: jails, jailSocket: jailSocketUnit} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, setting := range []string{"ProtectSystem", "PrivateTmp", "ProtectHome", "PrivateDevices", "ReadWritePaths", "ProtectKernelModules", "ProtectControlGroups"} {
		if strings.Contains(jails, setting) { // what users give is mounted in another namespace, and cannot be cloned
			t.Errorf("%s makes a mount namespace", setting)
		}
	}
	if got := rangesOf(text); !slices.Equal(got, DefaultRanges()) {
		t.Errorf("%v", got)
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("takes systemd-analyze")
	}
	cmd := exec.Command(analyze, "verify")
	for _, unit := range []string{service, socket, jailService, jailSocket} {
		cmd.Args = append(cmd.Args, filepath.Join(dir, instance(unit, 1000)))
		if err := os.Symlink(unit, filepath.Join(dir, instance(unit, 1000))); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}
