package wire

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
)

func TestPorts(t *testing.T) {
	var b bytes.Buffer
	lists := [][]uint16{{}, {22}, {1, 80, 65535}, make([]uint16, MaxPorts)}
	for _, l := range lists {
		if err := WritePorts(&b, l); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Clone(b.Bytes())
	for _, want := range lists {
		if got, err := ReadPorts(&b); err != nil || got == nil || !slices.Equal(got, want) {
			t.Errorf("%v came as %v, %v", want, got, err)
		}
	}
	if _, err := ReadPorts(&b); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if err := WritePorts(io.Discard, make([]uint16, MaxPorts+1)); err == nil {
		t.Error("too many are written")
	}
	for _, bad := range [][]byte{{0xff, 0xff}, {0}, {0, 1}, whole[2:5]} {
		if got, err := ReadPorts(bytes.NewReader(bad)); err == nil {
			t.Errorf("%v is read as %v", bad, got)
		}
	}
}
