//go:build !mutants

package lifecycle

// mutation is empty: the engine is as it is written. See mutants.go.
const mutation = ""
