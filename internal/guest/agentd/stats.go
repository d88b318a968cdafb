package agentd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
	"git.thaloco.com/thaloco/banger/internal/guest/measure"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
)

func (s service) Stats(ctx context.Context, _ *agentv1.StatsRequest) (*agentv1.StatsResponse, error) {
	if s.guest.Stats == nil {
		return nil, errNotHere
	}
	return s.guest.Stats(ctx)
}

func (s service) Ports(ctx context.Context, _ *agentv1.PortsRequest) (*agentv1.PortsResponse, error) {
	if s.guest.Ports == nil {
		return nil, errNotHere
	}
	return s.guest.Ports(ctx)
}

func (s service) Trim(ctx context.Context, _ *agentv1.TrimRequest) (*agentv1.TrimResponse, error) {
	if s.guest.Trim == nil {
		return nil, errNotHere
	}
	return s.guest.Trim(ctx)
}

// clockSlack is by how much the guest's clock may be off before it is stepped: what a request may take on
// a busy host. Programs in the guest, and its own time service if it has one, see no step below it.
const clockSlack = time.Second

// clockOrder has requests to set the clock come one after the other, and says when the newest was sent.
type clockOrder struct {
	mu   sync.Mutex
	sent int64 // milliseconds of the host's CLOCK_BOOTTIME
}

func (s service) SetClock(_ context.Context, r *agentv1.SetClockRequest) (*agentv1.SetClockResponse, error) {
	if s.guest.Now == nil || s.guest.SetNow == nil {
		return nil, errNotHere
	}
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	if sent := r.GetSentBoottimeMs(); sent != 0 {
		if sent < s.clock.sent {
			return &agentv1.SetClockResponse{}, nil // nobody waits for this answer any more
		}
		s.clock.sent = sent
	}
	host := time.UnixMilli(r.GetUnixMs())
	off := host.Sub(s.guest.Now())
	answer := &agentv1.SetClockResponse{OffMs: off.Milliseconds()}
	if off.Abs() <= clockSlack {
		return answer, nil
	}
	if err := s.guest.SetNow(host); err != nil {
		return nil, fmt.Errorf("step the clock by %s: %w", off, err)
	}
	answer.Stepped = true
	return answer, nil
}

// stats measures the guest, and names its disks as people know them: the system disk is what is written
// outside of /root.
func (l *live) stats(context.Context) (*agentv1.StatsResponse, error) {
	var disks []measure.Disk
	for _, m := range l.state.Mounted {
		disks = append(disks, measure.Disk{Target: m.Target, Path: m.Path})
	}
	return measure.Stats("/proc", disks)
}

func (l *live) ports(ctx context.Context) (*agentv1.PortsResponse, error) {
	list, err := measure.Listeners(ctx, "/proc")
	return &agentv1.PortsResponse{Listeners: list}, err
}

// trim discards on one disk after the other. The kernel cannot be interrupted in it: when ctx ends, what
// was done so far is the answer, and the kernel goes on with the disk that it is at.
func (l *live) trim(ctx context.Context) (*agentv1.TrimResponse, error) {
	r := &agentv1.TrimResponse{}
	for _, m := range l.state.Mounted {
		type result struct {
			bytes int64
			err   error
		}
		done := make(chan result, 1)
		go func() {
			bytes, err := system.Trim(m.Path)
			done <- result{bytes, err}
		}()
		select {
		case <-ctx.Done():
			return r, nil
		case d := <-done:
			t := &agentv1.Trimmed{Target: m.Target, Bytes: d.bytes}
			if errors.Is(d.err, unix.EOPNOTSUPP) {
				t.Unsupported = true
			} else if d.err != nil {
				return nil, d.err
			}
			r.Trimmed = append(r.Trimmed, t)
		}
	}
	return r, nil
}

// setNow steps the clock of the system.
func setNow(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// followPorts tells of what listens in this network namespace for others than the guest itself.
func followPorts(ctx context.Context, send func([]uint16) error) error {
	return measure.FollowPorts(ctx, "/proc", send)
}
