package firecracker

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// guest is what the test program does as a guest's first process, where it has been built for that.
var guest func()

// TestMain is also the guest of TestLinuxConformance, the daemon that TestDaemonKilled kills, and the stand-in of TestStartFails.
func TestMain(m *testing.M) {
	if os.Getpid() == 1 && guest != nil {
		guest()
	}
	if when := os.Getenv("FIRECRACKER_TEST_DAEMON"); when != "" {
		crash(when, os.Getenv("FIRECRACKER_TEST_DIR"))
	}
	if stage := os.Getenv("FIRECRACKER_TEST_STAGE"); stage != "" {
		standIn(stage)
	}
	goleak.VerifyTestMain(m)
}
