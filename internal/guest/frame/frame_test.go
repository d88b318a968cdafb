package frame

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b)
	payloads := [][]byte{nil, []byte("x"), bytes.Repeat([]byte{7}, Max)}
	for i, p := range payloads {
		if err := w.Write(byte(i), p); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Write(1, make([]byte, Max+1)); err == nil {
		t.Error("a payload beyond the bound was sent")
	}
	whole := bytes.Clone(b.Bytes())
	r := NewReader(&b)
	for i, p := range payloads {
		if kind, got, err := r.Next(); err != nil || int(kind) != i || !bytes.Equal(got, p) {
			t.Errorf("frame %d: kind %d, %d bytes, %v", i, kind, len(got), err)
		}
	}
	if _, _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	r = NewReader(bytes.NewReader(whole[:len(whole)-1]))
	var err error
	for err == nil {
		_, _, err = r.Next()
	}
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a frame that is cut: %v", err)
	}
}

// FuzzNext: no bytes make a reader keep more than the bound, or go on after their end.
func FuzzNext(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0})
	f.Add([]byte{1, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, total := NewReader(bytes.NewReader(data)), 0
		for {
			_, p, err := r.Next()
			if err != nil {
				break
			}
			total += HeaderSize + len(p)
		}
		if total > len(data) || cap(r.buffer) > Max {
			t.Errorf("%d bytes of frames from %d, %d kept", total, len(data), cap(r.buffer))
		}
	})
}
