package agentd

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// replyTime is what the answer has to leave before everything ends.
const replyTime = 200 * time.Millisecond

// stopRunit tells runit to end: `init 0` or `init 6` (runit-init(8)).
func stopRunit(ctx context.Context, init string, reboot bool) error {
	level := "0"
	if reboot {
		level = "6"
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, init, level).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", init, level, err, strings.TrimSpace(string(out)))
	}
	// runit forgets the signal that it gets while it boots (stage 1), though not what it stands for: it is given again
	// until the services have gone, and this program with them.
	go func() {
		for range time.Tick(time.Second) {
			_ = unix.Kill(1, unix.SIGCONT)
		}
	}()
	return nil
}

// stopWithoutSystemd ends the machine where no systemd does.
func stopWithoutSystemd(ownInit, reboot bool) {
	time.Sleep(replyTime) // the host reads the answer of the call that brought us here
	if ownInit {
		// It starts again what ends; and it knows the signal that the image's command wants.
		signal := system.SignalPowerOff
		if reboot {
			signal = system.SignalReboot
		}
		if unix.Kill(1, signal) == nil {
			return
		}
	}
	system.Stop(reboot)
}
