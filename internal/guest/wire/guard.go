package wire

import (
	"encoding/binary"
	"errors"
	"net"
)

// Frame layout of yamux (its spec.md): version, type, flags (16 bits), stream, length (32 bits each).
const (
	muxHeaderSize = 12
	muxData       = 0
	muxPing       = 2
	muxFlagSYN    = 1
)

var errMuxAbuse = errors.New("the guest sent a frame that an agent never sends")

// guardedConn passes on what a guest sends if it is what an agent may send. yamux answers each
// ping with a goroutine and buffers for each stream that the peer opens; the guest needs neither
// ping nor streams of its own, so a guest that sends them is not given the daemon's memory.
type guardedConn struct {
	boundedConn
	header [muxHeaderSize]byte
	have   int    // bytes of header so far
	body   uint32 // bytes of data still to come
}

// Read implements net.Conn. yamux reads from one goroutine only.
func (c *guardedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if bad := c.inspect(b[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (c *guardedConn) inspect(b []byte) error {
	for len(b) > 0 {
		if c.body > 0 {
			n := min(uint32(len(b)), c.body)
			c.body -= n
			b = b[n:]
			continue
		}
		n := copy(c.header[c.have:], b)
		c.have += n
		b = b[n:]
		if c.have < muxHeaderSize {
			return nil
		}
		c.have = 0
		kind, flags := c.header[1], binary.BigEndian.Uint16(c.header[2:])
		if c.header[0] != 0 || kind == muxPing || flags&muxFlagSYN != 0 {
			return errMuxAbuse
		}
		if kind == muxData {
			c.body = binary.BigEndian.Uint32(c.header[8:])
		}
	}
	return nil
}

var _ net.Conn = (*guardedConn)(nil)
