package measure

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	agentv1 "git.thaloco.com/thaloco/banger/api/banger/agent/v1"
)

// TestListeners asks the real kernel for sockets of this process.
func TestListeners(t *testing.T) {
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	all, err := Listeners(t.Context(), "/proc")
	if err != nil {
		t.Fatal(err)
	}
	for protocol, port := range map[string]int{"tcp": tcp.Addr().(*net.TCPAddr).Port, "udp": udp.LocalAddr().(*net.UDPAddr).Port} {
		at := slices.IndexFunc(all, func(l *agentv1.Listener) bool { return l.Protocol == protocol && l.Port == uint32(port) })
		if at < 0 {
			t.Errorf("%s %d is not listed", protocol, port)
			continue
		}
		l := all[at]
		if l.Address != "127.0.0.1" || l.Uid != uint32(os.Getuid()) || l.Pid != int32(os.Getpid()) ||
			l.Process != "measure.test" || len(l.Command) == 0 || len(l.Command) > maxCommand {
			t.Errorf("%s: %v", protocol, l)
		}
	}
}

// Both ways to ask say the same.
func TestProcNet(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here: " + err.Error())
	}
	defer l.Close()
	is := func(s socket) bool { return int(s.port) == l.Addr().(*net.TCPAddr).Port }
	slow, err := procNet("/proc", "tcp", unix.AF_INET6, 10)
	if err != nil {
		t.Fatal(err)
	}
	fast, err := diag(t.Context(), unix.AF_INET6, unix.IPPROTO_TCP, 10)
	if err != nil {
		t.Skip("this kernel has no sock_diag: " + err.Error())
	}
	a, b := slices.IndexFunc(slow, is), slices.IndexFunc(fast, is)
	if a < 0 || b < 0 || slow[a] != fast[b] || slow[a].address != netip.IPv6Loopback() || slow[a].inode == 0 {
		t.Errorf("/proc says %+v, sock_diag %+v", slow, fast)
	}
}

func TestProcNetOfNonsense(t *testing.T) {
	dir := proc(t, map[string]string{"net/tcp": "  sl  local_address\n 0: 0100007F:0016 00000000:0000 0A x x x 1000 0 77 1\n" +
		"1: zz:0016 0 0A 0 0 0 0 0 1\n2: 0100007F 0 0A 0 0 0 0 0 1\n3: 0100:0016 0 0A 0 0 0 0 0 1\n4: 0100007F:0016 0 01 0 0 0 0 0 1\n"})
	got, err := procNet(dir, "tcp", unix.AF_INET, 10)
	if err != nil || len(got) != 1 || got[0] != (socket{address: netip.MustParseAddr("127.0.0.1"), port: 22, uid: 1000, inode: 77}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzParseDiag(f *testing.F) {
	ne := binary.NativeEndian
	message := make([]byte, nlHeader+diagMessage)
	ne.PutUint32(message, uint32(len(message)))
	ne.PutUint16(message[4:], diagByFamily)
	message[nlHeader] = unix.AF_INET6
	f.Add(message)
	done := make([]byte, nlHeader)
	ne.PutUint32(done, nlHeader)
	ne.PutUint16(done[4:], unix.NLMSG_DONE)
	f.Add(append(slices.Clone(message), done...))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _, err := parseDiag(b)
		if err == nil && len(list) > len(b)/diagMessage {
			t.Errorf("%d sockets of %d bytes", len(list), len(b))
		}
	})
}

// A process whose socket was passed to its children is named once, by the oldest.
func TestOwners(t *testing.T) {
	dir := t.TempDir()
	for _, pid := range []int{30, 200, 4} {
		fds := filepath.Join(dir, strconv.Itoa(pid), "fd")
		if err := os.MkdirAll(fds, 0o755); err != nil {
			t.Fatal(err)
		}
		target := "socket:[7]"
		if pid == 4 {
			target = "socket:[8]"
		}
		if err := os.Symlink(target, filepath.Join(fds, "3")); err != nil {
			t.Fatal(err)
		}
	}
	if got := owners(t.Context(), dir, []socket{{inode: 7}, {inode: 9}}); len(got) != 1 || got[7] != 30 {
		t.Errorf("%v", got)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if got := owners(over, dir, []socket{{inode: 7}}); len(got) != 0 {
		t.Errorf("after the end: %v", got)
	}
}
