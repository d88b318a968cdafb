package console

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/vmm"
)

const (
	// quoted is how much of a log an error quotes, in bytes.
	quoted = 2048
	// endTail is where a guest's last words are looked for, in bytes: the kernel's own may follow.
	endTail = 16 << 10
)

// StartMark begins the line of a log that tells one start's output from the ones before. A guest can
// print it, too: then its own end is explained by less.
const StartMark = "banger: start "

// MarkStart appends the line. The daemon that reads it may be another one than that which wrote it.
func MarkStart(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "\n%s%s\n", StartMark, time.Now().UTC().Format(time.RFC3339))
	return errors.Join(err, f.Close())
}

// SinceStart leaves out what earlier starts wrote.
func SinceStart(log []byte) []byte {
	i := bytes.LastIndex(log, []byte("\n"+StartMark))
	if i < 0 {
		return log
	}
	_, rest, _ := bytes.Cut(log[i+1:], []byte("\n"))
	return rest
}

// Size of a log in bytes, 0 if there is none.
func Size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// Quote is what a log says since it had that size, in the form in which an error ends with it.
func Quote(path string, from int64) string {
	b, err := last(path, from, quoted)
	if text := strings.ToValidUTF8(string(bytes.TrimSpace(b)), "?"); err == nil && text != "" {
		return ": " + text
	}
	return ", and said nothing"
}

// End tells how the guest of the log's last start said that it ended: vmm.GuestShutdown,
// vmm.GuestReset, or "" if it did not say. Only what was written since the log had the size from
// counts; 0 for all of it. A log that may have been cut back since then is searched by its mark alone.
func End(path string, from int64) string {
	if Size(path) >= Keep { // less is never left by a cut
		from = 0
	}
	b, err := last(path, from, endTail)
	if err != nil {
		return ""
	}
	b = SinceStart(b)
	// Ours before the kernel's: a machine without a power switch is told to restart either way.
	if verb, ok := boot.EndVerb(b); ok {
		return map[string]string{boot.EndPowerOff: vmm.GuestShutdown, boot.EndReboot: vmm.GuestReset}[verb]
	}
	switch { // kernel/reboot.c, at a level that a quiet console shows as well
	case bytes.Contains(b, []byte("reboot: Power down")):
		return vmm.GuestShutdown
	case bytes.Contains(b, []byte("reboot: Restarting system")), bytes.Contains(b, []byte("Kernel panic - ")):
		return vmm.GuestReset // the command line turns a panic into a reset
	}
	return ""
}

// last reads at most the last n bytes that were written since the log had the size from. A log that
// is smaller by now was cut back meanwhile: then all of it counts.
func last(path string, from, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() < from {
		from = 0
	}
	from = max(from, st.Size()-n)
	return io.ReadAll(io.NewSectionReader(f, from, n))
}
