// Package scripts_test shows what the shell scripts do, with other programs of a fake PATH. It installs nothing.
package scripts_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const goodGo = "#!/bin/sh\necho go version go1.26.0 linux/amd64\n"

// run runs deps.sh with the given programs and nothing else on the PATH, but for directories of administration.
func run(t *testing.T, programs map[string]string, args ...string) (out string, code int) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range programs {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"env", "id"} {
		if _, ok := programs[name]; !ok {
			if err := os.Symlink("/usr/bin/"+name, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	cmd := exec.Command("/bin/sh", append([]string{"./deps.sh"}, args...)...)
	cmd.Env = []string{"PATH=" + dir, "LOG=" + filepath.Join(dir, "log")}
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	return string(b) + string(log), cmd.ProcessState.ExitCode()
}

func TestDryRunNamesWhatIsMissingAndWhy(t *testing.T) {
	out, code := run(t, map[string]string{"go": goodGo}, "--dry-run", "test")
	if code != 1 || !strings.Contains(out, "qemu-system-x86: runs the virtual machines") || !strings.Contains(out, "gcc: ") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	if strings.Contains(out, "Installing") {
		t.Errorf("a dry run installs:\n%s", out)
	}
}

func TestWithoutAptItListsWhatToInstall(t *testing.T) {
	out, code := run(t, map[string]string{"go": goodGo}, "sandbox")
	if code != 1 || !strings.Contains(out, "apt-get install") || !strings.Contains(out, "mmdebstrap") {
		t.Errorf("exit %d:\n%s", code, out)
	}
}

func TestAnOrdinaryUserIsToldOfSudo(t *testing.T) {
	record := "#!/bin/sh\necho \"${0##*/} $*\" >> \"$LOG\"\n"
	out, code := run(t, map[string]string{
		"go": goodGo, "id": "#!/bin/sh\necho 1000\n", "apt-get": record, "apt-cache": record, "sudo": record,
	}, "sandbox")
	if code != 0 || !strings.Contains(out, "Installing with: sudo apt-get install") || !strings.Contains(out, "sudo may ask for your password") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	if !strings.Contains(out, "sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends") || strings.Contains(out, "apt-get update") {
		t.Errorf("what was run:\n%s", out)
	}
}

func TestListsAreFetchedWhenTheyDoNotKnowThePackages(t *testing.T) {
	record := "#!/bin/sh\necho \"${0##*/} $*\" >> \"$LOG\"\n"
	out, code := run(t, map[string]string{
		"go": goodGo, "id": "#!/bin/sh\necho 0\n", "apt-get": record, "apt-cache": "#!/bin/sh\nexit 100\n",
	}, "sandbox")
	update, install := strings.Index(out, "apt-get update"), strings.LastIndex(out, "apt-get install -y")
	if code != 0 || update < 0 || install < update || strings.Contains(out, "sudo") {
		t.Errorf("exit %d:\n%s", code, out)
	}
}

func TestOldOrMissingGoIsTold(t *testing.T) {
	for _, v := range []string{"go1.19.8", "go1.20", "go1.9"} {
		out, code := run(t, map[string]string{"go": "#!/bin/sh\necho go version " + v + " linux/amd64\n"}, "sandbox")
		if code != 1 || !strings.Contains(out, "too old") || !strings.Contains(out, "1.21") {
			t.Errorf("%s: exit %d:\n%s", v, code, out)
		}
	}
	if out, code := run(t, nil, "sandbox"); code != 1 || !strings.Contains(out, "Go is not installed") {
		t.Errorf("no Go: exit %d:\n%s", code, out)
	}
}

// Where nothing is missing nothing is said, at once: it runs before every `make sandbox`.
func TestNothingMissingIsSilent(t *testing.T) {
	start := time.Now()
	out, err := exec.Command("./deps.sh", "test").CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("%v\n%s(a missing tool fails this test: run scripts/deps.sh test)", err, out)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %s", took)
	}
}

func TestShellcheck(t *testing.T) {
	if out, err := exec.Command("shellcheck", "deps.sh").CombinedOutput(); err != nil {
		t.Errorf("shellcheck: %v\n%s", err, out)
	}
}
