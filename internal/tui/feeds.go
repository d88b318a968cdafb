package tui

import (
	"context"
	"sync"

	tea "charm.land/bubbletea/v2"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/client"
)

// logTail is how many lines of a log are asked for; what follows is added.
const logTail = 500

// feeds are the streams that the screen shows. Each has a number: what comes of one that was given up is
// known by it and dropped.
type feeds struct {
	ctx  context.Context
	o    Options
	send func(tea.Msg)
	all  sync.WaitGroup

	usage, log feed
}

type feed struct {
	number int
	cancel context.CancelFunc
}

// next gives up what ran and returns the context and the number of what is to run.
func (f *feed) next(ctx context.Context) (context.Context, int) {
	f.stop()
	f.number++
	ctx, f.cancel = context.WithCancel(ctx)
	return ctx, f.number
}

func (f *feed) stop() {
	if f.cancel != nil {
		f.cancel()
	}
}

type (
	eventMsg struct{ e *bangerv1.WatchResponse }
	// goneMsg says that there is no daemon; with over that none is waited for.
	goneMsg struct {
		err  error
		over bool
	}
	usageMsg struct {
		number int
		look   *bangerv1.WatchUsageResponse
	}
	usageEndMsg struct{ number int }
	logMsg      struct {
		number int
		data   []byte
	}
	logEndMsg struct {
		number int
		err    error
	}
)

// follow sends what the daemon tells, over its end and its next start.
func (f *feeds) follow() {
	err := f.o.Follow.Follow(f.ctx, client.Follower{
		Event: func(e *bangerv1.WatchResponse) { f.send(eventMsg{e}) },
		Gone:  func(err error) { f.send(goneMsg{err: err}) },
	})
	if f.ctx.Err() == nil {
		f.send(goneMsg{err, true})
	}
}

// watchUsage looks at these VMs, and no others any more.
func (f *feeds) watchUsage(ids []string) {
	ctx, number := f.usage.next(f.ctx)
	if len(ids) == 0 {
		return
	}
	f.all.Go(func() {
		stream, err := f.o.Follow.VMs.WatchUsage(ctx, &bangerv1.WatchUsageRequest{Refs: ids, Ports: true})
		if err == nil {
			for stream.Receive() {
				f.send(usageMsg{number, stream.Msg()})
			}
			_ = stream.Close() // why it ended, the event stream tells
		}
		if ctx.Err() == nil {
			f.send(usageEndMsg{number})
		}
	})
}

// readLog follows a VM's log from its last lines on, and no other any more. An empty id: none.
func (f *feeds) readLog(id string) {
	ctx, number := f.log.next(f.ctx)
	if id == "" {
		return
	}
	f.all.Go(func() {
		tail := int32(logTail)
		stream, err := f.o.Follow.VMs.ReadLog(ctx, &bangerv1.ReadLogRequest{Id: id, Tail: &tail, Follow: true, Plain: true})
		if err == nil {
			for stream.Receive() {
				f.send(logMsg{number, stream.Msg().GetData()})
			}
			err = stream.Err()
			_ = stream.Close()
		}
		if ctx.Err() == nil {
			f.send(logEndMsg{number, client.FromConnect(err)})
		}
	})
}
