// Package tap owns a guest's network interface where the machine has no device for one: a TAP device that init makes, and whose frames the
// agent carries to the host over a stream.
//
// It gives the interface no address and no route, and never dials: what the stream is, is its caller's.
package tap

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// device is where TAP devices come from: Documentation/networking/tuntap.rst of the kernel.
const device = "/dev/net/tun"

// maxFrame is the longest Ethernet frame in bytes that a TAP device of the kernel's largest MTU has, with a VLAN tag.
const maxFrame = 65535 + 14 + 4

// lengthSize is what comes before each frame on the stream: its length in bytes, in network order, as QEMU's stream
// netdev has it.
const lengthSize = 4

// Present says whether the kernel has TAP devices now.
func Present() bool {
	_, err := os.Stat(device)
	return err == nil
}

// Make makes a TAP device that stays when nobody holds it. It is down, with a hardware address of the kernel's choice.
func Make(name string) error {
	fd, err := attach(name)
	if err != nil {
		return err
	}
	err = os.NewSyscallError("TUNSETPERSIST", unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1))
	return errors.Join(err, unix.Close(fd))
}

// attach opens the device with a name, which is made if it is not there.
func attach(name string) (int, error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: device, Err: err}
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr))
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("the TAP device %s: %w", name, err), unix.Close(fd))
	}
	return fd, nil
}

// Open takes the frames of a TAP device that Make made; the interface has a carrier from then on. One at a time.
func Open(name string) (*os.File, error) {
	if _, err := net.InterfaceByName(name); err != nil { // attach would make another one
		return nil, err
	}
	fd, err := attach(name) // before the runtime's poller gets to know it: a TAP descriptor polls as broken until then
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Carry moves frames between a TAP device and a stream until that ends or breaks, the device is gone, or ctx ends. It closes the stream
// and leaves the device open. A frame that the device does not take is lost, as on any wire.
func Carry(ctx context.Context, dev *os.File, stream net.Conn) error {
	if err := dev.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { // ends both directions
		_ = stream.Close()
		_ = dev.SetReadDeadline(time.Unix(1, 0))
	})
	defer stop()
	out := make(chan struct{})
	go func() {
		defer close(out)
		cancel(send(dev, stream))
	}()
	cancel(receive(stream, dev))
	<-out
	return context.Cause(ctx)
}

// send takes frames from the device to the stream.
func send(dev io.Reader, stream io.Writer) error {
	buffer := make([]byte, lengthSize+maxFrame)
	for {
		n, err := dev.Read(buffer[lengthSize:])
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint32(buffer, uint32(n))
		if _, err := stream.Write(buffer[:lengthSize+n]); err != nil {
			return err
		}
	}
}

// receive takes frames from the stream to the device.
func receive(stream io.Reader, dev io.Writer) error {
	in := bufio.NewReaderSize(stream, 64<<10)
	buffer := make([]byte, maxFrame)
	for {
		if _, err := io.ReadFull(in, buffer[:lengthSize]); err != nil {
			return err
		}
		size := binary.BigEndian.Uint32(buffer)
		if size > maxFrame {
			return fmt.Errorf("a frame of %d bytes, where %d is the most", size, maxFrame)
		}
		if _, err := io.ReadFull(in, buffer[:size]); err != nil {
			return err
		}
		// EINVAL: no frame at all. EIO: the interface is down. ENOBUFS: a kernel without memory for it.
		_, err := dev.Write(buffer[:size])
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ENOMEM) {
			return err
		}
	}
}
