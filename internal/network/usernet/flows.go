package usernet

import (
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of what one guest can have open. What a guest opens costs the host descriptors and memory.
const (
	maxTCP     = 2048
	maxUDP     = 2048
	maxDialing = 256 // connections that are being made; a further SYN is dropped, and the guest sends it again
	maxEchoes  = 64
	maxInbound = 1024 // connections to published ports

	dialTime  = 15 * time.Second
	udpIdle   = 60 * time.Second // RFC 4787 REQ-5 asks for two minutes; what most routers have, and DNS over UDP needs, is less
	closeTime = 5 * time.Second
)

// flows are connections, or what stands for one over UDP: a bounded set that can be ended as a whole.
type flows struct {
	limit int

	mu  sync.Mutex
	set map[*flow]struct{}
}

// flow is one. Both ends are closed with it.
type flow struct {
	ends [2]io.Closer
	used atomic.Int64 // UnixNano of the last packet, over UDP
	once sync.Once
}

func newFlows(limit int) *flows { return &flows{limit: limit, set: map[*flow]struct{}{}} }

func (f *flow) close() {
	f.once.Do(func() {
		for _, e := range f.ends {
			_ = e.Close() // both are to go, whatever state they are in
		}
	})
}

// add takes a flow in, unless there are too many.
func (fs *flows) add(f *flow) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if len(fs.set) >= fs.limit {
		return false
	}
	fs.set[f] = struct{}{}
	return true
}

// addOver takes a flow in and ends the one that has been silent longest if there are too many.
func (fs *flows) addOver(f *flow) {
	fs.mu.Lock()
	var oldest *flow
	if len(fs.set) >= fs.limit {
		for g := range fs.set {
			if oldest == nil || g.used.Load() < oldest.used.Load() {
				oldest = g
			}
		}
		delete(fs.set, oldest)
	}
	fs.set[f] = struct{}{}
	fs.mu.Unlock()
	if oldest != nil {
		oldest.close()
	}
}

// end closes a flow and forgets it.
func (fs *flows) end(f *flow) {
	f.close()
	fs.mu.Lock()
	defer fs.mu.Unlock()
	delete(fs.set, f)
}

func (fs *flows) closeAll() {
	fs.mu.Lock()
	all := fs.set
	fs.set = map[*flow]struct{}{}
	fs.mu.Unlock()
	for f := range all {
		f.close()
	}
}

func (fs *flows) len() int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return len(fs.set)
}

// halves is a connection whose sending half can be closed alone.
type halves interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// pumpSize is one read's, as large as a packet of the guest's.
const pumpSize = 64 << 10

var pumpBuffers = sync.Pool{New: func() any { b := make([]byte, pumpSize); return &b }}

// join copies between the two ends until both directions have ended. The end of one direction is passed on, an error ends both.
func (f *flow) join(a, b halves) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.pump(a, b)
	}()
	f.pump(b, a)
	<-done
}

func (f *flow) pump(to, from halves) {
	buf := pumpBuffers.Get().(*[]byte)
	defer pumpBuffers.Put(buf)
	for {
		n, err := from.Read(*buf)
		if n > 0 {
			if _, err := to.Write((*buf)[:n]); err != nil {
				f.close()
				return
			}
		}
		switch {
		case err == io.EOF: //nolint:errorlint // both kinds of connections return it as it is
			if to.CloseWrite() != nil {
				f.close()
			}
			return
		case err != nil:
			f.close()
			return
		}
	}
}
