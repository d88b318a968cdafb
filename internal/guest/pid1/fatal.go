package pid1

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

var dying sync.Mutex // the limit of a step and its error may come together: one line is enough

// fatal says on the console why the guest cannot boot, leaves clean disks, and ends the machine.
func fatal(stage string, err error) {
	dying.Lock()
	system.Say(boot.FatalLine(stage, err.Error()))
	_ = unix.Kill(-1, unix.SIGKILL) // the agent, if it was started; nothing else runs
	if err := system.UnmountDisks(); err != nil {
		system.Say(fmt.Sprintf("banger: %v\n", err))
	}
	system.Say(fmt.Sprintf("banger: %v\n", system.Off(false)))
	// Only the kernel's panic is left; panic=-1 makes that a reset.
	os.Exit(1)
}
