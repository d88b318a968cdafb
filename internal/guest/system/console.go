package system

import (
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Say writes to the console and waits until it is written: the machine may end right after.
func Say(text string) {
	if err := sayOn("/dev/console", text); err == nil {
		return
	}
	if err := sayOn(NewRoot+"/dev/console", text); err == nil {
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
