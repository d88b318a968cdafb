package agentd_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/agent"
	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/exec"
	"git.thaloco.com/thaloco/banger/internal/guest/frame"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

// realExec is a guest whose commands are processes of this machine.
func realExec() *agentd.Guest {
	return &agentd.Guest{Stages: &agentd.Stages{}, Exec: agentd.StartProcess}
}

func sh(script string) exec.Request { return exec.Request{Args: []string{"/bin/sh", "-c", script}} }

// result is what a command did.
type result struct {
	exec.Status
	out, errs string
}

func runIn(t *testing.T, s *agent.Session, r exec.Request, stdin io.Reader) result {
	t.Helper()
	var out, errs bytes.Buffer
	status, err := runWith(within(t), s, r, exec.Streams{Stdin: stdin, Stdout: &out, Stderr: &errs})
	if err != nil {
		t.Fatalf("%q: %v", r.Args, err)
	}
	return result{status, out.String(), errs.String()}
}

func runWith(ctx context.Context, s *agent.Session, r exec.Request, streams exec.Streams) (exec.Status, error) {
	conn, err := s.DialStream(ctx, wire.KindExec)
	if err != nil {
		return exec.Status{}, err
	}
	return exec.Run(ctx, conn, r, streams)
}

func TestExec(t *testing.T) {
	links(t, realExec(), func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		for _, c := range []struct {
			name  string
			r     exec.Request
			stdin string
			want  result
		}{
			{"output and code", sh("echo out; echo err >&2; exit 3"), "", result{exec.Status{Code: 3}, "out\n", "err\n"}},
			{"input and its end", sh("cat; echo end"), "some\ninput", result{exec.Status{}, "some\ninputend\n", ""}},
			{"input that nobody reads", sh("exit 4"), strings.Repeat("x", 3*exec.Window), result{exec.Status{Code: 4}, "", ""}},
			{"killed", sh("kill -9 $$"), "", result{exec.Status{Signal: 9}, "", ""}},
			{"directory", exec.Request{Args: []string{"pwd"}, Dir: "/usr/bin/.."}, "", result{exec.Status{}, "/usr\n", ""}},
			{"environment", exec.Request{Args: []string{"sh", "-c", "echo $A $HOME"}, Env: []string{"A=1", "A=2", "HOME=/h"}}, "", result{exec.Status{}, "2 /h\n", ""}},
			{"a search path of its own", exec.Request{Args: []string{"sh"}, Env: []string{"PATH=/nonexistent"}}, "",
				result{exec.Status{Code: 127, Failed: "sh: not found in the guest: file does not exist"}, "", ""}},
			{"no program", exec.Request{Args: []string{"/etc/passwd"}}, "", result{exec.Status{Code: 126, Failed: "/etc/passwd: is no program that can be run: permission denied"}, "", ""}},
			{"no directory", exec.Request{Args: []string{"true"}, Dir: "/nonexistent"}, "", result{exec.Status{Code: 126, Failed: "/nonexistent is no directory of the guest"}, "", ""}},
			{"no user", exec.Request{Args: []string{"true"}, User: "nobody-here"}, "", result{exec.Status{Code: 126, Failed: `there is no user "nobody-here"`}, "", ""}},
			{"somebody left behind with the output", sh("sleep 60 & echo $! done"), "", result{}},
		} {
			t.Run(c.name, func(t *testing.T) {
				got := runIn(t, s, c.r, strings.NewReader(c.stdin))
				if c.want == (result{}) { // its pid is not known before
					pid, rest, _ := strings.Cut(got.out, " ")
					n, err := strconv.Atoi(pid)
					if err != nil || rest != "done\n" || got.Code != 0 {
						t.Fatalf("got %+v", got)
					}
					if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
						t.Errorf("what was left behind is gone: %v", err)
					}
					return
				}
				if got != c.want {
					t.Errorf("got %+v\nwant %+v", got, c.want)
				}
			})
		}
	})
}

// TestExecAsAnotherUser needs root, as agents have it.
func TestExecAsAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	s := open(t, streamLink(t, realExec()))
	for who, want := range map[string]string{
		"nobody": "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)\n", "nobody:daemon": "uid=65534(nobody) gid=1(daemon) groups=1(daemon)\n",
		"1:2": "uid=1(daemon) gid=2(bin) groups=2(bin)\n", "4242": "uid=4242 gid=0(root) groups=0(root)\n",
	} {
		if got := runIn(t, s, exec.Request{Args: []string{"id"}, User: who, Dir: "/"}, nil); got.out != want {
			t.Errorf("%s: %+v", who, got)
		}
	}
	if got := runIn(t, s, exec.Request{Args: []string{"sh", "-c", "tty && echo $USER && : </dev/tty && stat -c %U $(tty)"}, User: "nobody", Dir: "/", TTY: true}, nil); !strings.HasPrefix(got.out, "/dev/pts/") ||
		!strings.HasSuffix(got.out, "\r\nnobody\r\nnobody\r\n") {
		t.Errorf("a terminal for another user: %+v", got)
	}
}

// TestExecCarriesMuchBothWays has each window filled many times over, in both directions at once.
func TestExecCarriesMuchBothWays(t *testing.T) {
	data := make([]byte, 8<<20)
	_, _ = rand.Read(data)
	links(t, realExec(), func(t *testing.T, link vmm.Link) {
		got := runIn(t, open(t, link), exec.Request{Args: []string{"sh", "-c", "tee /dev/stderr"}}, bytes.NewReader(data))
		if got.out != string(data) || got.errs != string(data) || got.Code != 0 {
			t.Errorf("of %d bytes %d and %d came back, %+v", len(data), len(got.out), len(got.errs), got.Status)
		}
	})
}

// TestExecSignals wants a signal to pass input that nobody takes.
func TestExecSignals(t *testing.T) {
	links(t, realExec(), func(t *testing.T, link vmm.Link) {
		signals := make(chan int)
		var out bytes.Buffer
		ready := &announce{w: &out, said: make(chan struct{})}
		go func() {
			<-ready.said
			signals <- int(unix.SIGINT)
		}()
		status, err := runWith(within(t), open(t, link), sh(`trap 'echo got it; exit 5' INT; echo ready; while :; do sleep 0.02; done`),
			exec.Streams{Stdin: bytes.NewReader(make([]byte, 2*exec.Window)), Stdout: ready, Stderr: io.Discard, Signals: signals})
		if err != nil || status.Code != 5 || out.String() != "ready\ngot it\n" {
			t.Errorf("%+v, %v, %q", status, err, out.String())
		}
	})
}

// announce tells when something was written first.
type announce struct {
	w    io.Writer
	said chan struct{}
	once sync.Once
}

func (a *announce) Write(b []byte) (int, error) {
	n, err := a.w.Write(b)
	a.once.Do(func() { close(a.said) })
	return n, err
}

func TestExecTerminal(t *testing.T) {
	s := open(t, streamLink(t, realExec()))
	r := exec.Request{Args: []string{"sh", "-c", "echo $(stty size) $(tty -s && echo terminal); read line; stty size; echo $line; cat; echo end"}, TTY: true, Rows: 33, Cols: 101}
	sizes := make(chan exec.Size)
	keys, typed := io.Pipe()
	var out bytes.Buffer
	ready := &announce{w: &out, said: make(chan struct{})}
	go func() {
		<-ready.said
		sizes <- exec.Size{Rows: 44, Cols: 55}
		time.Sleep(20 * time.Millisecond) // the size goes by another way than keys
		_, _ = typed.Write([]byte("typed\n"))
		typed.Close()
	}()
	status, err := runWith(within(t), s, r, exec.Streams{Stdin: keys, Stdout: ready, Stderr: io.Discard, Sizes: sizes})
	if want := "33 101 terminal\r\ntyped\r\n44 55\r\ntyped\r\nend\r\n"; err != nil || status.Code != 0 || out.String() != want {
		t.Errorf("%+v, %v\ngot  %q\nwant %q", status, err, out.String(), want)
	}
	// Ctrl-C is a key, and a signal for whom the terminal says.
	keys, typed = io.Pipe()
	defer typed.Close()
	ready = &announce{w: io.Discard, said: make(chan struct{})}
	go func() {
		<-ready.said
		_, _ = typed.Write([]byte{3})
	}()
	status, err = runWith(within(t), s, exec.Request{Args: []string{"sh", "-c", "echo ready; exec sleep 60"}, TTY: true}, exec.Streams{Stdin: keys, Stdout: ready, Stderr: io.Discard})
	if err != nil || status.Signal != int(unix.SIGINT) {
		t.Errorf("%+v, %v", status, err)
	}
}

// TestExecIsHungUp leaves commands without a host: nothing of their session stays, not even what
// ignores it; what made a session of its own does.
func TestExecIsHungUp(t *testing.T) {
	// Under nohup(1) commands of this process would ignore SIGHUP; a signal that is caught here is as usual in them.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	defer signal.Stop(caught)
	links(t, realExec(), func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		var both sync.WaitGroup // five seconds each
		defer both.Wait()
		for _, tty := range []bool{false, true} {
			dir := t.TempDir()
			both.Go(func() {
				r := sh(fmt.Sprintf(`cd %s; trap 'echo hup > hup; exit' HUP
				sh -c 'trap "" HUP; echo $$ > stubborn; while :; do sleep 1; done' &
				setsid sh -c 'echo $$ > daemon; exec sleep 60' &
				while ! [ -s stubborn ] || ! [ -s daemon ]; do sleep 0.02; done; echo ready; while :; do sleep 0.05; done`, dir))
				r.TTY = tty
				ctx, cancel := context.WithCancel(within(t))
				ready := &announce{w: io.Discard, said: make(chan struct{})}
				go func() {
					<-ready.said
					cancel()
				}()
				if _, err := runWith(ctx, s, r, exec.Streams{Stdout: ready, Stderr: io.Discard}); !errors.Is(err, context.Canceled) {
					t.Errorf("terminal %v: %v", tty, err)
				}
				pid := func(name string) int {
					b, err := os.ReadFile(filepath.Join(dir, name))
					if err != nil {
						t.Error(err)
					}
					n, err := strconv.Atoi(strings.TrimSpace(string(b)))
					if err != nil {
						t.Error(err)
					}
					return n
				}
				goneWithin(t, pid("stubborn"), 8*time.Second)
				if err := syscall.Kill(pid("daemon"), syscall.SIGKILL); err != nil {
					t.Errorf("terminal %v: the daemon is gone: %v", tty, err)
				}
				if b, err := os.ReadFile(filepath.Join(dir, "hup")); err != nil || string(b) != "hup\n" {
					t.Errorf("terminal %v: the command was not told: %q, %v", tty, b, err)
				}
			})
		}
	})
}

// goneWithin waits for the end of a process that is not ours.
func goneWithin(t *testing.T, pid int, most time.Duration) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for end := time.Now().Add(most); ; {
		n, err := unix.Poll(fds, int(time.Until(end).Milliseconds()))
		if errors.Is(err, unix.EINTR) && time.Now().Before(end) { // a signal of the runtime's own
			continue
		}
		if n != 1 || err != nil {
			t.Errorf("process %d still runs after %s (%v)", pid, most, err)
		}
		return
	}
}

// TestAnotherVersionsAgent names what an agent lacks that has never heard of it.
func TestAnotherVersionsAgent(t *testing.T) {
	old := &agentd.Guest{Version: "v0.1\x1b[31m", Stages: &agentd.Stages{}}
	links(t, old, func(t *testing.T, link vmm.Link) {
		_, err := open(t, link).DialStream(within(t), wire.KindExec)
		if !fault.Is(err, fault.VersionSkew) || !strings.Contains(err.Error(), `"exec"`) || !strings.Contains(err.Error(), "(v0.1)") {
			t.Errorf("got %v", err)
		}
	})
}

// TestExecOfAHostileGuest has guests that do not keep to the form: each is cut off, and nothing of
// theirs is kept beyond the bounds.
func TestExecOfAHostileGuest(t *testing.T) {
	for name, attack := range map[string]func(conn net.Conn, w *frame.Writer){
		"more output than there is credit for": func(_ net.Conn, w *frame.Writer) {
			for w.Write(exec.KindOutput, make([]byte, frame.Max)) == nil {
			}
		},
		"a frame that is too long": func(conn net.Conn, _ *frame.Writer) {
			_, _ = conn.Write([]byte{exec.KindOutput, 0xff, 0xff, 0xff, 0xff})
		},
		"credit for nothing":   func(_ net.Conn, w *frame.Writer) { _ = w.Write(exec.KindCredit, []byte{exec.KindInput, 0xff, 0, 0, 0}) },
		"an unknown kind":      func(_ net.Conn, w *frame.Writer) { _ = w.Write('?', nil) },
		"no status":            func(net.Conn, *frame.Writer) {},
		"a status of nonsense": func(_ net.Conn, w *frame.Writer) { _ = w.Write(exec.KindStatus, []byte(`{"code":-1}`)) },
		"a status without end": func(_ net.Conn, w *frame.Writer) { _ = w.Write(exec.KindStatus, bytes.Repeat([]byte("x"), 100<<10)) },
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := socketPair(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer guest.Close()
				r := frame.NewReader(guest)
				_, _, _ = r.Next()
				attack(guest, frame.NewWriter(guest))
			}()
			stuck := make(chan struct{})
			status, err := exec.Run(within(t), host, sh("true"), exec.Streams{Stdout: blocked{stuck}, Stderr: io.Discard})
			if err == nil {
				t.Errorf("got %+v and no error", status)
			}
			<-done
		})
	}
}

// blocked takes a while for each write, as a slow terminal does.
type blocked struct{ never chan struct{} }

func (b blocked) Write(p []byte) (int, error) {
	select {
	case <-b.never:
	case <-time.After(50 * time.Millisecond):
	}
	return len(p), nil
}

// A terminal's escape sequences in the reason of a failure are not passed on.
func TestStatusIsPrintable(t *testing.T) {
	s, err := exec.ParseStatus([]byte(`{"failed":"\u001b[2Jno\u0007","code":127}`))
	if err != nil || s.Failed != "no" {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestExecIsLikeOthers: a command has the ordinary standing towards the OOM killer and huge pages from its first
// instruction, whatever the agent has, and the agent keeps its own.
func TestExecIsLikeOthers(t *testing.T) {
	const own, agents = "/proc/self/oom_score_adj", "100" // an ordinary user may raise it, and take that back
	before, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, []byte(agents), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(own, bytes.TrimSpace(before), 0); err != nil {
			t.Error(err)
		}
	})
	links(t, realExec(), func(t *testing.T, link vmm.Link) {
		s := open(t, link)
		var wg sync.WaitGroup
		for range 20 { // side by side: the score is the whole agent's
			wg.Go(func() {
				// The shell's child is there before anybody could change the shell.
				var out bytes.Buffer
				_, err := runWith(within(t), s, sh("cat "+own+" & cat "+own+"; wait"), exec.Streams{Stdout: &out})
				if out.String() != "0\n0\n" {
					t.Errorf("a command has the scores %q (%v)", out.String(), err)
				}
			})
		}
		wg.Wait()
		if err := system.SetSmallPages(true); err != nil {
			t.Fatal(err)
		}
		got := runIn(t, s, sh("grep THP_enabled /proc/self/status"), nil)
		if small, err := system.SmallPages(); got.out != "THP_enabled:\t1\n" || !small || err != nil {
			t.Errorf("a command has %q, and this process small pages: %v, %v", got.out, small, err)
		}
		if err := system.SetSmallPages(false); err != nil {
			t.Fatal(err)
		}
		if now, err := os.ReadFile(own); err != nil || strings.TrimSpace(string(now)) != agents {
			t.Errorf("the agent has %q now (%v), had %s", now, err, agents)
		}
	})
}
