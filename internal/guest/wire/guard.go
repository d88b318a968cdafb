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
//
// Data are passed on as they come, in frames that are whole: yamux reads a frame's data under the lock that
// a reader of the stream takes, so a guest that stands still in the middle of a frame, or means to, would hold
// that reader beyond its deadline.
type guardedConn struct {
	boundedConn
	header [muxHeaderSize]byte
	have   int    // bytes of header so far
	body   uint32 // bytes of data still to come
	chunk  [16 << 10]byte
	whole  []byte // frames that were not given out so far, in room
	room   []byte
}

// Read implements net.Conn. yamux reads from one goroutine only.
func (c *guardedConn) Read(b []byte) (int, error) {
	for len(c.whole) == 0 {
		n, err := c.Conn.Read(c.chunk[:])
		if bad := c.inspect(c.chunk[:n]); bad != nil {
			return 0, bad
		}
		if err != nil && len(c.whole) == 0 {
			return 0, err // one that came with data comes again
		}
	}
	n := copy(b, c.whole)
	c.whole = c.whole[n:]
	return n, nil
}

// inspect makes whole frames of what came.
func (c *guardedConn) inspect(b []byte) error {
	c.room = c.room[:0]
	defer func() { c.whole = c.room }()
	for len(b) > 0 {
		if c.body > 0 {
			n := min(uint32(len(b)), c.body)
			binary.BigEndian.PutUint32(c.header[8:], n)
			c.room = append(append(c.room, c.header[:]...), b[:n]...)
			binary.BigEndian.PutUint16(c.header[2:], 0) // the rest of the frame is one without flags
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
		if c.body == 0 {
			c.room = append(c.room, c.header[:]...)
		}
	}
	return nil
}

var _ net.Conn = (*guardedConn)(nil)
