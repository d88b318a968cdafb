package measure

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
)

// Bounds of an answer: with them the largest one stays below the agent's largest message.
const (
	maxListeners = 1024
	maxCommand   = 256 // bytes of a command line
)

// socket is one listening socket.
type socket struct {
	protocol string // tcp, udp
	address  netip.Addr
	port     uint16
	uid      uint32
	inode    uint32
}

// Listeners lists the sockets that listen for TCP, and the UDP sockets without a peer, of the network
// namespace that this process is in, with the process that has each. A published port of a container is
// listened on by its proxy, which is such a process. The kernel is asked by sock_diag(7); one that has it not
// (its module cannot be loaded) by /proc/net, which says the same more slowly.
func Listeners(ctx context.Context, proc string) ([]*agentv1.Listener, error) {
	var found []socket
	for _, protocol := range []string{"tcp", "udp"} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			list, err := listening(ctx, proc, protocol, family)
			if err != nil {
				return nil, err
			}
			found = append(found, list...)
		}
	}
	slices.SortFunc(found, func(a, b socket) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.port, b.port), a.address.Compare(b.address))
	})
	found = found[:min(len(found), maxListeners)]
	owners := owners(ctx, proc, found)
	out := make([]*agentv1.Listener, len(found))
	for i, s := range found {
		out[i] = &agentv1.Listener{Protocol: s.protocol, Address: s.address.String(), Port: uint32(s.port), Uid: s.uid}
		if pid := owners[s.inode]; pid != 0 {
			out[i].Pid = int32(pid)
			out[i].Process, out[i].Command = describe(proc, pid)
		}
	}
	return out, nil
}

// listening lists the sockets of one protocol and family.
func listening(ctx context.Context, proc, protocol string, family uint8) ([]socket, error) {
	number, state := uint8(unix.IPPROTO_TCP), uint8(10) // TCP_LISTEN; a UDP socket without a peer is in TCP_CLOSE (net/tcp_states.h)
	if protocol == "udp" {
		number, state = unix.IPPROTO_UDP, 7
	}
	list, err := diag(ctx, family, number, state)
	if err != nil {
		if list, err = procNet(proc, protocol, family, state); err != nil {
			return nil, err
		}
	}
	for i := range list {
		list[i].protocol = protocol
	}
	return list, nil
}

// Layout of the messages (linux/inet_diag.h); numbers are the machine's, but for ports and addresses.
const (
	nlHeader     = 16
	diagRequest  = 56 // family, protocol, ext, pad, states, then a socket id of 48 bytes, all zero
	diagMessage  = 72 // family, state, timer, retrans, the socket id, expires, rqueue, wqueue, uid, inode
	diagByFamily = 20 // SOCK_DIAG_BY_FAMILY
	diagTime     = 5 * time.Second
)

// diag asks the kernel for the sockets of a family and protocol that are in a state.
func diag(ctx context.Context, family, protocol, state uint8) ([]socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	bound := diagTime
	if d, ok := ctx.Deadline(); ok {
		bound = min(bound, time.Until(d))
	}
	timeout := unix.NsecToTimeval(max(bound, time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	ne := binary.NativeEndian
	request := make([]byte, nlHeader+diagRequest)
	ne.PutUint32(request, uint32(len(request)))
	ne.PutUint16(request[4:], diagByFamily)
	ne.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	request[nlHeader], request[nlHeader+1] = family, protocol
	ne.PutUint32(request[nlHeader+4:], 1<<state)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	var out []socket
	buffer := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("recvfrom", err)
		}
		list, done, err := parseDiag(buffer[:n])
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
		if done || len(out) >= maxListeners {
			return out, nil
		}
	}
}

// parseDiag reads one datagram of an answer. done is true at its end.
func parseDiag(b []byte) (out []socket, done bool, err error) {
	ne := binary.NativeEndian
	for len(b) >= nlHeader {
		length, kind := int(ne.Uint32(b)), ne.Uint16(b[4:])
		if length < nlHeader || length > len(b) {
			return nil, false, fmt.Errorf("a netlink message of %d bytes in %d", length, len(b))
		}
		body := b[nlHeader:length]
		switch {
		case kind == unix.NLMSG_DONE:
			return out, true, nil
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			return nil, false, unix.Errno(-int32(ne.Uint32(body)))
		case kind == diagByFamily && len(body) >= diagMessage:
			s := socket{port: binary.BigEndian.Uint16(body[4:]), uid: ne.Uint32(body[64:]), inode: ne.Uint32(body[68:])}
			if body[0] == unix.AF_INET6 {
				s.address = netip.AddrFrom16([16]byte(body[8:24]))
			} else {
				s.address = netip.AddrFrom4([4]byte(body[8:12]))
			}
			out = append(out, s)
		}
		b = b[min((length+3)&^3, len(b)):]
	}
	return out, false, nil
}

// procNet reads /proc/net/tcp and its like (proc_pid_net(5)): the local address is the second field, the
// state the fourth, uid the eighth, inode the tenth.
func procNet(proc, protocol string, family, state uint8) ([]socket, error) {
	name := "net/" + protocol
	if family == unix.AF_INET6 {
		name += "6"
	}
	var out []socket
	err := lines(proc, name, func(f []string) {
		if len(f) < 10 || len(out) >= maxListeners || f[3] != fmt.Sprintf("%02X", state) {
			return
		}
		host, port, ok := strings.Cut(f[1], ":")
		raw, err := hex.DecodeString(host)
		n, perr := strconv.ParseUint(port, 16, 16)
		if !ok || err != nil || perr != nil || len(raw) != 4 && len(raw) != 16 {
			return
		}
		for i := 0; i < len(raw); i += 4 { // words of the machine's order
			binary.BigEndian.PutUint32(raw[i:], binary.NativeEndian.Uint32(raw[i:]))
		}
		address, _ := netip.AddrFromSlice(raw)
		out = append(out, socket{address: address, port: uint16(n), uid: uint32(number(f[7])), inode: uint32(number(f[9]))})
	})
	return out, err
}

// owners finds the process of each socket: the lowest pid, which is the one that the others were forked
// from. It ends when all are found, or with ctx.
func owners(ctx context.Context, proc string, sockets []socket) map[uint32]int {
	left := map[string]uint32{}
	for _, s := range sockets {
		left["socket:["+strconv.FormatUint(uint64(s.inode), 10)+"]"] = s.inode
	}
	found := map[uint32]int{}
	names, err := readNames(proc)
	if err != nil {
		return found
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	for _, pid := range pids {
		if len(left) == 0 || ctx.Err() != nil {
			break
		}
		dir := filepath.Join(proc, strconv.Itoa(pid), "fd")
		fds, err := readNames(dir)
		if err != nil {
			continue // gone
		}
		for _, fd := range fds {
			target, err := os.Readlink(filepath.Join(dir, fd))
			if err != nil {
				continue
			}
			if inode, ok := left[target]; ok {
				found[inode] = pid
				delete(left, target)
			}
		}
	}
	return found
}

// readNames lists a directory without looking at what is in it.
func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// describe gives a process's name and its command line, cut.
func describe(proc string, pid int) (name, command string) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	comm, err := os.ReadFile(filepath.Join(dir, "comm"))
	if err != nil {
		return "", "" // gone
	}
	f, err := os.Open(filepath.Join(dir, "cmdline"))
	if err != nil {
		return strings.TrimSpace(string(comm)), ""
	}
	defer f.Close()
	line := make([]byte, maxCommand)
	n, _ := f.Read(line) // nothing: a kernel thread, or gone
	line = bytes.TrimRight(line[:n], "\x00")
	return valid(strings.TrimSpace(string(comm))), valid(string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
}

// valid is s as a protobuf string must be.
func valid(s string) string { return strings.ToValidUTF8(s, "") }
