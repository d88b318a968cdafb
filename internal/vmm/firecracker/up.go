package firecracker

import (
	"net"
	"sync"

	"git.thaloco.com/thaloco/banger/internal/vmm/rundir"
)

// upListener takes the guest's word that its agent listens: one connection to UpPort, which Firecracker passes on to the
// vsock's path with "_" and the port behind it (its docs/vsock.md, "Guest-Initiated Connections"). After the first it
// takes no more, so that a guest cannot keep the host busy with it.
type upListener struct {
	said chan struct{} // closed when the guest has spoken, or cannot any more
	l    *net.UnixListener
	once sync.Once
	over chan struct{} // closed when nothing listens any more
}

// listenUp begins to listen. The caller closes it; what it leaves in the directory is clean's.
func listenUp(dir *rundir.Dir) (*upListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir.Path(upSocket), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the short path is another file's by then
	u := &upListener{said: make(chan struct{}), l: l, over: make(chan struct{})}
	go func() {
		defer close(u.over)
		conn, err := l.Accept()
		if err == nil {
			_ = conn.Close() // it carries nothing
		}
		close(u.said)
		u.end()
	}()
	return u, nil
}

func (u *upListener) end() { u.once.Do(func() { _ = u.l.Close() }) }

// close returns when nothing listens any more.
func (u *upListener) close() {
	u.end()
	<-u.over
}
