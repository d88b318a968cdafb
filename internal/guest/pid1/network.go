package pid1

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
	"git.thaloco.com/thaloco/banger/internal/guest/system"
	"git.thaloco.com/thaloco/banger/internal/guest/tap"
)

// interfaceTime bounds the wait for the interface, whose driver is loaded long before.
const interfaceTime = 10 * time.Second

// netClass is where sysfs lists network interfaces.
const netClass = "/sys/class/net"

// network configures the interface and keeps the image's network managers off it. A guest whose
// interface does not come is no use to anyone who asked for one: the boot fails.
func (b *booter) network() error {
	n := b.cfg.Network
	if n == nil {
		return nil
	}
	if n.Tunnel != 0 {
		if err := b.makeTunnel(n); err != nil {
			return err
		}
	}
	name, err := waitInterface(n.MAC)
	if err != nil {
		return errors.Join(err, b.moduleErr)
	}
	// Before the interface is up: there is no router that advertises, and whoever says that he is one lies.
	if err := acceptNoRouter(name); err != nil {
		return err
	}
	if err := configure(name, n); err != nil {
		return err
	}
	if err := leaveAlone("/run", name, n.MAC); err != nil {
		return err
	}
	return b.networkFiles(name, n)
}

// tunnelInterface is what a network interface is called that the machine has no device for: as the kernel calls
// one that it has (net.ifnames=0).
const tunnelInterface = "eth0"

// makeTunnel makes the interface whose frames the agent will carry. Until it does, the interface is one whose cable is not
// plugged in.
func (b *booter) makeTunnel(n *boot.Network) error {
	if err := b.loadTAP(); err != nil {
		return fmt.Errorf("the kernel has no TAP devices, by which this machine has a network: %w", err)
	}
	if err := addTunnel(n.MAC); err != nil {
		return fmt.Errorf("make the network interface %s: %w", tunnelInterface, err)
	}
	b.state.Tunnel = &system.Tunnel{Interface: tunnelInterface, Port: n.Tunnel}
	return nil
}

// addTunnel makes the TAP device.
func addTunnel(mac string) error {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	if err := tap.Make(tunnelInterface); err != nil {
		return err
	}
	c, err := dialRoute()
	if err != nil {
		return err
	}
	defer c.close()
	index, err := interfaceIndex(tunnelInterface)
	if err != nil {
		return err
	}
	return c.setHardware(index, hw)
}

// loadTAP brings the kernel's TAP devices. The initrd of a VM from before it carried the module does not have it: the root's own
// tools find it among the kernel's modules then.
func (b *booter) loadTAP() error {
	err := loadModule(filepath.Join(moduleDir, tapModule+".ko"))
	if tap.Present() { // also where it is built in
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), interfaceTime)
	defer cancel()
	modprobe := exec.CommandContext(ctx, "/sbin/modprobe", tapModule)
	modprobe.Dir, modprobe.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: newRoot}
	said, failed := modprobe.CombinedOutput()
	if tap.Present() {
		return nil
	}
	if failed != nil {
		failed = fmt.Errorf("modprobe: %w %s", failed, strings.TrimSpace(string(said)))
	}
	return errors.Join(err, failed)
}

// waitInterface returns the name of the interface with this hardware address, once it is there.
func waitInterface(mac string) (name string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), interfaceTime)
	defer cancel()
	err = system.WaitDevice(ctx, "network interface "+mac, func() (bool, error) {
		name, err = findInterface(netClass, mac)
		return name != "", err
	})
	return name, err
}

func findInterface(class, mac string) (string, error) {
	files, err := filepath.Glob(filepath.Join(class, "*", "address"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if have, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(have)) == mac {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", nil
}

func acceptNoRouter(name string) error {
	for _, setting := range []string{"accept_ra", "autoconf"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/"+setting, []byte("0"), 0o644)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	return nil
}

// configure gives the interface what n says, over rtnetlink(7).
func configure(name string, n *boot.Network) error {
	c, err := dialRoute()
	if err != nil {
		return err
	}
	defer c.close()
	index, err := interfaceIndex(name)
	if err != nil {
		return err
	}
	if err := c.up(index, n.MTU); err != nil {
		return fmt.Errorf("bring %s up with an MTU of %d: %w", name, n.MTU, err)
	}
	for _, a := range n.Addresses {
		// A kernel without IPv6 is no failure of the boot.
		if err := c.addAddress(index, a); err != nil && (a.Addr().Is4() || !withoutIPv6(err)) {
			return fmt.Errorf("give %s the address %s: %w", name, a, err)
		}
	}
	for _, r := range n.Routes {
		if err := c.addRoute(index, r.To, r.Via); err != nil && (r.To.Addr().Is4() || !withoutIPv6(err)) {
			return fmt.Errorf("route to %s by %s: %w", r.To, r.Via, err)
		}
	}
	return nil
}

// withoutIPv6: EOPNOTSUPP of a kernel built without, EACCES and EINVAL of one with it disabled.
func withoutIPv6(err error) bool {
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EINVAL) {
		return false
	}
	_, missing := os.Stat("/proc/net/if_inet6")
	off, readErr := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return missing != nil || readErr == nil && strings.TrimSpace(string(off)) == "1"
}

// leaveAlone keeps the network managers of images from undoing the interface's configuration, by files
// that they read for one boot. run is /run, which the new root gets later.
func leaveAlone(run, name, mac string) error {
	by := "# Written by banger at every start: the host has configured " + name + ".\n"
	for _, f := range []struct{ path, content string }{
		// systemd.network(5): of all files the first in the alphabet that matches is taken.
		{"systemd/network/00-banger.network", by + "[Match]\nMACAddress=" + mac + "\n\n[Link]\nUnmanaged=yes\n"},
		// An image whose only interface is unmanaged would wait for it in vain, for two minutes.
		{"systemd/system/systemd-networkd-wait-online.service.d/banger.conf", by + "[Service]\nExecStart=\nExecStart=/bin/true\n"},
		// NetworkManager.conf(5).
		{"NetworkManager/conf.d/00-banger.conf", by + "[main]\ndns=none\n\n[device-banger]\nmatch-device=mac:" + mac + "\nmanaged=0\n"},
		// What ifup(8) of ifupdown has brought up already.
		{"network/ifstate", "lo=lo\n" + name + "=" + name + "\n"},
	} {
		p := filepath.Join(run, f.path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, []byte(f.content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// networkFiles writes what has to lie in the root itself.
func (b *booter) networkFiles(name string, n *boot.Network) error {
	// cloud-init writes configuration for one of the others.
	const cloud = "/etc/cloud/cloud.cfg.d"
	at, err := b.rootFS.open(cloud, unix.O_PATH|unix.O_DIRECTORY, 0)
	switch {
	case err == nil:
		err = errors.Join(at.Close(), b.rootFS.write(cloud+"/99-banger-network.cfg", []byte("network: {config: disabled}\n"), 0o644, 0, 0))
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		err = nil
	}
	if err := errors.Join(err, b.denyDHCPCD(name)); err != nil {
		return err
	}
	if len(n.DNS) == 0 {
		return nil
	}
	return b.rootFS.write("/etc/resolv.conf", []byte(resolvConf(n)), 0o644, 0, 0)
}

// denyDHCPCD adds the interface to those that dhcpcd, which Void and Raspberry Pi OS start for all, leaves
// alone. It has no directory for more configuration, so its file is edited, once.
func (b *booter) denyDHCPCD(name string) error {
	const path = "/etc/dhcpcd.conf"
	have, err := b.rootFS.read(path)
	if err != nil || have == nil {
		return err
	}
	line := "denyinterfaces " + name + "\n"
	if strings.Contains("\n"+string(have), "\n"+line) {
		return nil
	}
	text := strings.TrimSuffix(string(have), "\n") + "\n" + line
	return b.rootFS.write(path, []byte(strings.TrimPrefix(text, "\n")), 0o644, 0, 0)
}

// resolvConf renders resolv.conf(5).
func resolvConf(n *boot.Network) string {
	var s strings.Builder
	s.WriteString("# Written by banger at every start.\n")
	for _, a := range n.DNS {
		s.WriteString("nameserver " + a.String() + "\n")
	}
	if len(n.Search) > 0 {
		s.WriteString("search " + strings.Join(n.Search, " ") + "\n")
	}
	return s.String()
}

// family is the address family of a, and its bytes.
func family(a netip.Addr) (uint8, []byte) {
	if a.Is4() {
		return unix.AF_INET, a.AsSlice()
	}
	return unix.AF_INET6, a.AsSlice()
}
