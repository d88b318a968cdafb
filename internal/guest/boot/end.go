package boot

import "bytes"

// PowerOffByReboot on the kernel command line says that this machine ends by a reset: Firecracker
// has no power switch, a power-off would hang there, and its VMM exits when the guest resets.
const PowerOffByReboot = "banger.poweroff=reboot"

// endMarker starts the console line with which a guest says how it ends: "banger: end: <verb>". A VMM
// that knows a reset alone cannot tell the two, and whoever was not there when it ended can tell nothing.
const endMarker = "banger: end: "

// The verbs of a guest's end.
const (
	EndPowerOff = "poweroff"
	EndReboot   = "reboot"
)

// EndLine renders the console line of a guest that ends.
func EndLine(reset bool) string {
	if reset {
		return endMarker + EndReboot + "\n"
	}
	return endMarker + EndPowerOff + "\n"
}

// EndVerb finds the last complete line of EndLine in the tail of a console log. The tail may begin and
// end in mid-line and hold any bytes: the guest wrote it.
func EndVerb(tail []byte) (verb string, ok bool) {
	for line := range bytes.Lines(tail) {
		v, found := bytes.CutPrefix(bytes.TrimRight(line, "\r\n"), []byte(endMarker))
		if found && bytes.HasSuffix(line, []byte("\n")) && (string(v) == EndPowerOff || string(v) == EndReboot) {
			verb, ok = string(v), true
		}
	}
	return verb, ok
}
