//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/imagebuild"
)

// TestDefaultImage looks at what the image of the runtime bundle has beside its packages: in its filesystem, and in a VM of it.
func TestDefaultImage(t *testing.T) {
	image, seed := bundleFile("rootfs-docker.ext4"), bundleFile("rootfs-docker.work-seed.ext4")
	// A line for each tool that could be had when the image was built: what it is, and the pin that it had.
	tools := map[string]string{}
	for line := range strings.Lines(debugfs(t, image, "cat /usr/local/share/banger/tools")) {
		fields := strings.Fields(line)
		tools[fields[0]] = fields[len(fields)-1]
	}
	pins := map[string]string{}
	for tool, source := range map[string]string{"mise": imagebuild.DefaultMise, "opencode": imagebuild.DefaultOpencode,
		"tmux-resurrect": imagebuild.DefaultTmuxResurrect, "tmux-continuum": imagebuild.DefaultTmuxContinuum} {
		_, pin, _ := strings.Cut(source, "#")
		pins[tool] = strings.TrimPrefix(pin, "sha256=")
	}
	version := func(source string) string {
		at, _, _ := strings.Cut(source, "#")
		return at[strings.LastIndex(at, "@")+1:]
	}
	mise, opencode := version(imagebuild.DefaultMise), version(imagebuild.DefaultOpencode)
	opencodePath := "/usr/local/share/mise/installs/opencode/" + opencode + "/opencode"
	// has fails without the npm registry's tools, which every machine that tests this reaches, and skips without the others.
	has := func(t *testing.T, tool string) {
		t.Helper()
		switch got, ok := tools[tool]; {
		case !ok && strings.HasPrefix(tool, "tmux"):
			t.Skip("the image is without " + tool + ": its repository was out of reach when it was built (TestMake has images with stand-ins)")
		case got != pins[tool]:
			t.Fatalf("the image has %v, and %s is pinned to %s", tools, tool, pins[tool])
		}
	}

	for tool, program := range map[string]struct{ path, version string }{"mise": {"/usr/local/bin/mise", mise}, "opencode": {opencodePath, opencode}} {
		t.Run(tool, func(t *testing.T) {
			has(t, tool)
			if got := debugfs(t, image, "stat "+program.path); !strings.Contains(got, "Mode:  0755") || !strings.Contains(got, "User:     0   Group:     0") {
				t.Errorf("%s is\n%s", program.path, got)
			}
			// It runs here, where the CPU has what it needs, which an emulated guest's may lack.
			here := filepath.Join(t.TempDir(), tool)
			debugfs(t, image, "dump "+program.path+" "+here)
			must(0, os.Chmod(here, 0o755))
			cmd := exec.CommandContext(t.Context(), here, "--version")
			home := t.TempDir()
			cmd.Env, cmd.Dir = []string{"HOME=" + home, "PATH=/usr/bin:/bin", "MISE_OFFLINE=1"}, home
			if out, err := cmd.Output(); err != nil || !strings.Contains(string(out), program.version) {
				t.Errorf("%s --version: %q, %v; want %s", tool, out, err, program.version)
			}
		})
	}
	t.Run("files", func(t *testing.T) {
		for path, want := range map[string]string{
			"/etc/mise/config.toml":         "opencode = \"" + opencode + "\"\n",
			"/etc/profile.d/banger-mise.sh": "mise activate bash",
			"/etc/bash.bashrc":              ". /etc/profile.d/banger-mise.sh",
		} {
			if got := debugfs(t, image, "cat "+path); !strings.Contains(got, want) {
				t.Errorf("%s has %q, and not %q", path, got, want)
			}
		}
		if got := debugfs(t, image, "stat /usr/local/bin/opencode"); !strings.Contains(got, `"`+opencodePath+`"`) {
			t.Errorf("/usr/local/bin/opencode is\n%s", got)
		}
		if got := debugfs(t, seed, "cat /.bashrc"); !strings.Contains(got, ". /etc/profile.d/banger-mise.sh") {
			t.Errorf("the work seed's .bashrc has %q", got)
		}
	})
	for _, plugin := range []string{"resurrect", "continuum"} {
		t.Run("tmux-"+plugin, func(t *testing.T) {
			has(t, "tmux-"+plugin)
			path := "/.tmux/plugins/tmux-" + plugin + "/" + plugin + ".tmux"
			if got := debugfs(t, seed, "stat "+path); !strings.Contains(got, "Mode:  0755") {
				t.Errorf("%s is\n%s", path, got)
			}
			if got := debugfs(t, seed, "cat /.tmux.conf"); !strings.Contains(got, "run-shell /root"+path) {
				t.Errorf(".tmux.conf has\n%s", got)
			}
		})
	}
	t.Run("VM", func(t *testing.T) {
		h := newHost(t)
		h.create("default")
		if got := h.show("default").Agent; !strings.Contains(got, "answers") {
			t.Errorf("the agent: %q", got)
		}
		for command, want := range map[string]string{
			"bash -lc 'type -P mise; type -t mise; mise --version'": "/usr/local/bin/mise\nfunction\n" + mise,
			"bash -ic 'type -t mise' 2>/dev/null":                   "function",
			"bash -lc 'type -P opencode; mise which opencode'":      opencodePath + "\n" + opencodePath,
			"bash -lc 'mise ls --installed --no-header opencode'":   "opencode  " + opencode,
		} {
			if got := h.in("default", command); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %q, want %q", command, got, want)
			}
		}
		t.Run("opencode", func(t *testing.T) {
			if h.sh("default", "grep -c -w cx16 /proc/cpuinfo || true") == "0" {
				t.Skip("the VM's emulated CPU has no cmpxchg16b, which opencode's program needs")
			}
			if got := h.in("default", "bash -lc 'opencode --version'"); got != opencode {
				t.Errorf("opencode --version: %q, want %s", got, opencode)
			}
		})
	})
}
