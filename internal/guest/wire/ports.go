package wire

import (
	"encoding/binary"
	"fmt"
	"io"
)

// MaxPorts is how many ports a list of a KindPorts stream has at most.
const MaxPorts = 1024

// A list is the number of its ports, then they, each of 16 bits, the higher byte first.

// WritePorts writes a list of ports.
func WritePorts(w io.Writer, ports []uint16) error {
	if len(ports) > MaxPorts {
		return fmt.Errorf("%d ports in a list; %d at most", len(ports), MaxPorts)
	}
	b := binary.BigEndian.AppendUint16(nil, uint16(len(ports)))
	for _, p := range ports {
		b = binary.BigEndian.AppendUint16(b, p)
	}
	_, err := w.Write(b)
	return err
}

// ReadPorts reads a list of ports, and nothing that follows it. The ports are what the guest says: 0 may be among them, and one twice.
// It is never nil without an error.
func ReadPorts(r io.Reader) ([]uint16, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(head[:]))
	if n > MaxPorts {
		return nil, fmt.Errorf("%d ports in a list; %d at most", n, MaxPorts)
	}
	b := make([]byte, 2*n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("a list of ports that is cut: %w", err)
	}
	ports := make([]uint16, n)
	for i := range ports {
		ports[i] = binary.BigEndian.Uint16(b[2*i:])
	}
	return ports, nil
}
