package agentd

import (
	"bytes"
	"os"
	"sync"
)

// ordinary is the standing towards the OOM killer of a process that nobody gave another (proc_pid_oom_score_adj(5)).
const ordinary = "0"

// forks lets one child be made at a time: the score is the whole process's.
var forks sync.Mutex

// unprotected calls start, which makes a child, with the ordinary standing towards the OOM killer. The
// agent's own would make what it starts unkillable for a guest out of memory, and a child that is given
// another afterwards has run until then, and may have children. The agent itself can be killed for as long as a fork
// takes; it would be started again.
func unprotected(start func() error) error {
	const path = "/proc/self/oom_score_adj"
	forks.Lock()
	defer forks.Unlock()
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
