package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm/qemu"
)

// TestNetworksOfAnOrdinaryUser: which networks there are with and without the root helper.
func TestNetworksOfAnOrdinaryUser(t *testing.T) {
	if err := unix.Access("/dev/net/tun", unix.R_OK|unix.W_OK); err != nil {
		t.Skip("takes a /dev/net/tun that may be opened: ", err)
	}
	dir := t.TempDir()
	install := func(code fault.Code) error {
		return fault.New(code, "root helper", "it is not so").WithHint("sudo banger system install")
	}
	none := rootHelper{filepath.Join(dir, "none"), install(fault.Unavailable)}
	old := rootHelper{answering(t, wire.Answer{Revision: wire.Revision + 1}), install(fault.VersionSkew)}
	good := rootHelper{answering(t, wire.Answer{Revision: wire.Revision}), nil}
	refusing := rootHelper{answering(t, wire.Answer{Revision: wire.Revision, Fault: &wire.Fault{Code: fault.Exists, Message: "it is taken", Hint: "set cidr"}}), nil}
	for _, c := range []struct {
		name, setting string
		root          rootHelper
		want, fix     string
	}{
		{"by itself", config.NetworkAuto, none, "user", ""},
		{"the helper", config.NetworkAuto, good, "bridge user", ""},
		{"the helper, and a range that is taken", config.NetworkAuto, refusing, "user", "set cidr"},
		{"another helper", config.NetworkAuto, old, "user", ""},
		{"the helper, which is not wanted", config.NetworkUser, good, "user", ""},
		{"a bridge without the helper", config.NetworkBridge, none, "", "sudo banger system install"},
		{"a bridge with another helper, of which each start tells", config.NetworkBridge, old, "bridge user", ""},
		{"none", config.NetworkNone, good, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			why, fix := "", ""
			var kinds []string
			settings := config.Config{Network: c.setting, BridgeName: "banger0", CIDR: netip.MustParsePrefix("172.16.88.0/24"), IPv6CIDR: config.IPv6Auto}
			for _, n := range networks(config.Paths{State: dir}, settings, qemu.New(false), 1000, c.root)(sandbox.NetworkHost{
				Installation: "a1b2c3d4e5f6", Log: slog.New(slog.DiscardHandler), Notice: func(w, f string) { why, fix = w, f }, LinkDown: func() {},
			}) {
				kinds = append(kinds, n.Kind())
				if err := n.Close(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if got := strings.Join(kinds, " "); got != c.want || (why == "") != (c.fix == "") || !strings.HasPrefix(fix, c.fix) {
				t.Errorf("%q, want %q; why %q, fix %q, want %q", got, c.want, why, fix, c.fix)
			}
		})
	}
}

// answering is the socket of a helper that answers all the same.
func answering(t *testing.T, a wire.Answer) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	a.Release = "0.0.1"
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = wire.Write(conn, a)
			_ = conn.Close()
		}
	}()
	return path
}

func TestDoctorTellsOfTheHelper(t *testing.T) {
	good, old := answering(t, wire.Answer{Revision: wire.Revision}), answering(t, wire.Answer{Revision: wire.Revision + 1})
	for _, c := range []struct {
		root     rootHelper
		severity doctor.Severity
		fix      string
	}{
		{rootHelper{good, nil}, doctor.Pass, ""},
		{rootHelper{good, fault.New(fault.Unavailable, "", "")}, doctor.Warn, "banger daemon stop"},
		{rootHelper{old, nil}, doctor.Fail, "system install"},
		{rootHelper{filepath.Join(t.TempDir(), "none"), nil}, doctor.Warn, "system install"},
	} {
		f := c.root.finding(context.Background())
		if f.Severity != c.severity || (f.Fix == "") != (c.fix == "") || !strings.Contains(f.Fix, c.fix) || f.Detail == "" {
			t.Errorf("%+v, want %s and %q", f, c.severity, c.fix)
		}
	}
}
