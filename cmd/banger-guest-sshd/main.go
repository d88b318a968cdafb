// Command banger-guest-sshd is the SSH server of VMs whose image has none. It is put into such an image when that
// is pulled; banger's init starts it there. It is a program of its own, since every guest has the agent's in memory.
package main

import (
	"errors"
	"fmt"
	"os"

	"git.thaloco.com/thaloco/banger/internal/guest/sshd"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == sshd.FilesFlag:
		err = sshd.ServeFiles(os.Stdin, os.Stdout)
	case len(os.Args) == 1:
		err = sshd.Run()
	default:
		err = errors.New("this program takes no arguments; banger's init starts it in a VM")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "banger-guest-sshd: %v\n", err)
		os.Exit(1)
	}
}
