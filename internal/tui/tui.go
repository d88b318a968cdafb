// Package tui owns the full-screen face of banger: a list of VMs that shows what happens while it happens,
// and the keys that act on them.
//
// It follows the daemon's event stream and polls nothing; what VMs use is streamed for those on the screen
// alone. It decides nothing about VMs: it imports package client and the API, and no use case. What the daemon says
// is made safe to show where it comes in (clean), and so are the lines of a log.
//
// It takes bubbletea for the terminal (input, cell-wise redraws, suspending) and neither bubbles nor lipgloss:
// lipgloss looks at the terminal when the program is loaded, which every other command would pay for, too.
package tui

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"time"

	tea "charm.land/bubbletea/v2"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// Options say what the screen is made on, and with what.
type Options struct {
	// Client acts. It may start the daemon, and does when Run begins and when its user asks for it.
	Client *client.Client
	// Follow looks. It must start none: somebody who stops the daemon must not get it back at once.
	Follow *client.Client
	// SSH is the command that enters a VM, without its terminal.
	SSH func(vmID string) *exec.Cmd
	// Color says whether colours are shown. Without them all is told by words, marks, bold and reverse.
	Color bool
	In    *os.File
	Out   io.Writer
}

// Run shows the screen until its user leaves or ctx ends. The terminal is then as it was. Operations go on in
// the daemon; ports that were opened here are closed.
func Run(ctx context.Context, o Options) error {
	// Not GetStatus alone, which daemons of every revision answer.
	if _, err := o.Client.VMs.GetDefaults(ctx, &bangerv1.GetDefaultsRequest{}); err != nil {
		return err
	}
	status, err := o.Client.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &feeds{ctx: ctx, o: o}
	m := newModel(o, f)
	m.takeStatus(status)
	p := tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(o.In), tea.WithOutput(o.Out))
	f.send = p.Send
	f.all.Go(f.follow)
	_, err = p.Run()
	cancel()
	f.all.Wait()
	if errors.Is(err, tea.ErrInterrupted) || ctx.Err() != nil && errors.Is(err, tea.ErrProgramKilled) {
		return nil // a signal is one way to leave
	}
	return err
}

// session is a program that has the terminal for a while.
type session struct {
	cmd      *exec.Cmd
	in       io.Reader
	out, err io.Writer
	quick    time.Duration // one that fails sooner is waited for: what it said would be gone at once
}

func (s *session) SetStdin(r io.Reader)  { s.in = r }
func (s *session) SetStdout(w io.Writer) { s.out = w }
func (s *session) SetStderr(w io.Writer) { s.err = w }

// Run gives the terminal to the program until it ends.
func (s *session) Run() error {
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = s.in, s.out, s.err
	began := time.Now()
	err := s.cmd.Run()
	if err != nil && time.Since(began) < s.quick {
		_, _ = io.WriteString(s.err, "\nPress Enter to go back to the list.")
		var b [1]byte
		for {
			if n, err := s.in.Read(b[:]); err != nil || n == 1 && (b[0] == '\n' || b[0] == '\r') {
				break
			}
		}
	}
	return err
}
