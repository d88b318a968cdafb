package qemu

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain is also the daemon that TestDaemonKilled kills.
func TestMain(m *testing.M) {
	if when := os.Getenv("QEMU_TEST_DAEMON"); when != "" {
		crash(when, os.Getenv("QEMU_TEST_DIR"))
	}
	goleak.VerifyTestMain(m)
}
