// Command banger is the command line of banger. See internal/cli.
package main

import (
	"os"

	"git.thaloco.com/thaloco/banger/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:])) }
