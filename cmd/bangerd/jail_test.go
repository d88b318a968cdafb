package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/config"
	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm/firecracker"
)

// TestJails: whether VMs are started in jails, by who asks and by what there is.
func TestJails(t *testing.T) {
	good, old := answering(t, wire.Answer{Revision: wire.Revision}), answering(t, wire.Answer{Revision: wire.Revision + 1})
	none := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct {
		name       string
		j          firecracker.Jails
		socket     string
		jail, want bool
		why, fix   string
	}{
		{"the helper", firecracker.Jails{Want: true}, good, true, true, "", ""},
		{"the helper, and they are not wanted", firecracker.Jails{Why: "off"}, good, true, false, "off", ""},
		{"none", firecracker.Jails{Want: true, Must: true}, none, false, false, "it is not installed", "system install"},
		{"a helper for networks alone", firecracker.Jails{Want: true}, none, false, false, "installed without a Firecracker", "make runtime"},
		{"another helper", firecracker.Jails{Want: true}, old, false, false, "does not fit", "system install"},
		{"none, and they are not wanted", firecracker.Jails{Why: "off"}, none, false, false, "off", "system install"},
	} {
		networks := none
		if strings.HasSuffix(c.name, "alone") {
			networks = good
		}
		got := jailsAt(t.Context(), c.j, c.socket, networks)
		if (got.Jail != nil) != c.jail || got.Want != c.want || got.Must != c.j.Must || !strings.Contains(got.Why, c.why) || (got.Why == "") != (c.why == "") || !strings.Contains(got.Fix, c.fix) {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
	for setting, want := range map[string][2]bool{config.JailerAuto: {true, false}, config.JailerOn: {true, true}, config.JailerOff: {false, false}} {
		got := jailsOf(t.Context(), config.Config{Jailer: setting}, 0, slog.New(slog.DiscardHandler))
		if got.Jail == nil || [2]bool{got.Want, got.Must} != want || (got.Why == "") != got.Want {
			t.Errorf("%s: %+v", setting, got)
		}
	}
}

func TestFindJailer(t *testing.T) {
	dir := t.TempDir()
	c := config.Config{FirecrackerBin: filepath.Join(dir, "firecracker-v1.12.1-x86_64")}
	if _, err := findJailer(c); !fault.Is(err, fault.Unsupported) || fault.HintOf(err) == "" {
		t.Errorf("none: %v", err)
	}
	beside := filepath.Join(dir, "jailer-v1.12.1-x86_64")
	if err := os.WriteFile(beside, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if p, err := findJailer(c); err != nil || p.Jailer != beside || p.Firecracker != c.FirecrackerBin {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := findJailer(config.Config{FirecrackerBin: filepath.Join(dir, "fc")}); !fault.Is(err, fault.Unsupported) {
		t.Errorf("another name: %v", err)
	}
}
