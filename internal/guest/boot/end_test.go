package boot_test

import (
	"testing"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

func TestEndVerb(t *testing.T) {
	for _, c := range []struct{ name, tail, want string }{
		{"none", "boot messages\n", ""},
		{"power off", "x\r\n" + boot.EndLine(false) + "[  1.0] reboot: Restarting system\n", boot.EndPowerOff},
		{"reboot, as a terminal has it", "\r\nbanger: end: reboot\r\n", boot.EndReboot},
		{"last wins", boot.EndLine(false) + boot.EndLine(true), boot.EndReboot},
		{"not ended", "banger: end: poweroff", ""},
		{"in mid-line", "say banger: end: poweroff\n", ""},
		{"more on the line", "banger: end: poweroff now\n", ""},
		{"unknown verb", "banger: end: never\n", ""},
	} {
		if verb, ok := boot.EndVerb([]byte(c.tail)); verb != c.want || ok != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", c.name, verb, ok, c.want)
		}
	}
}
