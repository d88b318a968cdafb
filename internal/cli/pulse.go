package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// pulseAfter is how long a session is open until its guest is watched: most commands have ended by then.
const pulseAfter = 10 * time.Second

// pulse says on stderr while a session with a guest is open that the guest does not answer: a command in it may take as long as it takes,
// and nothing else tells one that works from one that never will again.
type pulse struct {
	silent atomic.Bool // and that was told
	stop   context.CancelFunc
	done   chan struct{}
}

// watchPulse watches the guest of a session until end. leave says how the session is left, and say prints lines. Where no daemon runs
// (any more) nothing is told: a session may outlive it, and is not to start another.
func (a *app) watchPulse(ctx context.Context, c *client.Client, v *bangerv1.VM, leave string, say func(string)) *pulse {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &pulse{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		select {
		case <-time.After(pulseAfter):
		case <-ctx.Done():
			return
		}
		if running, err := c.Running(ctx); err != nil || !running {
			return
		}
		stream, err := c.VMs.WatchGuest(ctx, &bangerv1.WatchGuestRequest{Id: v.GetId()})
		if err != nil {
			return // a daemon that does not know the call says so in the stream
		}
		defer stream.Close()
		p.follow(a, v.GetName(), leave, say, func() *bangerv1.WatchGuestResponse {
			if !stream.Receive() {
				return nil
			}
			return stream.Msg()
		})
	}()
	return p
}

// follow tells of each state that next gives, until nil.
func (p *pulse) follow(a *app, name, leave string, say func(string), next func() *bangerv1.WatchGuestResponse) {
	for m := next(); m != nil; m = next() {
		// Before it is told: what is told to be left with Ctrl-C is, at once.
		told := p.silent.Swap(m.GetState() == "silent" || m.GetState() == "paused")
		switch m.GetState() {
		case "silent":
			took := a.now().Sub(m.GetSince().AsTime())
			say(a.errorText(fault.New(fault.Timeout, name, "its guest has not answered for %.0f s", took.Seconds()).
				WithHint("wait, leave with %s, or end the VM: banger vm kill %s", leave, name)))
		case "paused":
			say(a.errorText(fault.New(fault.Precondition, name, "%s", m.GetNote()).WithHint("banger vm start %s", name)))
		default:
			if told && !a.json {
				say(fmt.Sprintf("banger: %s: its guest answers again\n", name))
			}
		}
	}
	p.silent.Store(false)
}

// end stops the watch.
func (p *pulse) end() {
	p.stop()
	<-p.done
}

// errorText is what printError prints.
func (a *app) errorText(err error) string {
	var text bytes.Buffer
	b := *a
	b.stderr = &text
	b.printError(err)
	return text.String()
}

// saying prints lines on w; on a terminal that is raw by then each goes back to the line's begin.
func saying(w io.Writer, raw func() bool) func(string) {
	return func(text string) {
		if raw() {
			text = "\r\n" + strings.ReplaceAll(text, "\n", "\r\n")
		}
		_, _ = io.WriteString(w, text) // there is nobody else to tell
	}
}
