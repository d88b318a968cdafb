package rundir

import "net"

// First is the wait for somebody to connect to a socket: for a word, since the connection carries nothing. After the first one
// it takes no more, so that nobody keeps the host busy with it.
type First struct {
	// Came is closed when somebody has connected, or cannot any more.
	Came <-chan struct{}

	l    *net.UnixListener
	over chan struct{} // closed when nothing listens any more
}

// ListenFirst binds a socket in the directory, and begins to wait. Close what it returns; the socket's file stays, for Remove.
func (r *Dir) ListenFirst(name string) (*First, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.Path(name), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the short path is another file's by then
	came := make(chan struct{})
	f := &First{Came: came, l: l, over: make(chan struct{})}
	go func() {
		defer close(f.over)
		conn, err := l.Accept()
		if err == nil {
			_ = conn.Close() // it carries nothing
		}
		close(came)
		_ = f.l.Close()
	}()
	return f, nil
}

// Close returns when nothing listens any more. It may be called twice.
func (f *First) Close() {
	_ = f.l.Close() // it may be closed already
	<-f.over
}
