//go:build mutants

package lifecycle

import "os"

// mutation makes the engine wrong in one way, so that the crash test can be seen to fail. Built
// with the tag mutants only.
//
//	forward-cleanup    Down goes from the first step to the last
//	late-intent        preparing and cleaning are not recorded before the act
//	ignored-preparing  Up takes a step that a crash left half-made for ready
var mutation = os.Getenv("BANGER_MUTATION")
