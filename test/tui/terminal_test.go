// Package tui drives what banger draws, `banger tui` above all, as people do: a real terminal, whose screen is read by an
// emulator, before the real program, with a real daemon behind it whose machines are fake. Screens after actions are kept as text.
//
// It boots nothing, never waits for a time to pass, and leaves no process behind.
package tui

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/charmbracelet/x/vt"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/vmm/fakevmm"
	"git.thaloco.com/thaloco/banger/test/fakeinstall"
)

var (
	update  = flag.Bool("update", false, "rewrite the screens in testdata")
	install fakeinstall.Install
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "banger-tui-*")
		if err == nil {
			defer os.RemoveAll(dir)
			install, err = fakeinstall.Build(filepath.Join("..", ".."), dir)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// patience bounds every wait.
const patience = 30 * time.Second

// home is one installation with its daemon, whose state the test sees as other clients do.
type home struct {
	t     *testing.T
	work  string
	env   []string
	c     *client.Client // may start the daemon
	world *fakevmm.World
}

// newHome makes an installation whose paths have the same length every time: screens depend on it.
func newHome(t *testing.T) *home {
	t.Helper()
	work := ""
	for i := range 1000 {
		dir := filepath.Join(os.TempDir(), fmt.Sprintf("tui%05dx%03d", os.Getpid()%100000, i))
		if err := os.Mkdir(dir, 0o700); err == nil {
			work = dir
			break
		}
	}
	if work == "" {
		t.Fatal("no directory to work in")
	}
	t.Cleanup(func() { _ = os.RemoveAll(work) })
	env, err := install.Env(work)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(work, "config", "banger")
	if err := os.MkdirAll(config, 0o700); err != nil {
		t.Fatal(err)
	}
	// What else depends on the machine that the test runs on.
	settings := "default_vcpu = 2\ndefault_memory = \"1G\"\ndefault_disk_size = \"8G\"\ndefault_system_size = \"16G\"\n"
	if err := os.WriteFile(filepath.Join(config, "config.toml"), []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	h := &home{t: t, work: work, env: append(os.Environ(), env...)}
	if h.world, err = fakevmm.Open(filepath.Join(work, "world")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := install.EndDaemons(work); err != nil {
			t.Error(err)
		}
	})
	h.c = client.New(client.Options{Socket: filepath.Join(work, "run", "banger", "bangerd.sock"), StateDir: filepath.Join(work, "state", "banger")})
	t.Cleanup(h.c.Close)
	return h
}

// banger runs the command line, which must succeed, and returns what it prints.
func (h *home) banger(args ...string) string {
	h.t.Helper()
	cmd := exec.Command(filepath.Join(install.Bin, "banger"), args...)
	cmd.Env = h.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		h.t.Fatalf("banger %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fails runs the command line, which must not succeed, and returns its exit code and what it prints.
func (h *home) fails(args ...string) (int, string) {
	h.t.Helper()
	cmd := exec.Command(filepath.Join(install.Bin, "banger"), args...)
	cmd.Env = h.env
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		h.t.Fatalf("banger %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return exit.ExitCode(), string(out)
}

// terminal is a terminal with the program in it.
type terminal struct {
	t     *testing.T
	h     *home
	cmd   *exec.Cmd
	pty   *os.File
	ended chan error
	waits time.Duration // at most, for a screen

	mu      sync.Mutex
	emu     *vt.Emulator
	raw     bytes.Buffer // all that was written to the terminal
	changed chan struct{}
}

// openPTY makes a terminal of that size (pty(7)).
func openPTY(w, h int) (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(h), Col: uint16(w)})
	}
	// The kernel throws away what is not yet read when Ctrl-C comes, and with it, on a busy machine, what the program says of that
	// (termios(3), NOFLSH; __isig of its drivers/tty/n_tty.c signals first).
	var settings *unix.Termios
	if err == nil {
		settings, err = unix.IoctlGetTermios(fd, unix.TCGETS)
	}
	if err == nil {
		settings.Lflag |= unix.NOFLSH
		err = unix.IoctlSetTermios(fd, unix.TCSETS, settings)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}

// tui starts `banger tui` in a terminal; env is added to the installation's.
func (h *home) tui(width, height int, env ...string) *terminal {
	h.t.Helper()
	return h.terminal(width, height, []string{filepath.Join(install.Bin, "banger"), "tui"}, env...)
}

// terminal starts a program in a terminal.
func (h *home) terminal(width, height int, args []string, env ...string) *terminal {
	h.t.Helper()
	master, slave, err := openPTY(width, height)
	if err != nil {
		h.t.Fatal(err)
	}
	x := &terminal{t: h.t, h: h, pty: master, emu: vt.NewEmulator(width, height), changed: make(chan struct{}, 1), ended: make(chan error, 1), waits: patience}
	x.cmd = exec.Command(args[0], args[1:]...)
	x.cmd.Env = append(append(h.env, "TERM=xterm-256color", "NO_COLOR=", "DISPLAY=", "WAYLAND_DISPLAY=", "BROWSER=", "TZ=UTC", "COLORTERM="), env...)
	x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = slave, slave, slave
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := x.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	_ = slave.Close()
	var streams sync.WaitGroup
	streams.Go(x.show)
	streams.Go(x.answer)
	go func() { x.ended <- x.cmd.Wait() }()
	h.t.Cleanup(func() {
		_ = x.cmd.Process.Kill() // one that has ended is not found
		_ = master.Close()
		_ = x.emu.InputPipe().(io.Closer).Close() // Emulator.Close races with Read
		streams.Wait()
	})
	return x
}

// show feeds the screen.
func (x *terminal) show() {
	b := make([]byte, 64<<10)
	for {
		n, err := x.pty.Read(b)
		x.mu.Lock()
		x.raw.Write(b[:n])
		_, _ = x.emu.Write(b[:n])
		x.mu.Unlock()
		select {
		case x.changed <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// answer sends what the terminal says when it is asked, e.g. what it can do.
func (x *terminal) answer() {
	b := make([]byte, 4096)
	for {
		n, err := x.emu.Read(b)
		if err != nil {
			return
		}
		if _, err := x.pty.Write(b[:n]); err != nil {
			return
		}
	}
}

// screen is the text on the screen.
func (x *terminal) screen() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out strings.Builder
	for y := range x.emu.Height() {
		line := ""
		for col := 0; col < x.emu.Width(); {
			c := x.emu.CellAt(col, y)
			if c == nil || c.Content == "" {
				line += " "
				col++
				continue
			}
			line += c.Content
			col += max(c.Width, 1)
		}
		out.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return out.String()
}

// written is how much was sent to the terminal so far.
func (x *terminal) written() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.raw.Len()
}

// since is what was sent to the terminal from there on.
func (x *terminal) since(from int) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.raw.String()[from:]
}

// until waits until the screen is as it should be.
func (x *terminal) until(what string, ok func(screen string) bool) {
	x.t.Helper()
	timeout := time.After(x.waits)
	for {
		if ok(x.screen()) {
			return
		}
		select {
		case <-x.changed:
		case <-timeout:
			x.t.Fatalf("it never showed %s; the screen:\n%s", what, x.screen())
		}
	}
}

// shows waits until all these texts are on the screen.
func (x *terminal) shows(texts ...string) {
	x.t.Helper()
	x.until(fmt.Sprintf("%q", texts), func(s string) bool {
		for _, text := range texts {
			if !strings.Contains(s, text) {
				return false
			}
		}
		return true
	})
}

// row waits until a line of the screen matches.
func (x *terminal) row(pattern string) {
	x.t.Helper()
	re := regexp.MustCompile("(?m)" + pattern)
	x.until("a line like "+pattern, re.MatchString)
}

// lacks waits until a text is gone from the screen.
func (x *terminal) lacks(text string) {
	x.t.Helper()
	x.until("a screen without "+text, func(s string) bool { return !strings.Contains(s, text) })
}

// keys are the bytes that a terminal sends for keys that have no character.
var keys = map[string]string{
	"up": "\x1b[A", "down": "\x1b[B", "right": "\x1b[C", "left": "\x1b[D", "enter": "\r", "esc": "\x1b", "tab": "\t",
	"shift+tab": "\x1b[Z", "pgup": "\x1b[5~", "pgdown": "\x1b[6~", "home": "\x1b[H", "end": "\x1b[F", "space": " ",
	"backspace": "\x7f", "ctrl+c": "\x03", "ctrl+u": "\x15", "ctrl+z": "\x1a",
}

// press sends keys: one of those above, or text.
func (x *terminal) press(names ...string) {
	x.t.Helper()
	for _, name := range names {
		b, ok := keys[name]
		if !ok {
			b = name
		}
		if _, err := x.pty.WriteString(b); err != nil {
			x.t.Fatal(err)
		}
	}
}

// mouse sends a press and a release of a button (SGR mouse mode); cells count from 0.
func (x *terminal) mouse(button, col, row int) {
	x.t.Helper()
	x.press(fmt.Sprintf("\x1b[<%d;%d;%dM", button, col+1, row+1))
	if button < 64 { // wheels have no release
		x.press(fmt.Sprintf("\x1b[<%d;%d;%dm", button, col+1, row+1))
	}
}

// resize changes the terminal's size.
func (x *terminal) resize(w, h int) {
	x.t.Helper()
	x.mu.Lock()
	x.emu.Resize(w, h)
	x.mu.Unlock()
	raw, err := x.pty.SyscallConn()
	if err != nil {
		x.t.Fatal(err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(h), Col: uint16(w)})
	})
	if err := errors.Join(err, set); err != nil {
		x.t.Fatal(err)
	}
}

// quits leaves by the key, and checks that the terminal is as it was.
func (x *terminal) quits() {
	x.t.Helper()
	x.press("q")
	x.ends(0)
	x.restored()
}

// ends waits until the program has ended, with that exit code.
func (x *terminal) ends(code int) {
	x.t.Helper()
	select {
	case <-x.ended:
		if got := x.cmd.ProcessState.ExitCode(); got != code {
			x.t.Errorf("it ended with %d", got)
		}
	case <-time.After(patience):
		x.t.Fatalf("it does not end; the screen:\n%s", x.screen())
	}
}

// restored checks that the terminal is as it was before.
func (x *terminal) restored() {
	x.t.Helper()
	x.until("the other screen", func(string) bool {
		x.mu.Lock()
		defer x.mu.Unlock()
		return !x.emu.IsAltScreen() && !x.emu.CursorHidden()
	})
}

var scrubs = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`\b[0-9a-f]{32}\b|\b[0-9a-f]{12}\b`), "<id>"},
	{regexp.MustCompile(`/tmp/[^ \n]+`), "<path>"},
	{regexp.MustCompile(`API revision \d+`), "API revision <n>"},
	{regexp.MustCompile(`process \d+`), "process <pid>"},
	{regexp.MustCompile(`(on the host) .*`), "$1 <sizes>"}, // what a filesystem makes of it
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:<port>"},
	{regexp.MustCompile(`\d\d:\d\d:\d\d`), "hh:mm:ss"},
	{regexp.MustCompile(` +\d+(\.\d+)?(ms|s|m\d\ds|m)\b`), " #"},
	{regexp.MustCompile(`[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]`), "⠋"},
	{regexp.MustCompile(` +│`), " │"},
	{regexp.MustCompile(`(?m) +$`), ""},
}

func scrub(s string) string {
	for _, c := range scrubs {
		s = c.re.ReplaceAllString(s, c.with)
	}
	return s
}

// golden waits until the screen, but for what differs each time, is as in the file.
func (x *terminal) golden(name string) {
	x.t.Helper()
	file := filepath.Join("testdata", name+".txt")
	if *update {
		// What a person would do who writes it down: look until nothing changes any more.
		last, quiet := scrub(x.screen()), time.After(3*time.Second)
		for same := false; !same; {
			select {
			case <-x.changed:
				if now := scrub(x.screen()); now != last {
					last, quiet = now, time.After(3*time.Second)
				}
			case <-quiet:
				same = true
			}
		}
		if err := os.WriteFile(file, []byte(last), 0o644); err != nil {
			x.t.Fatal(err)
		}
		return
	}
	b, err := os.ReadFile(file)
	if err != nil {
		x.t.Fatal(err)
	}
	want := string(b)
	timeout := time.After(patience)
	for {
		got := scrub(x.screen())
		if got == want {
			return
		}
		select {
		case <-x.changed:
		case <-timeout:
			x.t.Fatalf("%s (-want +got):\n%s", file, cmp.Diff(want, got))
		}
	}
}
