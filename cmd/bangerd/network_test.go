package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/doctor"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/sandbox"
	"git.thaloco.com/thaloco/banger/internal/vmm"
	"git.thaloco.com/thaloco/banger/internal/vmm/qemu"
)

// answering is a root helper of a revision that says yes to everything; its socket.
func answering(t *testing.T, name string, revision int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = wire.Write(conn, wire.Answer{Revision: revision, Release: "0.0.1"})
			_ = conn.Close()
		}
	}()
	return path
}

// TestNetworksOfAnOrdinaryUser: which networks there are with and without the root helper.
func TestNetworksOfAnOrdinaryUser(t *testing.T) {
	d := vmm.Driver(qemu.New(false))
	dir := t.TempDir()
	none := rootHelper{filepath.Join(dir, "none"), fault.New(fault.Unavailable, "root helper", "it is not installed").WithHint("sudo banger system install")}
	old := rootHelper{filepath.Join(dir, "old"), fault.New(fault.VersionSkew, "root helper", "it does not fit").WithHint("sudo banger system install")}
	good := rootHelper{answering(t, "good", wire.Revision), nil}
	ended := rootHelper{filepath.Join(dir, "ended"), nil} // since the daemon looked
	for _, c := range []struct {
		name, setting string
		root          rootHelper
		want, fix     string
	}{
		{"no helper", config.NetworkAuto, none, "user", ""},
		{"the helper", config.NetworkAuto, good, "bridge user", ""},
		{"another helper", config.NetworkAuto, old, "user", ""},
		{"a helper that does not answer", config.NetworkAuto, ended, "user", "sudo banger system install"},
		{"the helper, which is not wanted", config.NetworkUser, good, "user", ""},
		{"a bridge without the helper", config.NetworkBridge, none, "", "sudo banger system install"},
		{"a bridge with another helper, of which each start tells", config.NetworkBridge, old, "bridge user", ""},
		{"none", config.NetworkNone, good, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			notice, fix := "", ""
			host := sandbox.NetworkHost{Installation: "a1b2c3d4e5f6", Log: slog.New(slog.DiscardHandler), Notice: func(why, what string) { notice, fix = why, what }}
			cfg := config.Config{Network: c.setting, BridgeName: "banger0", CIDR: netip.MustParsePrefix("172.16.88.0/24"), IPv6CIDR: config.IPv6Auto}
			var kinds []string
			for _, n := range networks(config.Paths{State: dir}, cfg, d, 1000, c.root)(host) {
				kinds = append(kinds, n.Kind())
				if err := n.Close(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if fix != c.fix || (notice == "") != (c.fix == "") {
				t.Errorf("notice %q, fix %q, want %q", notice, fix, c.fix)
			}
			if got := strings.Join(kinds, " "); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestDoctorTellsOfTheHelper(t *testing.T) {
	dir := t.TempDir()
	good, old := answering(t, "good", wire.Revision), answering(t, "old", wire.Revision+1)
	for _, c := range []struct {
		root     rootHelper
		severity doctor.Severity
		fix      string
	}{
		{rootHelper{good, nil}, doctor.Pass, ""},
		{rootHelper{good, fault.New(fault.Unavailable, "", "")}, doctor.Warn, "banger daemon stop"},
		{rootHelper{old, nil}, doctor.Fail, "system install"},
		{rootHelper{filepath.Join(dir, "none"), nil}, doctor.Warn, "system install"},
	} {
		f := c.root.finding(context.Background())
		if f.Severity != c.severity || (f.Fix == "") != (c.fix == "") || !strings.Contains(f.Fix, c.fix) || f.Detail == "" {
			t.Errorf("%+v, want %s and %q", f, c.severity, c.fix)
		}
	}
}
