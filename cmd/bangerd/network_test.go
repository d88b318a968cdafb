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
	"git.thaloco.com/thaloco/banger/internal/vmm/firecracker"
	"git.thaloco.com/thaloco/banger/internal/vmm/qemu"
)

// TestNetworksOfAnOrdinaryUser: which networks there are with and without the root helper.
func TestNetworksOfAnOrdinaryUser(t *testing.T) {
	q, f := vmm.Driver(qemu.New(false)), vmm.Driver(firecracker.New(func() (string, error) { return "", nil }))
	dir := t.TempDir()
	none := rootHelper{filepath.Join(dir, "none"), fault.New(fault.Unavailable, "root helper", "it is not installed").WithHint("sudo banger system install")}
	old := rootHelper{filepath.Join(dir, "old"), fault.New(fault.VersionSkew, "root helper", "it does not fit").WithHint("sudo banger system install")}
	good := rootHelper{filepath.Join(dir, "good"), nil}
	for _, c := range []struct {
		name, setting string
		d             vmm.Driver
		root          rootHelper
		want, fix     string
	}{
		{"QEMU by itself", config.NetworkAuto, q, none, "user", ""},
		{"QEMU and the helper", config.NetworkAuto, q, good, "bridge user", ""},
		{"QEMU and another helper", config.NetworkAuto, q, old, "user", ""},
		{"QEMU and the helper, which is not wanted", config.NetworkUser, q, good, "user", ""},
		{"Firecracker by itself", config.NetworkAuto, f, none, "", "sudo banger system install"},
		{"Firecracker and the helper", config.NetworkAuto, f, good, "bridge user", ""},
		{"a bridge without the helper", config.NetworkBridge, q, none, "", "sudo banger system install"},
		{"a bridge with another helper, of which each start tells", config.NetworkBridge, q, old, "bridge user", ""},
		{"none", config.NetworkNone, q, good, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			open, notice, fix := networks(config.Paths{State: dir}, config.Config{Network: c.setting, BridgeName: "banger0", CIDR: netip.MustParsePrefix("172.16.88.0/24"), IPv6CIDR: config.IPv6Auto}, c.d, 1000, c.root)
			if fix != c.fix || (notice == "") != (c.fix == "") {
				t.Errorf("notice %q, fix %q, want %q", notice, fix, c.fix)
			}
			var kinds []string
			if open != nil {
				for _, n := range open(sandbox.NetworkHost{Installation: "a1b2c3d4e5f6", Log: slog.New(slog.DiscardHandler)}) {
					kinds = append(kinds, n.Kind())
					if err := n.Close(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
			if got := strings.Join(kinds, " "); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestDoctorTellsOfTheHelper(t *testing.T) {
	dir := t.TempDir()
	answer := func(name string, revision int) string {
		path := filepath.Join(dir, name)
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
	good, old := answer("good", wire.Revision), answer("old", wire.Revision+1)
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
