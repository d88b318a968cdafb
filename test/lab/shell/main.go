// Command shell enters the lab (`make lab-shell`): it boots the emulated host with a checkout of this source, its
// programs and its runtime bundle in ~/banger, and runs a shell or a command in it. The host goes away with it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"git.thaloco.com/thaloco/banger/test/lab"
)

func main() {
	user := flag.String("user", "user", "who enters: root, or user (in group kvm, may use sudo)")
	memory := flag.Int("memory", 6144, "the host's memory in `MiB`")
	disk := flag.String("disk", "", "a `file` to keep the host's disk in; made if it is missing. Else it is thrown away")
	var content lab.Content
	flag.BoolVar(&content.Suites, "tests", false, "bring the test programs along, in /payload/bin")
	flag.BoolVar(&content.Go, "go", false, "bring Go along")
	flag.BoolVar(&content.Fresh, "fresh", false, "bring Go and the caches of the builds along instead of programs and bundle")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: shell [flags] [command...]")
		flag.PrintDefaults()
	}
	flag.Parse()
	// On a terminal Ctrl-C is the session's; the others end everything.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	code, err := enter(ctx, *user, *memory, *disk, content, flag.Args())
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

func enter(ctx context.Context, user string, memory int, disk string, content lab.Content, command []string) (code int, err error) {
	host, err := filepath.EvalSymlinks(lab.HostDir)
	if err != nil {
		return 0, fmt.Errorf("no lab: make lab builds it (%w)", err)
	}
	dir, err := lab.Scratch("dist/lab")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	began := time.Now()
	say := func(what string) {
		fmt.Fprintf(os.Stderr, "  %s: done in %.1fs\n", what, time.Since(began).Seconds())
		began = time.Now()
	}
	payload, err := lab.MakePayload(ctx, ".", dir, content)
	if err != nil {
		return 0, err
	}
	say("packing programs and bundle")
	if disk != "" {
		if err := lab.CopyDisk(ctx, host, disk); err != nil {
			return 0, err
		}
	}
	log, err := os.Create(filepath.Join(dir, "console.log"))
	if err != nil {
		return 0, err
	}
	defer log.Close()
	m, err := lab.Boot(ctx, lab.Options{Host: host, Payload: payload, Disk: disk, Memory: memory, Console: log})
	if err != nil {
		return 0, err
	}
	defer m.Kill()
	say("booting the lab")
	if disk != "" {
		defer func() { // written out before the power goes
			_, syncErr := m.Output(context.WithoutCancel(ctx), "root", "sync")
			err = errors.Join(err, syncErr)
		}()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-m.Lost():
			cancel(m.Err())
		case <-ctx.Done():
		}
	}()
	argv := m.SSH(user, command...)
	if len(command) == 0 {
		argv = append(m.SSH(user), "-t", "cd banger && exec bash -l")
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}
