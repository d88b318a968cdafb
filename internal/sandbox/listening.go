package sandbox

import (
	"context"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/guest/wire"
	"git.thaloco.com/thaloco/banger/internal/vm"
)

// Publisher is a network that brings ports of guests to the host one by one, and has to know which.
type Publisher interface {
	// Publishes says whether it wants to be told what guests listen on.
	Publishes() bool
	// Publish brings TCP ports of a VM that runs to its addresses, and no others. It may be called while other calls for the VM are
	// under way. fault.Unavailable if that cannot be now.
	Publish(ctx context.Context, v vm.VM, ports []uint16) error
	// Published are the TCP ports that are at a VM's addresses now. fault.Unavailable if its network does not answer.
	Published(ctx context.Context, v vm.VM) ([]uint16, error)
}

const (
	// publishTime bounds one Publish.
	publishTime = 10 * time.Second
	// publishPause is between two, however often a guest changes its mind.
	publishPause = 50 * time.Millisecond
	// Pauses before a guest is asked again whose stream ended: its agent was started anew, or there was no room.
	firstAskPorts = time.Second
	mostAskPorts  = 30 * time.Second
)

// publishPorts keeps a VM's network told of what its guest listens on, for as long as the machine and the daemon run. Nothing is
// asked while nothing changes. What is published stays so when the daemon ends; the next one is told all again.
func (s *Service) publishPorts(v vm.VM, m *machine) {
	p, ok := s.network.of(&v).(Publisher)
	if !ok || !p.Publishes() {
		return
	}
	ctx, cancel := m.whileAlive(s.bg)
	defer cancel()
	for pause := firstAskPorts; ; {
		began := time.Now()
		err := s.publishOnce(ctx, v, p)
		switch {
		case ctx.Err() != nil:
			return
		case fault.Is(err, fault.VersionSkew):
			s.log.Warn("the ports of a VM are not published: its agent does not tell of them", "vm", v.ID, "err", err)
			s.warn("banger vm restart "+v.Name, "the ports of %s are not published until `banger vm restart %s`: an older banger started it", v.Name, v.Name)
			return
		}
		if time.Since(began) > mostAskPorts {
			pause = firstAskPorts
		}
		s.log.Info("a guest tells no more of its ports, and is asked again", "vm", v.ID, "err", err, "after", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, mostAskPorts)
	}
}

// publishOnce follows one stream of a guest's to its end.
func (s *Service) publishOnce(ctx context.Context, v vm.VM, p Publisher) error {
	sess, err := s.machines.session(ctx, v.ID)
	if err != nil {
		return err
	}
	conn, err := sess.DialStream(ctx, wire.KindPorts)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		ports, err := wire.ReadPorts(conn)
		if err != nil {
			return err
		}
		bounded, cancel := context.WithTimeout(ctx, publishTime)
		err = p.Publish(bounded, v, ports)
		cancel()
		if err != nil && ctx.Err() == nil { // the next list is whole again
			s.log.Warn("the ports of a VM could not be published", "vm", v.ID, "err", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(publishPause):
		}
	}
}
