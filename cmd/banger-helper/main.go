// Command banger-helper is the root helper of one user: it makes that user's bridge network. See
// internal/helper.
package main

import (
	"os"

	"git.thaloco.com/thaloco/banger/internal/helper"
)

func main() { os.Exit(helper.Main(os.Args[1:])) }
