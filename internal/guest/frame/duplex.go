package frame

import (
	"errors"
	"io"
)

// Kinds of a Duplex's frames.
const (
	kindData = 'd'
	kindEnd  = 'e' // nothing more comes this way
)

// chunk is what a Duplex puts into a frame, in bytes.
const chunk = 64 << 10

// Duplex is a stream whose two directions end one after the other, over one that can only be closed as a
// whole: Firecracker's vsock passes on no half-close, neither way, and drops what was still to come of the other.
// And it tells an end from a connection that broke. Both sides use it. Read and Write may be called concurrently,
// each by one caller at a time.
type Duplex struct {
	conn  io.ReadWriteCloser
	r     *Reader
	w     *Writer
	rest  []byte // of the last frame
	ended bool
}

// NewDuplex returns a Duplex over conn, which it closes with its own Close.
func NewDuplex(conn io.ReadWriteCloser) *Duplex {
	return &Duplex{conn: conn, r: NewReader(conn), w: NewWriter(conn)}
}

// Read returns io.EOF once the other side has said that no more comes, and io.ErrUnexpectedEOF if the
// connection ended without that.
func (d *Duplex) Read(b []byte) (int, error) {
	for len(d.rest) == 0 {
		if d.ended {
			return 0, io.EOF
		}
		kind, payload, err := d.r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return 0, io.ErrUnexpectedEOF
		case err != nil:
			return 0, err
		case kind == kindData:
			d.rest = payload
		case kind == kindEnd:
			d.ended = true
		default:
			return 0, errors.New("a frame came that is neither data nor their end")
		}
	}
	n := copy(b, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

// Write sends b.
func (d *Duplex) Write(b []byte) (int, error) {
	for written := 0; ; {
		part := b[written:min(len(b), written+chunk)]
		if len(part) == 0 {
			return written, nil
		}
		if err := d.w.Write(kindData, part); err != nil {
			return written, err
		}
		written += len(part)
	}
}

// CloseWrite says that no more comes this way.
func (d *Duplex) CloseWrite() error { return d.w.Write(kindEnd, nil) }

// Close closes the connection. What was written and not read by then may be lost: whoever wants the other side to
// have everything reads to the end first.
func (d *Duplex) Close() error { return d.conn.Close() }
