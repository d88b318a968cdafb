package config

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func resolve(t *testing.T, home string, env ...string) Paths {
	t.Helper()
	p, err := ResolvePaths(environment(home, env...))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func environment(home string, env ...string) Environment {
	vars := map[string]string{}
	for i := 0; i < len(env); i += 2 {
		vars[env[i]] = env[i+1]
	}
	return Environment{Getenv: func(k string) string { return vars[k] }, Home: home, UID: 1000, Tmp: "/tmp"}
}

func TestPromisedPaths(t *testing.T) {
	p := resolve(t, "/home/u", "XDG_RUNTIME_DIR", "/run/user/1000")
	for got, want := range map[string]string{
		p.ConfigFile:  "/home/u/.config/banger/config.toml",
		p.State:       "/home/u/.local/state/banger",
		p.Cache:       "/home/u/.cache/banger",
		p.Socket():    "/run/user/1000/banger/bangerd.sock",
		p.DaemonLog(): "/home/u/.local/state/banger/bangerd.log",
		p.VM("x"):     "/home/u/.local/state/banger/vms/x",
		p.BuildLogs(): "/home/u/.local/state/banger/image-build",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	p = resolve(t, "/home/u", "XDG_CONFIG_HOME", "/c", "XDG_STATE_HOME", "/s", "XDG_CACHE_HOME", "/k")
	if p.ConfigFile != "/c/banger/config.toml" || p.State != "/s/banger" || p.Cache != "/k/banger" || p.Socket() != "/tmp/banger-1000/bangerd.sock" {
		t.Errorf("%+v", p)
	}
	// The XDG specification: relative values are invalid and to be ignored.
	p = resolve(t, "/home/u", "XDG_STATE_HOME", "s", "XDG_RUNTIME_DIR", "run")
	if p.State != "/home/u/.local/state/banger" || p.Runtime != "/tmp/banger-1000" {
		t.Errorf("relative values were used: %+v", p)
	}
}

func TestEachStateDirectoryHasItsOwnSocket(t *testing.T) {
	home := t.TempDir()
	run := []string{"XDG_RUNTIME_DIR", "/run/user/1000"}
	a := resolve(t, home, append(run, "BANGER_STATE_DIR", "/srv/a")...)
	b := resolve(t, home, append(run, "BANGER_STATE_DIR", "/srv/b/")...)
	standard := resolve(t, home, run...)
	if a.State != "/srv/a" || b.State != "/srv/b" {
		t.Errorf("state: %s, %s", a.State, b.State)
	}
	if a.Socket() == b.Socket() || a.Socket() == standard.Socket() {
		t.Errorf("shared: %s, %s, %s", a.Socket(), b.Socket(), standard.Socket())
	}
	// The standard one by its name, and through a link, is one installation.
	if p := resolve(t, home, append(run, "BANGER_STATE_DIR", filepath.Join(home, ".local/state/banger"))...); p.Socket() != standard.Socket() {
		t.Errorf("the standard directory by name has another socket: %s", p.Socket())
	}
	link := filepath.Join(home, "link")
	target := filepath.Join(home, "real")
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	x := resolve(t, home, append(run, "BANGER_STATE_DIR", filepath.Join(link, "s"))...)
	y := resolve(t, home, append(run, "BANGER_STATE_DIR", filepath.Join(target, "s"))...)
	if x.Socket() != y.Socket() {
		t.Errorf("one directory, two sockets: %s, %s", x.Socket(), y.Socket())
	}
}

func TestPathsRefused(t *testing.T) {
	if _, err := ResolvePaths(environment("/home/u", "BANGER_STATE_DIR", "state")); !fault.Is(err, fault.Invalid) || !strings.Contains(fault.HintOf(err), "$PWD/state") {
		t.Errorf("relative state directory: %v", err)
	}
	if _, err := ResolvePaths(environment("")); !fault.Is(err, fault.Precondition) || fault.HintOf(err) == "" {
		t.Errorf("no home: %v", err)
	}
	if _, err := ResolvePaths(environment("", "XDG_CONFIG_HOME", "/c", "XDG_CACHE_HOME", "/k", "BANGER_STATE_DIR", "/s")); err != nil {
		t.Errorf("no home is needed where all is said: %v", err)
	}
}

// mine is an installation under a fresh directory, owned by whoever runs the test.
func mine(t *testing.T, env ...string) (Paths, string) {
	t.Helper()
	home := t.TempDir()
	e := environment(home, env...)
	e.UID = os.Getuid()
	e.Tmp = home
	p, err := ResolvePaths(e)
	if err != nil {
		t.Fatal(err)
	}
	return p, home
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Mode().Perm()
}

func TestDirectoriesArePrivateWhateverTheUmask(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	for _, umask := range []int{0, 0o022, 0o777} {
		p, _ := mine(t, "BANGER_STATE_DIR", filepath.Join(t.TempDir(), "other"))
		syscall.Umask(umask)
		errs := []error{p.EnsureRuntime(), p.EnsureRuntime()}
		syscall.Umask(0)
		for _, err := range errs {
			if err != nil {
				t.Errorf("umask %o: %v", umask, err)
			}
		}
		if m, b := mode(t, p.Runtime), mode(t, p.runtimeBase); m != 0o700 || b != 0o700 || p.Runtime == p.runtimeBase {
			t.Errorf("umask %o: %s is %o, %s is %o", umask, p.Runtime, m, p.runtimeBase, b)
		}
	}
	p, _ := mine(t)
	if err := os.MkdirAll(p.State, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := p.EnsureState(); err != nil || mode(t, p.State) != 0o700 {
		t.Errorf("an open state directory was not closed: %v, %o", err, mode(t, p.State))
	}
	if err := p.EnsureCache(); err != nil || mode(t, p.Cache) != 0o700 {
		t.Errorf("cache: %v", err)
	}
}

func TestUnsafeSocketDirectoriesAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(path string) error
		message string
		code    fault.Code
	}{
		"symbolic link": {func(p string) error { return os.Symlink(filepath.Dir(p), p) }, "symbolic link", fault.Permission},
		"dangling link": {func(p string) error { return os.Symlink("/nonexistent", p) }, "symbolic link", fault.Permission},
		"file":          {func(p string) error { return os.WriteFile(p, nil, 0o600) }, "not a directory", fault.Precondition},
		"open to all": {func(p string) error {
			if err := os.Mkdir(p, 0o700); err != nil {
				return err
			}
			return os.Chmod(p, 0o777)
		}, "written to by others (mode 0777)", fault.Permission},
	} {
		p, _ := mine(t)
		if err := c.prepare(p.Runtime); err != nil {
			t.Fatal(err)
		}
		err := p.EnsureRuntime()
		if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.message) || !strings.Contains(err.Error(), p.Runtime) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// As anyone but root, / belongs to someone else; as root, we pretend to be another user.
func TestForeignDirectoriesAreRefused(t *testing.T) {
	p, home := mine(t)
	p.uid = 12345
	if err := os.Mkdir(p.Runtime, 0o700); err != nil {
		t.Fatal(err)
	}
	err := p.EnsureRuntime()
	if !fault.Is(err, fault.Permission) || !strings.Contains(err.Error(), "you are user 12345") || !strings.Contains(err.Error(), "belongs to") || fault.HintOf(err) == "" {
		t.Errorf("socket directory: %v", err)
	}
	if err := p.EnsureState(); !fault.Is(err, fault.Permission) {
		t.Errorf("state directory: %v", err)
	}
	p, err = ResolvePaths(Environment{Getenv: func(k string) string {
		if k == "XDG_RUNTIME_DIR" {
			return home
		}
		return ""
	}, Home: home, UID: 12345, Tmp: "/tmp"})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.EnsureRuntime(); !fault.Is(err, fault.Permission) || !strings.Contains(err.Error(), "XDG_RUNTIME_DIR") {
		t.Errorf("someone else's XDG_RUNTIME_DIR: %v", err)
	}
	if _, err := os.Lstat(p.Runtime); err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
}

func TestMissingRuntimeDirectoryIsNamed(t *testing.T) {
	p, _ := mine(t, "XDG_RUNTIME_DIR", "/nonexistent/run")
	if err := p.EnsureRuntime(); !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "/nonexistent/run") {
		t.Error(err)
	}
}
