package agentd

import (
	"bytes"
	"errors"
	"slices"
	"testing"
)

// sizes notes what is written to it, and fails once it was given more than limit bytes.
type sizes struct {
	bytes.Buffer
	writes []int
	limit  int
}

var errFull = errors.New("full")

func (s *sizes) Write(b []byte) (int, error) {
	s.writes = append(s.writes, len(b))
	if room := s.limit - s.Len(); room < len(b) {
		n, _ := s.Buffer.Write(b[:room])
		return n, errFull
	}
	return s.Buffer.Write(b)
}

// TestWriteParts: what goes out over vsock is what was written, in packets of a bounded size.
func TestWriteParts(t *testing.T) {
	data := make([]byte, 3*maxPacket+5)
	for i := range data {
		data[i] = byte(i % 251)
	}
	for _, c := range []struct {
		n, limit int
		writes   []int
		taken    int
		err      error
	}{
		{0, 1 << 20, []int{0}, 0, nil},
		{1, 1 << 20, []int{1}, 1, nil},
		{maxPacket, 1 << 20, []int{maxPacket}, maxPacket, nil},
		{2 * maxPacket, 1 << 20, []int{maxPacket, maxPacket}, 2 * maxPacket, nil},
		{len(data), 1 << 20, []int{maxPacket, maxPacket, maxPacket, 5}, len(data), nil},
		{len(data), maxPacket + 7, []int{maxPacket, maxPacket}, maxPacket + 7, errFull},
	} {
		w := &sizes{limit: c.limit}
		n, err := writeParts(w, data[:c.n], maxPacket)
		if n != c.taken || !errors.Is(err, c.err) || !slices.Equal(w.writes, c.writes) || !bytes.Equal(w.Bytes(), data[:c.taken]) {
			t.Errorf("%d bytes: %d were taken (%v) in writes of %v, want %d (%v) in %v", c.n, n, err, w.writes, c.taken, c.err, c.writes)
		}
	}
}
