package agentd

import (
	"io"
	"sync"

	"github.com/mdlayher/vsock"
)

// maxPacket is what one write on vsock may hold, in bytes. Linux 6.17, and stable kernels since (6.12 of Debian 13
// among them), put a packet whose buffer would take more than 32 KiB into several pieces ("vsock/virtio: Allocate nonlinear
// SKBs for handling large transmit buffers"). A Firecracker before 1.14 sends the first piece of such a packet
// again when its socket on the host is full at the second (its pull request 5485): the stream is torn, and nobody
// is told. A write is never joined with another.
const maxPacket = 16 << 10

// packets is a vsock connection whose packets Firecracker passes on as they are. Safe for concurrent use, as
// the connection is.
type packets struct {
	*vsock.Conn
	writing sync.Mutex
}

// Write implements net.Conn.
func (p *packets) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	return writeParts(p.Conn, b, maxPacket)
}

// writeParts writes b in parts of at most most bytes, and returns how many bytes were taken.
func writeParts(w io.Writer, b []byte, most int) (int, error) {
	written := 0
	for {
		n, err := w.Write(b[written:min(len(b), written+most)])
		if written += n; err != nil || written == len(b) {
			return written, err
		}
	}
}
