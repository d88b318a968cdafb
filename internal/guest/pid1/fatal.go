package pid1

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

var dying sync.Mutex // the limit of a step and its error may come together: one line is enough

// fatal says on the console why the guest cannot boot, leaves clean disks, and ends the machine.
func fatal(stage string, err error) {
	dying.Lock()
	say(boot.FatalLine(stage, err.Error()))
	_ = unix.Kill(-1, unix.SIGKILL) // the agent, if it was started; nothing else runs
	if err := system.UnmountDisks(); err != nil {
		say(fmt.Sprintf("banger: %v\n", err))
	}
	say(fmt.Sprintf("banger: %v\n", system.Off(false)))
	// Only the kernel's panic is left; panic=-1 makes that a reset.
	os.Exit(1)
}

// say writes to the console and waits until it is written: the machine may end right after.
func say(text string) {
	if err := sayOn("/dev/console", text); err == nil {
		return
	}
	if err := sayOn(newRoot+"/dev/console", text); err == nil {
		return
	}
	// No console at all: the kernel's log reaches one if there is one. 0 is shown on a quiet one too.
	_ = os.WriteFile("/dev/kmsg", []byte("<0>"+text), 0)
}

func sayOn(console, text string) error {
	f, err := os.OpenFile(console, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.ReplaceAll("\n"+text, "\n", "\r\n"))
	const waitOutput = 1 // TCSBRK with an argument other than 0 is tcdrain(3)
	return errors.Join(err, unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, waitOutput), f.Close())
}
