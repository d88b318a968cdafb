package oci

import (
	"encoding/json"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// TestInit: which images boot by themselves.
func TestInit(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	x := mode(0o755)
	busybox := m("bin/busybox", "x", x)
	for i, c := range []struct {
		what  string
		files []file
		boots bool
	}{
		{"nothing", []file{m("etc/", "")}, false},
		{"a program", []file{m("sbin/init", "x", x)}, true},
		{"a file that is no program", []file{m("sbin/init", "x")}, false},
		{"systemd by a link", []file{m("usr/lib/systemd/systemd", "x", x), symlink("usr/sbin/init", "../lib/systemd/systemd"), symlink("sbin", "usr/sbin")}, true},
		{"an absolute link", []file{m("lib/systemd/systemd", "x", x), symlink("sbin/init", "/lib/systemd/systemd")}, true},
		{"a link to nowhere", []file{symlink("sbin/init", "/nowhere")}, false},
		{"a link to itself", []file{symlink("sbin/init", "init")}, false},
		{"a link that escapes", []file{symlink("sbin/init", "../../../../bin/sh")}, false},
		{"a directory", []file{m("sbin/init/", "")}, false},
		{"busybox", []file{busybox, symlink("sbin/init", "/bin/busybox")}, false},
		{"busybox by hard links", []file{m("bin/[", "x", x), hardlink("bin/init", "bin/[")}, false},
		{"busybox with an inittab", []file{busybox, symlink("sbin/init", "../bin/busybox"), m("etc/inittab", "x")}, false},
		{"Alpine with OpenRC", []file{busybox, symlink("sbin/init", "../bin/busybox"), m("etc/inittab", "x"), m("sbin/openrc", "x", x)}, true},
	} {
		img := pull(t, p, h.push(t, "init/"+string(rune('a'+i))+":1", imageOf(t, tarOf(t, c.files...))))
		if img.boots() != c.boots {
			t.Errorf("%s: %v", c.what, img.boots())
		}
	}
}

// TestContainer: what the config says is in the filesystem, whatever the image has there.
func TestContainer(t *testing.T) {
	h, p := newHub(t), newPuller(t)
	for i, files := range [][]file{nil, {m("etc/", "")}, {symlink("etc", "/usr/etc"), m("usr/etc/", "")}, {m("etc/banger", "a file")},
		{symlink("etc/banger", "../tmp"), m("tmp/", "")}, {symlink("etc/banger/image.json", "/etc/shadow"), m("etc/shadow", "secret")}, {m("etc/banger/image.json/", "")}} {
		made := withConfig(t, imageOf(t, tarOf(t, files...)), func(c *v1.ConfigFile) {
			c.Config = v1.Config{Entrypoint: []string{"/bin/x"}, Cmd: []string{"a", "b"}, Env: []string{"A=1"}, User: "u", WorkingDir: "/w", StopSignal: "SIGINT"}
		})
		img := pull(t, p, h.push(t, "c/"+string(rune('a'+i))+":1", made))
		if err := img.AddContainer(); err != nil {
			t.Errorf("%d: %v", i, err)
			continue
		}
		file := filepath.Join(t.TempDir(), "fs")
		if _, err := img.Flatten(t.Context(), mkfs(t), file, file+".seed", nil); err != nil {
			t.Fatal(err)
		}
		path := boot.ContainerPath
		if i == 2 {
			path = "/usr" + path // debugfs resolves absolute links by the host's root
		}
		var got boot.Container
		if err := json.Unmarshal([]byte(debugfs(t, file, "cat "+path)), &got); err != nil {
			t.Errorf("%d: %v", i, err)
			continue
		}
		want := boot.Container{Version: 1, Reference: img.Reference, Digest: img.Digest, NoInit: true, Command: []string{"/bin/x", "a", "b"}, Environment: []string{"A=1"}, User: "u", WorkingDir: "/w", StopSignal: "SIGINT"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
	}
}
