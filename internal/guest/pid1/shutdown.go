package pid1

import (
	"fmt"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// Shutdown is the last program of a stopping guest: systemd has pivoted to system.ShutdownDir, is
// gone, and has left the old root at /oldroot (systemd's INITRD_INTERFACE). It unmounts what init
// joined, which nobody inside the root can, so that every disk is clean, and ends the machine.
func Shutdown(verb string) {
	_ = unix.Kill(-1, unix.SIGKILL) // whoever survived keeps the root busy
	if _, err := system.Mounts(); err != nil {
		_ = unix.Mount("proc", "/proc", "proc", 0, "") // UnmountDisks says what is wrong if this fails
	}
	if err := system.UnmountDisks(); err != nil {
		system.Say(fmt.Sprintf("banger: shutdown: %v\n", err))
	}
	reset := verb == "reboot" || verb == "kexec"
	system.Say(fmt.Sprintf("banger: shutdown: %v\n", system.Off(reset)))
}
