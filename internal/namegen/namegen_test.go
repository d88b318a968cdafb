package namegen

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func free(string) bool { return false }

func TestEveryCombinationIsAValidShortName(t *testing.T) {
	for list, words := range map[string][]string{"adjectives": adjectives, "animals": animals} {
		if len(words) < 64 {
			t.Errorf("%d %s", len(words), list)
		}
		if !slices.IsSorted(words) || len(slices.Compact(slices.Clone(words))) != len(words) {
			t.Errorf("%s are not sorted, or one is there twice", list)
		}
	}
	for _, a := range adjectives {
		for _, b := range animals {
			if name := a + "-" + b; vm.ValidateName(name) != nil || len(name) > 16 {
				t.Errorf("%s: %v", name, vm.ValidateName(name))
			}
		}
	}
}

func TestNamesVary(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		n, err := Generator{}.Generate(context.Background(), free)
		if err != nil {
			t.Fatal(err)
		}
		seen[n] = true
	}
	if len(seen) < 90 { // of 12,000; fewer has odds below 1 in 10^9
		t.Errorf("only %d names of 100 are different", len(seen))
	}
}

func TestCollisions(t *testing.T) {
	// Only names with digits are free.
	words := func(n string) bool { return strings.Count(n, "-") == 1 }
	n, err := Generator{}.Generate(context.Background(), words)
	if err != nil || words(n) || vm.ValidateName(n) != nil {
		t.Errorf("%q, %v", n, err)
	}
	if _, err := (Generator{}).Generate(context.Background(), func(string) bool { return true }); !fault.Is(err, fault.Exhausted) || fault.HintOf(err) == "" {
		t.Errorf("nothing is free: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := (Generator{}).Generate(ctx, free); !fault.Is(err, fault.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
}

func program(t *testing.T, script string) Generator {
	t.Helper()
	p := filepath.Join(t.TempDir(), "name")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return Generator{Program: p}
}

func TestProgram(t *testing.T) {
	n, err := program(t, "echo '  red-bicycle '; echo second line; echo noise >&2").Generate(context.Background(), free)
	if err != nil || n != "red-bicycle" {
		t.Errorf("%q, %v", n, err)
	}
	n, err = program(t, "echo always").Generate(context.Background(), func(n string) bool { return n == "always" })
	if err != nil || !strings.HasPrefix(n, "always-") || vm.ValidateName(n) != nil {
		t.Errorf("taken: %q, %v", n, err)
	}
	long := strings.Repeat("x", vm.MaxName)
	n, err = program(t, "echo "+long).Generate(context.Background(), func(n string) bool { return n == long })
	if err != nil || vm.ValidateName(n) != nil || n == long {
		t.Errorf("long and taken: %q, %v", n, err)
	}
	// A flood is swallowed, and its first line used.
	n, err = program(t, "echo flood; head -c 3000000 /dev/zero").Generate(context.Background(), free)
	if err != nil || n != "flood" {
		t.Errorf("flood: %q, %v", n, err)
	}
}

func TestProgramsThatFail(t *testing.T) {
	for name, c := range map[string]struct {
		g       Generator
		code    fault.Code
		message string
	}{
		"absent":      {Generator{Program: "/nonexistent/namer"}, fault.Unavailable, "no such program"},
		"not in PATH": {Generator{Program: "no-such-namer"}, fault.Unavailable, "no such program"},
		"fails":       {program(t, "echo it is broken >&2; exit 3"), fault.Unavailable, "it is broken"},
		"silent":      {program(t, "true"), fault.Invalid, "is empty"},
		"bad name":    {program(t, "echo 'Not A Name'"), fault.Invalid, "upper-case"},
		"binary":      {program(t, `printf '\377\000'`), fault.Invalid, "character"},
	} {
		_, err := c.g.Generate(context.Background(), free)
		if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.message) || !strings.Contains(err.Error(), c.g.Program) || !strings.Contains(fault.HintOf(err), "namegen_path") {
			t.Errorf("%s: %v, hint %q", name, err, fault.HintOf(err))
		}
	}
}

// The caller's deadline ends the program and what it started, though they hold the pipe open.
func TestHangingProgramIsEnded(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	g := program(t, "sleep 60 & echo $! > "+pid+"; wait")
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := g.Generate(ctx, free); !fault.Is(err, fault.Timeout) {
		t.Errorf("%v", err)
	}
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("it took %s", d)
	}
	b, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(n, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 2000); err != nil || ready != 1 {
		t.Errorf("what the program started still runs: %v", err)
	}
}
