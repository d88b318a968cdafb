package agentd

import (
	"bytes"
	"os"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

// ordinary is the standing towards the OOM killer of a process that nobody gave another (proc_pid_oom_score_adj(5)).
const ordinary = "0"

// forks lets one child be made at a time: what is changed for it is the whole process's.
var forks sync.Mutex

// asOthers calls start, which makes a child, while this process is like others in what children inherit: its standing towards the OOM killer,
// which would make what it starts unkillable for a guest out of memory, and that it gets no huge pages. A child that is changed
// afterwards has run until then, and may have children. The agent itself can be killed for as long as a fork
// takes; it would be started again.
func asOthers(start func() error) error {
	const path = "/proc/self/oom_score_adj"
	forks.Lock()
	defer forks.Unlock()
	if small, err := system.SmallPages(); err == nil && small {
		if err := system.SetSmallPages(false); err != nil {
			return err
		}
		defer func() { _ = system.SetSmallPages(true) }() // it was possible before
	}
	own, err := os.ReadFile(path)
	if own = bytes.TrimSpace(own); err != nil || string(own) == ordinary {
		return start() // there is nothing to give back, or no /proc to do it by
	}
	if err := os.WriteFile(path, []byte(ordinary), 0); err != nil {
		return err
	}
	failed := start()
	// Lowering it takes a privilege that the agent has; without, the agent goes on like any other process.
	_ = os.WriteFile(path, own, 0)
	return failed
}
