package cli

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/cgroup"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

var update = flag.Bool("update", false, "rewrite testdata/units")

func TestUnits(t *testing.T) {
	for name, p := range map[string]unitPlace{
		"user": {Banger: "/home/me/.local/bin/banger", Bangerd: "/home/me/.local/bin/bangerd", Runtime: "%t/banger", User: true},
		"root": {Banger: `/opt/100% "odd"/banger`, Bangerd: `/opt/100% "odd"/bangerd`, Runtime: "/run/user/0/banger", XDGRuntime: "/run/user/0", Needs: "user-runtime-dir@0.service"},
	} {
		golden := filepath.Join("testdata/units", name)
		if *update {
			if err := writeUnits(golden, p); err != nil {
				t.Fatal(err)
			}
		}
		dir := t.TempDir()
		if err := writeUnits(dir, p); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != len(units) {
			t.Errorf("%s: %v, %v", name, entries, err)
		}
		for _, unit := range units {
			got, err := os.ReadFile(filepath.Join(dir, unit))
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join(golden, unit))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("%s/%s: %s", name, unit, diff)
			}
		}
	}
}

// Names that others rely on: the daemon on the sockets, the scopes of VMs on the unit that powers them off.
func TestUnitNames(t *testing.T) {
	if units[len(units)-1] != cgroup.GuestsUnit {
		t.Errorf("scopes are ordered before %s, which is none of %v", cgroup.GuestsUnit, units)
	}
	text, err := renderUnit("bangerd.socket", unitPlace{Runtime: "%t/banger"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/bangerd.sock\n", "/" + bangerv1.DialSocketName + "\n"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("bangerd.socket does not listen on %s:\n%s", strings.TrimSpace(want), text)
		}
	}
}

// install and uninstall call systemctl, here a script that notes its arguments, and leave what the units say.
func TestInstallUnits(t *testing.T) {
	dir, tools := filepath.Join(t.TempDir(), "units"), t.TempDir()
	calls := filepath.Join(tools, "calls")
	script := "#!/bin/sh\necho \"$@\" >>" + calls + "\n"
	if err := os.WriteFile(filepath.Join(tools, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", tools+":/usr/bin:/bin")
	bangerd := filepath.Join(tools, "bangerd")
	if err := os.WriteFile(bangerd, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	a := &app{stdout: &out, stderr: &errs, now: time.Now, place: func() (place, error) {
		return place{socket: filepath.Join(tools, "run", "bangerd.sock"), stateDir: tools, daemon: bangerd}, nil
	}}
	p := unitPlace{Banger: filepath.Join(tools, "banger"), Bangerd: bangerd, Runtime: "%t/banger", User: true, Linger: filepath.Join(tools, "linger")}
	if err := os.Mkdir(filepath.Join(tools, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := a.installUnits(t.Context(), dir, p); err != nil {
		t.Fatal(err)
	}
	for _, unit := range units {
		if _, err := os.Stat(filepath.Join(dir, unit)); err != nil {
			t.Error(err)
		}
	}
	if err := a.uninstallUnits(t.Context(), dir, p); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	said := out.String()
	if err := a.uninstallUnits(t.Context(), dir, p); err != nil { // again
		t.Fatal(err)
	}
	got, err := os.ReadFile(calls)
	if err != nil {
		t.Fatal(err)
	}
	want := `--user daemon-reload
--user enable --now bangerd.socket bangerd.service banger-guests.service
--user daemon-reload
--user disable --now bangerd.socket bangerd.service banger-guests.service
--user daemon-reload
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(said, "enabled in "+dir) || !strings.Contains(said, "VMs run on") {
		t.Errorf("said %q", said)
	}

	// Who does not linger is told what comes of it and what to type; who does, and root, whose units are the host's, are not.
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	install := func(p unitPlace, asJSON bool) (said string, view unitsView) {
		t.Helper()
		out.Reset()
		errs.Reset()
		a.json = asJSON
		if err := a.installUnits(t.Context(), dir, p); err != nil {
			t.Fatal(err)
		}
		a.json = false
		if asJSON {
			if err := json.Unmarshal(out.Bytes(), &view); err != nil {
				t.Errorf("%v: %s", err, out.String())
			}
		}
		return errs.String(), view
	}
	warning := me.Username + " does not linger: the daemon begins with the first login, and the end of the last one powers VMs off; sudo loginctl enable-linger " + me.Username
	if said, _ := install(p, false); said != warning+"\n" {
		t.Errorf("who does not linger is told %q", said)
	}
	if said, view := install(p, true); said != "" || view.Lingers || len(view.Warnings) != 1 || view.Warnings[0] != warning {
		t.Errorf("who does not linger is told %q, %+v", said, view)
	}
	root := p
	root.User = false
	if err := os.MkdirAll(filepath.Join(p.Linger, me.Username), 0o700); err != nil {
		t.Fatal(err)
	}
	lingering := p
	root.Linger = filepath.Join(tools, "none")
	for _, p := range []unitPlace{lingering, root} {
		if said, _ := install(p, false); said != "" {
			t.Errorf("%+v: told %q", p, said)
		}
		if said, view := install(p, true); said != "" || !view.Lingers || len(view.Warnings) != 0 {
			t.Errorf("%+v: told %q, %+v", p, said, view)
		}
	}

	// systemd refuses: its words are passed on.
	if err := os.WriteFile(filepath.Join(tools, "systemctl"), []byte("#!/bin/sh\necho no bus; exit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := a.installUnits(t.Context(), dir, p); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "no bus") {
		t.Errorf("%v", err)
	}
	t.Setenv("PATH", t.TempDir())
	if err := a.installUnits(t.Context(), dir, p); !fault.Is(err, fault.Unsupported) {
		t.Errorf("without systemd: %v", err)
	}
	p.Bangerd = filepath.Join(tools, "none")
	if err := a.installUnits(t.Context(), dir, p); !fault.Is(err, fault.NotFound) {
		t.Errorf("without a daemon: %v", err)
	}
}
