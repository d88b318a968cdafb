// Command banger-vsock-agent is the program banger puts into a guest. One static binary leads all
// its lives, told apart by what it was started as: init of the initrd (process 1), systemd's
// shutdown program (process 1, argv[0] /shutdown), runit's last script (argv[0] /etc/runit/3), the agent's supervisor, and
// the agent; and, in an image without an init, the init and the supervisor of the image's command.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"git.thaloco.com/thaloco/banger/internal/guest/agentd"
	"git.thaloco.com/thaloco/banger/internal/guest/containerinit"
	"git.thaloco.com/thaloco/banger/internal/guest/pid1"
	"git.thaloco.com/thaloco/banger/internal/version"
)

func main() {
	name := filepath.Base(os.Args[0])
	var err error
	switch {
	case os.Getpid() == 1 && name == "shutdown":
		verb := "poweroff"
		if len(os.Args) > 1 {
			verb = os.Args[1]
		}
		pid1.Shutdown(verb)
	case os.Getpid() == 1 && name == pid1.OwnInitName:
		containerinit.Run()
	case os.Args[0] == pid1.RunitEnd:
		pid1.EndRunit()
	case os.Getpid() == 1:
		pid1.Boot(os.Args[1:])
	case name == containerinit.CommandName:
		err = containerinit.RunCommand()
	case name == pid1.SupervisorName:
		err = pid1.Supervise()
	case len(os.Args) == 2 && os.Args[1] == "--version":
		fmt.Println(version.String())
	case os.Getenv(pid1.RestartsVariable) != "":
		err = runAgent()
	default:
		err = errors.New("this program runs inside a banger VM; it is started by the VM's kernel")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "banger-vsock-agent: %v\n", err)
		os.Exit(1)
	}
}

func runAgent() error {
	restarts, err := strconv.Atoi(os.Getenv(pid1.RestartsVariable))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := agentd.Run(ctx, version.String(), restarts); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
