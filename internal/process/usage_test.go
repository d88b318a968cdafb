package process

import (
	"math"
	"os"
	"testing"
	"time"
)

func TestUsageOf(t *testing.T) {
	before, err := UsageOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if before.Memory < 1<<20 || before.Memory > 1<<34 {
		t.Errorf("%d bytes", before.Memory)
	}
	deadline := time.Now().Add(10 * time.Second)
	for after := before; after.CPU < before.CPU+20*time.Millisecond; {
		if time.Now().After(deadline) {
			t.Fatalf("a loop costs nothing: %v, then %v", before.CPU, after.CPU)
		}
		for x := 0.0; x < 1e6; x++ {
			_ = math.Sqrt(x)
		}
		if after, err = UsageOf(os.Getpid()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := UsageOf(1 << 30); err == nil { // above any pid
		t.Error("a process that does not exist costs something")
	}
}
