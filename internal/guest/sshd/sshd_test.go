package sshd

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
)

// The test's program is also what serves files, as the guest program is.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == FilesFlag {
		if err := ServeFiles(os.Stdin, os.Stdout); err != nil && !errors.Is(err, io.EOF) {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func newKey(t *testing.T) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// serve starts a server for one key, whose sessions run as whoever runs the test.
func serve(t *testing.T) (address string, key ssh.Signer) {
	t.Helper()
	key = newKey(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{HostKey: newKey(t), Shell: func(string) string { return "/bin/sh" }, Files: []string{self, FilesFlag},
		Allowed: func(user string, k ssh.PublicKey) bool {
			return user == "root" && bytes.Equal(k.Marshal(), key.PublicKey().Marshal())
		},
		Start: func(r exec.Request) (*agentd.Process, error) {
			r.User = ""
			return agentd.StartProcess(r)
		}}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-served:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("the server did not end")
		}
	})
	return l.Addr().String(), key
}

func dial(address, user string, key ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", address, &ssh.ClientConfig{User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 10 * time.Second}) //nolint:gosec // a test's own server
}

func connect(t *testing.T) *ssh.Client {
	t.Helper()
	address, key := serve(t)
	c, err := dial(address, "root", key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func session(t *testing.T, c *ssh.Client) *ssh.Session {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestWhoEnters(t *testing.T) {
	address, key := serve(t)
	for _, c := range []struct {
		user string
		key  ssh.Signer
		in   bool
	}{{"root", key, true}, {"root", newKey(t), false}, {"daemon", key, false}} {
		client, err := dial(address, c.user, c.key)
		if (err == nil) != c.in {
			t.Errorf("%s: %v", c.user, err)
		}
		if err == nil {
			client.Close()
		}
	}
	if _, err := ssh.Dial("tcp", address, &ssh.ClientConfig{User: "root", Auth: []ssh.AuthMethod{ssh.Password("")},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 10 * time.Second}); err == nil { //nolint:gosec // likewise
		t.Error("a password was taken")
	}
}

func TestCommands(t *testing.T) {
	c := connect(t)
	s := session(t, c)
	var out, errs bytes.Buffer
	s.Stdin, s.Stdout, s.Stderr = strings.NewReader("input"), &out, &errs
	err := s.Run("cat; echo error >&2; exit 7")
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 7 || out.String() != "input" || errs.String() != "error\n" {
		t.Errorf("%v, %q, %q", err, out.String(), errs.String())
	}
	s = session(t, c)
	if err := s.Run("kill -TERM $$"); !errors.As(err, &exit) || exit.Signal() != "TERM" {
		t.Errorf("killed: %v", err)
	}
	s = session(t, c)
	if err := s.Setenv("LC_ALL", "C"); err != nil {
		t.Error(err)
	}
	if err := s.Setenv("LD_PRELOAD", "/x"); err == nil {
		t.Error("a variable was taken that changes what programs do")
	}
	if got, err := s.Output("echo $LC_ALL"); err != nil || string(got) != "C\n" {
		t.Errorf("%q, %v", got, err)
	}
	s = session(t, c)
	if got, err := s.Output("head -c 3000000 /dev/zero | wc -c; head -c 3000000 /dev/zero"); err != nil || len(got) != 3_000_008 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// What a command leaves in the background neither holds the session nor ends with it.
	file := filepath.Join(t.TempDir(), "late")
	s = session(t, c)
	if _, err := s.Output("(sleep 0.3; echo done > " + file + ") >/dev/null 2>&1 &"); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if b, err := os.ReadFile(file); err == nil && string(b) == "done\n" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("what ran in the background was ended")
		}
	}
}

func TestTerminal(t *testing.T) {
	s := session(t, connect(t))
	if err := s.RequestPty("vt100", 33, 99, nil); err != nil {
		t.Fatal(err)
	}
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.Stdout = &out
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	if err := s.WindowChange(40, 120); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "stty size; echo term=$TERM; exit 4\n"); err != nil {
		t.Fatal(err)
	}
	err = s.Wait()
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 4 || !strings.Contains(out.String(), "40 120") || !strings.Contains(out.String(), "term=vt100") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// TestClientGone: a session's command is hung up when its client goes.
func TestClientGone(t *testing.T) {
	c := connect(t)
	s := session(t, c)
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "hup")
	if err := s.Start("trap 'echo hup > " + file + "; exit' HUP; echo ready; while :; do sleep 0.05; done"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the command was not hung up")
		}
	}
}

func TestFilesAndForwards(t *testing.T) {
	c := connect(t)
	f, err := sftp.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "x")
	w, err := f.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("content")); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if b, err := os.ReadFile(path); err != nil || string(b) != "content" {
		t.Errorf("%q, %v", b, err)
	}
	f.Close()

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}
	}()
	conn, err := c.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "echo" {
		t.Errorf("%q, %v", got, err)
	}
	conn.Close()
	if conn, err := c.Dial("tcp", "127.0.0.1:1"); err == nil {
		conn.Close()
		t.Error("a port that nobody listens on was connected")
	}
	if _, err := c.Listen("tcp", "127.0.0.1:0"); err == nil {
		t.Error("the server listens for a client")
	}
}

func TestKeys(t *testing.T) {
	key, other := newKey(t).PublicKey(), newKey(t).PublicKey()
	line := string(ssh.MarshalAuthorizedKey(key))
	another := string(ssh.MarshalAuthorizedKey(other))
	for text, want := range map[string]bool{
		line: true, "# note\n\n" + another + line: true, another: false, "": false, "garbage\n" + line: true,
		`command="x" ` + line: false, `from="10.0.0.1" ` + line + another: false,
	} {
		if got := hasKey([]byte(text), key); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "keys")
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	uid := uint32(os.Getuid())
	if !holds(path, uid, key) || holds(path, uid, other) || holds(filepath.Join(dir, "none"), uid, key) || holds(dir, uid, key) {
		t.Error("the file is not read right")
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if holds(path, uid, key) {
		t.Error("a file that anybody may write was believed")
	}
}

func TestShellIn(t *testing.T) {
	passwd := "root:x:0:0:root:/root:/bin/bash\nx:x:1:1::/:\nbroken\n"
	for name, want := range map[string]string{"root": "/bin/bash", "x": "/bin/sh", "nobody": "/bin/sh"} {
		if got := shellIn(passwd, name); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
}
