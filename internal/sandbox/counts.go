package sandbox

import (
	"maps"
	"slices"
	"sync"
	"time"

	"git.thaloco.com/thaloco/banger/internal/operation"
)

// OperationBuckets are the upper bounds, in seconds, by which operations are counted by how long they took.
var OperationBuckets = []float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300}

// OperationCount is how many operations of a kind ended in a state since the daemon's start.
type OperationCount struct {
	Kind    operation.Kind
	State   operation.State
	Count   int64
	Seconds float64 // all together
	// Within is, for each of OperationBuckets, how many took no longer.
	Within []int64
}

// operationCounts counts operations as they end. Safe for concurrent use.
type operationCounts struct {
	mu  sync.Mutex
	all map[[2]string]*OperationCount
}

// note takes an operation that may have ended. It is told of each end once.
func (c *operationCounts) note(op operation.Operation) {
	if op.State == operation.Running {
		return
	}
	took := op.FinishedAt.Sub(op.CreatedAt)
	key := [2]string{string(op.Kind), string(op.State)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all = map[[2]string]*OperationCount{}
	}
	n := c.all[key]
	if n == nil {
		n = &OperationCount{Kind: op.Kind, State: op.State, Within: make([]int64, len(OperationBuckets))}
		c.all[key] = n
	}
	n.Count++
	n.Seconds += max(0, took.Seconds())
	for i, bound := range OperationBuckets {
		if took <= time.Duration(bound*float64(time.Second)) {
			n.Within[i]++
		}
	}
}

// OperationCounts are those of this daemon, by kind and state in order.
func (s *Service) OperationCounts() []OperationCount {
	s.counts.mu.Lock()
	defer s.counts.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(s.counts.all), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	out := make([]OperationCount, len(keys))
	for i, key := range keys {
		out[i] = *s.counts.all[key]
		out[i].Within = slices.Clone(out[i].Within)
	}
	return out
}
