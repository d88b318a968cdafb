// Command man writes banger's manual pages into a directory (`make shell-files`). It is no command of banger's: what renders pages
// takes a fifth of the time that any other command needs to start.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra/doc"

	"git.thaloco.com/thaloco/banger/internal/cli"
	"git.thaloco.com/thaloco/banger/internal/version"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: man DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root := cli.Commands()
	root.DisableAutoGenTag = true // the same version gives the same pages
	return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "banger " + version.String(), Manual: "banger"}, dir)
}
