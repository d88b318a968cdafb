package pid1

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/tap"
)

func sampleNetwork() *boot.Network {
	return &boot.Network{
		MAC: "02:00:00:00:00:01", MTU: 1420,
		Addresses: []netip.Prefix{netip.MustParsePrefix("172.30.0.2/24"), netip.MustParsePrefix("fd00::2/64")},
		Routes: []boot.Route{
			{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("172.30.0.1")},
			{To: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd00::1")},
		},
		DNS: []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd00::1")}, Search: []string{"vm"},
	}
}

// TestConfigure asks the kernel, in a network namespace of the test's own.
func TestConfigure(t *testing.T) {
	runtime.LockOSThread() // never unlocked: the thread ends with the test, and its namespace with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("needs to make a network namespace: ", err)
	}
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", HardwareAddr: []byte{2, 0, 0, 0, 0, 1}}, PeerName: "host"}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a second time changes nothing
		if err := configure("eth0", sampleNetwork()); err != nil {
			t.Fatal(err)
		}
		var got []string
		have, err := netlink.LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint("mtu ", have.Attrs().MTU, " up ", have.Attrs().Flags&net.FlagUp != 0))
		addresses, err := netlink.AddrList(have, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addresses {
			if a.IP.IsLinkLocalUnicast() {
				continue
			}
			got = append(got, fmt.Sprint("address ", a.IPNet, " tentative ", a.Flags&unix.IFA_F_TENTATIVE != 0, " broadcast ", a.Broadcast))
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteList(have, family)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range routes {
				if r.Gw != nil {
					got = append(got, fmt.Sprint("route ", r.Dst, " via ", r.Gw))
				}
			}
		}
		want := []string{
			"mtu 1420 up true",
			"address 172.30.0.2/24 tentative false broadcast 172.30.0.255",
			"address fd00::2/64 tentative false broadcast <nil>",
			"route 0.0.0.0/0 via 172.30.0.1",
			"route ::/0 via fd00::1",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	bad := sampleNetwork()
	bad.Routes = []boot.Route{{To: netip.MustParsePrefix("10.0.0.0/8"), Via: netip.MustParseAddr("192.0.2.1")}}
	if err := configure("eth0", bad); err == nil || !strings.Contains(err.Error(), "192.0.2.1") {
		t.Errorf("a gateway that cannot be reached: %v", err)
	}
}

func TestFindInterface(t *testing.T) {
	class := t.TempDir()
	put(t, filepath.Join(class, "lo", "address"), "00:00:00:00:00:00\n")
	put(t, filepath.Join(class, "eth0", "address"), "02:00:00:00:00:01\n")
	for mac, want := range map[string]string{"02:00:00:00:00:01": "eth0", "02:00:00:00:00:02": ""} {
		if got, err := findInterface(class, mac); got != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", mac, got, err, want)
		}
	}
}

func TestNetworkFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("files are written as root's")
	}
	for _, c := range []struct {
		name  string
		files map[string]string
		links map[string]string
		want  map[string]string
		gone  []string
	}{
		{"a link of systemd-resolved is replaced, not followed", map[string]string{"run/systemd/resolve/stub-resolv.conf": "kept"},
			map[string]string{"etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf"},
			map[string]string{"etc/resolv.conf": "# Written by banger at every start.\nnameserver 172.30.0.1\nnameserver fd00::1\nsearch vm\n", "run/systemd/resolve/stub-resolv.conf": "kept"},
			[]string{"etc/cloud", "etc/dhcpcd.conf"}},
		{"cloud-init", map[string]string{"etc/cloud/cloud.cfg.d/05_logging.cfg": ""}, nil,
			map[string]string{"etc/cloud/cloud.cfg.d/99-banger-network.cfg": "network: {config: disabled}\n"}, nil},
		{"dhcpcd", map[string]string{"etc/dhcpcd.conf": "hostname"}, nil,
			map[string]string{"etc/dhcpcd.conf": "hostname\ndenyinterfaces eth0\n"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for p, content := range c.files {
				put(t, filepath.Join(dir, p), content)
			}
			if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			for p, to := range c.links {
				if err := os.Symlink(to, filepath.Join(dir, p)); err != nil {
					t.Fatal(err)
				}
			}
			root, err := openRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.f.Close()
			b := &booter{rootFS: root}
			for range 2 { // the second boot finds what the first left
				if err := b.networkFiles("eth0", sampleNetwork()); err != nil {
					t.Fatal(err)
				}
			}
			for p, want := range c.want {
				if got, err := os.ReadFile(filepath.Join(dir, p)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v; want %q", p, got, err, want)
				}
			}
			for _, p := range c.gone {
				if _, err := os.Lstat(filepath.Join(dir, p)); err == nil {
					t.Errorf("%s was made", p)
				}
			}
		})
	}
}

func TestLeaveAlone(t *testing.T) {
	run := t.TempDir()
	if err := leaveAlone(run, "eth0", "02:00:00:00:00:01"); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range []string{"systemd/network/00-banger.network", "NetworkManager/conf.d/00-banger.conf", "network/ifstate"} {
		content, err := os.ReadFile(filepath.Join(run, p))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.Split(string(content), "\n")...)
	}
	for _, want := range []string{"MACAddress=02:00:00:00:00:01", "Unmanaged=yes", "match-device=mac:02:00:00:00:00:01", "managed=0", "eth0=eth0"} {
		if !slices.Contains(got, want) {
			t.Errorf("no line %q in %q", want, got)
		}
	}
	// systemd.service(5): an empty ExecStart= takes away what the unit says itself, without which a second one of a unit that is not
	// oneshot is refused, and one of a oneshot unit is run after the wait.
	dropIn, err := os.ReadFile(filepath.Join(run, "systemd/system/systemd-networkd-wait-online.service.d/banger.conf"))
	if err != nil || !strings.HasSuffix(string(dropIn), "\n[Service]\nExecStart=\nExecStart=/bin/true\n") {
		t.Errorf("systemd would wait for the network: %q, %v", dropIn, err)
	}
}

// TestAddTunnel makes the interface of a machine without a network device, which then is configured like any other.
func TestAddTunnel(t *testing.T) {
	runtime.LockOSThread() // as above
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("needs to make a network namespace: ", err)
	}
	if !tap.Present() {
		t.Skip("this kernel has no TAP devices")
	}
	n := sampleNetwork()
	if err := addTunnel(n.MAC); err != nil {
		t.Fatal(err)
	}
	if err := configure(tunnelInterface, n); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	a := link.Attrs()
	if a.HardwareAddr.String() != n.MAC || a.MTU != n.MTU || a.Flags&net.FlagUp == 0 || a.EncapType != "ether" {
		t.Errorf("%+v", a)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} { // there is no carrier yet, and routes hold all the same
		routes, err := netlink.RouteList(link, family)
		if err != nil || !slices.ContainsFunc(routes, func(r netlink.Route) bool {
			return r.Gw != nil && (r.Dst == nil || r.Dst.String() == "0.0.0.0/0" || r.Dst.String() == "::/0")
		}) {
			t.Errorf("family %d: routes %v, %v", family, routes, err)
		}
	}
	dev, err := tap.Open("eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := addTunnel(n.MAC); err == nil {
		t.Error("one that somebody has is made again")
	}
}
