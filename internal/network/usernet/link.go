package usernet

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// queueLen is how many frames wait for the VMM; what comes when they do is dropped, as a network card would.
	queueLen = 256
	// batch is how many frames one write may carry.
	batch = 32
	// ethernetExtra is what a frame may have beyond the MTU: its header and a VLAN tag.
	ethernetExtra = header.EthernetMinimumSize + 4
)

// serveVMM moves frames between a VMM's stream and the stack until the stream ends or breaks. Each frame has its length before it, four
// bytes in network order (QEMU's net/stream.c). A length that cannot be is an error: what follows cannot be told apart
// any more. A frame that makes no sense is dropped.
func (n *Network) serveVMM(ctx context.Context, conn net.Conn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // ends both directions
	defer stop()
	written := make(chan struct{})
	go func() {
		defer close(written)
		cancel(n.writeFrames(ctx, conn))
	}()
	err := n.readFrames(conn)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cancel(err)
	_ = conn.Close()
	<-written
	return err
}

func (n *Network) readFrames(conn io.Reader) error {
	in := bufio.NewReaderSize(conn, 256<<10)
	frame := make([]byte, n.cfg.MTU+ethernetExtra)
	for {
		var length [4]byte
		if _, err := io.ReadFull(in, length[:]); err != nil {
			return err // io.EOF between frames: an orderly end
		}
		size := binary.BigEndian.Uint32(length[:])
		if size > uint32(len(frame)) {
			return fmt.Errorf("a frame of %d bytes, where %d is the most", size, len(frame))
		}
		if _, err := io.ReadFull(in, frame[:size]); err != nil {
			return fmt.Errorf("in a frame of %d bytes: %w", size, err)
		}
		if !n.admit(frame[:size]) {
			continue
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame[:size])})
		n.link.InjectInbound(0, pkt)
		pkt.DecRef()
	}
}

// writeFrames sends what the stack has for the guest, several frames with one call where several wait. A VMM that does not read, such as a
// paused one, holds up nothing else: its queue overflows.
func (n *Network) writeFrames(ctx context.Context, conn net.Conn) error {
	var lengths [batch][4]byte
	packets := make([]*stack.PacketBuffer, 0, batch)
	var out net.Buffers
	for {
		pkt := n.link.ReadContext(ctx)
		if pkt == nil {
			return ctx.Err()
		}
		packets = packets[:0]
		for ; pkt != nil && len(packets) < batch; pkt = n.next(len(packets)) {
			packets = append(packets, pkt)
		}
		out = out[:0]
		for i, p := range packets {
			binary.BigEndian.PutUint32(lengths[i][:], uint32(p.Size()))
			out = append(append(out, lengths[i][:]), p.AsSlices()...)
		}
		sending := out // WriteTo eats what it has written
		_, err := sending.WriteTo(conn)
		for _, p := range packets {
			p.DecRef()
		}
		if err != nil {
			return err
		}
	}
}

// next is another frame that waits, if there is one and a batch that has so many takes it.
func (n *Network) next(have int) *stack.PacketBuffer {
	if have+1 >= batch {
		return nil
	}
	return n.link.Read()
}
