package tui

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/test/fakeinstall"
)

// vms asks the daemon, as any other client does, for all VMs by name.
func (h *home) vms() map[string]*bangerv1.VM {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := h.c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	out := map[string]*bangerv1.VM{}
	for _, v := range r.GetVms() {
		out[v.GetName()] = v
	}
	return out
}

// states checks what the daemon says of all VMs: "name=state", sorted.
func (h *home) states(want ...string) {
	h.t.Helper()
	got := []string{}
	for name, v := range h.vms() {
		got = append(got, name+"="+v.GetState())
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		h.t.Errorf("the daemon has %v, want %v", got, want)
	}
}

// The form shows the daemon's own defaults, says while one types what cannot be, and makes what it says.
func TestCreate(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	x := h.tui(80, 24)
	x.shows("No VMs yet. Press n to make one.")
	x.golden("empty-80x24")
	x.press("n")
	x.shows("[generated", "[16G")
	x.golden("form-80x24")
	// Every field says what is wrong with it, and Enter does nothing.
	x.press("Bad_Name", "down", "down", "0", "down", "64", "down", "1 banana", "tab", "1M")
	x.golden("form-wrong-80x24")
	x.press("enter")
	x.press("up", "ctrl+u", "12G")
	x.lacks("banana")
	h.states()
	x.press("down", "ctrl+u", "up", "up", "ctrl+u", "1536", "up", "ctrl+u", "3", "up", "up", "ctrl+u", "otter")
	x.lacks("!")
	x.golden("form-right-80x24")
	x.press("enter")
	x.row(`^> otter +running +50% 768M/1.5G`)
	x.shows("otter: running", "3 vCPU")
	x.golden("running-80x24")
	v := h.vms()["otter"]
	if v.GetState() != "running" || v.GetVcpu() != 3 || v.GetMemoryMib() != 1536 || v.GetDiskBytes() != 12<<30 || v.GetSystemBytes() != 16<<30 || v.GetNat() {
		t.Errorf("made: %v", v)
	}
	// The name is taken now; NAT and not starting are other fields.
	x.press("n")
	x.shows("[generated")
	x.press("otter")
	x.shows("a VM of this name exists")
	x.press("2", "up", "space", "up", "y", "enter")
	x.row(`^> otter2 +stopped`)
	if v := h.vms()["otter2"]; v == nil || !v.GetNat() || v.GetDesired() != "stopped" || v.GetMemoryMib() != 1024 {
		t.Errorf("made: %v", v)
	}
	x.resize(200, 50)
	x.row(`│`)
	x.press("up")
	x.golden("running-200x50")
	x.quits()
	h.states("otter2=stopped", "otter=running")
}

// Keys act on the VM under the cursor; delete asks.
func TestActions(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +running`)
	x.press("x")
	x.row(`^> otter +stopped`)
	x.shows("otter: stopped")
	h.states("otter=stopped")
	x.press("e")
	x.shows("otter is stopped. s starts it.")
	x.press("s")
	x.row(`^> otter +running`)
	x.shows("otter: running")
	first := h.vms()["otter"].GetPid()
	x.press("r")
	x.shows("otter: running")
	x.press("4")
	x.row(`otter +restart done after`)
	if second := h.vms()["otter"]; second.GetState() != "running" || second.GetPid() == first {
		t.Errorf("after the restart: %v, before it process %d", second, first)
	}
	x.press("d")
	x.shows("Delete otter and its disks? There is no way back.")
	x.golden("delete-80x24")
	x.press("x", "n")
	x.shows("Nothing was deleted.")
	h.states("otter=running")
	x.press("d")
	x.shows("Delete otter")
	x.press("y")
	x.shows("No VMs yet", "otter: deleted")
	x.golden("events-80x24")
	h.states()
	if machines, err := h.world.Machines(); err != nil || len(machines) > 0 {
		t.Errorf("machines left: %v, %v", machines, err)
	}
	x.quits()
}

// What is marked is acted on as one, each with its own result.
func TestBatch(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	for _, name := range []string{"api", "db", "web"} {
		h.banger("vm", "create", "-q", "--name", name)
	}
	if err := h.world.SetFaults("web refuse no room at the inn\n"); err != nil {
		t.Fatal(err)
	}
	x := h.tui(80, 24)
	x.row(`^  web +running`)
	x.press("space", "down", "space")
	x.shows("2 marked")
	x.row(`^ \*api`)
	x.row(`\*web`)
	x.press("x")
	x.shows("2 VMs: stopped")
	x.lacks("marked")
	h.states("api=stopped", "db=running", "web=stopped")
	x.press("a", "s")
	x.shows("3 VMs: 1 failed", "no room at the inn")
	x.row(`web +failed: starting th`)
	h.states("api=running", "db=running", "web=failed")
	x.press("2")
	x.row(`start +web +failed after`)
	x.row(`^ +hint: see what is known with .banger vm show web`)
	x.press("a", "d")
	x.shows("Delete 3 VMs and their disks?", "api, db, web")
	x.press("y")
	x.shows("3 VMs: deleted", "No VMs yet")
	h.states()
	x.quits()
}

// Filter and order of the list; neither touches a VM.
func TestFilterAndSort(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "api", "--label", "team=blue", "--memory", "512M")
	h.banger("vm", "create", "-q", "--name", "web", "--memory", "2G")
	h.banger("vm", "create", "-q", "--name", "worker", "--no-start")
	x := h.tui(80, 24)
	x.row(`^  web +running +50%`)
	order := func(want ...string) {
		t.Helper()
		x.until(fmt.Sprint("the order ", want), func(s string) bool {
			var got []string
			for _, m := range regexp.MustCompile(`(?m)^[> ][* ](api|web|worker) `).FindAllStringSubmatch(s, -1) {
				got = append(got, m[1])
			}
			return slices.Equal(got, want)
		})
	}
	order("api", "web", "worker")
	x.press("T")
	order("worker", "web", "api")
	x.press("t") // state
	x.shows("STATE▾")
	order("api", "web", "worker")
	x.press("t", "t") // CPU, memory
	x.shows("MEMORY▾")
	order("web", "api", "worker")
	x.press("t") // age
	order("worker", "web", "api")
	x.press("t", "/", "W")
	order("web", "worker")
	x.press("o", "r")
	order("worker")
	x.golden("filter-80x24")
	x.press("enter", "esc")
	order("api", "web", "worker")
	x.press("/", "blue run")
	order("api")
	x.press("ctrl+u", "nothing has this")
	x.shows("No VM has these words.")
	x.press("esc")
	order("api", "web", "worker")
	x.quits()
	h.states("api=running", "web=running", "worker=stopped")
}

// The stages of an operation that runs, with how far it is; it can be cancelled.
func TestStages(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "first") // how many stages a create has is known from the last
	if err := h.world.SetFaults("otter hold\n"); err != nil {
		t.Fatal(err)
	}
	x := h.tui(80, 24)
	x.row(`^> first +running +50%`)
	x.press("n")
	x.shows("[generated")
	x.press("otter", "enter")
	x.row(`^> otter +starting the machine`)
	x.row(`create +█+░+ \d/\d, `)
	x.row(`✓ making the system disk`)
	x.golden("stages-80x24")
	x.press("2")
	x.row(`create +otter +█+░+ \d/\d`)
	x.row(`⠋|⠙|⠹|⠸|⠼|⠴|⠦|⠧|⠇|⠏`)
	x.golden("stages-operations-80x24")
	x.press("c")
	x.row(`create +otter +cancelled after`)
	x.row(`^> first`)
	h.states("first=running") // what the create did was undone
	x.press("n")
	x.shows("[generated")
	x.press("otter", "enter")
	x.row(`^> otter +starting the machine`)
	if err := h.world.SetFaults(""); err != nil {
		t.Fatal(err)
	}
	x.row(`^> otter +running`)
	h.states("first=running", "otter=running")
	x.quits()
}

// The log follows, over a stop and a start, and nothing in it reaches the terminal but text.
func TestLog(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	if err := h.world.SetFaults("otter console Linux version 6.12\n"); err != nil {
		t.Fatal(err)
	}
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +running`)
	x.press("3")
	x.shows("[3 Log]", "Linux version 6.12")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := h.c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Id: "otter"})
	if err != nil {
		t.Fatal(err)
	}
	guest, err := os.OpenFile(r.GetVm().GetLog(), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	from := x.written()
	fmt.Fprint(guest, "evil \x1b]0;owned\x07\x1b[31mred\x1b[2J\x9b5n\u202e text\r\n")
	x.shows("evil red5n text")
	if sent := x.since(from); strings.Contains(sent, "owned") || strings.Contains(sent, "\x1b[2J") || strings.Contains(sent, "\x1b[31m") || strings.Contains(sent, "\u202e") {
		t.Errorf("a guest's own sequences reached the terminal: %q", sent)
	}
	for i := range 50 {
		fmt.Fprintf(guest, "line %d\n", i)
	}
	x.shows("line 49")
	x.press("z")
	x.shows("line 49", "line 30")
	x.press("pgup")
	x.shows("line 25")
	x.lacks("line 49")
	fmt.Fprintln(guest, "more")
	x.press("end")
	x.shows("more", "line 49")
	x.golden("log-80x24")
	x.press("z", "x")
	x.row(`^> otter +stopped`)
	x.press("s")
	x.row(`^> otter +running`)
	x.until("the next start's console", func(s string) bool {
		i := strings.LastIndex(s, "banger: start ")
		return i > 0 && strings.Contains(s[i:], "Linux version 6.12")
	})
	x.quits()
}

// SSH has the terminal, and gives it back.
func TestSSH(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +running`)
	from := x.written()
	x.press("e")
	x.shows("Back from otter.")
	x.row(`^> otter +running`)
	sent := x.since(from)
	if at := strings.Index(sent, "welcome"); at < 0 || !strings.Contains(sent[:at], "\x1b[?1049l") || !strings.Contains(sent[at:], "\x1b[?1049h") {
		t.Errorf("the guest's shell was not shown on the terminal's own screen: %q", sent)
	}
	// The list is live again, and has keys.
	h.banger("vm", "stop", "otter")
	x.row(`^> otter +stopped`)
	x.press("s")
	x.row(`^> otter +running`)
	x.quits()
}

// An ssh that cannot be run says why, and is not drawn over before that was read.
func TestSSHThatFails(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24, "PATH=/nonexistent")
	x.row(`^> otter +running`)
	x.press("e")
	x.shows("the system's SSH client is not installed", "Press Enter to go back")
	x.press("enter")
	x.shows("the session ended with 7")
	x.row(`^> otter +running`)
	x.quits()
}

// A port of a guest is opened by a key: it answers on this host, and the browser gets its address.
func TestPorts(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "web")
	bin := filepath.Join(h.work, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	opened := filepath.Join(h.work, "opened")
	if err := os.WriteFile(filepath.Join(bin, "xdg-open"), []byte("#!/bin/sh\necho \"$@\" > "+opened+".new && mv "+opened+".new "+opened+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	x := h.tui(80, 24, "BROWSER=something", "PATH="+bin+":"+os.Getenv("PATH"))
	x.shows("8080*")
	x.press("o") // there are two web ports: which one is asked
	x.shows("Enter opens the port under the cursor.", "http 200 Otters & friends")
	x.golden("ports-80x24")
	x.press("down", "down", "enter")
	x.row(`Port 8080 of web: http://127\.0\.0\.1:\d+/, in your browser`)
	url := regexp.MustCompile(`http://127\.0\.0\.1:\d+/`).FindString(x.screen())
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if page, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(page), "Otters") {
		t.Errorf("%s: %q, %v", url, page, err)
	}
	x.golden("ports-opened-80x24")
	deadline := time.Now().Add(patience)
	for {
		b, err := os.ReadFile(opened)
		if err == nil {
			if strings.TrimSpace(string(b)) != url {
				t.Errorf("the browser got %q", b)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no browser was started")
		}
		time.Sleep(10 * time.Millisecond)
	}
	// What listens for the guest alone is reached as well; UDP is not.
	x.press("up", "enter")
	x.shows("Port 5432 of web: 127.0.0.1:")
	x.press("end", "enter")
	x.shows("Port 53 is UDP")
	x.quits()
	if resp, err := http.Get(url); err == nil {
		_ = resp.Body.Close()
		t.Error("the port is open although nobody looks any more")
	}
}

// The daemon goes and comes back: that is said, VMs are shown as they were, and then as they are.
func TestDaemonGoesAndComesBack(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +running +50%`)
	pids := install.Daemons(h.work)
	if len(pids) != 1 {
		t.Fatalf("daemons: %v", pids)
	}
	if err := fakeinstall.End(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	x.shows("The daemon is gone; VMs run on.", "no daemon")
	x.golden("gone-80x24")
	if pids := install.Daemons(h.work); len(pids) > 0 {
		t.Fatalf("looking at it started a daemon: %v", pids)
	}
	x.press("x")
	h.banger("vm", "stop", "otter") // starts one
	x.shows("The daemon is back.")
	x.row(`^> otter +stopped`)
	x.press("s")
	x.row(`^> otter +running +50%`)
	h.states("otter=running")
	// Once more, stopped politely and started by the key.
	h.banger("daemon", "stop")
	x.shows("The daemon is gone; VMs run on.")
	x.press("D")
	x.row(`^> otter +running +50%`)
	x.lacks("no daemon")
	h.states("otter=running")
	x.quits()
}

// The pictures in the documentation, as text and as a drawing, are a screen that there was, but for the name of what the
// machines are.
func TestPicture(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "buildbox", "--memory", "4G")
	h.banger("vm", "create", "-q", "--name", "calm-otter")
	h.banger("vm", "create", "-q", "--name", "web-1", "--no-start")
	if err := h.world.SetFaults("web-2 hold\n"); err != nil {
		t.Fatal(err)
	}
	x := h.tui(80, 24)
	x.row(`^  calm-otter +running +50%`)
	x.press("n")
	x.shows("[generated")
	x.press("web-2", "enter")
	x.row(`^> web-2 +starting the machine`)
	x.row(`create +█+░+ \d/\d, `)
	x.golden("picture-80x24")
	const drawing = "../../docs/tui.svg"
	const page, begin, end = "../../docs/tui.md", "<!-- picture -->\n```text\n", "```\n<!-- picture end -->"
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(b), begin)
	have, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no place for the picture", page)
	}
	if *update {
		drawn := strings.ReplaceAll(x.screen(), "fake tcg", "qemu kvm")
		svg := strings.ReplaceAll(x.svg(), "fake tcg", "qemu kvm")
		if err := errors.Join(os.WriteFile(page, []byte(before+begin+drawn+end+after), 0o644), os.WriteFile(drawing, []byte(svg), 0o644)); err != nil {
			t.Fatal(err)
		}
		return
	}
	svg, err := os.ReadFile(drawing)
	if err != nil {
		t.Fatal(err)
	}
	text, looks := readSVG(string(svg))
	_, now := readSVG(x.svg())
	if diff := cmp.Diff(now, looks); diff != "" {
		t.Errorf("the colours of %s (-want +got):\n%s", drawing, diff)
	}
	want, err := os.ReadFile("testdata/picture-80x24.txt")
	if err != nil {
		t.Fatal(err)
	}
	for where, shown := range map[string]string{page: have, drawing: text} {
		if got := strings.ReplaceAll(scrub(shown), "qemu kvm", "fake tcg"); got != string(want) {
			t.Errorf("the picture in %s (-want +got); go test ./test/tui -run TestPicture -update draws it:\n%s", where, cmp.Diff(string(want), got))
		}
	}
}

// Images come and go while one looks; VMs are made of the one under the cursor, and it is deleted after a question.
func TestImages(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--no-start", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +stopped`)
	x.press("6", "tab")
	x.row(`^> default +\S+ +default .* for 1 VM`)
	tree := filepath.Join(h.work, "tree", "sbin")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "init"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(h.work, "root.ext4")
	mke2fs := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", filepath.Dir(tree), root, "8M")
	mke2fs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mke2fs.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	h.banger("image", "register", "--name", "my-own", "--rootfs", root)
	x.row(`^  my-own +8M .* for 0 VMs`)
	x.golden("images-80x24")
	x.press("down", "enter")
	x.row(`Image +\[my-own +\]  2 of 2`)
	x.press("cub", "enter")
	x.row(`^> cub +running`)
	if v := h.vms()["cub"]; v.GetImage() != "my-own" {
		t.Errorf("made of %q", v.GetImage())
	}
	x.press("tab", "d")
	x.shows("Delete the image my-own?")
	x.press("y")
	x.shows("the image is in use by cub")
	h.banger("vm", "delete", "cub")
	x.row(`my-own .* for 0 VMs`)
	x.press("d")
	x.shows("Delete the image my-own?")
	x.press("y")
	x.shows("my-own: deleted")
	x.lacks("my-own  ")
	if list := h.banger("image", "list"); strings.Contains(list, "my-own") {
		t.Errorf("the daemon has it still:\n%s", list)
	}
	h.states("otter=stopped")
	x.quits()
}

// Signals end it in order, and so does a terminal that is closed.
func TestEnds(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--no-start", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter`)
	if err := x.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	x.ends(0)
	x.restored()
	x = h.tui(80, 24)
	x.row(`^> otter`)
	x.press("d") // no key of a question's but its own
	x.shows("Delete otter")
	x.press("ctrl+c")
	x.lacks("Delete otter")
	x.press("ctrl+c")
	x.ends(0)
	x.restored()
	x = h.tui(80, 24)
	x.row(`^> otter`)
	if err := x.pty.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-x.ended:
	case <-time.After(patience):
		t.Error("it goes on without a terminal")
	}
	h.states("otter=stopped")
}

// Ctrl-Z gives the terminal to the shell, and fg takes it back; without a shell it does nothing.
func TestSuspend(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +running +50%`)
	x.press("ctrl+z")
	x.shows("There is no shell to go back to.")
	x.quits()
	x = h.terminal(80, 24, []string{"bash", "--norc", "--noprofile", "-i"}, "PS1=prompt> ", "HISTFILE=")
	x.shows("prompt>")
	x.press("banger tui", "enter")
	x.row(`^> otter +running +50%`)
	x.press("ctrl+z")
	x.shows("Stopped", "banger tui")
	x.row(`^prompt> *$`) // the shell reads what is typed from here on
	h.banger("vm", "stop", "otter")
	x.press("fg", "enter")
	x.row(`^> otter +stopped`)
	x.press("s")
	x.row(`^> otter +running +50%`)
	x.press("q")
	x.restored()
	h.states("otter=running")
}

// A daemon that does not speak with this program: said, with what to type.
func TestSkew(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--no-start", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter`)
	x.shows("on the host") // its details are there
	h.banger("daemon", "stop")
	x.shows("The daemon is gone")
	newer := *h
	newer.env = append(slices.Clone(h.env), "BANGER_TEST_API_REVISION=99")
	if code, out := newer.fails("vm", "list"); code != 7 { // starts it, and is refused as well
		t.Fatalf("exit code %d: %s", code, out)
	}
	x.shows("no daemon", "D tries again")
	x.golden("skew-80x24")
	x.press("D")
	x.press("4")
	x.row(`upgrade`) // all of it
	x.golden("skew-events-80x24")
	x.quits()
}

// Without colours everything is told by words and marks.
func TestNoColor(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24, "NO_COLOR=1")
	x.row(`^> otter +running +50%`)
	for _, k := range []string{"2", "3", "4", "5", "6", "1", "?"} {
		x.press(k)
	}
	x.shows("make a VM")
	x.press("esc")
	x.lacks("make a VM")
	x.press("d")
	x.shows("Delete otter")
	x.press("n")
	x.quits()
	colour := regexp.MustCompile(`\x1b\[[0-9;:]*m`)
	for _, sgr := range colour.FindAllString(x.since(0), -1) {
		for _, p := range strings.FieldsFunc(strings.Trim(sgr, "\x1b[m"), func(r rune) bool { return r == ';' }) {
			if len(p) > 1 && p != "22" && p != "24" && p != "27" {
				t.Fatalf("a colour was sent: %q", sgr)
			}
		}
	}
	if !strings.Contains(x.since(0), "\x1b[7m") {
		t.Error("the cursor is told by nothing: no reverse was sent")
	}
}

// All that can be pointed at.
func TestMouse(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	for _, name := range []string{"api", "db", "web"} {
		h.banger("vm", "create", "-q", "--no-start", "--name", name)
	}
	x := h.tui(80, 24)
	x.row(`^> api`)
	x.mouse(0, 10, 4)
	x.row(`^> web`)
	x.mouse(64, 10, 4) // wheel up
	x.row(`^> api`)
	x.mouse(0, 1, 3) // a mark
	x.row(`^>\*db`)
	x.mouse(0, 3, 1) // the title of the column
	x.shows("NAME▴")
	x.row(`^  api`)
	x.mouse(0, 36, 10) // a tab
	x.shows("[4 Events]")
	x.mouse(0, 15, 10)
	x.shows("[2 Operations]")
	x.mouse(0, 10, 13)
	x.row(`^> create +`)
	x.quits()
}

// Any size, and back; what is too small says so.
func TestResize(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--name", "otter")
	x := h.tui(80, 24)
	x.row(`^> otter +running +50%`)
	x.resize(60, 12) // no room for a pane: list or pane
	x.lacks("Operations")
	x.golden("list-60x12")
	x.press("tab")
	x.shows("Operations", "3 Log")
	x.golden("pane-60x12")
	x.press("tab")
	x.resize(30, 5)
	x.shows("banger needs 40 x 10")
	x.resize(200, 50)
	x.row(`│ state +running`)
	x.golden("otter-200x50")
	x.press("?")
	x.shows("make a VM")
	x.golden("help-200x50")
	x.resize(80, 24)
	x.golden("help-80x24")
	x.press("end")
	x.shows("leave; VMs and operations go on")
	x.press("esc")
	x.row(`^> otter +running +50%`)
	x.quits()
}

// What is drawn by differences is what would be drawn anew, whatever was on the screen before.
func TestDrawnAsAnew(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	for _, name := range []string{"api", "database-of-everything", "web"} {
		h.banger("vm", "create", "-q", "--no-start", "--name", name, "--label", "made="+name)
	}
	x := h.tui(80, 24)
	x.row(`^> api`)
	x.press("2") // details and the log change when they are answered
	ages := regexp.MustCompile(` +\d+[sm]\b`)
	text := func(s string) string { return ages.ReplaceAllString(s, " #") }
	random := rand.New(rand.NewPCG(1, 2))
	sizes := [][2]int{{80, 24}, {200, 50}, {60, 12}, {149, 30}, {150, 30}, {41, 11}, {100, 40}}
	some := []string{"2", "4", "5", "6", "z", "tab", "up", "down", "space", "a", "t", "T", "end", "home", "pgdown"}
	for round := range 25 {
		if round%3 == 0 {
			// Something is being drawn at that moment.
			x.press("4", "end", "2", "down", "down", "up", "z", "z")
			size := sizes[random.IntN(len(sizes))]
			x.resize(size[0], size[1])
		}
		for range 4 {
			x.press(some[random.IntN(len(some))])
		}
		// The help and back: its text comes after all that was asked for before.
		x.press("?")
		x.shows("make a VM")
		x.press("q")
		x.lacks("make a VM")
		was := x.written()
		drawn := text(x.screen())
		x.press("\x0c")
		x.until("itself as if drawn anew", func(string) bool { return strings.Contains(x.since(was), "\x1b[2J") })
		x.until("the same, drawn anew, in round "+strconv.Itoa(round)+":\n"+drawn, func(s string) bool { return text(s) == drawn })
	}
	x.quits()
}

// With 200 VMs of which many change at once the screen is only ever written over, never emptied, and little is
// sent for little.
func TestManyVMs(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	h.banger("vm", "create", "-q", "--no-start", "--name", "vm-000")
	const n = 200
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	defer cancel()
	each := func(do func(name string) error) {
		t.Helper()
		slots, failed := make(chan struct{}, 8), make(chan error, n)
		for i := 1; i < n; i++ {
			slots <- struct{}{}
			go func() {
				defer func() { <-slots }()
				failed <- do(fmt.Sprintf("vm-%03d", i))
			}()
		}
		for range n - 1 {
			if err := <-failed; err != nil {
				t.Fatal(err)
			}
		}
	}
	x := h.tui(80, 24)
	x.waits = 5 * patience // a hundred starts take their time on a busy machine
	x.row(`^> vm-000 +stopped`)
	start := x.written()
	each(func(name string) error {
		_, err := h.c.VMs.CreateVM(ctx, &bangerv1.CreateVMRequest{Name: name, NoStart: true, DiskBytes: 512 << 20, SystemBytes: 512 << 20})
		return err
	})
	x.shows("200 VMs, 0 running")
	x.press("end")
	x.row(`^> vm-199 +stopped`)
	x.press("home", "/", "vm-1", "enter", "a", "s") // a hundred starts at once
	x.shows("100 VMs: running", "200 VMs, 100 running")
	x.row(`^> vm-100 +running +50%`)
	x.golden("many-80x24")
	x.resize(200, 50)
	x.row(`vm-140 +running +50%`)
	x.resize(80, 24)
	x.lacks("│")
	x.press("a", "x")
	x.shows("100 VMs: stopped", "200 VMs, 0 running")
	sent := x.since(start)
	if c := strings.Count(sent, "\x1b[2J"); c > 4 { // two resizes
		t.Errorf("the screen was emptied %d times", c)
	}
	t.Logf("%d bytes were sent for 199 creates, 100 starts, 100 stops", len(sent))
	// One change among 200 is one line.
	from := x.written()
	h.banger("vm", "start", "vm-101")
	x.row(`vm-101 +running`)
	if sent := x.since(from); len(sent) > 4000 {
		t.Errorf("%d bytes for one start", len(sent))
	}
	x.quits()
}

// Not a terminal: said, not drawn.
func TestNeedsATerminal(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	code, out := h.fails("tui")
	if code != 2 || !strings.Contains(out, "banger tui needs a terminal") || !strings.Contains(out, "hint: banger vm list") {
		t.Errorf("exit code %d: %s", code, out)
	}
}
