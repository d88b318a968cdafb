// Package frame owns the frames in which a stream between host and guest carries more than one thing:
// a kind, a length and a payload of bounded size.
//
// It gives no kind a meaning and trusts neither end: a length beyond the bound ends the stream before
// anything is read or kept of it.
package frame

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Max bounds a frame's payload in bytes.
const Max = 256 << 10

// HeaderSize is a kind and a length (big endian, 32 bits), in bytes.
const HeaderSize = 5

// PutHeader writes the header of a frame with n bytes of payload, at most Max, into the first
// HeaderSize bytes of b: for those who have the payload behind it already.
func PutHeader(b []byte, kind byte, n int) {
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:HeaderSize], uint32(n))
}

// Writer writes frames, each in one write of w. Safe for concurrent use.
type Writer struct {
	mu     sync.Mutex
	w      io.Writer
	buffer []byte
}

// NewWriter returns a Writer on w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write sends a frame. payload is not kept. A payload beyond Max is an error, and nothing is sent.
func (w *Writer) Write(kind byte, payload []byte) error {
	if len(payload) > Max {
		return fmt.Errorf("a frame of %d bytes, at most %d fit", len(payload), Max)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buffer = append(append(w.buffer[:0], make([]byte, HeaderSize)...), payload...)
	PutHeader(w.buffer, kind, len(payload))
	_, err := w.w.Write(w.buffer)
	return err
}

// Reader reads frames. Not safe for concurrent use.
type Reader struct {
	r      *bufio.Reader
	buffer []byte
}

// NewReader returns a Reader on r, of which it may read more than the frame that was asked for.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, 64<<10)} }

// Next returns the next frame; its payload is good until the next call. io.EOF at the end between two
// frames, io.ErrUnexpectedEOF inside of one.
func (r *Reader) Next() (kind byte, payload []byte, err error) {
	var header [HeaderSize]byte
	if _, err := io.ReadFull(r.r, header[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(header[1:])
	if n > Max {
		return 0, nil, fmt.Errorf("a frame of %d bytes came, at most %d are taken", n, Max)
	}
	if uint32(cap(r.buffer)) < n {
		r.buffer = make([]byte, n)
	}
	payload = r.buffer[:n]
	if _, err := io.ReadFull(r.r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return header[0], payload, nil
}
