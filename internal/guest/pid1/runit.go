package pid1

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// RunitEnd is runit's last script (runit(8), stage 3), in whose place this program is put: after it runit, which is process 1, ends
// the machine at once and leaves what init joined mounted, so every disk dirty. And as soon as runit's services are gone it goes there, so
// nobody else has the time to unmount.
const RunitEnd = "/etc/runit/3"

// runitOwnEnd is where the distribution's script is seen then.
const runitOwnEnd = system.RunDir + "/runit-3"

// runitEndTime bounds the distribution's script: Debian's waits 25 s for services, Void's seven and more.
const runitEndTime = 90 * time.Second

// isRunit says whether an init, by its path with symlinks resolved, is runit's.
func isRunit(init string) bool {
	name := filepath.Base(init)
	return name == "runit-init" || name == "runit"
}

// takeRunitEnd puts this program, the file in the initramfs that runs now, in place of runit's last script.
func (b *booter) takeRunitEnd() error {
	at, err := b.rootFS.open(RunitEnd, unix.O_PATH, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // runit without stages: the agent stops it as any other init
	}
	if err != nil {
		return err
	}
	defer at.Close()
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(system.RunDir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(runitOwnEnd, nil, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(magicPath(at), runitOwnEnd, "", unix.MS_BIND, ""); err != nil {
		return system.PathError("bind", RunitEnd, err)
	}
	if err := unix.Mount(self, magicPath(at), "", unix.MS_BIND, ""); err != nil {
		return system.PathError("bind", RunitEnd, err)
	}
	b.state.Runit = b.initPath
	return nil
}

// EndRunit is what this program does as runit's last script: the distribution's own first, then it ends what is left, leaves clean disks
// and ends the machine. It does not return, because runit would act.
func EndRunit() {
	ctx, cancel := context.WithTimeout(context.Background(), runitEndTime)
	defer cancel()
	own := exec.CommandContext(ctx, runitOwnEnd)
	own.Args[0] = RunitEnd
	own.Stdin, own.Stdout, own.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := own.Run(); err != nil {
		system.Say(fmt.Sprintf("banger: shutdown: %s: %v\n", RunitEnd, err)) // what is left to do is done all the same
	}
	_ = unix.Kill(-1, unix.SIGKILL) // all but process 1 and this one: whoever survived keeps the root busy
	if err := system.UnmountDisks(); err != nil {
		system.Say(fmt.Sprintf("banger: shutdown: %v\n", err))
	}
	// As runit itself decides (runit(8)).
	info, err := os.Stat("/etc/runit/reboot")
	system.Say(fmt.Sprintf("banger: shutdown: %v\n", system.Off(err == nil && info.Mode().Perm()&0o100 != 0)))
	select {}
}
