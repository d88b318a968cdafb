//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"io"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// appScript is the command of the image without init: it says who it is, and ends well by its own signal alone.
const appScript = `#!/bin/sh
trap 'echo the signal came; exit 0' QUIT
echo "$(id -un) in $(pwd), GREETING=$GREETING, arguments $*"
[ -e /home/app/again ] || { touch /home/app/again; exit 3; }
while :; do sleep 1; done
`

// busyboxImage is an image of busybox with some files over it.
func busyboxImage(t *testing.T, config v1.Config, files map[string]string) v1.Image {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal("busybox is not installed: scripts/deps.sh test")
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h *tar.Header, content string) {
		t.Helper()
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	put(&tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, string(program))
	for _, applet := range strings.Fields("sh id cat ls ps sleep touch pwd echo wc test grep mount tty stty init poweroff") {
		put(&tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, "")
	}
	put(&tar.Header{Name: "home/app/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: 1000, Gid: 1000}, "")
	for name, content := range files {
		put(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755}, content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		img, err = mutate.Config(img, config)
	}
	if err != nil {
		t.Fatal(err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.OS, file.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"
	group  = "root:x:0:\napp:x:1000:\n"
)

// TestPull makes VMs of images of a registry: one without an init, whose command runs under banger's, with SSH and
// files, and one with an init of its own.
func TestPull(t *testing.T) {
	server := httptest.NewServer(registry.New())
	defer server.Close()
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	push := func(repo string, img v1.Image) string {
		t.Helper()
		ref, err := name.ParseReference(u.Host + "/" + repo)
		if err == nil {
			err = remote.Write(ref, img)
		}
		if err != nil {
			t.Fatal(err)
		}
		return ref.String()
	}
	h := newHost(t)
	app := push("team/app:1", busyboxImage(t, v1.Config{Entrypoint: []string{"/bin/app"}, Cmd: []string{"one", "two"}, User: "app",
		WorkingDir: "/srv/work", StopSignal: "SIGQUIT", Env: []string{"GREETING=hi there", "PATH=/opt/app:/bin"}},
		map[string]string{"bin/app": appScript, "etc/passwd": passwd, "etc/group": group, "root/note": "from the image\n"}))
	init := push("team/init:1", busyboxImage(t, v1.Config{}, map[string]string{"etc/passwd": passwd, "etc/group": group,
		"etc/inittab": "::respawn:/bin/sleep 1000\n", "sbin/init": "#!/bin/sh\necho its own > /run/init-was-here\nexec /bin/busybox init\n"}))

	h.do("image", "pull", app)
	h.create("app", "--image", "app-1")
	if got := h.in("app", "cat /proc/1/comm; cat /root/note; echo $GREETING $PATH"); got != "shutdown\nfrom the image\nhi there /opt/app:/bin" {
		t.Errorf("a session sees %q", got)
	}
	h.until("the command was started again", time.Minute, func() bool {
		return strings.Count(h.in("app", "cat /var/log/banger/command.log"), "app in /srv/work, GREETING=hi there, arguments one two") == 2
	})
	if log := h.in("app", "cat /var/log/banger/command.log"); !strings.Contains(log, "ended with status 3") {
		t.Errorf("the log says %q", log)
	}
	// Orphans are reaped.
	if got := h.in("app", "sh -c '(sleep 0.1 &)'; sleep 1; ps | grep -c '[[]sleep]'; true"); got != "0" {
		t.Errorf("%s zombies", got)
	}
	// SSH: commands, their status, a terminal; users of the image by the same key.
	if r := h.try("vm", "ssh", "app", "--", "echo $GREETING; exit 7"); r.code != 7 || r.stdout != "hi there\n" {
		t.Errorf("ssh: %s", r)
	}
	if r := h.tryInput("typed", "vm", "ssh", "app", "--", "cat; echo error >&2"); r.code != 0 || r.stdout != "typed" || r.stderr != "error\n" {
		t.Errorf("ssh with input: %s", r)
	}
	h.do("vm", "stop", "app")
	h.do("vm", "start", "app")
	if log := h.in("app", "cat /var/log/banger/command.log"); !strings.Contains(log, "the signal came") {
		t.Errorf("the command was not stopped as it asks for: %q", log)
	}
	h.do("vm", "delete", "app")

	h.do("image", "pull", init, "--name", "own")
	h.create("own", "--image", "own")
	if got := h.do("vm", "exec", "own", "--", "cat", "/run/init-was-here", "/proc/1/comm"); got != "its own\nbusybox\n" && got != "its own\ninit\n" {
		t.Errorf("process 1 is %q", got)
	}
	h.do("vm", "delete", "own")
	// Pulled again under its name: the layers are here, and the image is replaced.
	h.do("image", "pull", app)
	h.refused(3, []string{"image", "pull", u.Host + "/team/none:1"}, "no such image")
	if left, err := filepath.Glob(filepath.Join(h.state, "images", ".import-*")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
