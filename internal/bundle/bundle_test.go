package bundle

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// checkout makes the root of a source checkout and a whole bundle in its ./runtime.
func checkout(t *testing.T) (root string, b *Bundle) {
	t.Helper()
	root = t.TempDir()
	write(t, filepath.Join(root, "go.mod"), "module git.thaloco.com/thaloco/banger\n\ngo 1.26.0\n")
	dir := filepath.Join(root, "runtime")
	b = &Bundle{CreatedBy: "test", Arch: runtime.GOARCH, KernelVersion: "6.12.9", Artifacts: map[Role]Artifact{}}
	for _, r := range Required() {
		if r == SSHKey {
			continue
		}
		write(t, filepath.Join(dir, FileName(r)), "content of "+string(r))
		a, err := Describe(t.Context(), dir, FileName(r))
		if err != nil {
			t.Fatal(err)
		}
		b.Artifacts[r] = a
	}
	if err := EnsureSSHKey(dir); err != nil {
		t.Fatal(err)
	}
	b.Artifacts[SSHKey] = Artifact{Path: FileName(SSHKey)}
	if err := b.Write(dir); err != nil {
		t.Fatal(err)
	}
	return root, b
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestLoadGivesWhatWasWritten(t *testing.T) {
	_, want := checkout(t)
	got, err := Load(want.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(Bundle{})); d != "" {
		t.Error(d)
	}
	if err := got.Check(); err != nil {
		t.Error(err)
	}
	if err := got.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if got.Base() != filepath.Join(got.Dir(), "rootfs-docker.ext4") || got.Path(BaseRootFS) != "" {
		t.Errorf("without a base of its own: Base() = %s", got.Base())
	}
	got.Artifacts[BaseRootFS] = Artifact{Path: "rootfs.ext4"}
	if got.Base() != filepath.Join(got.Dir(), "rootfs.ext4") {
		t.Errorf("with a base of its own: Base() = %s", got.Base())
	}
}

// Every artifact, missing, cut and altered: named, with the command that repairs it.
func TestDamageNamesArtifactAndRepair(t *testing.T) {
	for _, r := range Required() {
		root, b := checkout(t)
		file := b.Path(r)
		fails := func(what string, err error, code fault.Code) {
			t.Helper()
			if !fault.Is(err, code) || !strings.Contains(err.Error(), file) || !strings.Contains(fault.HintOf(err), "'make runtime' in "+root) {
				t.Errorf("%s %s: %v (%s), hint %q", what, r, err, fault.CodeOf(err), fault.HintOf(err))
			}
		}
		if r != SSHKey {
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			write(t, file, strings.ToUpper(string(whole)))
			if err := b.Check(); err != nil {
				t.Errorf("Check read %s: %v", r, err)
			}
			fails("altered", b.Verify(t.Context()), fault.Corrupt)
		}
		if err := os.Truncate(file, 0); err != nil {
			t.Fatal(err)
		}
		fails("empty", b.Check(), fault.Corrupt)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		fails("missing", b.Check(), fault.NotFound)
	}
}

// A bundle is whole without Firecracker; one that is listed is checked like the rest, and must be executable.
func TestFirecrackerIsOptionalAndChecked(t *testing.T) {
	for _, r := range []Role{Firecracker, Jailer} {
		root, b := checkout(t)
		if b.Path(r) != "" || b.Check() != nil {
			t.Fatalf("a bundle without %s: %q, %v", r, b.Path(r), b.Check())
		}
		file := filepath.Join(b.Dir(), string(r))
		whole := "content of " + string(r)
		write(t, file, whole)
		a, err := Describe(t.Context(), b.Dir(), string(r))
		if err != nil {
			t.Fatal(err)
		}
		b.Artifacts[r], b.FirecrackerVersion, b.FirecrackerFrom = a, "1.12.1", "PATH: /usr/bin/firecracker"
		if err := b.Write(b.Dir()); err != nil {
			t.Fatal(err)
		}
		got, err := Load(b.Dir())
		if err != nil || got.Path(r) != file {
			t.Fatalf("Path(%s) = %v, %v", r, got, err)
		}
		if d := cmp.Diff(b, got, cmp.AllowUnexported(Bundle{})); d != "" {
			t.Error(d)
		}
		fails := func(what string, err error, code fault.Code) {
			t.Helper()
			if !fault.Is(err, code) || !strings.Contains(err.Error(), file) || !strings.Contains(fault.HintOf(err), "'make runtime' in "+root) {
				t.Errorf("%s %s: %v (%s), hint %q", what, r, err, fault.CodeOf(err), fault.HintOf(err))
			}
		}
		fails("not executable", got.Check(), fault.Corrupt)
		if err := os.Chmod(file, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := got.Verify(t.Context()); err != nil {
			t.Error(err)
		}
		write(t, file, strings.ToUpper(whole))
		fails("altered", got.Verify(t.Context()), fault.Corrupt)
		write(t, file, "short")
		fails("cut", got.Check(), fault.Corrupt)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		fails("missing", got.Check(), fault.NotFound)
	}
}

func TestCheckReportsAllThatIsWrong(t *testing.T) {
	_, b := checkout(t)
	for _, r := range []Role{Kernel, Agent} {
		if err := os.Remove(b.Path(r)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Check(); err == nil || !strings.Contains(err.Error(), "vmlinux") || !strings.Contains(err.Error(), "banger-vsock-agent") ||
		!fault.Is(err, fault.NotFound) || !strings.Contains(fault.HintOf(err), "make runtime") {
		t.Errorf("Check() = %v", err)
	}
}

func TestManifestsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(map[string]any)
		code fault.Code
		want string
	}{
		"newer format": {func(m map[string]any) { m["format"] = Format + 1; m["artifacts"] = "of another shape" }, fault.VersionSkew, "format 2; this banger reads up to 1"},
		"no format":    {func(m map[string]any) { delete(m, "format") }, fault.Corrupt, "no format version"},
		"other arch":   {func(m map[string]any) { m["arch"] = "riscv64" }, fault.Unsupported, "riscv64"},
		"no kernel":    {func(m map[string]any) { delete(m["artifacts"].(map[string]any), "kernel") }, fault.Corrupt, "lists no kernel"},
		"escape": {func(m map[string]any) {
			m["artifacts"].(map[string]any)["kernel"] = map[string]any{"path": "../../etc/passwd"}
		}, fault.Corrupt, "outside"},
	} {
		root, b := checkout(t)
		file := filepath.Join(b.Dir(), ManifestName)
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		c.edit(m)
		if raw, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		write(t, file, string(raw))
		_, err = Load(b.Dir())
		if !fault.Is(err, c.code) || !strings.Contains(err.Error(), c.want) || !strings.Contains(fault.HintOf(err), "'make runtime' in "+root) {
			t.Errorf("%s: %v (%s), hint %q", name, err, fault.CodeOf(err), fault.HintOf(err))
		}
	}
	root, b := checkout(t)
	write(t, filepath.Join(b.Dir(), ManifestName), `{"format": 1,`)
	if _, err := Load(b.Dir()); !fault.Is(err, fault.Corrupt) {
		t.Errorf("cut short: %v", err)
	}
	if _, err := Load(filepath.Join(root, "nothing")); !fault.Is(err, fault.NotFound) || !strings.Contains(fault.HintOf(err), "make install") {
		t.Errorf("missing outside of a checkout: %v, hint %q", err, fault.HintOf(err))
	}
}

func TestVerifyEndsWithItsContext(t *testing.T) {
	_, b := checkout(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Verify(ctx); !fault.Is(err, fault.Cancelled) {
		t.Errorf("Verify = %v", err)
	}
}

func TestLocate(t *testing.T) {
	root, _ := checkout(t)
	prefix := t.TempDir()
	for name, c := range map[string]struct {
		env, configured, exe string
		want                 Location
	}{
		"environment first": {"/env", "/conf", root + "/banger", Location{"/env", EnvDir}},
		"then setting":      {"", "/conf", root + "/banger", Location{"/conf", "runtime_dir"}},
		"then checkout":     {"", "", root + "/banger", Location{root + "/runtime", "checkout"}},
		"then installation": {"", "", prefix + "/bin/banger", Location{prefix + "/lib/banger", "installation"}},
		"without a program": {"/env", "", "", Location{"/env", EnvDir}},
	} {
		got, err := locate(c.env, c.configured, c.exe)
		if err != nil || got != c.want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if _, err := locate("", "", ""); !fault.Is(err, fault.NotFound) {
		t.Errorf("no program, no setting: %v", err)
	}
}

func TestSSHKeyIsMadeOnceAndKeptPrivate(t *testing.T) {
	dir := t.TempDir()
	if err := EnsureSSHKey(dir); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "id_ed25519")
	first, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(first)
	if err != nil {
		t.Fatal(err)
	}
	// A copy may have lost its mode and its other half.
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(file + ".pub"); err != nil {
		t.Fatal(err)
	}
	if err := EnsureSSHKey(dir); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(file); err != nil || string(again) != string(first) {
		t.Errorf("the key was made anew (%v)", err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	raw, err := os.ReadFile(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	pub, comment, _, _, err := ssh.ParseAuthorizedKey(raw)
	if err != nil || string(pub.Marshal()) != string(signer.PublicKey().Marshal()) || comment != "banger" {
		t.Errorf("public key %q: %v", raw, err)
	}
	write(t, file, "not a key")
	if err := EnsureSSHKey(dir); !fault.Is(err, fault.Corrupt) {
		t.Errorf("a damaged key: %v", err)
	}
	if raw, _ := os.ReadFile(file); string(raw) != "not a key" {
		t.Error("a damaged key was overwritten")
	}
}

func TestKeyThatOthersCanReadIsReported(t *testing.T) {
	_, b := checkout(t)
	if err := os.Chmod(b.Path(SSHKey), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(); !fault.Is(err, fault.Corrupt) || !strings.Contains(fault.HintOf(err), "chmod 600 ") {
		t.Errorf("Check() = %v", err)
	}
}

// A bundle that lists no key is the system's: every user has a key of their own, made once.
func TestBundleOfTheSystemHasNoKey(t *testing.T) {
	_, b := checkout(t)
	own := t.TempDir()
	if got, err := b.KeyFor(own); err != nil || got != b.Path(SSHKey) {
		t.Errorf("KeyFor = %q, %v", got, err)
	}
	// One that is missing is a fault, and no reason for another.
	if err := os.Remove(b.Path(SSHKey)); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(); !fault.Is(err, fault.NotFound) {
		t.Errorf("Check() = %v", err)
	}
	if got, err := b.KeyFor(own); err != nil || got != b.Path(SSHKey) {
		t.Errorf("KeyFor = %q, %v", got, err)
	}

	delete(b.Artifacts, SSHKey)
	if err := b.Write(b.Dir()); err != nil {
		t.Fatal(err)
	}
	b, err := Load(b.Dir())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	var all sync.WaitGroup
	keys := make([]string, 8)
	for i := range keys {
		all.Go(func() {
			file, err := b.KeyFor(own)
			raw, err2 := os.ReadFile(file)
			if err != nil || err2 != nil || file != filepath.Join(own, "id_ed25519") {
				t.Errorf("KeyFor = %q, %v, %v", file, err, err2)
			}
			keys[i] = string(raw)
		})
	}
	all.Wait()
	for _, k := range keys {
		if k != keys[0] || k == "" {
			t.Fatal("several keys were made")
		}
	}
}

// What root installed for everybody has a key that its users cannot read: they have their own.
func TestBundleOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a bundle to another user")
	}
	_, b := checkout(t)
	own := t.TempDir()
	if err := os.Chown(b.Dir(), 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if got, err := b.KeyFor(own); err != nil || got != b.Path(SSHKey) {
		t.Errorf("root: KeyFor = %q, %v", got, err)
	}
}
