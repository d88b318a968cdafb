//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestAgentVerbs is one VM and everything that reaches it through its agent without SSH, and what makes
// ssh reach it by name.
func TestAgentVerbs(t *testing.T) {
	h := newHost(t)
	home := t.TempDir()
	h.setenv("HOME", home)
	const name = "swift-heron"
	if r := h.try("vm", "create", "--name", name, "--memory", "1G"); r.code != 0 {
		t.Fatal(r)
	}

	t.Run("exec", func(t *testing.T) {
		h := h.with(t)
		h.do("vm", "exec", name, "--", "true") // it waits for the guest's services, and says so
		for _, c := range []struct {
			args []string
			want result
		}{
			{[]string{name, "--", "sh", "-c", "id -un; pwd; echo $HOME; echo err >&2; exit 3"}, result{stdout: "root\n/root\n/root\n", stderr: "err\n", code: 3}},
			{[]string{"--user", "nobody", "--workdir", "/var", "--env", "A=b c", name, "--", "sh", "-c", "id -un; pwd; echo $A"}, result{stdout: "nobody\n/var\nb c\n"}},
			{[]string{name, "--", "sh", "-c", "kill -TERM $$"}, result{code: 143}},
			{[]string{name, "--", "nonsense"}, result{code: 127, stderr: "banger: " + name + ": nonsense: not found in the guest: file does not exist\n"}},
			{[]string{"-t", name, "--", "sh", "-c", "tty >/dev/null && echo terminal"}, result{stdout: "terminal\r\n"}},
			{[]string{name, "--", "cat", "/proc/self/oom_score_adj"}, result{stdout: "0\n"}},
			{[]string{name, "--", "grep", "^SigIgn", "/proc/self/status"}, result{stdout: "SigIgn:\t0000000000000000\n"}},
		} {
			r := h.try(append([]string{"vm", "exec"}, c.args...)...)
			if r.stdout != c.want.stdout || r.stderr != c.want.stderr || r.code != c.want.code {
				t.Errorf("%s\nwant %q, %q, %d", r, c.want.stdout, c.want.stderr, c.want.code)
			}
		}
		data := make([]byte, 5<<20)
		_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
		if r := h.tryInput(string(data), "vm", "exec", name, "--", "cat"); r.stdout != string(data) || r.code != 0 {
			t.Errorf("%d bytes came back of %d, exit code %d: %s", len(r.stdout), len(data), r.code, r.stderr)
		}
	})

	t.Run("a command without its host", func(t *testing.T) {
		h := h.with(t)
		ctx, cancel := context.WithTimeout(context.Background(), callTime)
		defer cancel()
		cmd := h.command(ctx, "vm", "exec", name, "--", "sh", "-c", "trap 'echo hup > /root/hup; exit' HUP; echo ready; while :; do sleep 0.1; done")
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Fatalf("%q, %v", line, err)
		}
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait() // it was killed
		h.until("the command is hung up", callTime, func() bool { return h.try("vm", "exec", name, "--", "cat", "/root/hup").stdout == "hup\n" })
	})

	t.Run("exec against ssh", func(t *testing.T) {
		h := h.with(t)
		h.do("vm", "wait", name, "--for", "ssh")
		measure := func(how string) func() time.Duration {
			return func() time.Duration {
				var took []time.Duration
				for range 5 {
					r := h.try("vm", how, name, "--", "true")
					if r.code != 0 {
						t.Fatal(r)
					}
					took = append(took, r.took)
				}
				slices.Sort(took)
				return took[len(took)/2]
			}
		}
		measure("exec")() // once: what runs for the first time in a guest is slow
		wantFaster(t, "vm exec -- true", "vm ssh -- true", 5, measure("exec"), measure("ssh"))
	})

	t.Run("cp", func(t *testing.T) {
		h := h.with(t)
		dir := t.TempDir()
		write(t, filepath.Join(dir, "project/sub/run"), "#!/bin/sh\necho built\n")
		if err := errors.Join(os.Chmod(dir+"/project/sub/run", 0o755), os.Symlink("sub/run", dir+"/project/link"), os.Link(dir+"/project/sub/run", dir+"/project/again")); err != nil {
			t.Fatal(err)
		}
		h.do("vm", "cp", dir+"/project", name+":")
		if r := h.try("vm", "exec", name, "--", "sh", "-c", "project/link; stat -c '%U %a %h' project/sub/run; truncate -s 1G sparse; echo end >> sparse"); r.stdout != "built\nroot 755 2\n" {
			t.Errorf("%s", r)
		}
		h.do("vm", "cp", name+":project", name+":sparse", dir)
		if link, err := os.Readlink(dir + "/project/project/link"); err == nil || link != "" {
			t.Errorf("the copy lies below the one that was there: %q", link)
		}
		st, err := os.Stat(dir + "/sparse")
		if err != nil || st.Size() != 1<<30+4 || st.Sys().(*syscall.Stat_t).Blocks > 2048 {
			t.Errorf("a sparse file: %+v, %v", st, err)
		}
	})

	t.Run("port-forward", func(t *testing.T) {
		h := h.with(t)
		ctx, cancel := context.WithTimeout(context.Background(), 2*callTime)
		defer cancel()
		serve := h.command(ctx, "vm", "exec", name, "--", "python3", "-c", `
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.end_headers(); self.wfile.write(body[::-1])
http.server.ThreadingHTTPServer(("127.0.0.1", 3000), H).serve_forever()`)
		if err := serve.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = serve.Process.Signal(syscall.SIGTERM); _ = serve.Wait() }()
		h.do("vm", "wait", name, "--for", "port:3000", "--timeout", "1m")
		forward := h.command(ctx, "vm", "port-forward", name, ":3000", ":22")
		out, err := forward.StdoutPipe()
		if err == nil {
			err = forward.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = forward.Process.Signal(syscall.SIGTERM); _ = forward.Wait() }()
		lines := bufio.NewReader(out)
		var addresses []string
		for range 2 {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			address, _, _ := strings.Cut(line, " ")
			addresses = append(addresses, address)
		}
		body := bytes.Repeat([]byte("abcdefgh"), 50_000)
		for range 3 {
			resp, err := http.Post("http://"+addresses[0], "", bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			slices.Reverse(got)
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("%d bytes of %d came back, %v", len(got), len(body), err)
			}
		}
		http.DefaultClient.CloseIdleConnections()
		ssh, err := net.Dial("tcp", addresses[1])
		if err != nil {
			t.Fatal(err)
		}
		defer ssh.Close()
		if banner, err := bufio.NewReader(ssh).ReadString('\n'); !strings.HasPrefix(banner, "SSH-2.0-OpenSSH") {
			t.Errorf("%q, %v", banner, err)
		}
	})

	t.Run("logs", func(t *testing.T) {
		h := h.with(t)
		h.do("vm", "exec", name, "--", "sh", "-c", "echo from the guest > /dev/console")
		h.until("the console is in the log", callTime, func() bool {
			return strings.Contains(h.try("vm", "logs", "--tail", "20", name).stdout, "from the guest")
		})
		if r := h.try("vm", "logs", "--vmm", name); !strings.HasPrefix(r.stdout, "banger: start ") || strings.Contains(r.stdout, "from the guest") {
			t.Errorf("%s", r)
		}
		// One that has grown past its bound is cut back under the VMM, which goes on writing at the new end.
		path := h.show(name).Log
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			_, err = f.Write(bytes.Repeat([]byte("a line of a guest that says much\n"), 6<<20/33))
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		h.until("the log is cut back", callTime, func() bool { return must(os.Stat(path)).Size() < 4<<20 })
		h.do("vm", "exec", name, "--", "sh", "-c", "echo after the cut > /dev/console")
		h.until("the console goes on", callTime, func() bool {
			return strings.Contains(h.try("vm", "logs", "--tail", "20", name).stdout, "after the cut")
		})
		if kept := must(os.ReadFile(path)); bytes.IndexByte(kept, 0) >= 0 || !bytes.Contains(kept, []byte("\na line of a guest that says much\n")) || len(kept) > 2<<20 {
			t.Errorf("of the log there are %d bytes, with a hole at %d", len(kept), bytes.IndexByte(kept, 0))
		}
	})

	t.Run("ssh-config", func(t *testing.T) {
		h := h.with(t)
		h.do("ssh-config", "install", "--include")
		config := filepath.Join(home, ".ssh", "config")
		if err := os.WriteFile(config, []byte("Include "+home+"/.ssh/banger_config\n"), 0o600); err != nil {
			t.Fatal(err) // ssh takes the home directory from passwd
		}
		ctx, cancel := context.WithTimeout(context.Background(), callTime)
		defer cancel()
		if out, err := command(ctx, "ssh", "-F", config, name+".vm", "hostname").CombinedOutput(); err != nil || string(out) != name+"\n" {
			t.Errorf("%q, %v", out, err)
		}
	})

	h.do("vm", "stop", name)
	h.do("vm", "wait", name, "--for", "stopped", "--timeout", "10s")
	h.refused(4, []string{"vm", "exec", name, "--", "true"}, "is stopped", "banger vm start "+name)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// TestCopyAgainstScp holds vm cp against scp in the same VM: random data, and many small files, both
// ways. BANGER_E2E_COPY=full takes 1 GiB and 10,000 files (a quarter of an hour by emulation, nearly all
// of it scp's), else it is a quarter and a tenth of that, and less in the lab. docs/benchmarks.md has the figures.
func TestCopyAgainstScp(t *testing.T) {
	slow(t)
	size, files := 256<<20, 1000
	switch {
	case os.Getenv("BANGER_E2E_COPY") == "full":
		size, files = 1<<30, 10_000
	case underFirecracker(): // in the lab, whose guests are emulated twice
		size, files = 64<<20, 250
	}
	h := newHost(t)
	home := t.TempDir()
	h.setenv("HOME", home)
	const name = "swift-heron"
	h.do("vm", "create", "--name", name, "--memory", "1G", "--disk-size", "16G")
	h.do("vm", "wait", name, "--for", "ssh")
	h.do("ssh-config", "install")
	dir := t.TempDir()
	big, err := os.Create(dir + "/big")
	if err == nil {
		_, err = io.CopyN(big, rand.NewChaCha8([32]byte{2}), int64(size))
	}
	if err = errors.Join(err, big.Close()); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		write(t, filepath.Join(dir, "many", strconv.Itoa(i%100), strconv.Itoa(i)), fmt.Sprintf("content of file %d\n", i))
	}
	timed := func(cmd *exec.Cmd) time.Duration {
		t.Helper()
		began := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
		}
		return time.Since(began)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	for _, c := range []struct{ what, source, ours, theirs string }{
		{"data in", dir + "/big", name + ":big", name + ".vm:big2"},
		{"data out", "big", dir + "/big3", dir + "/big4"},
		{"files in", dir + "/many", name + ":many", name + ".vm:many2"},
		{"files out", "many", dir + "/many3", dir + "/many4"},
	} {
		ours, theirs := c.source, c.source
		if strings.HasSuffix(c.what, "out") {
			ours, theirs = name+":"+ours, name+".vm:"+theirs
		}
		round := 0
		wantFaster(t, "vm cp, "+c.what, "scp", 1, func() time.Duration {
			round++
			return timed(h.command(ctx, "vm", "cp", ours, again(c.ours, round)))
		}, func() time.Duration {
			scp := command(ctx, "scp", "-q", "-r", "-F", home+"/.ssh/banger_config", theirs, again(c.theirs, round))
			scp.Env = h.env
			return timed(scp)
		})
	}
	for _, pair := range [][2]string{{"big", "big3"}, {"many", "many3"}} {
		if out, err := command(ctx, "diff", "-r", dir+"/"+pair[0], dir+"/"+pair[1]).CombinedOutput(); err != nil {
			t.Errorf("what came back differs: %v\n%.500s", err, out)
		}
	}
}

// again is where a copy goes in that round: the first one to target itself, the others beside it.
func again(target string, round int) string {
	if round == 1 {
		return target
	}
	return fmt.Sprintf("%s-%d", target, round)
}

// wantFaster wants ours to be that many times faster than theirs. They are timed in turn, and the quickest of each counts, for what
// else runs on the machine only ever adds: up to three rounds until that shows.
func wantFaster(t *testing.T, ours, theirs string, times float64, measureOurs, measureTheirs func() time.Duration) {
	t.Helper()
	var a, b time.Duration
	for round := range 3 {
		x, y := measureOurs(), measureTheirs()
		if round == 0 {
			a, b = x, y
		}
		a, b = min(a, x), min(b, y)
		t.Logf("%s %.3f s, %s %.3f s: %.1f times faster", ours, x.Seconds(), theirs, y.Seconds(), y.Seconds()/x.Seconds())
		if b.Seconds() >= times*a.Seconds() {
			return
		}
	}
	t.Errorf("%s takes %s, %s %s: it is to be %g times faster", ours, a, theirs, b, times)
}
