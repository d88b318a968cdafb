package scripts_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// staged is a script with stages in a directory of its own.
func staged(t *testing.T, dir, stages string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(dir, "script")
	text := "set -euo pipefail\n. " + here + "/stage.sh\ntrap stage_end EXIT\ntrap 'exit 130' INT\ntrap 'exit 143' TERM\n" + stages
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", script)
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 10 * time.Second
	return cmd, &out
}

// TestStageStatus: a stage's exit status is the script's to judge, and its output is shown if it failed.
func TestStageStatus(t *testing.T) {
	for stages, want := range map[string]struct {
		code    int
		out, no string
	}{
		"stage quiet log echo nothing to see":                          {0, "quiet", "nothing to see"},
		"stage wrong log sh -c 'echo because; exit 7'":                 {7, "because", "done in"},
		"f() { false; echo goes on; return 3; }; stage_run '' f":       {3, "goes on", ""},
		"f() { read -r x || echo no input; }; stage_run '' f; echo $?": {0, "no input\n0", ""},
		"stage_run '' false || echo noticed; [ -z \"$stage_group\" ]":  {0, "noticed", ""},
	} {
		cmd, out := staged(t, t.TempDir(), stages)
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if code := cmd.ProcessState.ExitCode(); code != want.code || !strings.Contains(out.String(), want.out) || want.no != "" && strings.Contains(out.String(), want.no) {
			t.Errorf("%s: exit %d\n%s", stages, code, out)
		}
	}
}

// TestStageIsEnded: a script that is told to end does not wait for its stage, and leaves nothing of it.
func TestStageIsEnded(t *testing.T) {
	for name, c := range map[string]struct {
		stages string
		signal syscall.Signal
		code   int
	}{
		"a stage":               {"stage long log sh -c 'sleep 300 & echo $! >pid; wait'", syscall.SIGTERM, 143},
		"one that is shown":     {"f() { sleep 300 & echo $! >pid; wait; }; stage_run '' f", syscall.SIGTERM, 143},
		"Ctrl-C":                {"stage long log sh -c 'sleep 300 & echo $! >pid; wait'", syscall.SIGINT, 130},
		"one that does not end": {"stage long log sh -c 'trap \"\" TERM; sleep 300 & echo $! >pid; wait'", syscall.SIGTERM, 143},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			cmd, out := staged(t, dir, c.stages)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var pid int
			for deadline := time.Now().Add(20 * time.Second); pid == 0; time.Sleep(10 * time.Millisecond) {
				b, _ := os.ReadFile(filepath.Join(dir, "pid"))
				pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
				if time.Now().After(deadline) {
					_ = cmd.Process.Kill()
					t.Fatalf("the stage does not begin:\n%s", out)
				}
			}
			told := time.Now()
			if err := cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if took := time.Since(told); cmd.ProcessState.ExitCode() != c.code || took > 15*time.Second {
				t.Errorf("exit %d after %v\n%s", cmd.ProcessState.ExitCode(), took, out)
			}
			// It is init's to reap, which may take it a moment.
			for deadline := time.Now().Add(5 * time.Second); running(pid); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("process %d of the stage runs on", pid)
				}
			}
		})
	}
}

// running reports whether a process is there and no zombie.
func running(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z")
}
