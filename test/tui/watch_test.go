package tui

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"git.thaloco.com/thaloco/banger/test/fakeinstall"
)

// A watch is drawn over itself: it has no more lines than the screen, and none goes on in the next. It goes on over the end
// of the daemon, which it says.
func TestWatch(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	for i := range 30 {
		h.banger("vm", "create", "-q", "--no-start", "--name", fmt.Sprintf("vm-%02d-of-several", i))
	}
	h.banger("vm", "start", "vm-00-of-several", "vm-01-of-several")
	banger := filepath.Join(install.Bin, "banger")
	x := h.terminal(80, 24, []string{banger, "vm", "list", "--watch"})
	x.row(`^… 9 more$`)
	x.row(`^vm-01-of-several +[0-9a-f]+ +running`)
	x.golden("watch-80x24")
	h.banger("vm", "stop", "vm-01-of-several")
	x.row(`^vm-01-of-several +[0-9a-f]+ +stopped`)
	x.resize(200, 50)
	x.row(`^vm-29-of-several`)
	x.golden("watch-200x50")
	x.resize(80, 24)
	x.row(`^… 9 more$`)
	pids := install.Daemons(h.work)
	if len(pids) != 1 {
		t.Fatalf("daemons: %v", pids)
	}
	if err := fakeinstall.End(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	x.shows("banger: the daemon is gone; this goes on when it is back", "hint: any command that needs it starts it")
	h.banger("vm", "start", "vm-01-of-several")
	x.row(`^vm-01-of-several +[0-9a-f]+ +running`)
	x.lacks("the daemon is gone")
	x.golden("watch-80x24")
	x.press("ctrl+c")
	x.restored()

	x = h.terminal(80, 24, []string{banger, "vm", "stats", "--watch"})
	x.row(`^NAME +HOST CPU +MEMORY +CPU +MEM$`) // the bars fit as well
	x.row(`^vm-00-of-several +0% .*[▁▂▃▄▅▆▇█]\nvm-01-of-several .*[▁▂▃▄▅▆▇█]$`)
	x.resize(200, 50)
	x.row(`^NAME +HOST CPU +HOST MEM .* SYSTEM .*UPTIME +CPU +MEM +NET$`)
	x.press("ctrl+c")
	x.restored()

	x = h.terminal(80, 24, []string{banger, "vm", "stats"})
	x.row(`^NAME +HOST CPU +MEMORY +DISK +UPTIME$`)
	x.row(`^vm-00-of-several +0% .*s$`)
	x.ends(0)
	x = h.terminal(80, 24, []string{banger, "vm", "stats", "-o", "wide"})
	x.row(`^NAME +HOST CPU +HOST MEM`)
	x.row(`UPTIME$`)
	x.ends(0)
}

// Progress is one line, however long the name and narrow the terminal: what is drawn again would be left on the screen.
func TestProgressOnANarrowTerminal(t *testing.T) {
	t.Parallel()
	h := newHome(t)
	name := "very-long" + strings.Repeat("-long", 10)
	if err := h.world.SetFaults(name + " hold\n"); err != nil {
		t.Fatal(err)
	}
	x := h.terminal(40, 10, []string{filepath.Join(install.Bin, "banger"), "vm", "create", "--name", name})
	for range 20 { // frames
		<-x.changed
	}
	x.row(`^. very-long[-long]*…$`)
	// A stage that took long on a busy machine has a line of its own.
	if screen := x.screen(); len(regexp.MustCompile(`(?m)^[^✓\n] very-long`).FindAllString(screen, -1)) != 1 {
		t.Errorf("it is drawn beside itself:\n%s", screen)
	}
	x.press("ctrl+c")
	x.shows("banger operation watch")
	if err := h.world.SetFaults(""); err != nil {
		t.Fatal(err)
	}
}
